"""Scores of images by their prompts: the paper's four, CLIP score, and the miniature world's own.

Published checkpoints are read in their published layouts, strictly, from a folder or from the hub.
Networks compute in float32. Scales are as published: PickScore and CLIP score are about 100 times
a cosine, HPS is the cosine itself, the aesthetic score runs from 1 to 10, ImageReward is about
0 +- 1.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from spin import toy
from spin.checkpoint.hub import download
from spin.checkpoint.names import BLIP_NAMES, CLIP_NAMES, TEXT_NAMES, NameMap, expand_names
from spin.checkpoint.tensors import compare_tensors, config_errors, fill, read_tensors
from spin.eval import blip
from spin.infra.errors import InputError
from spin.infra.files import hash_files, read_text
from spin.text import Tokenizer

# Each scorer's files: (repository on the hub, file).
FILES = {
    "toy": [],
    "pickscore": [("yuvalkirstain/PickScore_v1", "model.safetensors")],
    "hps": [("xswu/HPSv2", "HPS_v2_compressed.pt")],  # version 2.0, as in the paper
    "aesthetic": [
        ("openai/clip-vit-large-patch14", "model.safetensors"),
        ("camenduru/improved-aesthetic-predictor", "sac+logos+ava1-l14-linearMSE.pth"),
    ],
    "clip": [("openai/clip-vit-large-patch14", "model.safetensors")],
    "imagereward": [
        ("THUDM/ImageReward", "ImageReward.pt"),
        ("google-bert/bert-base-uncased", "vocab.txt"),  # of its tokenizer
    ],
}

# Names in open_clip of the architectures of those checkpoints.
VIT_H = "ViT-H-14"  # PickScore and HPS are fine-tuned from LAION's CLIP
VIT_L = "ViT-L-14-quickgelu"  # OpenAI's CLIP has another activation than open_clip's ViT-L-14

# Sizes of ImageReward's two networks, BLIP's with a large vision transformer.
VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,  # pixels a side
    "patch_size": 16,
}
TEXT = {  # BERT base
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 30524,  # BERT's 30522 and two tokens that BLIP added, which are not used here
    "max_position_embeddings": 512,
}

# What the paper published, arXiv 2402.10210: Pick-a-Pic's 500 test prompts, best of five images.
# Approximate; "" where it gives no number.
PUBLISHED = {
    "SD-1.5": {
        "pickscore": "21.20",
        "aesthetic": "5.77",
        "wins against SD-1.5": "",
        "wins against DPO": "",
    },
    "SFT": {
        "pickscore": "21.45",
        "aesthetic": "",
        "wins against SD-1.5": "73.2%",
        "wins against DPO": "",
    },
    "Diffusion-DPO": {
        "pickscore": "21.45",
        "aesthetic": "5.86",
        "wins against SD-1.5": "84.8%",
        "wins against DPO": "",
    },
    "SPIN-2": {
        "pickscore": "",
        "aesthetic": "",
        "wins against SD-1.5": "90.0%",
        "wins against DPO": "",
    },
    "SPIN-3": {
        "pickscore": "22.00",
        "aesthetic": "6.25",
        "wins against SD-1.5": "91.6%",
        "wins against DPO": "70.2%",
    },
}

# What others published of the same models, arXiv 2510.18353, Table 3: Pick-a-Pic v2's test prompts;
# of five images the one with the median PickScore counts. Their HPS is HPSv2.
PUBLISHED_BY_OTHERS = {
    name: dict(zip(("pickscore", "hps", "aesthetic", "clip", "imagereward"), scores))
    for name, scores in {
        "SD-1.5": ("20.68", "26.88", "5.93", ".337", ".177"),
        "SPIN-Diffusion, as published": ("21.40", "27.78", "6.26", ".331", ".562"),
        "SFT on 500 images chosen by HPSv2": ("21.24", "28.11", "6.34", ".329", ".762"),
        "Diffusion-DPO": ("21.00", "27.22", "5.96", ".343", ".337"),
        "Diffusion-DRO": ("21.52", "28.49", "6.40", ".339", ".851"),
    }.items()
}

# The images that every network takes.
SIDE = 224  # pixels
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]  # CLIP's, in [0,1]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]

# ImageReward.pt also has these tensors, which the reward does not use.
UNUSED_BY_IMAGEREWARD = (
    "blip.vision_proj.",
    "blip.text_proj.",
    "blip.text_encoder.embeddings.position_ids",
)


# ---- The scorers ---------------------------------------------------------------------------------


class Scorer:
    """Scores images by their prompts.

    name: its name in FILES. hash: 16 hexadecimal digits over its files.
    metrics: what `score` returns, set_metrics: what `score_set` returns.
    primary_metric: the metric that models are compared by.
    """

    name: str
    hash: str
    metrics: tuple[str, ...]
    set_metrics: tuple[str, ...] = ()
    primary_metric: str
    less_is_better: tuple[str, ...] = ()

    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        """Return {metric: [N]} for N images and their N prompts.

        A prompt is cut to the length that the network takes.
        """
        raise NotImplementedError

    def score_set(self, images: list[Image.Image], prompt: str) -> dict[str, float]:
        """Return {metric: score} for at least two images of one prompt, as a set."""
        return {}


class ToyScorer(Scorer):
    """The miniature world's exact score, which needs no network."""

    name = "toy"
    metrics = toy.METRICS
    set_metrics = toy.SET_METRICS
    primary_metric = "reward"
    less_is_better = toy.LESS_IS_BETTER

    def __init__(self):
        folder = Path(toy.__file__).parent
        names = ["scenes.py", "pictures.py", "score.py"]
        self.hash = hash_files([folder / name for name in names])

    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        """Return the metrics of `toy.score`. Raises InputError for anything not of that world."""
        try:
            return toy.score(to_pixels(images), prompts)
        except (KeyError, ValueError) as error:
            size = f"{toy.SIDE} x {toy.SIDE} pixels"
            raise InputError(f"toy needs {size} and captions of its world: {error}") from None

    def score_set(self, images: list[Image.Image], prompt: str) -> dict[str, float]:
        return toy.score_set(to_pixels(images), prompt)


