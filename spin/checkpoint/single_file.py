"""The single-file layout in which Stable Diffusion was first published, and its tensors' names.

    model.diffusion_model.*   UNet
    first_stage_model.*       VAE
    cond_stage_model.*        text tower; conditioner.* in SDXL, which has two

Such a file holds no config: that of SD_1, SD_2 or SDXL in configs.py is assumed. Other tensors must
agree with it (alphas_cumprod, ...) or be LEFTOVERS, which are not read (model_ema.*, ...).
"""

from pathlib import Path

import torch
from torch import Tensor

from spin.checkpoint.agreement import (
    ASK,
    ends_at_pure_noise,
    read_prediction_type,
    refuse_other_statements,
)
from spin.checkpoint.configs import (
    FOREIGN,
    LEFTOVERS,
    OTHER_INPUTS,
    SCALE_TENSOR,
    SCALING_FACTORS,
    SCHEDULE_TENSORS,
    SD_1,
    SD_2,
    SDXL,
    SETTINGS,
    V_MARKER,
    ZERO_SNR_MARKER,
)
from spin.checkpoint.folder import StoredNetwork, write_safetensors
from spin.checkpoint.names import (
    ORIGINAL_RESNET_NAMES,
    ORIGINAL_UNET_NAMES,
    ORIGINAL_VAE_NAMES,
    replace_parts,
    text_names,
    transpose_projection,
    unfuse,
)
from spin.checkpoint.tensors import config_errors, first_five, read_tensors
from spin.checkpoint.tokenizer import clip_tokenizer
from spin.infra.errors import InputError
from spin.scheduler import Scheduler
from spin.text import TextEncoder, Tokenizer
from spin.unet import UNet, depth_per_block, heads_per_block
from spin.vae import AutoencoderKL

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model."  # how the next three prefixes begin
TEXT_1_PREFIX = "cond_stage_model.transformer.text_model."  # SD-1.x; then transformers' names
TEXT_2_PREFIX = "cond_stage_model.model."  # SD-2.x; then open_clip's names, which are ours
# SDXL: transformers' names in the first, ours in the second
XL_TEXT_PREFIX = "conditioner.embedders."
TEXT_PREFIXES = {
    "1.x": {"text_encoder": TEXT_1_PREFIX},
    "2.x": {"text_encoder": TEXT_2_PREFIX},
    "XL": {
        "text_encoder": f"{XL_TEXT_PREFIX}0.transformer.text_model.",
        "text_encoder_2": f"{XL_TEXT_PREFIX}1.model.",
    },
}
OLD_TEXT_PREFIX = "cond_stage_model.transformer."  # NovelAI's SD-1.x and merges with it
# what follows OLD_TEXT_PREFIX in the names of a text tower's tensors
OLD_TEXT_MODULES = ("embeddings.", "encoder.", "final_layer_norm.")

# what each network is called in messages
NETWORKS = {
    "unet": "UNet",
    "vae": "VAE",
    "text_encoder": "text tower",
    "text_encoder_2": "second text tower",
}

AVERAGE_PREFIX = "model_ema."
AVERAGE = f"an average of a UNet's weights ({AVERAGE_PREFIX}*), which is not read"

# a tensor whose width is that of the context: 768 in SD-1.x, 1024 in SD-2.x
CONTEXT_WEIGHT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
# a tensor that only SDXL has, and one whose channels are those of what a UNet reads
ADDED_WEIGHT = "model.diffusion_model.label_emb.0.0.weight"
INPUT_WEIGHT = "model.diffusion_model.input_blocks.0.0.weight"


