"""Checkpoints on the Hugging Face hub."""

import re
from pathlib import Path

from spin.checkpoint.folder import MODEL_INDEX, PARTS
from spin.checkpoint.weights import USUAL_FILE, WEIGHT_FILES, is_index, read_index
from spin.infra.errors import InputError

# a source that ends so is a file, not a repository
FILE_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")


def locate(source: str | Path, parts: tuple[str, ...] = PARTS) -> Path:
    """Return the path of a checkpoint on this machine.

    source: a folder, a file, or a hub id "org/name", which is downloaded unless it has been before
    parts:  the parts to download

    Raises InputError if there is no such path and the hub has no such checkpoint.
    """
    path = Path(source)
    if path.exists():
        return path
    looks_like_file = path.suffix in FILE_SUFFIXES
    if looks_like_file or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise InputError(f"{source}: no such folder or file, and not a hub id such as org/name")

    files = [MODEL_INDEX, "*/config.json"]  # what even parts from elsewhere must agree with
    for part in parts:
        files += [f"{part}/*.json", f"{part}/*.txt"]  # configs, indices and a tokenizer's merges
        if part in USUAL_FILE:
            files.append(f"{part}/{USUAL_FILE[part]}")
    while True:
        folder = download(str(source), files)
        missing = []
        for part in parts:
            missing += missing_weights(folder, part, files)
        if not missing:
            return folder
        files += missing


def missing_weights(folder: Path, part: str, requested: list[str]) -> list[str]:
    """Return which files of a part's weights to download next; [] if none is needed.

    folder:    what has been downloaded. A network without a config is one that the model lacks.
    requested: what was requested so far. The hub lacks those that are not in `folder`. All JSON
               files have been requested, and so has every index.
    """
    if not (folder / part / "config.json").exists():
        return []
    for name in WEIGHT_FILES.get(part, ()):
        path = folder / part / name
        if is_index(path):
            if path.exists():
                shards = [f"{part}/{shard}" for shard in read_index(path)]
                return [shard for shard in shards if shard not in requested]
        elif path.exists():
            return []
        elif f"{part}/{name}" not in requested:
            return [f"{part}/{name}"]
    return []


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
