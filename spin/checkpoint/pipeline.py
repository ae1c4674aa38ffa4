"""Load and save checkpoints, and hold a loaded model: load_pipeline, save_pipeline, Pipeline.

Supports folders in the diffusers layout (folder.py, weights.py, tokenizer.py), which can also come
from the hub (hub.py), and single files in the original layout (single_file.py). Both are validated
strictly: every tensor (tensors.py), and what is stated in several places (agreement.py).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from spin.checkpoint.agreement import (
    check_same_schedule,
    check_same_vocabulary,
    check_same_width,
)
from spin.checkpoint.configs import PART_CLASSES, SCALING_FACTORS
from spin.checkpoint.folder import (
    PARTS,
    SCHEDULER_CONFIG,
    Folder,
    StoredNetwork,
    write_model_index,
    write_network,
)
from spin.checkpoint.hub import locate
from spin.checkpoint.names import add_text_prefix, text_names, transpose_projection, unfuse
from spin.checkpoint.single_file import SingleFile, write_single_file
from spin.checkpoint.tensors import config_errors, fill
from spin.checkpoint.tokenizer import FILES, write_tokenizer
from spin.checkpoint.weights import WEIGHT_FILES, list_weight_files
from spin.infra.errors import InputError
from spin.infra.files import hash_files, write_json
from spin.scheduler import Scheduler
from spin.text import TextEncoder, Tokenizer, encode_for_sdxl
from spin.unet import UNet
from spin.vae import AutoencoderKL


@dataclass
class Pipeline:
    """The parts of a text-to-image model. The networks are in eval mode."""

    unet: UNet | None  # None in what several models share
    vae: AutoencoderKL
    text_encoder: TextEncoder
    scheduler: Scheduler
    text_encoder_2: TextEncoder | None = None  # SDXL's

    def encode_prompts(self, prompts: list[str | None], sizes: Tensor | None = None) -> Tensor:
        """Return the context of prompts, [B,77,D], or [B,78,D] for SDXL.

        prompts: None is no prompt: for SDXL all zeros, for others the empty prompt.
        sizes: [B,6], for SDXL alone: see `spin.unet.PooledAndSizesEmbedding`. None: whole images of
            the size that the UNet was trained at.
        """
        if self.text_encoder_2 is None:
            return self.text_encoder([prompt or "" for prompt in prompts])
        if sizes is None:
            sizes = sizes_of_whole_images(*default_size(self), len(prompts))
        return encode_for_sdxl(self.text_encoder, self.text_encoder_2, prompts, sizes)

    @property
    def reads_sizes(self) -> bool:
        """Whether contexts depend on sizes, as they do for SDXL."""
        return self.text_encoder_2 is not None

    def freeze(self) -> "Pipeline":
        """Switch gradients off for all weights, and return the pipeline itself."""
        for network in (self.unet, self.vae, self.text_encoder, self.text_encoder_2):
            if network is not None:
                network.requires_grad_(False)
        return self


def default_size(pipe) -> tuple[int, int]:
    """Return the height and width, in pixels, of the images that the UNet was trained on."""
    size = pipe.unet.sample_size
    height, width = size if isinstance(size, list) else (size, size)
    return height * pipe.vae.downscale, width * pipe.vae.downscale


def sizes_of_whole_images(height: int, width: int, count: int) -> Tensor:
    """Return what SDXL is told of images that are neither cut nor resized: sizes [count,6]."""
    return torch.tensor([[height, width, 0, 0, height, width]] * count)


# ---- Loading -------------------------------------------------------------------------------------
def load_pipeline(
    source: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    unet: str | Path | None = None,
    prediction_type: str | None = None,
) -> Pipeline:
    """Load a model.

    source: a diffusers folder, a hub id "org/name", or a file in the original layout
    dtype:  of all weights
    device: where the weights are put
    unet:   another source, or its folder unet/ alone, to take the UNet from
    prediction_type:
            "epsilon" or "v_prediction", whatever the files say; None for what they say

    The UNet predicts the noise eps, or with prediction_type "v_prediction" the velocity
    v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0: SD-2.x at 768 px.

    Raises InputError if anything is missing, damaged, of another architecture, or inconsistent with
    its config; if parts do not belong together; and if the files do not say what the UNet predicts,
    or contradict each other.
    """
    checkpoint = open_checkpoint(locate(source))
    unet_checkpoint = checkpoint
    if unet is not None:
        unet_checkpoint = open_checkpoint(locate(unet, parts=("unet", "scheduler")))

    # what is stored
    stored_unet = unet_checkpoint.read_network("unet")
    stored_vae = checkpoint.read_network("vae")
    stored_text = checkpoint.read_network("text_encoder")
    tokenizer = checkpoint.read_tokenizer("tokenizer", stored_text.config)
    scheduler = checkpoint.read_scheduler(prediction_type)
    if unet is not None:
        unet_scheduler = unet_checkpoint.read_scheduler_of_unet(prediction_type)
        if unet_scheduler is not None:
            check_same_schedule(scheduler, unet_scheduler, source, unet)

    # the networks
    network = make_network(UNet, stored_unet, dtype, device)
    vae = make_network(AutoencoderKL, stored_vae, dtype, device)
    if unet is not None:
        check_same_scaling(vae, unet_checkpoint, source, unet)
    text_encoder = make_text_encoder(stored_text, tokenizer, dtype, device)
    text_encoder_2 = None
    if checkpoint.has_two_text_encoders():
        stored_text = checkpoint.read_network("text_encoder_2")
        tokenizer = checkpoint.read_tokenizer("tokenizer_2", stored_text.config)
        text_encoder_2 = make_text_encoder(stored_text, tokenizer, dtype, device, projects=True)
    check_same_width(network, text_encoder, text_encoder_2, source, unet or source)
    check_own_vae(network, vae, source)

    return Pipeline(network, vae, text_encoder, scheduler, text_encoder_2)


def load_unet(
    source: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> UNet:
    """Load the UNet of a checkpoint. Of a folder or hub id, unet/ alone is enough."""
    checkpoint = open_checkpoint(locate(source, parts=("unet",)))
    return make_network(UNet, checkpoint.read_network("unet"), dtype, device)


def open_checkpoint(path: Path) -> Folder | SingleFile:
    if path.is_file():
        return SingleFile(path)
    return Folder(path)


def check_own_vae(unet: UNet, vae: AutoencoderKL, source: str | Path) -> None:
    """Raise InputError if SDXL's UNet stands beside the VAE of Stable Diffusion 1.x and 2.x.

    The reverse is accepted: some models of SD-1.x's architecture are trained with SDXL's VAE.
    """
    foreign = SCALING_FACTORS["1.x"]
    if unet.add_embedding is not None and vae.scaling_factor == foreign:
        raise InputError(
            f"{source}: its UNet is for latents times {SCALING_FACTORS['XL']}, but its VAE's "
            f"scaling_factor is {foreign}: they do not belong together"
        )


def check_same_scaling(
    vae: AutoencoderKL,
    unet_checkpoint: Folder | SingleFile,
    source: str | Path,
    unet_source: str | Path,
) -> None:
    """Raise InputError if a UNet from another checkpoint is for latents of another scale.

    source, unet_source: the names of the model and of the other checkpoint, for messages
    """
    scaling_factor = unet_checkpoint.read_scaling_factor_of_unet()
    if scaling_factor not in (None, vae.scaling_factor):
        message = f"the UNet of {unet_source} is for latents times {scaling_factor}"
        raise InputError(
            f"{message} (scaling_factor), but {source} states {vae.scaling_factor}: they do not "
            "belong together"
        )


def make_network(
    network_class: type[nn.Module], stored: StoredNetwork, dtype: torch.dtype, device: str
) -> nn.Module:
    """Build a network from its config and fill it with its tensors."""
    with config_errors(stored.where), torch.device("meta"):  # meta: no memory for weights yet
        network = network_class(stored.config)
    return fill(network, stored.tensors, stored.where, dtype, device)


def make_text_encoder(
    stored: StoredNetwork,
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    device: str,
    projects: bool = False,
) -> TextEncoder:
    """Build a text encoder from its config and tokenizer, and fill it with its tensors."""
    with config_errors(stored.where), torch.device("meta"):
        text_encoder = TextEncoder(stored.config, tokenizer, projects)
    check_same_vocabulary(text_encoder, stored.where)
    names = text_names(stored.config, projects)
    tensors = transpose_projection(stored.tensors)
    fill(text_encoder.tower, tensors, stored.where, dtype, device, names)
    return text_encoder.eval()


# ---- Saving --------------------------------------------------------------------------------------
def save_pipeline(pipe: Pipeline, folder: str | Path) -> None:
    """Write a model in the layout of diffusers.

    StableDiffusionPipeline.from_pretrained can load it, or StableDiffusionXLPipeline's.
    load_pipeline restores it bit for bit.
    """
    folder = Path(folder)
    unet_config = dict(pipe.unet.config)
    unet_config["_class_name"] = "UNet2DConditionModel"
    write_network(folder / "unet", "unet", unet_config, pipe.unet.state_dict())

    vae_config = dict(pipe.vae.config)
    vae_config["_class_name"] = "AutoencoderKL"
    vae_config["scaling_factor"] = pipe.vae.scaling_factor
    write_network(folder / "vae", "vae", vae_config, pipe.vae.state_dict())

    write_text_encoder(folder, pipe.text_encoder)
    if pipe.text_encoder_2 is not None:
        write_text_encoder(folder, pipe.text_encoder_2, "_2", projects=True)

    scheduler_config = {"_class_name": "DDIMScheduler"}  # unless the config names another
    scheduler_config.update(pipe.scheduler.config)
    write_json(folder / "scheduler" / SCHEDULER_CONFIG, scheduler_config)
    is_xl = pipe.text_encoder_2 is not None
    write_model_index(folder, scheduler_config["_class_name"], is_xl)


def write_text_encoder(
    folder: Path, text_encoder: TextEncoder, suffix: str = "", projects: bool = False
) -> None:
    """Write the text encoder and the tokenizer of a model, into folders whose names end alike."""
    config = dict(text_encoder.config)
    config["architectures"] = [PART_CLASSES[f"text_encoder{suffix}"][0]]
    config["model_type"] = "clip_text_model"
    tensors = unfuse(text_encoder.tower.state_dict(), text_names(config, projects))
    tensors = transpose_projection(tensors)
    tensors = {add_text_prefix(name): tensor for name, tensor in tensors.items()}
    write_network(folder / f"text_encoder{suffix}", f"text_encoder{suffix}", config, tensors)
    write_tokenizer(folder / f"tokenizer{suffix}", text_encoder.tokenizer)


def save_single_file(pipe: Pipeline, path: str | Path) -> None:
    """Write a model as one .safetensors file in the original layout, which other programs read.

    load_pipeline gives back every bit. Raises InputError if a network's settings, the noise
    schedule, the latents' scale or the tokenizer are not Stable Diffusion's.
    """
    write_single_file(
        Path(path),
        pipe.unet,
        pipe.vae,
        pipe.text_encoder,
        pipe.scheduler,
        pipe.text_encoder_2,
    )


def hash_checkpoint(path: str | Path) -> str:
    """Return 16 hexadecimal digits of SHA-256 over all that is read from a checkpoint.

    path: a folder, its folder unet/ alone, or a single file

    Other files beside them, such as the same weights in half precision, change nothing. Nor does
    model_index.json: what it says is either what is assumed, or refused.
    """
    path = Path(path)
    if path.is_file():
        yaml = path.with_suffix(".yaml")
        return hash_files([path, yaml] if yaml.exists() else [path])
    parts = [part for part in PARTS if (path / part).is_dir()]
    if not parts:
        return hash_files(files_of_part(path, "unet"))
    files = []
    for part in parts:
        files += files_of_part(path / part, part)
    return hash_files(files)


def files_of_part(folder: Path, part: str) -> list[Path]:
    """Return a part's files whose contents may matter, sorted by name.

    folder: the part's own folder, such as unet/
    """
    if part in WEIGHT_FILES:
        files = [folder / "config.json", *list_weight_files(folder, part)]
    elif part.startswith("tokenizer"):
        files = [folder / name for name in FILES]
    else:
        files = [folder / SCHEDULER_CONFIG]
    return sorted(filter(Path.exists, files))