# ---- Reading -------------------------------------------------------------------------------------
class SingleFile:
    """A checkpoint in one file. Raises InputError if the file is of another model."""

    def __init__(self, path: Path):
        self.path = path
        tensors = read_tensors(path)
        refuse_other_models(tensors, path)
        self.has_average = any(name.startswith(AVERAGE_PREFIX) for name in tensors)
        self.tensors = without_leftovers(tensors)
        self.family = find_family(self.tensors)
        self.configs = assumed_configs(self.family)
        refuse_unknown_tensors(self.tensors, path, self.names_of_text_towers())

    def has_two_text_encoders(self) -> bool:
        """Return whether the model is an SDXL."""
        return self.family == "XL"

    def names_of_text_towers(self) -> list[str]:
        """Return the names of the text towers' tensors, or their beginnings."""
        names = []
        if self.family == "1.x":
            names += [OLD_TEXT_PREFIX + module for module in OLD_TEXT_MODULES]
        for part, prefix in TEXT_PREFIXES[self.family].items():
            if not has_our_names(prefix):
                names.append(prefix)
                continue
            for _, ours in text_names(self.configs[part], part == "text_encoder_2"):
                names.append(prefix + ours)
        return names

    def read_network(self, part: str) -> StoredNetwork:
        """Return "unet", "vae", "text_encoder" or "text_encoder_2", with the names in a folder.

        Raises InputError if it is not in the file.
        """
        network = NETWORKS[part]
        text_prefixes = {"text_encoder": TEXT_PREFIX}  # of any SD-1.x or SD-2.x
        if self.family == "XL":
            text_prefixes = TEXT_PREFIXES["XL"]
        prefix = {"unet": UNET_PREFIX, "vae": VAE_PREFIX, **text_prefixes}[part]
        if not any(name.startswith(prefix) for name in self.tensors):
            message = f"holds no {network} ({prefix}*)"
            if part == "unet" and self.has_average:
                message += f", only {AVERAGE}"
            raise InputError(f"{self.path}: {message}; use a file with all three networks")
        config = self.configs[part]
        if part == "unet":
            tensors = from_original(self.tensors, UNET_PREFIX, original_unet_names(config))
        elif part == "vae":
            tensors = from_original(self.tensors, VAE_PREFIX, original_vae_names(config))
            tensors = convolutions_to_linear(tensors)
        else:
            tensors = self.read_text_tensors(part)
        return StoredNetwork(config, tensors, self.path)

    def read_text_tensors(self, part: str) -> dict[str, Tensor]:
        """Return a text tower's tensors by transformers' names, without "text_model.".

        part: "text_encoder" or "text_encoder_2"

        Raises InputError if a tensor is there under an old and a new name, with other values.
        """
        prefix = TEXT_PREFIXES[self.family][part]
        tensors = with_prefix(self.tensors, prefix)
        if has_our_names(prefix):
            tensors = unfuse(tensors, text_names(self.configs[part], part == "text_encoder_2"))
            return transpose_projection(tensors)
        older = with_prefix(self.tensors, OLD_TEXT_PREFIX)
        for name, tensor in older.items():
            if not name.startswith(OLD_TEXT_MODULES):
                continue  # "text_model.", which `tensors` has already
            if name in tensors and not torch.equal(tensors[name], tensor):
                message = f"two different tensors, with and without text_model.: {name}"
                advice = "use a file that was not merged"
                raise InputError(f"{self.path}: its text tower has {message}; {advice}")
            tensors[name] = tensor
        return tensors

    def read_tokenizer(self, part: str, text_config: dict) -> Tokenizer:
        return clip_tokenizer(text_config)

    def read_scaling_factor_of_unet(self) -> float:
        """Return the scale of the latents that the UNet was trained with."""
        return SCALING_FACTORS[self.family]

    def read_scheduler(self, prediction_type: str | None = None) -> Scheduler:
        """Return the noise schedule and what the UNet predicts.

        Raises InputError if the file does not say what, and neither does `prediction_type`. An
        SD-1.x or SDXL need not say that it predicts the noise.
        """
        refuse_other_statements(self.path, self.tensors, self.family)
        config = dict(self.configs["scheduler"])
        if ends_at_pure_noise(self.path, self.tensors):
            config["rescale_betas_zero_snr"] = True
            config["prediction_type"] = None  # hardly the noise: the file must say
        if prediction_type is None:
            prediction_type = read_prediction_type(self.path, self.tensors)
        if prediction_type is not None:
            config["prediction_type"] = prediction_type
        if config["prediction_type"] is None:
            message = "does not say whether its UNet predicts epsilon or v_prediction"
            raise InputError(f"{self.path}: {message}; {ASK}")
        with config_errors(self.path):
            return Scheduler(config)

    def read_scheduler_of_unet(self, prediction_type: str | None = None) -> Scheduler:
        return self.read_scheduler(prediction_type)


