"""Data for the tests: a tiny Stable Diffusion, tiny scorers, captioned images, Gaussian data.

The tiny networks have every part of the real ones, in the same layout, and weights that are a
function of the tensors' names. They have learned nothing: their images are noise.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor

DATA = Path(__file__).parent / "data"
MANIFEST = {
    **json.loads((DATA / "manifest.json").read_text()),
    **json.loads((DATA / "manifest_sdxl.json").read_text()),
}
GOLDEN = load_file(DATA / "golden.safetensors")
REWARDS = json.loads((DATA / "rewards_manifest.json").read_text())  # the scorers' tensors, configs
WORDS = json.loads((DATA / "wordpiece.json").read_text())
HEAD = DATA / "sac+logos+ava1-l14-linearMSE.pth"

# scheduler/scheduler_config.json of SD-1.5's checkpoint
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}

# scheduler/scheduler_config.json of SDXL's checkpoint
SCHEDULER_SDXL = {
    "_class_name": "EulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
    "clip_sample": False,
}

# the weights' file of each part
FILES = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",  # of SDXL alone
}


# -----------------------------------------------------------------------------
# weights and inputs by name


def standard_normal(name: str, shape) -> np.ndarray:
    """Return float32 noise that is a function of the name: PCG64 seeded with its CRC-32."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return generator.standard_normal(tuple(shape), dtype=np.float32)


def oracle_input(name: str, shape) -> Tensor:
    """Return the input of this name that the golden outputs were computed for."""
    return torch.from_numpy(standard_normal(name, shape))


def oracle_tensor(name: str, shape) -> Tensor:
    """Return the weight of this name that the golden outputs were computed with.

    Matrices and kernels are N(0, 1 / fan_in), vectors 0.1 N(0, 1), around 1 for a norm's scale.
    """
    values = torch.from_numpy(standard_normal(name, shape))
    if len(shape) > 1:
        fan_in = math.prod(shape[1:])
        return values / math.sqrt(fan_in)
    center = 1.0 if name.endswith("weight") else 0.0
    return values * 0.1 + center


# -----------------------------------------------------------------------------
# checkpoints


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_checkpoint(folder: Path, tag: str = "tiny") -> Path:
    """Write a diffusers folder and return it.

    tag: "tiny" (like SD-1.x), "tiny2" (like SD-2.x), "tinyxl" (like SDXL) or "sd15" (full size,
         4 GB).
    There is no tokenizer in it, which means CLIP's own.
    """
    for part, shapes in MANIFEST[tag].items():
        stem = FILES[part]
        write_json(folder / part / "config.json", MANIFEST[f"{tag}.config"][part])
        tensors = {name: oracle_tensor(name, shape) for name, shape in shapes.items()}
        save_file(tensors, folder / part / f"{stem}.safetensors")
    scheduler = dict(SCHEDULER_SDXL if tag == "tinyxl" else SCHEDULER)
    if tag == "tiny2":
        scheduler["prediction_type"] = "v_prediction"
        write_json(folder / "tokenizer" / "tokenizer_config.json", {"pad_token": "!"})
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    return folder


# -----------------------------------------------------------------------------
# images