def to_pixels(images: list[Image.Image]) -> np.ndarray:
    """Return N images of one size as an array [N,H,W,3] in [0,1]."""
    return np.stack([np.asarray(image, dtype=np.float32) / 255 for image in images])


class ClipScorer(Scorer):
    """CLIP score: 100 times the cosine of the embeddings of image and prompt.

    The other scores from a CLIP are variants of it.
    """

    name = "clip"
    architecture = VIT_L
    scale: float | Tensor = 100.0

    def __init__(self, paths: list[Path], device: str):
        from open_clip import get_model_config

        config = get_model_config(self.architecture)
        self.clip = load_clip(config, read_tensors(paths[0]), paths[0], device)
        self.device = device
        self.hash = hash_files(paths)
        self.metrics = (self.name,)
        self.primary_metric = self.name

    def preprocess(self, images: list[Image.Image]) -> Tensor:
        return clip_pixels(images)

    def tokenize(self, prompts: list[str]) -> Tensor:
        from open_clip import tokenize

        return tokenize(prompts)

    def embed_images(self, images: list[Image.Image]) -> Tensor:
        pixels = self.preprocess(images).to(self.device)
        return self.clip.encode_image(pixels, normalize=True)  # [N,D]

    def embed_prompts(self, prompts: list[str]) -> Tensor:
        ids = self.tokenize(prompts).to(self.device)
        return self.clip.encode_text(ids, normalize=True)  # [N,D]

    @torch.no_grad()
    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        cosines = (self.embed_images(images) * self.embed_prompts(prompts)).sum(1)
        return {self.name: (self.scale * cosines).cpu().numpy()}


class PickScorer(ClipScorer):
    """PickScore, arXiv 2305.01569: the cosine, scaled as its CLIP has learned."""

    name = "pickscore"
    architecture = VIT_H

    def __init__(self, paths: list[Path], device: str):
        super().__init__(paths, device)
        self.scale = self.clip.logit_scale.exp()
        self.tokenizer = Tokenizer()

    def tokenize(self, prompts: list[str]) -> Tensor:
        # PickScore's code uses transformers, which cleans prompts differently from open_clip.
        return self.tokenizer(prompts)


