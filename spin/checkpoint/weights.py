"""The files of a network's weights in a folder: which of several is read, and in how many shards.

An index is a JSON file whose "weight_map" says in which shard, a file beside it, each tensor is.
"""

from pathlib import Path

from torch import Tensor

from spin.checkpoint.tensors import first_five, read_tensors
from spin.infra.errors import InputError
from spin.infra.files import read_json

# The first of these files that a folder holds is read. The order is that of diffusers and of
# transformers: the former prefers an index to a .safetensors file, the latter the file. Both read
# half precision only on request; this project reads it where there is nothing else.
DIFFUSERS_FILES = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    # in half precision
    "diffusion_pytorch_model.safetensors.index.fp16.json",
    "diffusion_pytorch_model.safetensors.fp16.index.json",  # of older versions
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.bin",
    "diffusion_pytorch_model.bin.index.fp16.json",
)
TRANSFORMERS_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    # in half precision
    "model.fp16.safetensors",
    "model.safetensors.index.fp16.json",
    "pytorch_model.fp16.bin",
    "pytorch_model.bin.index.fp16.json",
)
WEIGHT_FILES = {
    "unet": DIFFUSERS_FILES,
    "vae": DIFFUSERS_FILES,
    "text_encoder": TRANSFORMERS_FILES,
    "text_encoder_2": TRANSFORMERS_FILES,
}

# the file that is written, and that most folders have
USUAL_FILE = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}


def find_weights(folder: Path, part: str) -> Path | None:
    """Return the file to read a network's weights from, which may be an index, or None.

    part: "unet", "vae", "text_encoder" or "text_encoder_2"
    """
    for name in WEIGHT_FILES[part]:
        if (folder / name).is_file():
            return folder / name
    return None


def list_weight_files(folder: Path, part: str) -> list[Path]:
    """Return every file that `read_weights` reads: one file, an index and its shards, or none.

    Missing shards are left out. `read_weights` refuses them.
    """
    path = find_weights(folder, part)
    if path is None:
        return []
    if not is_index(path):
        return [path]
    shards = [path.with_name(shard) for shard in read_index(path)]
    return [path, *filter(Path.is_file, shards)]


def read_weights(folder: Path, part: str) -> dict[str, Tensor]:
    """Return all tensors of a network, by the names that they are stored under.

    Raises InputError if there are none, or if a file is damaged or is not what its index says.
    """
    path = find_weights(folder, part)
    if path is None:
        usual = folder / USUAL_FILE[part]
        raise InputError(f"{usual}: no such file, nor a .bin file or an index in its place")
    if not is_index(path):
        return read_tensors(path)
    tensors = {}
    for shard, names in read_index(path).items():
        tensors.update(read_shard(path.with_name(shard), names, path.name))
    return tensors


def is_index(path: Path) -> bool:
    return path.suffix == ".json"


def read_index(path: Path) -> dict[str, set[str]]:
    """Return the names of each shard's tensors, by the shard's file name.

    Raises InputError if the file is no index, or if a shard's name leads to another folder.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: has no weight_map, which says in which file each tensor is")
    shards = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", "..") or Path(shard).name != shard:
            raise InputError(f"{path}: {name} is in {shard!r}, which is not a file beside it")
        shards.setdefault(shard, set()).add(name)
    return shards


def read_shard(path: Path, names: set[str], index: str) -> dict[str, Tensor]:
    """Return a shard's tensors. Raises InputError unless they are those that its index lists."""
    if not path.is_file():
        raise InputError(f"{path}: no such file, but {index} lists it; download it again")
    tensors = read_tensors(path)
    different = sorted(tensors.keys() ^ names)
    if different:
        message = f"{index} lists other tensors than it holds: {first_five(different)}"
        raise InputError(f"{path}: {message}")
    return tensors
