"""Atomic writes, hashes, and text and JSON files whose errors are reported in one line."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from spin.infra.errors import InputError

#: The first line of the small text file that stands for a large one in a Git repository.
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and move it to `path` if the block succeeds.

    The `with` block creates a file or a folder there. Until it succeeds, `path` is unchanged. A
    folder can only be moved to a `path` that does not exist yet.
    Raises InputError if writing fails.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)  # a killed process may have left one
        yield temporary
        if temporary.is_file():
            use_default_permissions(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be written ({reason})") from error
    finally:
        remove(temporary)


def use_default_permissions(path: Path) -> None:
    """Give a file the permissions that open() would have given it.

    safetensors makes its files readable by their owner only.
    """
    umask = os.umask(0)  # the mask can only be read by setting it
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def remove(path: Path) -> None:
    """Delete a file or a folder with all it holds. A missing one is no error."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def write_json(path: Path, value) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_text(path: Path) -> str:
    """Return a UTF-8 file's text. Raises InputError if it is missing or not text."""
    refuse_lfs_pointer(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        reason = describe_encoding(error.object, error.start)
        raise InputError(f"{path}: not UTF-8 text ({reason}); save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: not readable as text ({error.strerror})") from None


def describe_encoding(content: bytes, start: int) -> str:
    """Return why a file's content is not UTF-8, which fails at byte `start`."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "it begins as UTF-16 does"
    line = content.count(b"\n", 0, start) + 1
    return f"line {line} has the byte 0x{content[start]:02x}"


def refuse_lfs_pointer(path: Path) -> None:
    """Raise InputError if a file is a Git LFS pointer.

    A file that cannot be opened is left to its reader, whose message says why.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError:
        return
    if start == LFS_POINTER:
        raise InputError(
            f"{path}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
        )


def read_json(path: Path) -> dict:
    """Return the JSON object in a file. Raises InputError if it is missing or not an object."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}, not a JSON object")
    return value


def hash_files(paths: Iterable[Path], strings: Iterable[str] = ()) -> str:
    """Return 16 hexadecimal digits of SHA-256 over files' names and contents, then `strings`."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        add_content(digest, path)
    for string in strings:
        digest.update(string.encode())
    return digest.hexdigest()[:16]


def hash_content(path: Path) -> str:
    """Return the 64 hexadecimal digits of SHA-256 over a file's content."""
    digest = hashlib.sha256()
    add_content(digest, path)
    return digest.hexdigest()


def add_content(digest, path: Path) -> None:
    """Add a file's content to a digest of hashlib."""
    with open(path, "rb") as file:
        for block in iter(partial(file.read, 1 << 20), b""):  # a mebibyte at a time
            digest.update(block)
