"""Checkpoints on the Hugging Face hub."""

import re
from pathlib import Path

from spin.checkpoint.folder import PARTS
from spin.checkpoint.tensors import PICKLE_SUFFIXES
from spin.infra.errors import InputError

# the files that are downloaded of each part of a checkpoint
FILES = (
    "*.json",
    "*.txt",  # merges of a tokenizer
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
)
# the same weights in older or smaller files, for repositories that have no others
OLDER_FILES = (
    "*_model.bin",
    "*model.fp16.safetensors",
)


def locate(source: str | Path, parts: tuple[str, ...] = PARTS) -> Path:
    """Return the path of a checkpoint on this machine.

    source: a folder, a file, or a hub id "org/name", which is downloaded unless it has been before
    parts:  the parts to download

    Raises InputError if there is no such path and the hub has no such checkpoint.
    """
    path = Path(source)
    if path.exists():
        return path
    looks_like_file = path.suffix in (".safetensors", *PICKLE_SUFFIXES)
    if looks_like_file or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise InputError(f"{source}: no such folder or file, and not a hub id such as org/name")

    patterns = []
    older_patterns = []
    for part in parts:
        patterns += [f"{part}/{file}" for file in FILES]
        older_patterns += [f"{part}/{file}" for file in OLDER_FILES]
    folder = download(str(source), patterns)
    if any((folder / parts[0]).glob("*.safetensors")):
        return folder
    return download(str(source), patterns + older_patterns)


def download(repository: str, files: list[str]) -> Path:
    """Return a local folder with these files of a repository on the hub.

    files: names, or patterns with *

    Raises InputError if they cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=files))
    except Exception as error:  # network, permissions, disk space: errors of many libraries
        reason = str(error) or type(error).__name__
        first_line = reason.split("\n")[0]
        message = f"{repository}: no such folder here, and not available from the hub: {first_line}"
        raise InputError(message) from None