class HPSScorer(ClipScorer):
    """Human Preference Score v2.0, arXiv 2306.09341: the cosine itself, of padded images."""

    name = "hps"
    architecture = VIT_H
    scale = 1.0

    def preprocess(self, images: list[Image.Image]) -> Tensor:
        return hps_pixels(images)


class AestheticScorer(ClipScorer):
    """LAION's aesthetic predictor v2: a linear function of the image's embedding, 1 to 10."""

    name = "aesthetic"

    def __init__(self, paths: list[Path], device: str):
        super().__init__(paths, device)
        width = self.clip.visual.output_dim
        weight, bias = merge_head(read_tensors(paths[1]), "layers.", width, paths[1])
        self.weight = weight.to(device)
        self.bias = bias.to(device)

    @torch.no_grad()
    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        scores = self.embed_images(images) @ self.weight.T + self.bias  # [N,1]
        return {self.name: scores[:, 0].cpu().numpy()}


class ImageRewardScorer(Scorer):
    """ImageReward, arXiv 2304.05977."""

    name = "imagereward"
    metrics = ("imagereward",)
    primary_metric = "imagereward"

    def __init__(self, paths: list[Path], device: str):
        weights, vocabulary = paths
        self.network = load_imagereward(read_tensors(weights), weights, device, VISION, TEXT)
        tokens = read_text(vocabulary).rstrip("\n").split("\n")
        with config_errors(vocabulary):
            self.tokenizer = blip.WordPiece(tokens)
        self.device = device
        self.hash = hash_files(paths)

    @torch.no_grad()
    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        pixels = clip_pixels(images).to(self.device)
        ids = self.tokenizer(prompts).to(self.device)
        return {self.name: self.network(pixels, ids).cpu().numpy()}


# Those that need a network.
NETWORK_SCORERS = {
    "pickscore": PickScorer,
    "hps": HPSScorer,
    "aesthetic": AestheticScorer,
    "clip": ClipScorer,
    "imagereward": ImageRewardScorer,
}


def load_scorer(name: str, folder: str | Path | None = None, device: str = "cpu") -> Scorer:
    """Load a scorer by its name in FILES.

    folder: holds its files, each as <name of its repository>/<file>; others come from the hub.
    Raises InputError if a file is unavailable, or differs from the published one.
    """
    paths = locate_files(name, folder)
    if name == "toy":
        return ToyScorer()
    return NETWORK_SCORERS[name](paths, device)


def locate_files(name: str, folder: str | Path | None = None) -> list[Path]:
    """Return a scorer's files, downloaded if necessary.

    Raises InputError if the name is unknown or a file is unavailable.
    """
    if name not in FILES:
        raise InputError(f"scorer {name!r}: must be one of {', '.join(FILES)}")
    return [locate_file(name, repository, file, folder) for repository, file in FILES[name]]


def locate_file(name: str, repository: str, file: str, folder: str | Path | None) -> Path:
    """Return a scorer's file in `folder`, or else from the hub."""
    path = Path(folder or "FOLDER", repository.split("/")[1], file)
    if folder and path.exists():
        return path
    try:
        return download(repository, [file]) / file
    except InputError as error:
        advice = f"put it at {path}" if folder else f"use --scorers FOLDER and put it at {path}"
        raise InputError(f"{name} needs {file}: {advice} ({error})") from None


# ---- Networks ------------------------------------------------------------------------------------


def load_clip(config: dict, tensors: dict[str, Tensor], where: Path, device: str):
    """Return open_clip's CLIP, frozen.

    config: open_clip's.
    tensors: under open_clip's own names, as HPS has them, or those of transformers' CLIPModel.
    where: the file they are from, for error messages.
    """
    from open_clip.model import CLIP

    with config_errors(where), torch.device("meta"):
        network = CLIP(**config)
    # Older files store the positions 0, 1, 2, ....
    weights = {name: t for name, t in tensors.items() if not name.endswith("position_ids")}

    names = None
    if any(name.startswith("text_model.") for name in weights):
        names = clip_names(config)
        for projection in ("text_projection.weight", "visual_projection.weight"):
            if projection in weights:
                weights[projection] = weights[projection].T
    fill(network, weights, where, torch.float32, device, names)

    # The causal mask is in no checkpoint, and has no values on the meta device.
    length = config["text_cfg"].get("context_length", 77)
    network.attn_mask = torch.full((length, length), float("-inf"), device=device).triu(1)
    return network.requires_grad_(False)