def write_images(folder: Path, count: int = 12) -> Path:
    """Write captioned images and their metadata.jsonl, and return the folder.

    Each is a colored shape on white or on a transparent ground, as JPEG or PNG. Sizes,
    orientations and modes vary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [(64, 64), (96, 64), (70, 120), (200, 150)]
    modes = ["RGB", "RGBA", "L", "P", "LA"]
    colors = ["red", "green", "blue"]
    rows = []
    for i in range(count):
        size = sizes[i % len(sizes)]
        mode = modes[i % len(modes)]
        color = colors[i % len(colors)]
        shape = ["circle", "square"][i // 3 % 2]

        ground = (0, 0, 0, 0) if mode in ("RGBA", "LA") else "white"
        image = Image.new("RGBA", size, ground)
        center_x = size[0] // 2
        center_y = size[1] // 2
        box = [center_x - 24, center_y - 24, center_x + 24, center_y + 24]
        if shape == "circle":
            ImageDraw.Draw(image).ellipse(box, fill=color)
        else:
            ImageDraw.Draw(image).rectangle(box, fill=color)

        suffix = "jpg" if mode in ("RGB", "L") else "png"
        name = f"{i}.{suffix}"
        image.convert(mode).save(folder / name)
        rows.append({"file_name": name, "text": f"a {color} {shape} on white"})
    write_metadata(folder, rows)
    return folder


def write_metadata(folder: Path, rows: list[dict]) -> None:
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "metadata.jsonl").write_text("".join(lines))


def write_faulty_rows(folder: Path) -> Path:
    """Write nine rows, of which only 0, 6 and 8 can be used, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), "red").save(folder / "good.png")
    content = (folder / "good.png").read_bytes()
    (folder / "broken.png").write_bytes(content[: len(content) // 2])
    (folder / "bomb.png").write_bytes(resized_header(content, 30_000))
    (folder / "text.jpg").write_text("not an image")
    rows = [
        {"file_name": "good.png", "text": "a caption"},
        {"file_name": "missing.png", "text": "a caption"},
        {"file_name": "broken.png", "text": "a caption"},
        {"file_name": "bomb.png", "text": "a caption"},
        {"file_name": "good.png", "text": " "},
        {"file_name": "../good.png", "text": "a caption"},
        {"file_name": "good.png", "text": "a caption"},
        {"file_name": "text.jpg", "text": "a caption"},
        {"file_name": "good.png", "text": "a caption"},
    ]
    write_metadata(folder, rows)
    return folder


def resized_header(png: bytes, side: int) -> bytes:
    """Return a PNG file whose header claims side x side pixels."""
    signature = png[:8]
    color_and_compression = b"\x08\x02\x00\x00\x00"
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + color_and_compression
    checksum = zlib.crc32(header).to_bytes(4, "big")
    return signature + (13).to_bytes(4, "big") + header + checksum + png[33:]


def photograph(name: str, size: tuple[int, int]) -> Image.Image:
    """Return an image, width x height, that a resampler can go wrong on.

    It has smooth colors, edges and a little grain, which depends on the name.
    """
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    channels = [np.sin(5 * x + k) * np.cos(4 * y - k) for k in range(3)]
    smooth = np.stack(channels, axis=2)
    columns = (8 * x).astype(int) % 2
    rows = (6 * y).astype(int) % 2
    edges = 0.6 * (columns ^ rows)[..., None]
    grain = standard_normal(name, (height, width, 3))
    values = 0.5 + 0.25 * smooth - 0.3 * edges + 0.08 * grain
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))


# -----------------------------------------------------------------------------
# scorers


def scorer_tensors(tag: str) -> dict[str, Tensor]:
    """Return a scorer's tensors under their published names."""
    tensors = {name: oracle_tensor(name, shape) for name, shape in REWARDS[tag].items()}
    if "logit_scale" in tensors:
        tensors["logit_scale"] = torch.tensor(REWARDS["pickscore.tiny.config"]["logit_scale"])
    return tensors


def clip_config(config: dict) -> dict:
    """Return open_clip's config for the sizes in transformers' config."""
    vision = config["vision"]
    text = config["text"]
    vision_config = {
        "image_size": vision["image_size"],
        "layers": vision["num_hidden_layers"],
        "width": vision["hidden_size"],
        "head_width": vision["hidden_size"] // vision["num_attention_heads"],
        "patch_size": vision["patch_size"],
        "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
    }
    text_config = {
        "context_length": 77,
        "vocab_size": text["vocab_size"],
        "width": text["hidden_size"],
        "heads": text["num_attention_heads"],
        "layers": text["num_hidden_layers"],
        "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
    }
    return {
        "embed_dim": config["projection_dim"],
        "vision_cfg": vision_config,
        "text_cfg": text_config,
    }


