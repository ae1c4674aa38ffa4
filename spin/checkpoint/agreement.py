"""What a checkpoint states in several places, and what its parts must agree on.

Of a folder, the config of its scheduler states the noise schedule and what the UNet predicts. A
single file has no config. Its schedule is Stable Diffusion's, perhaps rescaled to end at pure
noise; what its UNet predicts may be stated by its metadata, by empty tensors, and by a .yaml beside
it. All are read. If they disagree, the user is asked. What is said of anything else must be what is
assumed of every such file.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spin.checkpoint.configs import (
    ARCHITECTURE_KEYS,
    BOOLEANS,
    DISCRETIZATION,
    FOREIGN_ARCHITECTURES,
    FOREIGN_SCHEDULERS,
    PREDICTION_KEYS,
    PREDICTION_METADATA,
    PREDICTION_YAML,
    PREDICTION_YAML_KEYS,
    SCALE_TENSOR,
    SCALING_FACTORS,
    SCHEDULE_TENSORS,
    SD_1,
    TEXT_LAYERS,
    V_MARKER,
    YAML_BUILT_IN,
    ZERO_SNR_KEYS,
    ZERO_SNR_MARKER,
)
from spin.infra.errors import InputError
from spin.infra.files import read_text
from spin.scheduler import PREDICTION_TYPES, Scheduler, rescale_to_zero_snr
from spin.text import TextEncoder
from spin.unet import NUM_TOKENS, UNet

ASK = "say which with --prediction-type"

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


# ---- Single files --------------------------------------------------------------------------------
def refuse_other_statements(path: Path, tensors: dict[str, Tensor], family: str) -> None:
    """Raise InputError if a single file, or the .yaml beside it, states what is not assumed of it.

    family: "1.x", "2.x" or "XL"

    That is: another noise schedule, scale of the latents, layer of the text tower, or architecture.
    What the UNet predicts, and whether the schedule ends at pure noise, may be stated.
    """
    refuse_other_tensors(path, tensors, family)
    refuse_other_yaml(path, family)
    metadata = read_metadata(path)
    for key in ARCHITECTURE_KEYS:
        word = metadata.get(key, "")
        foreign = [part for part in FOREIGN_ARCHITECTURES if part in word.lower()]
        if foreign and foreign != [family.lower()]:
            message = f"its metadata {key} says {word}: not Stable Diffusion {family}"
            raise InputError(f"{path}: {message}")


def refuse_other_tensors(path: Path, tensors: dict[str, Tensor], family: str) -> None:
    """Raise InputError if a single file holds the tensors of another noise schedule or scale."""
    for name in tensors:
        if name.startswith("edm_"):  # as ComfyUI marks them
            raise InputError(f"{path}: its tensor {name} says EDM: {FOREIGN_SCHEDULERS['EDM']}")
    plain = Scheduler(SD_1["scheduler"]).alphas_cumprod
    rescaled = rescale_to_zero_snr(plain)
    for name, alphas_cumprod in stored_schedules(tensors):
        if not is_close(alphas_cumprod, plain) and not is_close(alphas_cumprod, rescaled):
            message = f"its tensor {name} is of another noise schedule than Stable Diffusion's"
            raise InputError(f"{path}: {message}")
    expected = SCALING_FACTORS[family]
    scale = tensors.get(SCALE_TENSOR, torch.tensor(expected))
    if not is_close(scale.flatten(), torch.tensor([expected])):
        message = f"its tensor {SCALE_TENSOR} is not {expected}"
        message += f", which scales the latents of Stable Diffusion {family}"
        raise InputError(f"{path}: {message}")


def stored_schedules(tensors: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Return the noise schedules that a single file holds: a tensor's name, and alpha_bar_t.

    Those in float8 are left out: they are too coarse to be told apart.
    """
    schedules = []
    for name in SCHEDULE_TENSORS:
        if name not in tensors or tensors[name].dtype in FLOAT8:
            continue
        values = tensors[name].double()
        if name == "betas":
            values = torch.cumprod(1 - values, dim=0)
        elif name == "denoiser.sigmas":  # noise / signal, in either order
            values = 1 / (1 + values.sort().values ** 2)
        schedules.append((name, values))
    return schedules


def is_close(stored: Tensor, expected: Tensor) -> bool:
    """Return whether a stored tensor may be the expected one, rounded to half precision."""
    if stored.shape != expected.shape:
        return False
    return torch.allclose(stored.double(), expected.double(), rtol=1e-2, atol=1e-4)


