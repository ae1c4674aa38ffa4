"""Read metadata.jsonl, one line per image. A line that cannot be used is refused by its number."""

import codecs
import json
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from spin.infra.errors import InputError
from spin.infra.files import refuse_lfs_pointer
from spin.infra.hints import describe_missing_metadata, hint_at_image

NOT_A_ROW = "not a JSON object with file_name and text (or caption)"

#: How the fault of an image ends that is reached through a link out of the folder.
LEADS_OUT = "leads out of the folder through a link; --follow-links allows it"


@dataclass(frozen=True)
class Row:
    """A line of metadata.jsonl."""

    caption: str
    image: Path
    rejected_image: Path | None  # None where no rejected image is asked for

    def image_files(self) -> list[Path]:
        if self.rejected_image is None:
            return [self.image]
        return [self.image, self.rejected_image]


# ---- Lines ---------------------------------------------------------------------------------------


def index_lines(path: Path, limit: int | None) -> np.ndarray:
    """Return line number (1-based) and byte offset of every line that is not empty: [N,2] int64.

    limit: how many such lines to read at most; None for all.

    Raises InputError if the file is missing or cannot be read.
    """
    refuse_lfs_pointer(path)
    try:
        with open(path, "rb") as file:
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise InputError(f"{path}: it begins as UTF-16 does; save it as UTF-8")
            file.seek(0)
            return np.fromiter(islice(numbered_lines(file), limit), dtype=np.dtype((np.int64, 2)))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(describe_missing_metadata(path.parent)) from None
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror})") from None


def numbered_lines(file) -> Iterator[tuple[int, int]]:
    """Yield (line number, byte offset) of every line of a binary file that is not empty."""
    offset = 0
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, offset
        offset += len(line)


# ---- Rows ----------------------------------------------------------------------------------------


def parse_row(
    line: bytes, folder: Path, with_rejected: bool, follow_links: bool, location: str
) -> Row:
    """Return the row that a line holds, whose images exist but have not been opened.

    folder: without symbolic links in its path, as Path.resolve() returns it.
    with_rejected: whether a rejected image is needed.
    follow_links: whether links in the folder may lead out of it. A name itself may not.
    location: of the line, for error messages.

    Raises InputError if the line is not a row, or if an image does not exist.
    """
    entry = parse_entry(line, location)
    caption = choose_caption(entry, location)
    name = check_string(entry["file_name"], "file_name", location)
    image = locate_image(folder, name, follow_links, location)
    if not with_rejected:
        return Row(caption, image, None)
    if not entry.get("rejected_file_name"):
        raise InputError(f"{location}: no rejected_file_name, which DPO needs")
    name = check_string(entry["rejected_file_name"], "rejected_file_name", location)
    return Row(caption, image, locate_image(folder, name, follow_links, location))


def parse_entry(line: bytes, location: str) -> dict:
    """Return the JSON object that a line of metadata.jsonl holds, with its `file_name`.

    Raises InputError if the line is anything else.
    """
    try:
        text = line.decode("utf-8-sig")
        entry = json.loads(text, object_pairs_hook=dict_of_pairs)
    except UnicodeDecodeError:
        raise InputError(f"{location}: not UTF-8 text; save the file as UTF-8") from None
    except (json.JSONDecodeError, RecursionError):
        raise InputError(f"{location}: {NOT_A_ROW}{hint_at_list(text)}") from None
    except ValueError as error:
        raise InputError(f"{location}: {error}") from None
    if not isinstance(entry, dict) or "file_name" not in entry:
        raise InputError(f"{location}: {NOT_A_ROW}{hint_at_list(text)}")
    return entry


def hint_at_list(text: str) -> str:
    """Return what to say of a line with which a list begins, as in a file of .json: "" if none."""
    if text.lstrip().startswith("["):
        return ", but a list; write each of its entries on a line of its own, without the list"
    return ""


def dict_of_pairs(pairs: list[tuple]) -> dict:
    """Return a JSON object as a dict. Raises ValueError if a key comes twice."""
    values = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key!r} comes twice")
        values[key] = value
    return values


def choose_caption(entry: dict, location: str) -> str:
    """Return an entry's `text` or, where that is missing, null or blank, its `caption`."""
    key = "text"
    if is_blank(entry.get("text")) and "caption" in entry:
        key = "caption"
    if key not in entry:
        raise InputError(f"{location}: {NOT_A_ROW}")
    caption = check_string(entry[key], key, location)
    if is_blank(caption):
        raise InputError(f"{location}: an empty caption")
    return caption


def is_blank(value) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def check_string(value, key: str, location: str) -> str:
    """Return a string of an entry. Raises InputError for another value."""
    try:
        return as_text(value)
    except ValueError as error:
        raise InputError(f"{location}: {key} is {error}") from None


def as_text(value) -> str:
    """Return a string as it is. Raises ValueError for a value of JSON that is no text."""
    if isinstance(value, list):
        raise ValueError("a list; choose one of them")
    if not isinstance(value, str):
        raise ValueError(f"{json.dumps(value)[:40]}, not a string")
    if value.encode(errors="ignore").decode() != value:
        raise ValueError("malformed: it has a lone surrogate")
    if "\0" in value:
        raise ValueError("malformed: it has a NUL character")
    return value


def locate_image(folder: Path, name: str, follow_links: bool, location: str) -> Path:
    """Return an image's path. Raises InputError if it is outside the folder or does not exist."""
    try:
        path = normalize_name(folder, name)
        inside = path.resolve().is_relative_to(folder)  # links followed
        name_leaves = not Path(os.path.normpath(path)).is_relative_to(folder)  # links not followed
        exists = path.is_file()
        is_link = path.is_symlink()
    except (OSError, ValueError, RuntimeError):  # no file can have this name, or links in a circle
        raise InputError(f"{location}: no image {name!r} in {folder}") from None
    if not inside and name_leaves:
        hint = hint_at_image(folder, name) or "; move the image into it"
        raise InputError(f"{location}: {name!r} is outside the folder{hint}")
    if not exists:
        hint = ", only a broken link" if is_link else hint_at_image(folder, name)
        raise InputError(f"{location}: no image {name!r} in {folder}{hint}")
    if not inside and not follow_links:
        raise InputError(f"{location}: {name!r} {LEADS_OUT}")
    return path


def normalize_name(folder: Path, name: str) -> Path:
    """Return an image's path, also if its accents are written in Unicode's other form.

    macOS writes "e" and an accent (NFD) where other systems and most tables have one letter (NFC).
    """
    path = folder / name
    if path.exists():
        return path
    found = []
    for form in ("NFC", "NFD"):
        other = folder / unicodedata.normalize(form, name)
        if other.is_file():
            found.append(other)
    return found[0] if len(found) == 1 else path
