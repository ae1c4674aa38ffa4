"""The folder layout of diffusers. Several generations of it are read, the newest is written.

    unet/, vae/       config.json, diffusion_pytorch_model.safetensors
    text_encoder/     config.json, model.safetensors
    text_encoder_2/   the same, in SDXL alone; so is tokenizer_2/
    scheduler/        scheduler_config.json
    tokenizer/        vocab.json and merges.txt, or tokenizer.json alone; without either, CLIP's own
    model_index.json  the classes of the parts, which must be Stable Diffusion's if it is there
"""

import re
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from spin.checkpoint.configs import (
    BETAS,
    BUILT_IN,
    FOREIGN_PIPELINES,
    FOREIGN_SCHEDULERS,
    OTHER_FOLDERS,
    OTHER_INPUTS,
    PART_CLASSES,
    SCHEDULERS,
    SCHEDULERS_WITH_OTHER_BETAS,
    UNUSED_PARTS,
)
from spin.checkpoint.names import OLD_VAE_NAMES, replace_parts
from spin.checkpoint.tensors import config_errors, first_five
from spin.checkpoint.tokenizer import read_tokenizer
from spin.checkpoint.weights import USUAL_FILE, read_weights
from spin.infra.errors import InputError
from spin.infra.files import atomic_write, read_json, write_json
from spin.scheduler import Scheduler
from spin.text import Tokenizer
from spin.vae import read_scaling_factor

# in the order in which `hash_checkpoint` reads them
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "text_encoder_2", "tokenizer_2")

SCHEDULER_CONFIG = "scheduler_config.json"
MODEL_INDEX = "model_index.json"

# Their configs are read by diffusers, the text encoder's by transformers.
PARTS_OF_DIFFUSERS = ("unet", "vae", "scheduler")

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
    """A checkpoint's folder, whose parts are read when they are asked for.

    Raises InputError if its model_index.json says that it is a model of another kind.
    """

    def __init__(self, path: Path):
        self.path = path
        self.classes = read_model_index(path / MODEL_INDEX)

    def read_network(self, part: str) -> StoredNetwork:
        """Read "unet", "vae", "text_encoder" or "text_encoder_2".

        Raises InputError if it cannot be used.
        """
        where = self.path / part
        if not where.exists():
            if part == "unet" and is_unet_alone(self.path):
                where = self.path
            else:
                refuse_other_folders(self.path)
        config = read_config(where / "config.json", part)
        if part == "unet" and is_from_before_0_9(config):
            config["sample_size"] = max(64, config.get("sample_size") or 64)
        return StoredNetwork(config, read_network_tensors(where, part), where)

    def has_two_text_encoders(self) -> bool:
        """Return whether the model is an SDXL."""
        return "text_encoder_2" in self.classes or (self.path / "text_encoder_2").exists()

    def read_tokenizer(self, part: str, text_config: dict) -> Tokenizer:
        """Read "tokenizer" or "tokenizer_2", which is that of the text tower with this config."""
        return read_tokenizer(self.path / part, text_config)

    def read_scheduler(self, prediction_type: str | None = None) -> Scheduler:
        """Read the noise schedule and what the UNet predicts, unless `prediction_type` says so."""
        path = self.path / "scheduler" / SCHEDULER_CONFIG
        return read_scheduler(path, prediction_type, self.classes.get("scheduler"))

    def read_scheduler_of_unet(self, prediction_type: str | None = None) -> Scheduler | None:
        """Read the scheduler that a UNet was trained with, or return None if there is none."""
        folder = self.folder_around_unet()
        if not (folder / "scheduler" / SCHEDULER_CONFIG).exists():
            return None
        return Folder(folder).read_scheduler(prediction_type)

    def read_scaling_factor_of_unet(self) -> float | None:
        """Read the scale of the latents that a UNet was trained with, or return None.

        The config of the VAE beside it states it.
        """
        path = self.folder_around_unet() / "vae/config.json"
        if not path.exists():
            return None
        config = without_defaults(read_json(path), path)
        with config_errors(path.parent):
            return read_scaling_factor(config)

    def folder_around_unet(self) -> Path:
        """Return this folder or, if it is a folder unet/ alone, the one that it is in."""
        return self.path if (self.path / "unet").exists() else self.path.resolve().parent


def read_model_index(path: Path) -> dict[str, str]:
    """Return the class of each part that model_index.json states; {} if there is no such file.

    Raises InputError if the parts, or their classes, are not those of Stable Diffusion.
    """
    if not path.exists():
        return {}
    index = read_json(path)
    for part_of_name, why in FOREIGN_PIPELINES.items():
        pipeline = str(index.get("_class_name"))
        if part_of_name in pipeline:
            raise InputError(f"{path}: {pipeline}: {why}")
    if not index.get("force_zeros_for_empty_prompt", True):
        message = "force_zeros_for_empty_prompt is false, but a missing prompt is always zeros here"
        raise InputError(f"{path}: {message}: the model is not supported")

    classes = {}
    for part, value in index.items():
        # [library, class], or [null, null] for a part that the model lacks; others are settings
        is_part = isinstance(value, list) and len(value) == 2 and not part.startswith("_")
        if not is_part or None in value or part in UNUSED_PARTS:
            continue
        name = value[1]
        if part not in PARTS:
            message = f"has a part {part} ({name}), which is not supported"
            raise InputError(f"{path}: {message}: images would be made without it")
        if part == "scheduler":
            check_scheduler_class(name, path)
        elif name not in PART_CLASSES[part]:
            expected = " or ".join(PART_CLASSES[part])
            message = f"its {part} is {name}, in Stable Diffusion it is {expected}"
            raise InputError(f"{path}: {message}")
        classes[part] = name
    return classes


