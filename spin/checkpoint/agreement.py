"""What a checkpoint states in several places, and what its parts must agree on.

Of a folder, the config of its scheduler states the noise schedule and what the UNet predicts. A
single file has no config. Its schedule is Stable Diffusion's, perhaps rescaled to end at pure
noise; what its UNet predicts may be stated by its metadata, by empty tensors, and by a .yaml beside
it. All are read. If they disagree, the user is asked.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from spin.checkpoint.configs import (
    FOREIGN_SCHEDULERS,
    PREDICTION_KEYS,
    PREDICTION_METADATA,
    PREDICTION_YAML,
    V_MARKER,
    YAML_BUILT_IN,
    ZERO_SNR_MARKER,
)
from spin.infra.errors import InputError
from spin.infra.files import read_text
from spin.scheduler import PREDICTION_TYPES, Scheduler
from spin.text import TextEncoder
from spin.unet import UNet

ASK = "say which with --prediction-type"


# ---- Single files --------------------------------------------------------------------------------
def refuse_other_schedules(path: Path, tensor_names: Iterable[str]) -> None:
    """Raise InputError if a single file, or the .yaml beside it, states another noise schedule."""
    for name in tensor_names:
        if name.startswith("edm_"):  # as ComfyUI marks them
            raise InputError(f"{path}: its tensor {name} says EDM: {FOREIGN_SCHEDULERS['EDM']}")
    yaml_path, text = read_yaml(path)
    scaling = re.search(r"denoiser_scaling\.(\w*EDM\w*)", text)
    if scaling:
        raise InputError(f"{yaml_path}: {scaling[1]}: {FOREIGN_SCHEDULERS['EDM']}")
    for key, expected in YAML_BUILT_IN.items():
        for value in yaml_values(text, key):
            if to_number(value) != expected:
                message = f"{key} is {value}, in Stable Diffusion 1.x and 2.x it is {expected}"
                raise InputError(f"{yaml_path}: {message}")


def read_prediction_type(path: Path, tensor_names: Iterable[str]) -> str | None:
    """Return what a single file's UNet predicts, or None if the file does not say.

    Raises InputError if it says so in two ways that differ, or in unknown words.
    """
    statements = [
        *predictions_in_tensors(tensor_names),
        *predictions_in_metadata(path),
        *predictions_in_yaml(path),
    ]
    if not statements:
        return None
    first_place, first = statements[0]
    for place, prediction_type in statements:
        if prediction_type not in PREDICTION_TYPES:
            allowed = " or ".join(PREDICTION_TYPES)
            raise InputError(f"{path}: {place} says {prediction_type!r}, not {allowed}; {ASK}")
        if prediction_type != first:
            message = f"{first_place} says {first}, but {place} says {prediction_type}"
            raise InputError(f"{path}: {message}; {ASK}")
    return first


def predictions_in_tensors(tensor_names: Iterable[str]) -> list[tuple[str, str]]:
    """Return what a file's tensors say that its UNet predicts.

    One pair for each statement: the place, for messages, and the prediction type.
    """
    if V_MARKER in tensor_names:
        return [(f"its tensor {V_MARKER}", "v_prediction")]
    return []


def predictions_in_metadata(path: Path) -> list[tuple[str, str]]:
    """Return the same for a file's metadata.

    Unknown words of PREDICTION_KEYS are kept as they are, and refused by `read_prediction_type`.
    """
    metadata = read_metadata(path)
    statements = []
    for key, words in PREDICTION_METADATA.items():
        word = metadata.get(key)
        if word in words or (word is not None and key in PREDICTION_KEYS):
            statements.append((f"its metadata {key}", words.get(word, word)))
    return statements


def predictions_in_yaml(path: Path) -> list[tuple[str, str]]:
    """Return the same for the .yaml beside a file. Unknown words are kept as they are."""
    yaml_path, text = read_yaml(path)
    words = yaml_values(text, "parameterization")
    words += re.findall(r"denoiser_scaling\.(\w+)", text)
    is_of_original_code = re.search(r"\.ddpm\w*\.", text) is not None  # names its class
    if not words and is_of_original_code:
        words = ["eps"]  # that class's default
    return [(yaml_path.name, PREDICTION_YAML.get(word, word)) for word in words]


def ends_at_pure_noise(path: Path, tensor_names: Iterable[str]) -> bool:
    """Return whether a file states that its schedule is rescaled to a terminal SNR of zero."""
    _, yaml = read_yaml(path)
    in_yaml = [value.lower() for value in yaml_values(yaml, "rescale_betas_zero_snr")]
    in_metadata = read_metadata(path).get("ss_zero_terminal_snr")  # kohya's
    return ZERO_SNR_MARKER in tensor_names or in_metadata == "True" or "true" in in_yaml


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a .safetensors file; of any other file, nothing."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError:  # a pickle
        return {}


def read_yaml(path: Path) -> tuple[Path, str]:
    """Return the path of the .yaml beside a single file, and its text without comments.

    The text is "" if there is no such file.
    """
    yaml_path = path.with_suffix(".yaml")
    if not yaml_path.exists():
        return yaml_path, ""
    return yaml_path, re.sub("#.*", "", read_text(yaml_path))


def yaml_values(text: str, key: str) -> list[str]:
    """Return all plain values of a key, however deep it is nested.

    This is all of YAML that the configs of single files need.
    """
    return re.findall(rf"\b{key}[\"']?\s*:\s*[\"']?([\w.+-]+)", text)


def to_number(value: str) -> float | str:
    """Return the number that a string stands for, or the string."""
    try:
        return float(value)
    except ValueError:
        return value


# ---- Parts ---------------------------------------------------------------------------------------
def check_same_schedule(
    own: Scheduler, other: Scheduler, source: str | Path, unet_source: str | Path
) -> None:
    """Raise InputError unless a UNet from another checkpoint fits a model's scheduler.

    own, source:        the model's scheduler, and the model's name for messages
    other, unet_source: the scheduler and the name of the checkpoint that the UNet is from
    """
    if own.prediction_type != other.prediction_type:
        message = f"the UNet of {unet_source} predicts {other.prediction_type}"
        raise InputError(f"{message}, but {source} states {own.prediction_type}; {ASK}")
    same_length = own.num_train_timesteps == other.num_train_timesteps
    # the same betas, computed or written out, may differ in rounding
    if not same_length or not torch.allclose(own.alphas_cumprod, other.alphas_cumprod, atol=1e-5):
        message = f"the UNet of {unet_source} was trained with another noise schedule"
        raise InputError(f"{message} than {source} states: they do not belong together")


def check_same_vocabulary(text_encoder: TextEncoder, source: Path) -> None:
    """Raise InputError unless a text encoder has one embedding for each token of its tokenizer.

    source: the text encoder's folder or file, for messages
    """
    vocab_size = text_encoder.config["vocab_size"]
    num_tokens = len(text_encoder.tokenizer.vocab)
    if vocab_size != num_tokens:
        message = f"{vocab_size} embeddings for {num_tokens} tokens of the tokenizer"
        advice = "tokens added by textual inversion are not supported: use the model without them"
        raise InputError(f"{source}: {message}; {advice}")


def check_same_width(
    unet: UNet, text_encoder: TextEncoder, source: str | Path, unet_source: str | Path
) -> None:
    """Raise InputError unless the UNet reads contexts of the width that the text encoder makes."""
    read = unet.config["cross_attention_dim"]
    made = text_encoder.config["hidden_size"]
    if read != made:
        message = f"the UNet of {unet_source} reads text of {read} channels (cross_attention_dim)"
        raise InputError(
            f"{message}, but the text encoder of {source} makes {made} (hidden_size): they do not "
            "belong together"
        )