def refuse_other_yaml(path: Path, family: str) -> None:
    """Raise InputError if the .yaml beside a single file states what is not assumed of the file."""
    yaml_path, text = read_yaml(path)
    scaling = re.search(r"denoiser_scaling\.(\w*EDM\w*)", text)
    if scaling:
        raise InputError(f"{yaml_path}: {scaling[1]}: {FOREIGN_SCHEDULERS['EDM']}")
    for discretization in re.findall(r"discretizer\.(\w+)", text):
        if discretization != DISCRETIZATION:
            message = f"{discretization} is another noise schedule than Stable Diffusion's"
            raise InputError(f"{yaml_path}: {message}")
    given_betas = re.search(r"\bgiven_betas[\"']?\s*:\s*([^\s,}]+)", text)
    if given_betas and given_betas[1].lower() not in ("null", "none", "~"):
        message = "given_betas is another noise schedule than Stable Diffusion's"
        raise InputError(f"{yaml_path}: {message}")

    # Which layer of the text tower is read. Another is what "clip skip" means.
    built_in = {key: (value,) for key, value in YAML_BUILT_IN.items()}
    built_in["layer"] = TEXT_LAYERS[family]
    built_in[SCALE_TENSOR] = (SCALING_FACTORS[family],)
    for key, allowed in built_in.items():
        for value in yaml_values(text, key):
            if to_number(value) not in allowed:
                expected = " or ".join(map(str, allowed))
                message = f"{key} is {value}, in Stable Diffusion {family} it is {expected}"
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
    for key, predictions in PREDICTION_METADATA.items():
        if key not in metadata:
            continue
        word = metadata[key]
        unknown = word if key in PREDICTION_KEYS else None
        prediction_type = predictions.get(word.lower(), unknown)
        if prediction_type is not None:
            statements.append((f"its metadata {key}", prediction_type))
    return statements


def predictions_in_yaml(path: Path) -> list[tuple[str, str]]:
    """Return the same for the .yaml beside a file. Unknown words are kept as they are."""
    yaml_path, text = read_yaml(path)
    words = []
    for key in PREDICTION_YAML_KEYS:
        words += yaml_values(text, key)
    words += re.findall(r"denoiser_scaling\.(\w+)", text)
    is_of_original_code = re.search(r"\.ddpm\w*\.", text) is not None  # names its class
    if not words and is_of_original_code:
        words = ["eps"]  # that class's default
    return [(yaml_path.name, PREDICTION_YAML.get(word, word)) for word in words]


def ends_at_pure_noise(path: Path, tensors: dict[str, Tensor]) -> bool:
    """Return whether a file states that its schedule is rescaled to a terminal SNR of zero.

    The schedule among its tensors may be the one before a training that rescaled it, so that this
    is no contradiction. Raises InputError if the answer is neither yes nor no.
    """
    statements = [ZERO_SNR_MARKER in tensors]
    for _, alphas_cumprod in stored_schedules(tensors):
        last = alphas_cumprod[-1]
        statements.append(is_close(last, torch.zeros(())))
    metadata = read_metadata(path)
    yaml_path, yaml = read_yaml(path)
    for key in ZERO_SNR_KEYS:
        if key in metadata:
            statements.append(to_boolean(metadata[key], f"{path}: its metadata {key}"))
        for word in yaml_values(yaml, key):
            statements.append(to_boolean(word, f"{yaml_path}: {key}"))
    return any(statements)


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


def to_boolean(word: str, place: str) -> bool:
    """Return the truth value that a word stands for. `place` says in messages where it is."""
    if word.lower() not in BOOLEANS:
        raise InputError(f"{place} is {word!r}, neither true nor false")
    return BOOLEANS[word.lower()]


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
    unet: UNet,
    text_encoder: TextEncoder,
    text_encoder_2: TextEncoder | None,
    source: str | Path,
    unet_source: str | Path,
) -> None:
    """Raise InputError unless the UNet reads contexts like those that the text encoders make."""
    read = unet.config["cross_attention_dim"]
    made = text_encoder.config["hidden_size"]
    pooled_read = 0
    if unet.add_embedding is not None:
        pooled_read = unet.add_embedding.pooled_channels
    pooled_made = 0
    if text_encoder_2 is not None:
        for encoder in (text_encoder, text_encoder_2):
            if encoder.tokenizer.length != NUM_TOKENS:
                raise InputError(
                    f"{source}: prompts of {encoder.tokenizer.length} tokens (model_max_length), "
                    f"in SDXL they have {NUM_TOKENS}"
                )
        made += text_encoder_2.config["hidden_size"]
        pooled_made = text_encoder_2.config["projection_dim"]
    if pooled_read != pooled_made:
        message = f"the UNet of {unet_source} reads pooled text of {pooled_read} channels"
        raise InputError(
            f"{message}, but {source} makes {pooled_made} (projection_dim): they do not belong "
            "together"
        )
    if read != made:
        message = f"the UNet of {unet_source} reads text of {read} channels (cross_attention_dim)"
        raise InputError(
            f"{message}, but the text encoder of {source} makes {made} (hidden_size): they do not "
            "belong together"
        )