def write_scorers(folder: Path) -> Path:
    """Write every published file of every scorer, in miniature, and return the folder."""
    from spin.eval import scorers  # late, since it brings in half of the project

    for files in scorers.FILES.values():
        for repository, file in files:
            path = folder / repository.split("/")[1] / file
            path.parent.mkdir(parents=True, exist_ok=True)
            write_scorer_file(path)
    return folder


def write_scorer_file(path: Path) -> None:
    """Write the file that is published under this name, in miniature."""
    if path.name == "model.safetensors":
        save_file(scorer_tensors("pickscore.tiny"), path)
    elif path.name == "HPS_v2_compressed.pt":
        write_hps(path)
    elif path.name == HEAD.name:
        write_aesthetic_head(path)
    elif path.name == "ImageReward.pt":
        write_imagereward(path)
    elif path.name == "vocab.txt":
        path.write_text("\n".join(WORDS["vocab"]) + "\n", encoding="utf-8")
    else:
        raise ValueError(f"{path.name}: no miniature of it is known")


def write_hps(path: Path) -> None:
    """Write a CLIP in open_clip's layout and in half precision."""
    from spin.eval import scorers

    config = clip_config(REWARDS["pickscore.tiny.config"])
    clip = scorers.load_clip(config, scorer_tensors("pickscore.tiny"), path, "cpu")
    halves = {name: tensor.half() for name, tensor in clip.state_dict().items()}
    torch.save({"state_dict": halves}, path)


def write_aesthetic_head(path: Path) -> None:
    weights = {
        "layers.0.weight": (1024, 48),
        "layers.2.weight": (128, 1024),
        "layers.4.weight": (64, 128),
        "layers.6.weight": (16, 64),
        "layers.7.weight": (1, 16),
    }
    tensors = {}
    for name, shape in weights.items():
        bias = name.replace("weight", "bias")
        tensors[name] = oracle_tensor(name, shape)
        tensors[bias] = oracle_tensor(bias, shape[:1])
    torch.save(tensors, path)


def write_imagereward(path: Path) -> None:
    """Write ImageReward with patches of 14 pixels, so that it sees 56 pixels like the others."""
    tensors = scorer_tensors("imagereward.tiny")
    name = "blip.visual_encoder.patch_embed.proj.weight"
    tensors[name] = tensors[name][..., :14, :14].clone()
    torch.save(tensors, path)


# -----------------------------------------------------------------------------
# compilation


class CountingBackend:
    """A backend of torch.compile that runs graphs as they are, and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


# -----------------------------------------------------------------------------
# Gaussian data, for which everything is known
#
# If x0 ~ N(mean, variance), independently in every dimension, then x_t is Gaussian too, and the
# best prediction of the noise is linear in x_t: there is no network to train, and no integral
# that is not a sum.


def gaussian_marginal(mean, variance, alpha_bar):
    """Return the mean and the variance of x_t."""
    return alpha_bar**0.5 * mean, alpha_bar * variance + 1 - alpha_bar


def gaussian_eps(x_t, mean, variance, alpha_bar):
    """Return E[eps | x_t], the best prediction of the noise."""
    mean_t, variance_t = gaussian_marginal(mean, variance, alpha_bar)
    return (1 - alpha_bar) ** 0.5 * (x_t - mean_t) / variance_t


def normal_nodes(dimensions: int) -> tuple[Tensor, Tensor]:
    """Return points [3^dimensions, dimensions] and weights [3^dimensions] of a quadrature.

    The weighted sum over the points is the exact mean, over independent standard normals, of
    polynomials of degree up to 5.
    """
    points, weights = np.polynomial.hermite_e.hermegauss(3)
    weights = weights / weights.sum()
    point_grids = np.meshgrid(*[points] * dimensions, indexing="ij")
    weight_grids = np.meshgrid(*[weights] * dimensions, indexing="ij")
    all_points = np.stack(point_grids, axis=-1).reshape(-1, dimensions)
    all_weights = np.stack(weight_grids, axis=-1).reshape(-1, dimensions).prod(axis=1)
    return torch.from_numpy(all_points), torch.from_numpy(all_weights)
