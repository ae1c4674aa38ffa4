"""Scores of pictures by their prompts: PickScore, HPS v2.0, LAION aesthetic v2, CLIP score, ImageReward, the toy's own.
Published checkpoints are read in their published layouts, strictly, from a folder or from the hub; networks compute in
float32. Scales are as published: PickScore and CLIP score are about 100 times a cosine, HPS is the cosine itself."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from spin.eval import blip
from spin.toy import world as toy
from spin.infra.run import InputError, hash_files, read_text
from spin.text import Names, Tokenizer, names
from spin.checkpoint.pipeline import build, compare, download, fill, read_file

# Each scorer's files, (repository on the hub, file); its CLIP's name in open_clip; the sizes of ImageReward's networks;
# what the paper published.
FILES, CLIPS, VISION, TEXT, PUBLISHED = json.loads(Path(__file__).with_name("scorers.json").read_text()).values()
SIDE = 224  # pixels that every network sees
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]  # of CLIP's pixels in [0,1]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


@dataclass
class Scorer:
    """score(N pictures, N prompts) -> {metric: [N]}; judged_by: the metric by which it is that models are judged."""

    name: str
    score: Callable[[list[Image.Image], list[str]], dict[str, np.ndarray]]
    hash: str  # 16 hexadecimal digits over its files
    metrics: tuple[str, ...]
    judged_by: str
    less_is_better: tuple[str, ...] = ()


def load(name: str, folder: str | Path | None = None, device: str = "cpu") -> Scorer:
    """The scorer of a name in FILES. folder: has its files, each as <name of its repository>/<file>; else the hub has.
    Raises InputError where a file cannot be had, or is not what was published."""
    paths = files(name, folder)
    if name == "toy":
        return Scorer(name, score_toy, hash_files([Path(toy.__file__)]), toy.METRICS, "reward", toy.LESS_IS_BETTER)
    tensors = read_file(paths[0])
    if name == "imagereward":
        reward = load_imagereward(tensors, paths[0], device, VISION, TEXT)
        vocab = read_text(paths[1]).rstrip("\n").split("\n")
        tokenizer = build(blip.WordPiece, vocab, paths[1], device="cpu")
    else:
        from open_clip import get_model_config, tokenize

        clip = load_clip(get_model_config(CLIPS[name]), tensors, paths[0], device)
        tokenizer = Tokenizer() if name == "pickscore" else tokenize  # transformers' and open_clip's cleaning differ
    if name == "aesthetic":
        weight, bias = (t.to(device) for t in affine(read_file(paths[1]), "layers.", clip.visual.output_dim, paths[1]))

    @torch.no_grad()
    def score(pictures: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        pixels = (hps_pixels if name == "hps" else clip_pixels)(pictures).to(device)
        ids = tokenizer(prompts).to(device)  # a prompt is cut to the length that a network knows
        if name == "imagereward":
            found = reward(pixels, ids)
        else:
            seen = clip.encode_image(pixels, normalize=True)
            if name == "aesthetic":
                found = (seen @ weight.T + bias)[:, 0]  # of the picture alone, on a scale of 1 to 10
            else:
                scale = {"pickscore": clip.logit_scale.exp(), "hps": 1.0, "clip": 100.0}[name]
                found = scale * (seen * clip.encode_text(ids, normalize=True)).sum(1)
        return {name: found.cpu().numpy()}

    return Scorer(name, score, hash_files(paths), (name,), name)


def score_toy(pictures: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
    """`toy.score`; InputError for what is not of the miniature world."""
    try:
        return toy.score(np.stack([np.asarray(picture, dtype=np.float32) / 255 for picture in pictures]), prompts)
    except (KeyError, ValueError) as error:
        raise InputError(f"toy scores {toy.SIDE} x {toy.SIDE} pixels by captions of its world: {error}") from None


def files(name: str, folder: str | Path | None = None) -> list[Path]:
    """Those of a scorer on this machine, downloaded if need be; InputError where one cannot be had."""
    found = []
    for repository, file in FILES[name]:
        place = Path(folder or "FOLDER", repository.split("/")[1], file)
        try:
            found.append(place if folder and place.exists() else download(repository, [file]) / file)
        except InputError as error:
            put = f"put it at {place}" if folder else f"say --scorers FOLDER, with it at {place}"
            raise InputError(f"{name} needs {file}: {put} ({error})") from None
    return found


# ---- Networks --------------------------------------------------------------------------------------------------------
def load_clip(config: dict, tensors: dict[str, Tensor], where: Path, device: str):
    """open_clip's CLIP. tensors: with its own names, as HPS has them, or with those of transformers' CLIPModel."""
    from open_clip.model import CLIP

    network = build(lambda config: CLIP(**config), config, where)
    tensors = {name: t for name, t in tensors.items() if not name.endswith("position_ids")}  # 0, 1, 2, ...: older files
    table = clip_names(config) if any(name.startswith("text_model.") for name in tensors) else None
    tensors |= {name: t.T for name, t in tensors.items() if name.endswith("_projection.weight")}
    fill(network, tensors, where, torch.float32, device, table)
    length = config["text_cfg"].get("context_length", 77)
    network.attn_mask = torch.full((length, length), float("-inf"), device=device).triu(1)  # in no checkpoint
    return network.requires_grad_(False)


def clip_names(config: dict) -> Names:
    """transformers' CLIPModel -> open_clip's CLIP; the two projections are transposed besides."""
    text, vision = (config[f"{part}_cfg"]["layers"] for part in ("text", "vision"))
    prefixed = [([f"text_model.{name}" for name in theirs], ours) for theirs, ours in names("text", i=text)]
    return prefixed + names("clip", i=vision)


def load_imagereward(tensors: dict[str, Tensor], where: Path, device: str, vision: dict, text: dict):
    network = build(lambda config: blip.ImageReward(*config), (vision, text), where)
    unused = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(unused)}
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith("mlp.")}
    tensors |= zip(("head.weight", "head.bias"), affine(head, "mlp.layers.", text["hidden_size"], where))
    table = names("blip", v=vision["num_hidden_layers"], t=text["num_hidden_layers"])
    return fill(network, tensors, where, torch.float32, device, table).requires_grad_(False)


def affine(tensors: dict[str, Tensor], prefix: str, width: int, where: Path) -> tuple[Tensor, Tensor]:
    """The published head, five linear layers of which none bends what it passes on, as the one that they are.
    -> weight [1,width], bias [1]: h_5(h_4(...h_1(x))) = weight x + bias, multiplied out in float64."""
    sizes = [width, 1024, 128, 64, 16, 1]
    layers = dict(zip((0, 2, 4, 6, 7), zip(sizes[1:], sizes)))  # the numbers between are dropout's
    wanted = {f"{prefix}{i}.weight": torch.empty(shape) for i, shape in layers.items()}
    wanted |= {f"{prefix}{i}.bias": torch.empty(shape[:1]) for i, shape in layers.items()}
    compare(tensors, wanted, where)
    weight, bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for i in layers:
        w = tensors[f"{prefix}{i}.weight"].double()
        weight, bias = w @ weight, w @ bias + tensors[f"{prefix}{i}.bias"].double()
    return weight.float(), bias.float()


# ---- Pictures -> [N,3,224,224] ---------------------------------------------------------------------------------------
def to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)


def clip_pixels(pictures: list[Image.Image]) -> Tensor:
    """The short side to SIDE by Pillow's bicubic, in 8 bits, then the square in the middle: CLIP's and BLIP's way."""
    found = []
    for picture in pictures:
        width, height = (SIDE * length // min(picture.size) for length in picture.size)
        left, top = (width - SIDE) // 2, (height - SIDE) // 2
        resized = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        found.append(to_tensor(resized.crop((left, top, left + SIDE, top + SIDE))))
    return (torch.stack(found) - MEAN) / STD


def hps_pixels(pictures: list[Image.Image]) -> Tensor:
    """The long side to SIDE by bicubic interpolation of floats, black added around: HPS v2's way. Antialiased, which in
    HPS's own code depended on the torchvision of the day."""
    found = []
    for picture in pictures:
        height, width = (round(length * SIDE / max(picture.size)) for length in picture.size[::-1])
        left, top = (SIDE - width) // 2, (SIDE - height) // 2
        resized = F.interpolate(to_tensor(picture)[None], (height, width), mode="bicubic", antialias=True)[0]
        found.append(F.pad(resized, (left, SIDE - width - left, top, SIDE - height - top)))
    return (torch.stack(found) - MEAN) / STD
