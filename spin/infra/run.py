"""A run folder on disk: files that appear whole or not at all, one process at a time, a log, refusals in one line."""

import fcntl
import hashlib
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line that names it and says what to do."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` at which to make a file, or a folder that is not there yet; moves it into place if
    the block succeeds, until when `path` holds what it held before. InputError where the disk refuses."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(part)  # what a killed process left
        yield part
        if part.is_file():
            os.umask(mask := os.umask(0))  # it can only be read by setting it
            part.chmod(0o666 & ~mask)  # safetensors keeps its files to their owner
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written ({getattr(error, 'strerror', '') or error})") from error
    finally:
        remove(part)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    with whole(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n")


def hash_files(paths: Iterable[Path], more: Iterable[str] = ()) -> str:
    """16 hexadecimal digits of SHA-256 over the files' names and contents, and over strings."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    for text in more:
        digest.update(text.encode())
    return digest.hexdigest()[:16]


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as text ({error})") from None


def read_json(path: Path) -> dict:
    """Raises InputError where the file is missing or is no JSON object."""
    try:
        value = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}, not a JSON object")
    return value


def script(name: str, main: Callable[[], object], stopped: str = "what is finished is kept") -> int:
    """Runs a script's main; the exit status. What the user can mend is answered on one line of stderr, status 2."""
    try:
        main()
        return 0
    except KeyboardInterrupt:
        status, message = 130, f"\n{name}: stopped; {stopped}"
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        status, message = 2, f"{name}: error: {str(error).splitlines()[0]}"
    # after the exception has gone, and with it the progress bars of its frames; other ranks' may still be there
    sys.stderr.write("\n" * ("RANK" in os.environ) + f"{message}\n")
    return status


def number(kind: type, low: float, high: float = math.inf):
    """A type for argparse: a finite int or float. What argparse says of others: invalid int from 1 on value: '0'."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise ValueError
        return value

    parse.__name__ = f"{kind.__name__} from {low} {'on' if high == math.inf else f'to {high}'}"
    return parse


SEED = number(int, 0, 2**62)


def usable(device: str) -> str:
    """The device's name if torch can compute there; InputError otherwise."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: cannot be used here ({str(error).splitlines()[0]})") from None
    return device


def provenance() -> dict:
    """What a result depends on beside its flags: the git commit, "-dirty" with local changes, and the versions."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # no git on this machine
        commit = ""
    packages = ("torch", "numpy", "safetensors", "pillow", "open-clip-torch")
    versions = {"python": sys.version.split()[0]} | {name: version(name) for name in packages}
    return {"commit": commit or "unknown: not a git clone", "versions": versions}


class Run:
    """The folder runs/<name>. Take `with Run(folder).lock():` before writing."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def place(self, model: str) -> Path:
        """The folder of a model: iter2/ of "spin-2", the second player of self-play; sft/, dpo/ of the baselines."""
        return self.folder / model.replace("spin-", "iter")

    def checkpoint(self, model: str) -> Path:
        return self.place(model) / "checkpoint"

    def promoted(self) -> int:
        """The last self-play iteration whose checkpoint is there; 0 for none. Earlier ones may have been deleted."""
        there = [path.parent.name.removeprefix("iter") for path in self.folder.glob("iter*/checkpoint")]
        return max((int(name) for name in there if name.isdecimal()), default=0)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held for the block; the system drops it when the process ends, however it ends. InputError if it is held."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(self.folder / "lock", "w")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.folder}: another process works here; wait, or choose another --out") from None
        except OSError as error:
            raise InputError(f"{self.folder}: cannot write there ({error.strerror})") from None
        with file:
            yield

    def settle(self, config: dict, same: Iterable[str], write: bool = True) -> None:
        """Writes config.json; InputError if the run was begun with another value of one of the keys in `same`."""
        path = self.folder / "config.json"
        before = read_json(path) if path.exists() else config
        changed = [f"{key} {before.get(key)!r}, now {config[key]!r}" for key in same if before.get(key) != config[key]]
        if changed:
            raise InputError(f"{self.folder}: this run was begun with {'; '.join(changed)}. Choose another --out")
        if write:
            write_json(path, config)

    def log(self, line: dict) -> None:
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def read_log(self) -> list[dict]:
        """Every whole line of log.jsonl; a last line that a kill cut short is left out."""
        path = self.folder / "log.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        try:
            return [json.loads(line) for line in lines]
        except ValueError:
            raise InputError(f"{path}: holds a line that is not JSON; remove that line") from None

    def rewind_log(self, model: str, steps: int) -> None:
        """Forgets what was logged of a model after its first `steps` steps: training goes on from there."""
        log = self.read_log()
        kept = [row for row in log if row["model"] != model] + [row for row in log if row["model"] == model][:steps]
        with whole(self.folder / "log.jsonl") as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def save_state(self, model: str, state: dict) -> None:
        """What resuming a model's training needs, tensors and numbers, in the place of what was saved before."""
        with whole(self.place(model) / "state" / "state.pt") as part:
            try:
                torch.save(state, part)
            except RuntimeError as error:  # so torch calls it when the disk is full
                raise OSError(f"is there room? torch says: {error}") from None

    def load_state(self, model: str) -> dict:
        """What `save_state` last wrote for a model, on the CPU; {} if nothing. InputError if it is damaged."""
        path = self.place(model) / "state" / "state.pt"
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True) if path.exists() else {}
        except (pickle.UnpicklingError, RuntimeError, EOFError):
            raise InputError(f"{path}: damaged; delete it, and this model's training begins anew") from None

    def steps_saved(self, model: str) -> int:
        state = self.load_state(model)
        return state["step"] if "policy" in state else 0  # weights gone into a checkpoint: without it, all again

    def summary(self) -> list[dict]:
        """Per model of the log: its steps, seconds and first loss, and means over the last tenth of its steps."""
        rows, log = [], self.read_log()
        names = ("loss", "margin", "implicit_accuracy", "delta_data", "delta_gen", "grad_norm")  # SFT has two of them
        for model in dict.fromkeys(line["model"] for line in log):
            lines = [line for line in log if line["model"] == model]
            row = {"model": model, "steps": len(lines), "seconds": sum(line["seconds"] for line in lines)}
            last = lines[-math.ceil(len(lines) / 10) :]
            means = {name: sum(line[name] for line in last) / len(last) for name in names if name in last[0]}
            rows.append(row | {"first_loss": lines[0]["loss"]} | means)
        return rows
