"""What to say of a file that is missing: where it is, or what was given in its place."""

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath

NEEDED = "it must have a line with file_name and text for each image"
TABLES = (".csv", ".tsv", ".parquet", ".xlsx")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".zst")
CAPTIONS = (".txt", ".caption")
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG", ".WEBP")


# ---- metadata.jsonl ------------------------------------------------------------------------------


def describe_missing_metadata(folder: Path) -> str:
    """Return what to say where folder/metadata.jsonl cannot be opened: which path, and why."""
    if not folder.exists():
        return f"{str(folder)!r}: no such folder"
    if folder.name == "metadata.jsonl":
        return f"{folder}: not a folder; give the one that it is in"
    if folder.suffix.lower() in ARCHIVES:
        return f"{folder}: not a folder; unpack it first, and give the folder"
    if not folder.is_dir():
        return f"{folder}: not a folder"
    path = folder / "metadata.jsonl"
    if path.is_symlink():
        return f"{path}: only a broken link"
    return f"{path}: no such file; {replace_metadata(folder)}"


def replace_metadata(folder: Path) -> str:
    """Return what a folder has in place of metadata.jsonl, and what to do with it."""
    names = sorted(name for name in list_names(folder) if (folder / name).is_file())
    for name in names:
        if name.lower().startswith("metadata") and name.endswith(TABLES):
            return f"convert {name} to it: {NEEDED}"
        if name.lower().startswith(("metadata.j", "metadata.txt")) or name.endswith(".jsonl"):
            return f"rename {name!r} to it: {NEEDED}"
    for pattern in ("*/metadata.jsonl", "*/*/metadata.jsonl"):
        for path in sorted(folder.glob(pattern)):
            return f"there is one in {str(path.parent)!r}: give that folder"
    for name in names:
        if name.endswith(CAPTIONS) and has_image(folder / name):
            return f"captions in files like {name!r} are not read; {NEEDED}"
    for name in names:
        if name.endswith(ARCHIVES):
            return f"unpack {name!r} first: {NEEDED}"
    return NEEDED


def has_image(captions: Path) -> bool:
    """Return whether an image is beside a file of captions: 0.jpg or 0.jpg.txt for 0.txt."""
    return any(captions.with_suffix(suffix).is_file() for suffix in ("", *IMAGES))


# ---- Images --------------------------------------------------------------------------------------


def hint_at_image(folder: Path, name: str) -> str:
    """Return where a missing image may be, or "": the end of a message about its name."""
    for similar in similar_names(folder, name):
        if os.path.isfile(folder / similar):  # False if no file can have that name
            return f", but {similar!r} is there: correct the name"
    archives = list_archives(folder)
    if archives:
        return f"; if it is in {archives[0]!r}, unpack that first"
    return ""


def similar_names(folder: Path, name: str) -> Iterator[str]:
    """Yield names within the folder that may be meant by that of a missing image."""
    path = PurePosixPath(name.replace("\\", "/"))  # Windows writes backslashes
    parts = [part for part in path.parts if part not in ("/", "..")]
    for start in range(len(parts)):  # a name may be relative to another folder
        relative = PurePosixPath(*parts[start:])
        yield str(relative)
        yield str(relative).lower()
        yield str(relative).upper()
        for suffix in IMAGES:
            yield str(relative.with_suffix(suffix))
    for subfolder in list_subfolders(folder):
        yield str(PurePosixPath(subfolder, *parts))


# Once for a whole folder: it may have as many missing images as files.


@lru_cache(maxsize=1)
def list_subfolders(folder: Path) -> list[str]:
    return sorted(name for name in list_names(folder) if (folder / name).is_dir())


@lru_cache(maxsize=1)
def list_archives(folder: Path) -> list[str]:
    return sorted(name for name in list_names(folder) if name.endswith(ARCHIVES))


def list_names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # it may not be listed, only opened
        return []