def clip_names(config: dict) -> NameMap:
    """Return the name map from transformers' CLIPModel to open_clip's CLIP.

    The two projections are transposed as well.
    """
    text_names = expand_names(TEXT_NAMES, i=config["text_cfg"]["layers"])
    prefixed = []
    for theirs, ours in text_names:
        prefixed.append(([f"text_model.{name}" for name in theirs], ours))
    return prefixed + expand_names(CLIP_NAMES, i=config["vision_cfg"]["layers"])


def load_imagereward(
    tensors: dict[str, Tensor], where: Path, device: str, vision: dict, text: dict
) -> blip.ImageReward:
    """Return ImageReward's network, frozen. vision, text: sizes, as in VISION and TEXT."""
    with config_errors(where), torch.device("meta"):
        network = blip.ImageReward(vision, text)

    head = {}
    weights = {}
    for name, tensor in tensors.items():
        if name.startswith("mlp."):
            head[name] = tensor
        elif not name.startswith(UNUSED_BY_IMAGEREWARD):
            weights[name] = tensor
    weight, bias = merge_head(head, "mlp.layers.", text["hidden_size"], where)
    weights["head.weight"] = weight
    weights["head.bias"] = bias

    layers = {"v": vision["num_hidden_layers"], "t": text["num_hidden_layers"]}
    names = expand_names(BLIP_NAMES, **layers)
    return fill(network, weights, where, torch.float32, device, names).requires_grad_(False)


def merge_head(
    tensors: dict[str, Tensor], prefix: str, width: int, where: Path
) -> tuple[Tensor, Tensor]:
    """Return the published head as one linear layer: weight [1,width], bias [1].

    It has five linear layers without an activation between them. They are multiplied in float64.
    Raises InputError if `tensors` are not exactly those layers.
    """
    # by number in the published head, whose other layers are dropout
    shapes = {0: (1024, width), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    expected = {}
    for i, shape in shapes.items():
        expected[f"{prefix}{i}.weight"] = torch.empty(shape)
        expected[f"{prefix}{i}.bias"] = torch.empty(shape[:1])
    compare_tensors(tensors, expected, where)

    weight = torch.eye(width, dtype=torch.float64)
    bias = torch.zeros(width, dtype=torch.float64)
    for i in shapes:
        layer_weight = tensors[f"{prefix}{i}.weight"].double()
        layer_bias = tensors[f"{prefix}{i}.bias"].double()
        weight = layer_weight @ weight
        bias = layer_weight @ bias + layer_bias
    return weight.float(), bias.float()


# ---- Images -> [N,3,SIDE,SIDE] -------------------------------------------------------------------


def clip_pixels(images: list[Image.Image]) -> Tensor:
    """Return images as CLIP and BLIP take them.

    The shorter side is resized to SIDE by Pillow's bicubic filter, in 8 bits; the longer side is
    center-cropped.
    """
    batch = []
    for image in images:
        shorter = min(image.size)
        width = SIDE * image.width // shorter
        height = SIDE * image.height // shorter
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        left = (width - SIDE) // 2
        top = (height - SIDE) // 2
        square = resized.crop((left, top, left + SIDE, top + SIDE))
        batch.append(to_tensor(square))
    return (torch.stack(batch) - MEAN) / STD


def hps_pixels(images: list[Image.Image]) -> Tensor:
    """Return images as HPS v2 takes them.

    The longer side is resized to SIDE by bicubic interpolation of floats; the shorter is padded
    with black. It is antialiased, which in HPS's own code depended on torchvision's version.
    """
    batch = []
    for image in images:
        longer = max(image.size)
        width = round(image.width * SIDE / longer)
        height = round(image.height * SIDE / longer)
        pixels = to_tensor(image.convert("RGB"))[None]  # [1,3,H,W]
        resized = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)[0]
        left = (SIDE - width) // 2
        top = (SIDE - height) // 2
        batch.append(F.pad(resized, (left, SIDE - width - left, top, SIDE - height - top)))
    return (torch.stack(batch) - MEAN) / STD


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as [3,H,W] in [0,1]."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
