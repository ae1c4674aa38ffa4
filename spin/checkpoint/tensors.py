"""Tensors of a file -> weights of a network, strictly: every name and shape must be as expected."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from spin.checkpoint.names import NameMap, fuse, unfuse
from spin.infra.errors import InputError

PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")


class UnusedCallback:
    """Stand-in for the only class that published training checkpoints refer to.

    The class is a key in a dictionary that is not used.
    """


# classes that a pickle may refer to, besides torch's own types
SAFE_GLOBALS = [
    (UnusedCallback, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
]


# ---- Reading -------------------------------------------------------------------------------------
def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return every tensor of a .safetensors file or of a pickle, by name.

    They stay on disk until they are used, where the format allows it. No pickle can run code.
    Raises InputError if the file is damaged or holds something else.
    """
    if path.suffix in PICKLE_SUFFIXES:
        return read_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: truncated, or not a safetensors file ({error})") from None


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file that torch.save wrote: a state dict, or one in "state_dict"."""
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            mmap = is_zipfile(path)  # the older format cannot be left on disk
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        state = dict(content.get("state_dict", content))
    except Exception as error:  # a pickle can fail in any way
        if "weights_only" in str(error).lower():
            reason = "holds more than tensors"
        else:
            reason = "truncated, or not a checkpoint"
        message = f"{path}: {reason}; not loaded. Use a .safetensors file instead"
        raise InputError(message) from None

    tensors = {}
    for name, value in state.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            tensors[name] = value
    return tensors


# ---- Networks ------------------------------------------------------------------------------------
@contextmanager
def config_errors(where: Path) -> Iterator[None]:
    """Turn what a constructor raises about an unusable config into an InputError.

    where: the file or folder to name in the message
    """
    try:
        yield
    except KeyError as error:
        raise InputError(f"{where}: its config lacks {error}") from None
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        IndexError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reason = str(error) or type(error).__name__
        first_line = reason.splitlines()[0]
        raise InputError(f"{where}: its config is not usable: {first_line}") from None


def fill(
    network: nn.Module,
    tensors: dict[str, Tensor],
    where: Path,
    dtype: torch.dtype,
    device: str,
    names: NameMap | None = None,
) -> nn.Module:
    """Give a network that was built on the meta device its weights, and return it in eval mode.

    Each weight is converted into memory of its own.

    tensors: a checkpoint's
    where:   where they come from, for messages
    names:   what the tensors are called, if not as in `network`

    Raises InputError if names or shapes differ from the network's.
    """
    expected = network.state_dict()
    if names is None:
        compare_tensors(tensors, expected, where)
        state = tensors
    else:
        compare_tensors(tensors, unfuse(expected, names), where)
        state = fuse(tensors, names)

    weights = {}
    for name, tensor in state.items():
        weights[name] = tensor.to(device, dtype, copy=True)
    network.load_state_dict(weights, assign=True)
    return network.eval()


def compare_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], where: Path) -> None:
    """Raise InputError unless names and shapes are the same.

    The message holds at most five names of each kind of difference.
    """
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    reshaped = []
    for name in sorted(found.keys() & expected.keys()):
        shape = list(found[name].shape)
        expected_shape = list(expected[name].shape)
        if shape != expected_shape:
            reshaped.append(f"{name} is {shape}, not {expected_shape}")

    differences = []
    if missing:
        differences.append(f"{len(missing)} missing ({first_five(missing)})")
    if unexpected:
        differences.append(f"{len(unexpected)} unexpected ({first_five(unexpected)})")
    if reshaped:
        differences.append(f"{len(reshaped)} of another shape ({first_five(reshaped)})")
    if differences:
        listed = "; ".join(differences)
        raise InputError(f"{where}: its tensors do not match its config: {listed}")


def first_five(items: list[str]) -> str:
    """Return the first five items in one line, with dots if there are more."""
    if len(items) > 5:
        return ", ".join(items[:5]) + ", ..."
    return ", ".join(items)
