"""The single-file layout in which Stable Diffusion was first published: its names, and what its files leave unsaid.
One file holds model.diffusion_model.* (UNet), first_stage_model.* (VAE) and cond_stage_model.* (text tower), but no
config: `SD_1` and `SD_2` are what it would say. A training checkpoint's other keys (model_ema.*, ...) are not read."""

import json
import re
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT_1 = "cond_stage_model.transformer.text_model."  # of SD-1.x, then transformers' names
PREDICTION = "modelspec.prediction_type"  # in a .safetensors file's metadata, where it is said: epsilon or v
TEXT_2 = "cond_stage_model.model."  # of SD-2.x, then open_clip's

# SD_*: {"unet": its config.json, ...}; of OpenCLIP's ViT-H, SD-2.x reads all layers but the last. BUILT_IN: settings;
# another value means another architecture (SDXL, an inpainting model, ...), which might load and would draw nonsense.
# FOREIGN: what other files are, by a part of a name in them. IN_*: parts of diffusers' names -> those here.
FACTS = json.loads(Path(__file__).with_name("configs.json").read_text())
SD_1, SD_2, BUILT_IN, FOREIGN, IN_UNET, IN_RESNET, IN_VAE = FACTS.values()


def config_of(tensors: dict[str, Tensor]) -> dict[str, dict]:
    return SD_2 if any(name.startswith(TEXT_2) for name in tensors) else SD_1


def said_of_schedule(path: Path) -> dict:
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        said = (file.metadata() or {}).get(PREDICTION)
    return {"prediction_type": "v_prediction" if said.startswith("v") else said} if said else {}


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def renamed(name: str, table: dict[str, str]) -> str:
    for here, there in table.items():
        name = name.replace(here, there)
    return name


def unet_name(ours: str, depth: int, cross: list[bool]) -> str:
    """depth: residual blocks a level on the way down. cross: of each level on the way up, if it has attentions."""

    def block(found: re.Match) -> str:
        (way, kind), (level, place) = found.group(1, 3), map(int, found.group(2, 4))
        if kind == "downsamplers":
            return f"input_blocks.{(level + 1) * (depth + 1)}.0.op"
        if kind == "upsamplers":
            return f"output_blocks.{(level + 1) * (depth + 1) - 1}.{1 + cross[level]}.conv"
        number = level * (depth + 1) + place
        name = f"input_blocks.{number + 1}" if way == "down" else f"output_blocks.{number}"
        return f"{name}.{int(kind == 'attentions')}"

    name = re.sub(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)(?:(?<=samplers.0)\.conv)?", block, ours)
    return UNET + renamed(name, IN_UNET | IN_RESNET if ".resnets." in ours else IN_UNET)


def vae_name(ours: str, levels: int) -> str:
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", ours)
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
    return VAE + renamed(re.sub(r"(down|up)\.(\d+)\.resnets", r"\1.\2.block", name), IN_VAE)


def names(network: str, ours: list[str], config: dict) -> dict[str, str]:
    """{our name: the original one} of a "unet"'s or "vae"'s tensors. A bijection, which is tested."""
    if network == "vae":
        return {name: vae_name(name, len(config["block_out_channels"])) for name in ours}
    cross = [kind.startswith("Cross") for kind in config["up_block_types"]]
    return {name: unet_name(name, config.get("layers_per_block", 2), cross) for name in ours}


def to_original(network: str, state: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """The VAE's attention has 1x1 convolutions there, [C,C,1,1], and linear layers here, [C,C]."""
    tensors = {there: state[ours] for ours, there in names(network, list(state), config).items()}
    return {name: t[..., None, None] if ".attn_1." in name and t.ndim == 2 else t for name, t in tensors.items()}


def from_original(network: str, tensors: dict[str, Tensor], ours: list[str], config: dict) -> dict[str, Tensor]:
    """`to_original` backwards, out of a whole file's tensors; a name of that network without a place keeps its own."""
    here = {there: name for name, there in names(network, ours, config).items()}
    prefix = UNET if network == "unet" else VAE
    found = {here.get(name, name): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    squeezed = [name for name, t in found.items() if network == "vae" and ".to_" in name and t.ndim == 4]
    return found | {name: found[name][..., 0, 0] for name in squeezed}
