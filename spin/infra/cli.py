"""What the scripts' command lines share: argument types, exit statuses, provenance."""

import math
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import torch

from spin.infra import distributed
from spin.infra.errors import InputError, first_sentence
from spin.infra.interrupt import Interrupted, raise_on_stop_signals


def run_script(
    name: str,
    main: Callable[[], object],
    advice: str,
    memory_advice: str = "it needs a GPU with more memory",
) -> int:
    """Run a script's main and return its exit status.

    0: success. 2: an error that the user can fix, described in one line on stderr; if a GPU's
    memory was too small, the line ends with `memory_advice`. 130: it was interrupted; the line is
    the Interrupted exception's message, or else `advice`.
    """
    raise_on_stop_signals()
    try:
        main()
        return 0
    except Interrupted as interruption:
        status = 130
        message = f"\n{name}: stopped; {interruption or advice}"
    except KeyboardInterrupt:
        status = 130
        message = f"\n{name}: stopped; {advice}"
    except torch.OutOfMemoryError as error:
        status = 2
        message = f"{name}: error: {first_sentence(error)}; {memory_advice}"
    except (InputError, OSError) as error:
        status = 2
        message = f"{name}: error: {str(error).splitlines()[0]}"
    # Written outside the except blocks, once the exception's frames and their progress bars are
    # gone. Another rank's bar may still be on the line.
    if distributed.WORLD_SIZE > 1:
        message = "\n" + message
    sys.stderr.write(message + "\n")
    return status


def number(kind: type, low: float, high: float = math.inf):
    """Return a type for argparse: a finite int or float from `low` to `high`.

    argparse puts the type's name into its message: invalid int >= 1 value: '0'.
    """

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise ValueError
        return value

    parse.__name__ = f"{kind.__name__} >= {low}"
    if high != math.inf:
        parse.__name__ += f" and <= {high}"
    return parse


def utf8_text(text: str) -> str:
    """Return `text`. A type for argparse, which refuses arguments that are not UTF-8."""
    text.encode()  # fails for lone surrogates, which stand for bytes that are not UTF-8
    return text


utf8_text.__name__ = "UTF-8 text"  # which argparse puts into its message


def flag_name(setting: str) -> str:
    """Return the flag of a setting: --batch-size for batch_size."""
    return "--" + setting.replace("_", "-")


#: argparse's type of a --seed: torch and NumPy both take it, and there is room to count up
SEED_TYPE = number(int, 0, 2**62)


def warn_of_cut_prompts(tokenizer, prompts: Iterable[str]) -> None:
    """Say on stderr how many prompts are too long for the tokenizer, if any are."""
    if not distributed.is_main():
        return
    cut = tokenizer.count_cut(prompts)
    if cut > 0:
        noun = "1 prompt has" if cut == 1 else f"{cut} prompts have"
        sys.stderr.write(
            f"note: {noun} more than {tokenizer.length} tokens; the model reads the first ones\n"
        )


def provenance() -> dict:
    """Return what a result depends on besides its flags: the git commit and the versions.

    The commit ends in "-dirty" if files have local changes.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = Path(__file__).parent
    try:
        commit = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # git is not installed
        commit = ""
    versions = {"python": sys.version.split()[0]}
    for package in ("torch", "numpy", "safetensors", "pillow", "open-clip-torch"):
        versions[package] = version(package)
    return {"commit": commit or "unknown: not a git clone", "versions": versions}