def is_unet_alone(path: Path) -> bool:
    """Return whether a folder is unet/ alone."""
    return (path / "config.json").exists() and any(path.glob("diffusion_pytorch_model*"))


def refuse_other_folders(path: Path) -> None:
    """Raise InputError if a folder without one of the parts is known to be something else."""
    has_unet = (path / "unet").exists() or is_unet_alone(path)
    if has_unet and not (path / "vae").exists() and not (path / "text_encoder").exists():
        raise InputError(f"{path}: holds only a UNet: pass it as --unet, and its base as --model")
    if has_unet:
        return

    # a run of train.py, one of its iterations, a repository in the hub's cache
    models = [folder.parent for folder in [*path.glob("*/unet"), *path.glob("*/*/unet")]]
    if models:
        names = sorted(str(model.relative_to(path)) for model in models)
        message = f"no model itself, but folders in it are: choose one ({first_five(names)})"
        raise InputError(f"{path}: {message}")

    for file, content in OTHER_FOLDERS.items():
        if (path / file).exists():
            raise InputError(f"{path}: {content}")

    files = sorted(file.name for file in [*path.glob("*.safetensors"), *path.glob("*.ckpt")])
    if files:
        raise InputError(f"{path}: a folder of single files: choose one ({first_five(files)})")


def read_config(path: Path, part: str) -> dict:
    """Return a config. Raises InputError if a setting in BUILT_IN has another value."""
    config = read_json(path)
    if part in PARTS_OF_DIFFUSERS:
        config = without_defaults(config, path)
    for key, expected in BUILT_IN[part].items():
        value = config.get(key, expected)
        per_block = value if isinstance(value, list) else [value]
        if any(entry != expected for entry in per_block):
            message = f"{key} is {value!r}, in Stable Diffusion it is {expected!r}"
            if key == "in_channels" and value in OTHER_INPUTS:
                message += f": {OTHER_INPUTS[value]}"
            raise InputError(f"{path}: {message}")
    return config


def without_defaults(config: dict, path: Path) -> dict:
    """Return a config without the settings that diffusers ignores in it, and takes defaults for.

    path: the config's, for messages
    """
    config = dict(config)
    ignored = config.pop("_use_default_values", [])
    if not isinstance(ignored, list):
        raise InputError(f"{path}: _use_default_values is {ignored!r}, not a list of settings")
    return {key: value for key, value in config.items() if key not in ignored}


def is_from_before_0_9(config: dict) -> bool:
    """Return whether a UNet's config was written by diffusers before version 0.9.

    Those state a sample_size of 32 for Stable Diffusion's 64, which diffusers corrects, too.
    """
    numbers = re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version")))
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < (0, 9)


def read_scheduler(
    path: Path, prediction_type: str | None, class_in_index: str | None = None
) -> Scheduler:
    """Return the scheduler of a config.

    prediction_type: what the UNet predicts, whatever the config says; None for what it says
    class_in_index:  the class that model_index.json states. In diffusers, it counts in place of the
                     config's; here, neither may be another family's.

    Raises InputError if the config is not one of Stable Diffusion.
    """
    config = read_config(path, "scheduler")
    own_class = config.get("_class_name")
    check_scheduler_class(own_class, path)
    for name in (own_class, class_in_index or own_class):
        check_betas_are_stated(config, name, path)
    if prediction_type is not None:
        config["prediction_type"] = prediction_type
    with config_errors(path.parent):
        return Scheduler(config)


def check_scheduler_class(name: str | None, path: Path) -> None:
    """Raise InputError unless a scheduler of this class can be read as a DDIMScheduler.

    path: of the file that states the class, for messages
    """
    if name is not None and name not in SCHEDULERS + SCHEDULERS_WITH_OTHER_BETAS:
        reason = "not a sampler that Stable Diffusion is known to have"
        for part_of_name, why in FOREIGN_SCHEDULERS.items():
            if part_of_name in str(name):
                reason = why
        raise InputError(f"{path}: its scheduler is {name}: {reason}")


def check_betas_are_stated(config: dict, name: str | None, path: Path) -> None:
    """Raise InputError if a scheduler's config lacks betas whose defaults are not DDIMScheduler's.

    name: the scheduler's class
    path: the config's, for messages
    """
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


def write_model_index(folder: Path, scheduler_class: str, is_xl: bool) -> None:
    """Write model_index.json, by which diffusers knows the classes of a checkpoint's parts."""
    if is_xl:
        index = {
            "_class_name": "StableDiffusionXLPipeline",
            "force_zeros_for_empty_prompt": True,
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
    else:
        index = {
            "_class_name": "StableDiffusionPipeline",
            "requires_safety_checker": False,
            "feature_extractor": [None, None],
            "safety_checker": [None, None],
        }
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", scheduler_class],
    }
    write_json(folder / MODEL_INDEX, {**index, **parts})
