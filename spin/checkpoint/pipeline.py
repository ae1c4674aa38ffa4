"""Checkpoints in and out, read strictly: the folder layout of diffusers, from the hub too, and single original files.
    unet/, vae/: config.json, diffusion_pytorch_model.safetensors    text_encoder/: config.json, model.safetensors
    scheduler/: scheduler_config.json    tokenizer/: vocab.json + merges.txt, or tokenizer.json; without it, CLIP's own
Folders of several generations of diffusers and transformers are read; the newest names are written."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spin.checkpoint import single_file as original
from spin.infra.run import InputError, hash_files, read_json, read_text, whole, write_json
from spin.scheduler import Scheduler
from spin.text import EOS, Names, TextEncoder, Tokenizer, names, stack, unstack
from spin.unet import UNet
from spin.vae import AutoencoderKL

NETWORKS = {"unet": UNet, "vae": AutoencoderKL}
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")  # the folders of a checkpoint
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
# the one class that published training checkpoints name, as a key of no interest here, and an empty one in its place
INERT = [(type("Callback", (), {}), "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]
# the published SD-1.5 VAE has the attention names of an older diffusers
OLD_VAE_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass
class StableDiffusion:
    """The four parts of a text-to-image model. Networks are in eval mode; callers freeze what they freeze."""

    unet: UNet
    vae: AutoencoderKL
    text_encoder: TextEncoder
    scheduler: Scheduler

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        return self.text_encoder(prompts)  # context [B,77,D]


def load(
    source: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu", unet: str | Path | None = None
) -> StableDiffusion:
    """Reads a diffusers folder, a hub id "org/name", or a file in the original layout. unet: another checkpoint, or its
    unet/ alone, to take the UNet from. InputError for what is missing, cut short, foreign, or not as config.json says.
    With prediction_type "v_prediction" (SD-2.x at 768 px; also a file of SD-2.x that does not say is taken for one) the
    networks answer v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0, and v's errors are what losses compare."""
    path = locate(source)
    single = read_single(path) if path.is_file() else None
    network = load_unet(unet, dtype, device) if unet else make("unet", read_part(path, "unet", single), dtype, device)
    vae = make("vae", read_part(path, "vae", single), dtype, device)
    text_config, tensors, where = read_part(path, "text_encoder", single)
    if single:
        kind = original.config_of(single)
        tokenizer = Tokenizer(None, "!" if kind is original.SD_2 else EOS)
        schedule = kind["scheduler"] | original.said_of_schedule(path)
    else:
        tokenizer = load_tokenizer(path / "tokenizer", text_config.get("max_position_embeddings", 77))
        schedule = read_config(path / "scheduler" / "scheduler_config.json", "scheduler")
    text_encoder = build(lambda config: TextEncoder(config, tokenizer), text_config, where)
    if len(tokenizer.vocab) > text_config["vocab_size"]:
        raise InputError(f"{where}: {text_config['vocab_size']} embeddings for {len(tokenizer.vocab)} tokens")
    fill(text_encoder.tower, tensors, where, dtype, device, text_encoder.names)
    scheduler = build(Scheduler, schedule, path if single else path / "scheduler", device="cpu")
    return StableDiffusion(network, vae, text_encoder.eval(), scheduler)


