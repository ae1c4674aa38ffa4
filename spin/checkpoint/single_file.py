"""The single-file layout in which Stable Diffusion was first published, and its tensors' names.

    model.diffusion_model.*   UNet
    first_stage_model.*       VAE
    cond_stage_model.*        text tower

Such a file holds no config: that of SD_1 or SD_2 in configs.py is assumed. Other tensors of a
training checkpoint (model_ema.*, ...) are not read.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from spin.checkpoint.configs import FOREIGN, SD_1, SD_2
from spin.checkpoint.folder import POSITION_IDS, StoredNetwork, write_safetensors
from spin.checkpoint.names import (
    ORIGINAL_RESNET_NAMES,
    ORIGINAL_UNET_NAMES,
    ORIGINAL_VAE_NAMES,
    TEXT_NAMES,
    expand_names,
    replace_parts,
    unfuse,
)
from spin.checkpoint.tensors import config_errors, read_tensors
from spin.infra.errors import InputError
from spin.scheduler import Scheduler
from spin.text import EOS, TextEncoder, Tokenizer
from spin.unet import UNet
from spin.vae import AutoencoderKL

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_1_PREFIX = "cond_stage_model.transformer.text_model."  # SD-1.x; then transformers' names
TEXT_2_PREFIX = "cond_stage_model.model."  # SD-2.x; then open_clip's names, which are ours

# where the metadata of a .safetensors file may say what its UNet predicts: "epsilon" or "v"
PREDICTION_KEY = "modelspec.prediction_type"


# ---- Reading -------------------------------------------------------------------------------------
class SingleFile:
    """A checkpoint in one file. Raises InputError if the file is of another model."""

    def __init__(self, path: Path):
        self.path = path
        self.tensors = read_tensors(path)
        refuse_other_models(self.tensors, path)
        self.is_sd_2 = any(name.startswith(TEXT_2_PREFIX) for name in self.tensors)
        self.configs = SD_2 if self.is_sd_2 else SD_1

    def read_network(self, part: str) -> StoredNetwork:
        """Return "unet", "vae" or "text_encoder", with the names that a folder has."""
        config = self.configs[part]
        if part == "unet":
            tensors = from_original(self.tensors, UNET_PREFIX, original_unet_names(config))
        elif part == "vae":
            tensors = from_original(self.tensors, VAE_PREFIX, original_vae_names(config))
            tensors = convolutions_to_linear(tensors)
        elif part == "text_encoder":
            tensors = self.read_text_tensors(config["num_hidden_layers"])
        else:
            raise ValueError(f"{part!r} is not a network of a checkpoint")
        return StoredNetwork(config, tensors, self.path)

    def read_text_tensors(self, num_layers: int) -> dict[str, Tensor]:
        if self.is_sd_2:
            tensors = with_prefix(self.tensors, TEXT_2_PREFIX)
            # leaves out what the file holds besides: a last layer, projections
            return unfuse(tensors, expand_names(TEXT_NAMES, i=num_layers))
        tensors = with_prefix(self.tensors, TEXT_1_PREFIX)
        tensors.pop(POSITION_IDS, None)
        return tensors

    def read_tokenizer(self, length: int) -> Tokenizer:
        """Return CLIP's own tokenizer, which pads as the model was trained."""
        pad_token = "!" if self.is_sd_2 else EOS
        return Tokenizer(None, pad_token, length)

    def read_scheduler(self) -> Scheduler:
        config = dict(self.configs["scheduler"])
        prediction_type = read_prediction_type(self.path)
        if prediction_type is not None:
            config["prediction_type"] = prediction_type
        with config_errors(self.path):
            return Scheduler(config)


def refuse_other_models(tensors: dict[str, Tensor], path: Path) -> None:
    """Raise InputError unless the tensors' names are those of a whole SD-1.x or SD-2.x."""
    for part_of_name, model in FOREIGN.items():
        if any(part_of_name in name for name in tensors):
            raise InputError(f"{path}: not Stable Diffusion 1.x or 2.x, but {model}")
    if not any(name.startswith(UNET_PREFIX) for name in tensors):
        message = "not a complete Stable Diffusion; put a network alone into a diffusers folder"
        raise InputError(f"{path}: {message}")


def read_prediction_type(path: Path) -> str | None:
    """Return the prediction type in a file's metadata, as scheduler configs spell it, or None."""
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    prediction = metadata.get(PREDICTION_KEY)
    if prediction in ("v", "v_prediction"):
        return "v_prediction"
    return prediction


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, without it."""
    selected = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            selected[name.removeprefix(prefix)] = tensor
    return selected


def from_original(
    tensors: dict[str, Tensor], prefix: str, names: dict[str, str]
) -> dict[str, Tensor]:
    """Return the tensors of one network of a file under our names.

    prefix: of the network's tensors in the file
    names:  our names -> the original ones

    A tensor that is not in `names` keeps its name. It will be refused as unexpected.
    """
    our_names = {original: ours for ours, original in names.items()}
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            renamed[our_names.get(name, name)] = tensor
    return renamed


def convolutions_to_linear(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a VAE's tensors with the weights of its attention as [C,C] instead of [C,C,1,1]."""
    reshaped = dict(tensors)
    for name, tensor in tensors.items():
        if ".to_" in name and tensor.ndim == 4:
            reshaped[name] = tensor[..., 0, 0]
    return reshaped


