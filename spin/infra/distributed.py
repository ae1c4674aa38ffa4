"""The ranks that torchrun starts share the work; rank 0 writes the rest. With one process nothing here does a thing."""

import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

LAUNCHED = "MASTER_ADDR" in os.environ  # by torchrun; some clusters set the two others by themselves
RANK, WORLD = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if LAUNCHED else (0, 1)
# a progress bar, and a line above it, once for all ranks
bar, say = (partial(tqdm, disable=True), lambda line: None) if RANK else (tqdm, tqdm.write)


def own(device: str) -> str:
    """Where `device` is cuda, and there are several ranks, this one's GPU."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if WORLD > 1 and device.startswith("cuda") else device


@contextmanager
def together(device: str) -> Iterator[None]:
    """Joins the other ranks, each with its `own` device, for the block. ConnectionError where one ends too early."""
    if WORLD == 1:
        yield
        return
    if cuda := device.startswith("cuda"):
        torch.cuda.set_device(device)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # torchrun's, to those who are left: as Ctrl-C
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1))  # rank 0 may draw and score for long
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not any(word in str(error) for word in ("gloo", "NCCL")):
            raise
        lost = f"rank {RANK} of {WORLD} has lost another, which ended; the same command goes on from the last state"
        raise ConnectionError(f"{lost} ({str(error).split('. ')[0].splitlines()[0]})") from None
    dist.destroy_process_group()


def wait() -> None:
    """Until every rank has come here."""
    if WORLD > 1:
        dist.barrier()


def total(values: Tensor) -> Tensor:
    """The sum over all ranks."""
    if WORLD > 1:
        dist.all_reduce(values)
    return values


def parallel(network: nn.Module) -> nn.Module:
    """Its backward pass leaves every rank the gradients' mean over the ranks."""
    return DistributedDataParallel(network, gradient_as_bucket_view=True) if WORLD > 1 else network


def alone(network: nn.Module, yes: bool) -> AbstractContextManager:
    """For the block, if `yes`, a backward pass of a `parallel` network adds up gradients of this rank only."""
    return network.no_sync() if WORLD > 1 and yes else nullcontext()