def refuse_other_models(tensors: dict[str, Tensor], path: Path) -> None:
    """Raise InputError unless the tensors' names are those of an SD-1.x, SD-2.x or SDXL."""
    for part_of_name, model in FOREIGN.items():
        if any(part_of_name in name for name in tensors):
            raise InputError(f"{path}: not Stable Diffusion 1.x, 2.x or XL base, but {model}")
    for channels, model in OTHER_INPUTS.items():
        if INPUT_WEIGHT in tensors and tensors[INPUT_WEIGHT].shape[1:2] == (channels,):
            raise InputError(f"{path}: {model}")
    prefixes = (UNET_PREFIX, VAE_PREFIX, TEXT_PREFIX, XL_TEXT_PREFIX)
    if not any(name.startswith(prefixes) for name in tensors):
        if any(name.startswith(AVERAGE_PREFIX) for name in tensors):
            message = f"holds only {AVERAGE}; use a file with all three networks"
            raise InputError(f"{path}: {message}")
        message = "not a complete Stable Diffusion; put a network alone into a diffusers folder"
        raise InputError(f"{path}: {message}")


def without_leftovers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file that are not LEFTOVERS of its training."""
    prefixes = tuple(entry for entry in LEFTOVERS if entry.endswith("."))
    kept = {}
    for name, tensor in tensors.items():
        if name not in LEFTOVERS and not name.startswith(prefixes):
            kept[name] = tensor
    return kept


def refuse_unknown_tensors(tensors: dict[str, Tensor], path: Path, text_names: list[str]) -> None:
    """Raise InputError if some tensors belong to no network of Stable Diffusion, and state nothing.

    text_names: the names of the text tower's tensors, or their beginnings

    Those of the UNet and of the VAE are compared with the networks later, one by one.
    """
    statements = (V_MARKER, ZERO_SNR_MARKER, SCALE_TENSOR, *SCHEDULE_TENSORS)
    prefixes = (UNET_PREFIX, VAE_PREFIX, "edm_", *text_names)
    unknown = []
    for name in sorted(tensors):
        if name not in statements and not name.startswith(prefixes):
            unknown.append(name)
    if unknown:
        message = f"holds tensors of no network of Stable Diffusion ({first_five(unknown)})"
        raise InputError(f"{path}: {message}; use a file without them, since they are not read")


def find_family(tensors: dict[str, Tensor]) -> str:
    """Return "1.x", "2.x" or "XL", by a file's text towers or, without them, by its UNet."""
    prefixes = {"XL": XL_TEXT_PREFIX, "2.x": TEXT_2_PREFIX, "1.x": TEXT_PREFIX}
    for family, prefix in prefixes.items():
        if any(name.startswith(prefix) for name in tensors):
            return family
    if ADDED_WEIGHT in tensors:
        return "XL"
    weight = tensors.get(CONTEXT_WEIGHT)
    is_sd_2 = weight is not None and weight.shape[-1] == SD_2["unet"]["cross_attention_dim"]
    return "2.x" if is_sd_2 else "1.x"


def assumed_configs(family: str) -> dict[str, dict]:
    """Return the configs of a family's files, one per part."""
    return {"1.x": SD_1, "2.x": SD_2, "XL": SDXL}[family]


