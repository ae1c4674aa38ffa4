"""Tensors of a file -> weights of a network, strictly: every name and shape must be as expected."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from spin.checkpoint.configs import V_MARKER, ZERO_SNR_MARKER
from spin.checkpoint.names import NameMap, fuse, unfuse
from spin.infra.errors import InputError
from spin.infra.files import refuse_lfs_pointer

# how the files begin that are taken for weights by mistake -> what they are
OTHER_FILES = {
    b"<": "a web page or a server's error message, not weights; download the file again",
    b"GGUF": "a GGUF file, whose quantized weights cannot be used",
}


class Unused:
    """Stand-in for what a training checkpoint holds besides tensors, none of which is used."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def make_dict(*args) -> dict:
    """Return an empty dictionary in place of a defaultdict, whose items are then put into it."""
    return {}


# What a pickle may refer to, besides tensors and Python's own types. In place of each, an Unused is
# made: nothing of these packages runs.
UNUSED_GLOBALS = (
    # keys of a dictionary of callbacks in published checkpoints
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    # numbers and arrays of numpy, such as a step or a learning rate; numpy 1 and 2 differ in names
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    # types themselves, as settings or as a defaultdict's default
    "builtins.bool",
    "builtins.dict",
    "builtins.float",
    "builtins.int",
    "builtins.list",
    "builtins.str",
    "builtins.tuple",
    "numpy.bool_",
    "numpy.bool",
    "numpy.float16",
    "numpy.float32",
    "numpy.float64",
    "numpy.int32",
    "numpy.int64",
    # settings of a training
    "argparse.Namespace",
    "types.SimpleNamespace",
    # when and where it ran; Python 3.13 keeps paths in another module
    "datetime.date",
    "datetime.datetime",
    "datetime.time",
    "datetime.timedelta",
    "datetime.timezone",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.PureWindowsPath",
    "pathlib.WindowsPath",
    "pathlib._local.Path",
    "pathlib._local.PosixPath",
    "pathlib._local.PurePosixPath",
    "pathlib._local.PureWindowsPath",
    "pathlib._local.WindowsPath",
)
# dictionaries of other types, which are read as plain ones
DICTIONARIES = (
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)


# ---- Reading -------------------------------------------------------------------------------------
def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return every tensor of a safetensors file or of a pickle, by name.

    Its first bytes show which of the two a file is, and not its name. Tensors stay on disk until
    they are used, where the format allows it. No pickle can run code.
    Raises InputError if the file is damaged or holds something else.
    """
    beginning = read_beginning(path)
    if beginning[8:9] == b"{":  # JSON, after 8 bytes with its length
        return read_safetensors(path)
    if beginning.startswith((b"PK", b"\x80")):  # torch.save's zip archive, or a bare pickle
        if path.suffix == ".safetensors":  # torch.load would believe the name
            message = "a pickle, not a safetensors file; rename it to .ckpt or .bin"
            raise InputError(f"{path}: {message}")
        return read_pickle(path)

    refuse_lfs_pointer(path)
    for start, content in OTHER_FILES.items():
        if beginning.startswith(start):
            raise InputError(f"{path}: {content}")
    reason = "truncated" if beginning else "empty"
    raise InputError(f"{path}: {reason}, or not a safetensors file or a pickle; not loaded")


def read_beginning(path: Path) -> bytes:
    """Return the first 16 bytes of a file. Raises InputError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(16)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: truncated, or not a safetensors file ({error})") from None


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file that torch.save wrote: a state dict, or one in "state_dict".

    Raises InputError if the file is damaged, or refers to anything but tensors and UNUSED_GLOBALS.
    """
    allowed = [(Unused, name) for name in UNUSED_GLOBALS]
    allowed += [(dict, name) for name in DICTIONARIES]
    allowed.append((make_dict, "collections.defaultdict"))
    try:
        with torch.serialization.safe_globals(allowed):
            mmap = is_zipfile(path)  # the older format cannot be left on disk
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        state = content.get("state_dict", content)
        state = state.get("state_dict", state)  # saved by a program that had loaded such a file
    except Exception as error:  # a pickle can fail in any way
        reason = describe_pickle_error(str(error))
        message = f"{path}: {reason}; not loaded. Use a .safetensors file instead"
        raise InputError(message) from None

    tensors = {}
    for name, value in state.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            tensors[name] = value
    # These may also stand beside the state dict, or be no tensors. Their names are what counts.
    for marker in (V_MARKER, ZERO_SNR_MARKER):
        value = state.get(marker, content.get(marker))
        if value is not None and value is not False:
            tensors[marker] = torch.empty(0)
    return tensors


def describe_pickle_error(message: str) -> str:
    """Return what torch.load's message says about a file, in a few words."""
    refused = re.search(r"GLOBAL (\S+)", message)
    if refused:
        return f"holds more than tensors ({refused[1]})"
    if "weights_only" in message.lower():
        return "holds more than tensors"
    return "truncated, or not a checkpoint"


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

    Raises InputError if names or shapes differ from the network's, or if a number is not finite.
    """
    expected = network.state_dict()
    if names is not None:
        expected = unfuse(expected, names)
    compare_tensors(tensors, expected, where)

    weights = {}
    for name, tensor in tensors.items():
        weights[name] = convert(tensor, dtype, device, f"{where}: {name}")
    if names is not None:
        weights = fuse(weights, names)
    network.load_state_dict(weights, assign=True)
    return network.eval()


def convert(tensor: Tensor, dtype: torch.dtype, device: str, label: str) -> Tensor:
    """Return a copy of a weight with this dtype, on this device.

    label: names the tensor in messages

    Raises InputError if the weight is quantized or not finite. One NaN turns every image black.
    """
    if not tensor.is_floating_point():
        raise InputError(f"{label} is {tensor.dtype}: quantized weights cannot be used")
    weight = tensor.to(device, dtype, copy=True)
    if is_finite(weight):
        return weight
    if is_finite(tensor.to(torch.float64)):
        raise InputError(f"{label} is too large for {dtype}; use another type of weights")
    raise InputError(f"{label} holds NaN or infinity: the checkpoint is damaged")


def is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers of a tensor are finite."""
    # both ends are NaN if any number is; isfinite on all numbers takes thirty times as long
    ends = torch.stack(tensor.aminmax())
    return bool(ends.isfinite().all())


def compare_tensors(stored: dict[str, Tensor], expected: dict[str, Tensor], where: Path) -> None:
    """Raise InputError unless names and shapes are the same.

    The message holds at most five names of each kind of difference.
    """
    missing = sorted(expected.keys() - stored.keys())
    unexpected = sorted(stored.keys() - expected.keys())
    misshapen = []
    for name in sorted(stored.keys() & expected.keys()):
        shape = list(stored[name].shape)
        expected_shape = list(expected[name].shape)
        if shape != expected_shape:
            misshapen.append(f"{name} is {shape}, not {expected_shape}")

    differences = []
    if missing:
        differences.append(f"{len(missing)} missing ({first_five(missing)})")
    if unexpected:
        differences.append(f"{len(unexpected)} unexpected ({first_five(unexpected)})")
    if misshapen:
        differences.append(f"{len(misshapen)} of another shape ({first_five(misshapen)})")
    if differences:
        listed = "; ".join(differences)
        raise InputError(f"{where}: its tensors do not match its config: {listed}")


def first_five(items: list[str]) -> str:
    """Return the first five items in one line, with dots if there are more."""
    if len(items) > 5:
        return ", ".join(items[:5]) + ", ..."
    return ", ".join(items)
