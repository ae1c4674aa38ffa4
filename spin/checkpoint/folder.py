"""The folder layout of diffusers. Several generations of it are read, the newest is written.

    unet/, vae/    config.json, diffusion_pytorch_model.safetensors
    text_encoder/  config.json, model.safetensors
    scheduler/     scheduler_config.json
    tokenizer/     vocab.json and merges.txt, or tokenizer.json alone; without either, CLIP's own
"""

import re
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from spin.checkpoint.configs import (
    BETAS,
    BUILT_IN,
    FOREIGN_SCHEDULERS,
    SCHEDULERS,
    SCHEDULERS_WITH_OTHER_BETAS,
)
from spin.checkpoint.names import OLD_VAE_NAMES, replace_parts
from spin.checkpoint.tensors import config_errors
from spin.checkpoint.tokenizer import read_tokenizer
from spin.checkpoint.weights import USUAL_FILE, read_weights
from spin.infra.errors import InputError
from spin.infra.files import atomic_write, read_json, write_json
from spin.scheduler import Scheduler
from spin.text import Tokenizer

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

SCHEDULER_CONFIG = "scheduler_config.json"

# the numbers 0 to 76, which older versions of transformers stored with a text tower
POSITION_IDS = "embeddings.position_ids"


@dataclass
class StoredNetwork:
    """A network as a checkpoint holds it.

    config:  its config.json
    tensors: by today's names of diffusers or transformers, the latter without "text_model."
    where:   the folder or file that it comes from, for messages
    """

    config: dict
    tensors: dict[str, Tensor]
    where: Path


# ---- Reading -------------------------------------------------------------------------------------
class Folder:
    """A checkpoint's folder, whose parts are read when they are asked for."""

    def __init__(self, path: Path):
        self.path = path

    def read_network(self, part: str) -> StoredNetwork:
        """Read "unet", "vae" or "text_encoder". Raises InputError if it cannot be used."""
        where = self.path / part
        if part == "unet" and not where.exists() and (self.path / "config.json").exists():
            where = self.path  # the folder unet/ alone
        config = read_config(where / "config.json", part)
        if part == "unet" and is_from_before_0_9(config):
            config["sample_size"] = max(64, config.get("sample_size") or 64)
        return StoredNetwork(config, read_network_tensors(where, part), where)

    def read_tokenizer(self, text_config: dict) -> Tokenizer:
        return read_tokenizer(self.path / "tokenizer", text_config)

    def read_scheduler(self, prediction_type: str | None = None) -> Scheduler:
        """Read the noise schedule and what the UNet predicts, unless `prediction_type` says so."""
        return read_scheduler(self.path / "scheduler" / SCHEDULER_CONFIG, prediction_type)

    def read_scheduler_of_unet(self, prediction_type: str | None = None) -> Scheduler | None:
        """Read the scheduler that a UNet was trained with, or return None if there is none.

        It is in this folder or, if this is a folder unet/ alone, beside it.
        """
        is_whole = (self.path / "unet").exists()
        folder = self.path if is_whole else self.path.resolve().parent
        path = folder / "scheduler" / SCHEDULER_CONFIG
        if not path.exists():
            return None
        return read_scheduler(path, prediction_type)


def read_config(path: Path, part: str) -> dict:
    """Return a config. Raises InputError if a setting in BUILT_IN has another value."""
    config = read_json(path)
    for key, expected in BUILT_IN[part].items():
        value = config.get(key, expected)
        per_block = value if isinstance(value, list) else [value]
        if any(entry != expected for entry in per_block):
            message = f"{key} is {value!r}, in Stable Diffusion 1.x and 2.x it is {expected!r}"
            raise InputError(f"{path}: {message}")
    return config


def is_from_before_0_9(config: dict) -> bool:
    """Return whether a UNet's config was written by diffusers before version 0.9.

    Those state a sample_size of 32 for Stable Diffusion's 64, which diffusers corrects, too.
    """
    numbers = re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version")))
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < (0, 9)


def read_scheduler(path: Path, prediction_type: str | None) -> Scheduler:
    """Return the scheduler of a config.

    prediction_type: what the UNet predicts, whatever the config says; None for what it says

    Raises InputError if the config is not one of Stable Diffusion.
    """
    config = read_config(path, "scheduler")
    check_scheduler_class(config, path)
    if prediction_type is not None:
        config["prediction_type"] = prediction_type
    with config_errors(path.parent):
        return Scheduler(config)


def check_scheduler_class(config: dict, path: Path) -> None:
    """Raise InputError unless a scheduler's config can be read as DDIMScheduler's.

    path: the config's, for messages
    """
    name = config.get("_class_name")
    if name is not None and name not in SCHEDULERS + SCHEDULERS_WITH_OTHER_BETAS:
        reason = "not a sampler that Stable Diffusion 1.x or 2.x is known to have"
        for part_of_name, why in FOREIGN_SCHEDULERS.items():
            if part_of_name in str(name):
                reason = why
        raise InputError(f"{path}: its _class_name is {name}: {reason}")

    if name not in SCHEDULERS and config.get("trained_betas") is None:
        missing = [key for key in BETAS if key not in config]
        if missing:
            raise InputError(f"{path}: lacks {', '.join(missing)}: its noise schedule is unknown")


def read_network_tensors(folder: Path, part: str) -> dict[str, Tensor]:
    """Return a network's tensors by their names of today."""
    stored = read_weights(folder, part)
    tensors = {}
    for stored_name, tensor in stored.items():
        name = stored_name.removeprefix("text_model.")
        if part == "vae":
            name = replace_parts(name, OLD_VAE_NAMES)
        tensors[name] = tensor
    if len(tensors) < len(stored):
        raise InputError(f"{folder}: holds some tensors twice, under an older and a newer name")
    tensors.pop(POSITION_IDS, None)
    return tensors


# ---- Writing -------------------------------------------------------------------------------------
def write_network(folder: Path, part: str, config: dict, tensors: dict[str, Tensor]) -> None:
    """Write a network's config.json and its tensors under the names they have in `tensors`."""
    config = dict(config)
    # the type of the weights that were read, while those of `tensors` may have another by now
    config.pop("dtype", None)
    config.pop("torch_dtype", None)
    write_json(folder / "config.json", config)
    write_safetensors(folder / USUAL_FILE[part], tensors, {"format": "pt"})


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(contiguous, temporary, metadata)


def write_model_index(folder: Path, scheduler_class: str) -> None:
    """Write model_index.json, by which diffusers knows the classes of a checkpoint's parts."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "requires_safety_checker": False,
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", scheduler_class],
    }
    write_json(folder / "model_index.json", index)
