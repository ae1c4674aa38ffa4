"""A run folder on disk: files that appear whole or not at all, one process at a time, a log, refusals in one line."""

import fcntl
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line that names it and says what to do."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; renames it into place, on the disk for good, if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The same for a folder, which must not exist yet. Files inside are written with `whole_file`."""
    beside = path.with_name(f".{path.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        os.rename(beside, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Makes a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value) -> None:
    with whole_file(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict:
    """Raises InputError where the file is missing or is no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}, not a JSON object")
    return value


def provenance() -> dict:
    """Versions and the git commit ("unknown" outside a clone, "-dirty" with local changes) that a result depends on."""
    packages = ("torch", "numpy", "safetensors", "pillow", "open-clip-torch")
    here = Path(__file__).parent
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], cwd=here, capture_output=True, text=True)
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    return {"commit": git.stdout.strip() or "unknown", "versions": versions}


class Run:
    """The folder runs/<name>. Take `with Run(folder).lock():` before writing."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def iteration(self, k: int) -> Path:
        return self.folder / f"iter{k}"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held for the block; the system drops it when the process ends, however it ends. InputError if another holds it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(self.folder / "lock", "w")
        except OSError as error:
            raise InputError(f"{self.folder}: cannot write there ({error.strerror})") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{self.folder}: another process is working here; wait for it or choose another --out") from None
            yield

    def settle(self, config: dict, same: tuple[str, ...]) -> None:
        """Writes config.json for a new run; for one begun earlier, refuses if one of the keys in `same` has changed."""
        path = self.folder / "config.json"
        if path.exists():
            before = read_json(path)
            changed = [f"{key} {before.get(key)!r} -> {config[key]!r}" for key in same if before.get(key) != config[key]]
            if changed:
                raise InputError(f"{self.folder} was begun otherwise ({'; '.join(changed)}): undo that or choose another --out")
        else:
            write_json(path, config)

    def log(self, line: dict) -> None:
        """Appends one line to log.jsonl."""
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def read_log(self) -> list[dict]:
        """Every whole line of log.jsonl; a last line that a kill cut short is left out."""
        path = self.folder / "log.jsonl"
        lines = path.read_text().split("\n") if path.exists() else [""]
        return [json.loads(line) for line in lines[:-1]]

    def rewind_log(self, iteration: int, step: int) -> None:
        """Forgets what was logged after `step` of `iteration`: training goes on from there."""
        kept = [line for line in self.read_log() if (line["iteration"], line["step"]) <= (iteration, step)]
        with whole_file(self.folder / "log.jsonl") as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def save_state(self, k: int, state: dict) -> None:
        """What resuming iteration k needs, tensors and numbers, in the place of what was saved before."""
        with whole_file(self.iteration(k) / "state" / "state.pt") as part:
            torch.save(state, part)

    def load_state(self, k: int) -> dict:
        """What `save_state` last wrote for iteration k, on the CPU; {} where it wrote nothing."""
        path = self.iteration(k) / "state" / "state.pt"
        return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}

    def summary(self) -> list[dict]:
        """Per iteration of the log: its steps, seconds and first loss, and means over the last tenth of its steps."""
        rows, log = [], self.read_log()
        for k in sorted({line["iteration"] for line in log}):
            lines = [line for line in log if line["iteration"] == k]
            last = lines[-math.ceil(len(lines) / 10) :]
            row = {"iteration": k, "steps": len(lines), "seconds": sum(line["seconds"] for line in lines)}
            row["first_loss"] = lines[0]["loss"]
            for name in ("loss", "margin", "implicit_accuracy", "delta_data", "delta_gen", "grad_norm"):
                row[name] = sum(line[name] for line in last) / len(last)
            rows.append(row)
        return rows