def has_our_names(text_prefix: str) -> bool:
    """Return whether open_clip's names follow a text tower's prefix, and not transformers'."""
    return text_prefix.endswith(".model.")


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
    scheduler: Scheduler,
    text_encoder_2: TextEncoder | None = None,
) -> None:
    """Write a .safetensors file in the original layout.

    text_encoder_2: SDXL's

    Raises InputError if the networks' settings, the noise schedule, the latents' scale or the
    tokenizer are not Stable Diffusion's, since the file cannot state them.
    """
    text_encoders = {"text_encoder": text_encoder}
    family = "2.x" if text_encoder.config.get("hidden_act") == "gelu" else "1.x"
    if text_encoder_2 is not None:
        text_encoders["text_encoder_2"] = text_encoder_2
        family = "XL"
    configs = assumed_configs(family)
    refuse_other_settings(path, "unet", unet.config, configs)
    refuse_other_settings(path, "vae", vae.config, configs)
    for part, encoder in text_encoders.items():
        refuse_other_settings(path, part, encoder.config, configs)
        refuse_other_tokenizers(path, encoder)
    refuse_other_scales(path, vae, SCALING_FACTORS[family])
    refuse_other_schedules(path, scheduler)

    tensors = {}
    unet_state = unet.state_dict()
    for name, original in original_unet_names(unet.config).items():
        tensors[original] = unet_state[name]

    vae_state = linear_to_convolutions(vae.state_dict())
    for name, original in original_vae_names(vae.config).items():
        tensors[original] = vae_state[name]

    for part, encoder in text_encoders.items():
        prefix = TEXT_PREFIXES[family][part]
        text_state = encoder.tower.state_dict()
        if not has_our_names(prefix):
            text_state = unfuse(text_state, text_names(encoder.config))
        for name, tensor in text_state.items():
            tensors[prefix + name] = tensor

    # where other programs look: metadata, and the names of empty tensors
    empty = torch.empty(0, dtype=unet.conv_in.weight.dtype)
    if scheduler.prediction_type == "v_prediction":
        tensors[V_MARKER] = empty
    if scheduler.config.get("rescale_betas_zero_snr", False):
        tensors[ZERO_SNR_MARKER] = empty
    prediction = scheduler.prediction_type.removesuffix("_prediction")
    write_safetensors(path, tensors, {"format": "pt", "modelspec.prediction_type": prediction})


def refuse_other_settings(path: Path, part: str, config: dict, configs: dict[str, dict]) -> None:
    """Raise InputError unless a network's settings are those that a file's reader assumes.

    part:    "unet", "vae", "text_encoder" or "text_encoder_2"
    config:  the network's
    configs: SD_1, SD_2 or SDXL
    """
    network = NETWORKS[part]
    own = settings_in_use(part, config)
    assumed = settings_in_use(part, configs[part])
    for key, value in own.items():
        if value != assumed[key]:
            message = f"a single file states no {key}; it would mean {assumed[key]}"
            raise InputError(f"{path}: {message}, not the {network}'s {value}")


def settings_in_use(part: str, config: dict) -> dict:
    """Return the SETTINGS of a network, with the defaults of those that its config leaves out."""
    settings = {}
    for key, default in SETTINGS[part].items():
        settings[key] = config.get(key, default)
    if part == "unet":
        settings["attention_head_dim"] = heads_per_block(config)  # one number, or one per block
        settings["transformer_layers_per_block"] = depth_per_block(config)  # likewise
    return settings


def refuse_other_scales(path: Path, vae: AutoencoderKL, expected: float) -> None:
    """Raise InputError unless the latents' scale is the one that a file's reader assumes."""
    if vae.scaling_factor != expected:
        message = f"a single file states no scaling_factor; it would mean {expected}"
        raise InputError(f"{path}: {message}, not the VAE's {vae.scaling_factor}")


def refuse_other_tokenizers(path: Path, text_encoder: TextEncoder) -> None:
    """Raise InputError unless the tokenizer is the one that a single file's reader assumes."""
    own = text_encoder.tokenizer
    assumed = clip_tokenizer(text_encoder.config)
    same_rows = (own.pad_token, own.length) == (assumed.pad_token, assumed.length)
    if own.vocab != assumed.vocab or not same_rows:
        message = "a single file states no tokenizer; it would mean CLIP's, padded with"
        raise InputError(f"{path}: {message} {assumed.pad_token!r} to {assumed.length} tokens")


def refuse_other_schedules(path: Path, scheduler: Scheduler) -> None:
    """Raise InputError unless the noise schedule is Stable Diffusion's, rescaled or not.

    So must be the timesteps at which sampling begins and ends.
    """
    zero_snr = scheduler.config.get("rescale_betas_zero_snr", False)
    published = Scheduler({**SD_1["scheduler"], "rescale_betas_zero_snr": zero_snr})
    if not torch.equal(scheduler.alphas_cumprod, published.alphas_cumprod):
        message = "a single file states no betas, so only those of Stable Diffusion can be saved"
        raise InputError(f"{path}: {message}")
    if scheduler.steps_offset != published.steps_offset:
        message = f"a single file states no steps_offset; it would mean {published.steps_offset}"
        raise InputError(f"{path}: {message}, not {scheduler.steps_offset}")
    if scheduler.final_alpha_cumprod != published.final_alpha_cumprod:
        message = "a single file states no set_alpha_to_one; it would mean False, not True"
        raise InputError(f"{path}: {message}")


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
