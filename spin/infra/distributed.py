"""The processes ("ranks") that torchrun starts. They share the work, and rank 0 writes the files.

With one process there is nothing to wait for, and nothing to sum.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from spin.infra.devices import is_cuda
from spin.infra.errors import first_sentence

# MASTER_ADDR and RANK prove nothing: some clusters set them for every job. torchrun sets this one.
LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1

# Rank 0 samples and scores alone while the others wait, which takes hours with real models.
TIMEOUT = timedelta(days=1)


def is_main() -> bool:
    """Return whether this process is the one that writes files and messages."""
    return RANK == 0


def print0(line: str) -> None:
    """Print a line on rank 0, above any progress bar."""
    if is_main():
        tqdm.write(line)


def progress_bar(**kwargs) -> tqdm:
    """Return a progress bar that only rank 0 shows. Takes tqdm's keyword arguments."""
    if not is_main():
        kwargs["disable"] = True
    return tqdm(**kwargs)


def local_device(device: str) -> str:
    """Return this rank's own GPU if there are several ranks and `device` is one of CUDA's.

    Otherwise return `device` itself.
    """
    if WORLD_SIZE > 1 and is_cuda(device):
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the other ranks for the `with` block. device: this rank's own, see `local_device`.

    Raises ConnectionError if another rank ends before the block does.
    """
    if WORLD_SIZE == 1:
        yield
        return
    if is_cuda(device):
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=torch.device(device))
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "gloo" not in str(error) and "NCCL" not in str(error):
            raise
        raise ConnectionError(
            f"rank {RANK} of {WORLD_SIZE}: another rank has exited; "
            f"the same command resumes from the last saved state ({first_sentence(error)})"
        ) from None
    dist.destroy_process_group()


def barrier() -> None:
    """Block until all ranks arrive."""
    if WORLD_SIZE > 1:
        dist.barrier()


def any_rank(flag: bool, device: str) -> bool:
    """Return whether `flag` is true on any rank. device: this rank's own."""
    if WORLD_SIZE == 1:
        return flag
    count = torch.tensor(float(flag), device=device)
    dist.all_reduce(count)
    return count.item() > 0


class GradientReducer:
    """Sums a network's gradients and a few numbers over all ranks, in one all-reduce a step.

    From the first step on, the gradients are views of one flat buffer, so that there is no second
    copy of them. Parameters without a gradient after the first step stay out of the buffer. They
    are the same on all ranks, which run the same graph, and all optimizers skip them.
    With one process nothing is summed, and there is no buffer.
    """

    def __init__(self, network: nn.Module):
        self.network = network
        self.buffer: Tensor | None = None

    def all_reduce(self, numbers: Tensor) -> Tensor:
        """Sum the gradients over all ranks, in place, and return the sums of `numbers` [N].

        numbers: float32, on the network's device, N the same at every step.
        """
        if WORLD_SIZE == 1:
            return numbers
        if self.buffer is None:
            self.buffer = flatten_gradients(self.network, spare=len(numbers))
        sums = self.buffer[-len(numbers) :]
        sums.copy_(numbers)
        dist.all_reduce(self.buffer)
        return sums

    def zero(self) -> None:
        """Forget the gradients, to begin the next step."""
        if self.buffer is None:
            self.network.zero_grad(set_to_none=True)
        else:
            self.buffer.zero_()


def flatten_gradients(network: nn.Module, spare: int) -> Tensor:
    """Move all gradients into one buffer, of which they become views, and return the buffer.

    spare: how many elements to leave free at its end.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.grad is not None]
    size = sum(parameter.numel() for parameter in parameters)
    buffer = parameters[0].new_zeros(size + spare)
    start = 0
    for parameter in parameters:
        end = start + parameter.numel()
        view = buffer[start:end].view_as(parameter)
        view.copy_(parameter.grad)
        parameter.grad = view
        start = end
    return buffer


def check_same_weights(network: nn.Module) -> None:
    """Raise RuntimeError unless the network's weights are the same on all ranks, to the bit."""
    if WORLD_SIZE == 1:
        return
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    hashes: list[str | None] = [None] * WORLD_SIZE
    dist.all_gather_object(hashes, digest.hexdigest())
    if len(set(hashes)) > 1:
        raise RuntimeError(f"the ranks begin with different weights: {hashes}")
