"""A tiny Stable Diffusion with weights from names, and a dozen captioned pictures: what the tests run on.

The network has learned nothing: it draws noise. It has every part of the real one, in the same layout.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parent / "data"
MANIFEST = json.loads((DATA / "manifest.json").read_text())
GOLDEN = load_file(DATA / "golden.safetensors")

# scheduler/scheduler_config.json as SD-1.5's checkpoint has it; SD-2.x predicts v
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
FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def standard_normal(name: str, shape) -> np.ndarray:
    """float32 noise that depends on the name alone: PCG64 seeded with its CRC-32."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(shape), dtype=np.float32)


def oracle_input(name: str, shape) -> torch.Tensor:
    return torch.from_numpy(standard_normal(name, shape))


def oracle_tensor(name: str, shape) -> torch.Tensor:
    """A weight: matrices and kernels N(0, 1/fan_in); vectors 0.1 N(0,1), around 1 if they are a norm's scale."""
    values = standard_normal(name, shape)
    if len(shape) > 1:
        return torch.from_numpy(values) / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(values) * 0.1 + (1.0 if name.endswith("weight") else 0.0)


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_checkpoint(folder: Path, tag: str = "tiny") -> Path:
    """tag: "tiny" (as SD-1.x), "tiny2" (as SD-2.x) or "sd15" (full size, 4 GB). Without a tokenizer: CLIP's own."""
    for part, stem in FILES.items():
        write_json(folder / part / "config.json", MANIFEST[f"{tag}.config"][part])
        tensors = {name: oracle_tensor(name, shape) for name, shape in MANIFEST[tag][part].items()}
        save_file(tensors, folder / part / f"{stem}.safetensors")
    v_prediction = {"prediction_type": "v_prediction"} if tag == "tiny2" else {}
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER | v_prediction)
    if tag == "tiny2":
        write_json(folder / "tokenizer" / "tokenizer_config.json", {"pad_token": "!"})
    return folder


def write_pictures(folder: Path, count: int = 12) -> Path:
    """Coloured shapes as JPEG and PNG of different sizes, orientations and modes, with metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes, modes = [(64, 64), (96, 64), (70, 120), (200, 150)], ["RGB", "RGBA", "L", "P", "LA"]
    rows = []
    for i in range(count):
        colour, shape = ["red", "green", "blue"][i % 3], ["circle", "square"][i // 3 % 2]
        size, mode = sizes[i % len(sizes)], modes[i % len(modes)]
        picture = Image.new("RGBA", size, (0, 0, 0, 0) if mode in ("RGBA", "LA") else "white")
        box = [size[0] // 2 - 24, size[1] // 2 - 24, size[0] // 2 + 24, size[1] // 2 + 24]
        draw = ImageDraw.Draw(picture)
        (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=colour)
        name = f"{i}.jpg" if mode in ("RGB", "L") else f"{i}.png"
        picture.convert(mode).save(folder / name)
        rows.append({"file_name": name, "text": f"a {colour} {shape} on white"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def photograph(name: str, size: tuple[int, int]) -> Image.Image:
    """Soft colours, edges and a little grain, width x height: what a resampler can go wrong on."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    soft = np.stack([np.sin(5 * x + k) * np.cos(4 * y - k) for k in range(3)], 2)
    edges = 0.6 * ((8 * x).astype(int) % 2 ^ (6 * y).astype(int) % 2)[..., None]
    picture = 0.5 + 0.25 * soft - 0.3 * edges + 0.08 * standard_normal(name, (height, width, 3))
    return Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))