def load_unet(source: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> UNet:
    """The UNet of any checkpoint, or of its folder unet/ alone."""
    return make("unet", read_part(locate(source, ("unet",)), "unet"), dtype, device)


def make(part: str, found: tuple[dict, dict[str, Tensor], Path], dtype: torch.dtype, device: str) -> nn.Module:
    config, tensors, where = found
    return fill(build(NETWORKS[part], config, where), tensors, where, dtype, device)


def read_part(path: Path, part: str, single: dict | None = None) -> tuple[dict, dict[str, Tensor], Path]:
    """A network's config and tensors, under the names that diffusers and transformers give them now, and their place.
    path: a checkpoint's, or for a UNet its own folder. single: what `read_single` found there, if it is a file."""
    if path.is_file():
        tensors = single or read_single(path)
        kind = original.config_of(tensors)
        config = kind[part]
        if part != "text_encoder":
            ours = list(build(NETWORKS[part], config, path).state_dict())
            found = original.from_original(part, tensors, ours, config)
        elif kind is original.SD_2:
            found = unstack(original.under(original.TEXT_2, tensors), names("text", i=config["num_hidden_layers"]))
        else:
            found = original.under(original.TEXT_1, tensors)
    else:
        path = path if part == "unet" and (path / "config.json").exists() else path / part
        config = read_config(path / "config.json", part)
        tensors = read_tensors(path, "model" if part == "text_encoder" else "diffusion_pytorch_model")
        old = OLD_VAE_NAMES if part == "vae" else {}
        found = {original.renamed(name.removeprefix("text_model."), old): tensor for name, tensor in tensors.items()}
        if len(found) < len(tensors):
            raise InputError(f"{path}: holds some tensors twice, under an older and a newer name")
    found.pop("embeddings.position_ids", None)  # the numbers 0..76, which older transformers stored
    return config, found, path


def read_single(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file in the original layout; InputError where they tell of another model."""
    tensors = read_file(path)
    for part, what in original.FOREIGN.items():
        if any(part in name for name in tensors):
            raise InputError(f"{path}: no Stable Diffusion 1.x or 2.x, but {what}")
    if not any(name.startswith(original.UNET) for name in tensors):
        raise InputError(f"{path}: no whole Stable Diffusion; a network alone goes into a diffusers folder")
    return tensors


def locate(source: str | Path, parts: tuple[str, ...] = PARTS) -> Path:
    """The folder or file on this machine; `parts` of a hub id are downloaded, unless they have been before."""
    path = Path(source)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or path.suffix in (".safetensors", *PICKLES):
        raise InputError(f"{source}: no such folder or file, and no hub id, which is like org/name")
    names = ("*.json", "*.txt", "diffusion_pytorch_model.safetensors", "model.safetensors")
    wanted = [f"{part}/{name}" for part in parts for name in names]
    folder = download(str(source), wanted)
    if any((folder / parts[0]).glob("*.safetensors")):
        return folder
    others = [f"{part}/*{end}" for part in parts for end in ("_model.bin", "model.fp16.safetensors")]
    return download(str(source), wanted + others)


def download(repository: str, files: list[str]) -> Path:
    """The folder with these files of a repository on the hub; InputError where it cannot be had."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=files))
    except Exception as error:  # of many libraries: no network, no such repository, no permission, a full disk
        reason = (str(error) or type(error).__name__).split("\n")[0]
        raise InputError(f"{repository}: no such folder here, and not to be had from the hub: {reason}") from None


def load_tokenizer(folder: Path, length: int = 77) -> Tokenizer:
    """From vocab.json + merges.txt or tokenizer.json; CLIP's own where the folder has neither."""
    merges = vocab = None
    if (folder / "merges.txt").exists() or (folder / "vocab.json").exists():
        # an empty line, the last one above all, would count as a merge and shift the ids of the special tokens
        first, *lines = read_text(folder / "merges.txt").split("\n")
        merges = [line for line in ([] if first.startswith("#version") else [first]) + lines if line.strip()]
        vocab = read_json(folder / "vocab.json")
    elif (folder / "tokenizer.json").exists():
        try:
            model = read_json(folder / "tokenizer.json")["model"]
            merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
            vocab = model["vocab"]
        except (KeyError, TypeError):
            raise InputError(f"{folder / 'tokenizer.json'}: no model.vocab and model.merges as CLIP's has") from None
    files = [folder / "tokenizer_config.json", folder / "special_tokens_map.json"]
    try:
        tokens = (read_json(file).get("pad_token") for file in files if file.exists())
        pad = next((token for token in tokens if token is not None), EOS)
        tokenizer = Tokenizer(merges, pad["content"] if isinstance(pad, dict) else pad, length)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: not a tokenizer like CLIP's: {error}") from None
    if vocab is not None and vocab != tokenizer.vocab:
        odd = sorted(token for token in vocab | tokenizer.vocab if vocab.get(token) != tokenizer.vocab.get(token))
        raise InputError(f"{folder}: its vocabulary is not the one its merges make, as CLIP's is: {listed(odd)}")
    return tokenizer


def read_config(path: Path, part: str) -> dict:
    config = read_json(path)
    for key, value in original.BUILT_IN[part].items():
        found = config.get(key, value)
        if found != value and not (isinstance(found, list) and all(item == value for item in found)):
            raise InputError(f"{path}: {key} is {found!r}, in Stable Diffusion 1.x and 2.x it is {value!r}")
    return config


def build(make: Callable[[dict], object], config: dict, where: Path, device: str = "meta"):
    """make(config), without memory for its weights; InputError for what config.json lacks or says wrongly."""
    try:
        with torch.device(device):
            return make(config)
    except KeyError as error:
        raise InputError(f"{where}: its config lacks {error}") from None
    except (ArithmeticError, AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{where}: its config is not usable: {reason}") from None


def read_tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """Every tensor of folder/stem.safetensors, or of its half-precision twin, or of the older .bin."""
    older = stem if stem != "model" else "pytorch_model"
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{older}.bin", f"{older}.fp16.bin"):
        if (folder / name).exists():
            return read_file(folder / name)
    raise InputError(f"{folder / stem}.safetensors: no such file, nor {older}.bin")


def read_file(path: Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors file or of a pickle, still on the disk where possible. No pickle runs code."""
    try:
        if path.suffix not in PICKLES:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        with torch.serialization.safe_globals(INERT):
            pickled = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
        pickled = pickled.get("state_dict", pickled)
        return {name: t for name, t in pickled.items() if isinstance(name, str) and isinstance(t, Tensor)}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cut short, or no safetensors file ({error})") from None
    except Exception as error:  # a pickle can fail in any way
        reason = "holds more than tensors" if "weights_only" in str(error).lower() else "cut short, or no checkpoint"
        raise InputError(f"{path}: {reason}; not read. A .safetensors file is safe to read") from None


def fill(
    network: nn.Module, tensors: dict, where: Path, dtype: torch.dtype, device: str, names: Names | None = None
) -> nn.Module:
    """Gives a network built on the meta device its weights, converted one by one into memory of their own.
    names: `text.Names`, where those of `tensors` are not the network's own."""
    wanted = network.state_dict()
    compare(tensors, unstack(wanted, names) if names else wanted, where)
    tensors = stack(tensors, names) if names else tensors
    network.load_state_dict({name: t.to(device, dtype, copy=True) for name, t in tensors.items()}, assign=True)
    return network.eval()


def compare(found: dict[str, Tensor], wanted: dict[str, Tensor], where: Path) -> None:
    """InputError unless names and shapes are the same, with at most five names of each kind of difference."""
    reshaped = [name for name in found.keys() & wanted.keys() if found[name].shape != wanted[name].shape]
    reshaped = [f"{name} is {list(found[name].shape)}, not {list(wanted[name].shape)}" for name in reshaped]
    missing, unexpected = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    differences = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    if said := [f"{len(names)} {kind} ({listed(sorted(names))})" for kind, names in differences.items() if names]:
        raise InputError(f"{where}: its tensors are not those of its config: {'; '.join(said)}")


def listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def save(sd: StableDiffusion, folder: str | Path) -> None:
    """Writes the diffusers layout; StableDiffusionPipeline.from_pretrained opens it, `load` gives back every bit."""
    folder, encoder = Path(folder), sd.text_encoder
    save_network(folder / "unet", sd.unet.config | {"_class_name": "UNet2DConditionModel"}, sd.unet.state_dict())
    config = sd.vae.config | {"_class_name": "AutoencoderKL", "scaling_factor": sd.vae.scaling_factor}
    save_network(folder / "vae", config, sd.vae.state_dict())
    config = encoder.config | {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    text = unstack(encoder.tower.state_dict(), encoder.names)
    save_network(folder / "text_encoder", config, {f"text_model.{name}": text[name] for name in text}, "model")
    save_tokenizer(folder / "tokenizer", encoder.tokenizer)
    schedule = {"_class_name": "DDIMScheduler"} | sd.scheduler.config
    write_json(folder / "scheduler" / "scheduler_config.json", schedule)
    index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    index |= {"feature_extractor": [None, None], "safety_checker": [None, None]}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    write_json(folder / "model_index.json", index | {"scheduler": ["diffusers", schedule["_class_name"]]})


def save_network(folder: Path, config: dict, tensors: dict[str, Tensor], stem: str = "diffusion_pytorch_model") -> None:
    # the type of the file that was read, perhaps; the tensors say their own
    write_json(folder / "config.json", {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")})
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with whole(folder / f"{stem}.safetensors") as part:
        save_file(tensors, part, metadata={"format": "pt"})


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    write_json(folder / "vocab.json", tokenizer.vocab)
    with whole(folder / "merges.txt") as part:
        part.write_text("\n".join(["#version: 0.2", *tokenizer.merges]), encoding="utf-8")
    specials = {"bos_token": "<|startoftext|>", "eos_token": EOS, "unk_token": EOS, "pad_token": tokenizer.pad_token}
    # without model_max_length, diffusers would pad every prompt to 1e30 tokens
    config = specials | {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.length}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", specials)


def save_single(sd: StableDiffusion, path: str | Path) -> None:
    """One .safetensors file in the original layout, as other programs read it; `load` gives back every bit."""
    if sd.unet.config["block_out_channels"] != original.SD_1["unet"]["block_out_channels"]:
        raise InputError(f"{path}: a single file says no sizes, so only models of Stable Diffusion's can be one")
    prefix, text, config = original.TEXT_2, sd.text_encoder.tower.state_dict(), sd.text_encoder.config
    if config.get("hidden_act", "quick_gelu") != "gelu":
        prefix, text = original.TEXT_1, unstack(text, sd.text_encoder.names)
    tensors = original.to_original("unet", sd.unet.state_dict(), sd.unet.config)
    tensors |= original.to_original("vae", sd.vae.state_dict(), sd.vae.config)
    tensors |= {prefix + name: tensor for name, tensor in text.items()}
    with whole(Path(path)) as part:
        said = {"format": "pt", original.PREDICTION: sd.scheduler.prediction_type.removesuffix("_prediction")}
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, part, said)


def checkpoint_hash(folder: str | Path) -> str:
    """16 hexadecimal digits of SHA-256 over everything in a checkpoint, or in its unet/ alone, that is read."""
    parts = [Path(folder, part) for part in PARTS if Path(folder, part).is_dir()] or [Path(folder)]
    paths = [path for part in parts for path in (sorted(part.iterdir()) if part.is_dir() else [part])]
    return hash_files([path for path in paths if path.suffix in (".safetensors", ".json", ".txt", *PICKLES)])
