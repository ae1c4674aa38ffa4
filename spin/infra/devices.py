"""The device that computes: its precision, and copies that do not make it wait."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from spin.infra.errors import InputError


def prepare_device(device: str) -> str:
    """Return `device`. From now on, float32 means float32 on every GPU of this process.

    By default, a GPU's convolutions round float32 inputs to TF32, which has three digits. `tf32`
    allows that where it does no harm.

    Raises InputError if torch cannot compute there.
    """
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device}: cannot be used here ({reason})") from None
    torch.backends.cudnn.allow_tf32 = False
    return device


def repeat_to_the_bit() -> None:
    """From now on, the same computation gives the same bits on a GPU, at some cost in speed.

    Without it, a GPU adds up some gradients in whatever order its threads finish. Call it before
    the GPU's first matrix product.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def is_cuda(device: str | torch.device) -> bool:
    return str(device).startswith("cuda")


def default_dtype(device: str) -> str:
    """Return the name of the dtype to compute in where nothing else says."""
    return "bfloat16" if is_cuda(device) else "float32"


def copy_to_device(tensor: Tensor, device: str | torch.device) -> Tensor:
    """Copy a tensor in the CPU's memory to `device`, without waiting for a GPU.

    Only pinned memory can be read by a GPU on its own. For the CPU, return the tensor itself.
    """
    if is_cuda(device):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@contextmanager
def tf32() -> Iterator[None]:
    """Allow TF32 in a `with` block or a decorated function: faster, with three digits."""
    try:
        before = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set by the newer of torch's two interfaces, which do not mix: left as is
        yield
        return
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