# ---- Writing -------------------------------------------------------------------------------------
def write_single_file(
    path: Path,
    unet: UNet,
    vae: AutoencoderKL,
    text_encoder: TextEncoder,
    prediction_type: str,
) -> None:
    """Write a .safetensors file in the original layout.

    Raises InputError if the sizes are not Stable Diffusion's, since the file cannot state them.
    """
    if unet.config["block_out_channels"] != SD_1["unet"]["block_out_channels"]:
        message = "a single file states no sizes, so only those of Stable Diffusion can be saved"
        raise InputError(f"{path}: {message}")

    tensors = {}
    unet_state = unet.state_dict()
    for name, original in original_unet_names(unet.config).items():
        tensors[original] = unet_state[name]

    vae_state = linear_to_convolutions(vae.state_dict())
    for name, original in original_vae_names(vae.config).items():
        tensors[original] = vae_state[name]

    text_state = text_encoder.tower.state_dict()
    if text_encoder.config.get("hidden_act") == "gelu":
        text_prefix = TEXT_2_PREFIX
    else:
        text_prefix = TEXT_1_PREFIX
        num_layers = text_encoder.config["num_hidden_layers"]
        text_state = unfuse(text_state, expand_names(TEXT_NAMES, i=num_layers))
    for name, tensor in text_state.items():
        tensors[text_prefix + name] = tensor

    prediction = prediction_type.removesuffix("_prediction")
    write_safetensors(path, tensors, {"format": "pt", PREDICTION_KEY: prediction})


def linear_to_convolutions(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a VAE's tensors with the weights of its attention as [C,C,1,1] instead of [C,C]."""
    reshaped = dict(state)
    for name, tensor in state.items():
        if ".to_" in name and tensor.ndim == 2:
            reshaped[name] = tensor[..., None, None]
    return reshaped


# ---- Names ---------------------------------------------------------------------------------------
def original_unet_names(config: dict) -> dict[str, str]:
    """Return {our name: original name} for every tensor of a UNet with this config."""
    with torch.device("meta"):  # no memory for the weights
        state = UNet(config).state_dict()
    return {name: UNET_PREFIX + original_unet_name(name, config) for name in state}


def original_unet_name(name: str, config: dict) -> str:
    """Return the original name of one tensor of the UNet, without the prefix."""
    if name.startswith(("down_blocks.", "up_blocks.")):
        return original_block_name(name, config)
    for beginning, original in ORIGINAL_UNET_NAMES.items():
        if name.startswith(f"{beginning}."):
            rest = name.removeprefix(f"{beginning}.")
            if ".resnets." in beginning:
                rest = original_resnet_name(rest)
            return f"{original}.{rest}"
    raise KeyError(name)


def original_block_name(name: str, config: dict) -> str:
    """Return the original name of a tensor in a down or up block of the UNet.

    The original layout numbers the layers of all blocks consecutively. input_blocks.0 is conv_in;
    then each down block has a number for every layer and one for its downsampler. In output_blocks,
    each up block has a number for every layer, which is as many. After that number, 0 is the
    residual block and 1 the attention; the upsampler follows them, in the block's last layer.
    """
    direction, block_number, kind, layer_number, rest = name.split(".", 4)
    block = int(block_number)
    index = int(layer_number)
    numbers_per_block = config.get("layers_per_block", 2) + 1
    first = block * numbers_per_block
    last = first + numbers_per_block - 1

    if kind == "downsamplers":
        return f"input_blocks.{1 + last}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        attends = config["up_block_types"][block] == "CrossAttnUpBlock2D"
        index = 2 if attends else 1
        return f"output_blocks.{last}.{index}.{rest}"

    if direction == "down_blocks":
        layer = f"input_blocks.{1 + first + index}"
    else:
        layer = f"output_blocks.{first + index}"
    if kind == "attentions":
        return f"{layer}.1.{rest}"
    return f"{layer}.0.{original_resnet_name(rest)}"


def original_resnet_name(name: str) -> str:
    """Return the original name of a tensor in a residual block: in_layers.0.weight for norm1's."""
    layer, parameter = name.split(".")
    return f"{ORIGINAL_RESNET_NAMES[layer]}.{parameter}"


def original_vae_names(config: dict) -> dict[str, str]:
    """Return {our name: original name} for every tensor of a VAE with this config."""
    with torch.device("meta"):  # no memory for the weights
        state = AutoencoderKL(config).state_dict()
    num_blocks = len(config["block_out_channels"])
    return {name: VAE_PREFIX + original_vae_name(name, num_blocks) for name in state}


def original_vae_name(name: str, num_blocks: int) -> str:
    """Return the original name of one tensor of the VAE, without the prefix."""
    original = replace_parts(name, ORIGINAL_VAE_NAMES)
    for block in range(num_blocks):
        original = original.replace(f"down_blocks.{block}.", f"down.{block}.")
        # up blocks are counted from the last to the first
        original = original.replace(f"up_blocks.{block}.", f"up.{num_blocks - 1 - block}.")
    return original
