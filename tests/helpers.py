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

from spin.eval import scorers as rewards

DATA = Path(__file__).parent / "data"
MANIFEST = json.loads((DATA / "manifest.json").read_text())
GOLDEN = load_file(DATA / "golden.safetensors")
REWARDS = json.loads((DATA / "rewards_manifest.json").read_text())  # of the scorers
WORDS = json.loads((DATA / "wordpiece.json").read_text())
HEAD = DATA / "sac+logos+ava1-l14-linearMSE.pth"

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


def tensors_of(tag: str) -> dict[str, torch.Tensor]:
    """A scorer's, in the published layout."""
    found = {name: oracle_tensor(name, shape) for name, shape in REWARDS[tag].items()}
    if "logit_scale" in found:
        found["logit_scale"] = torch.tensor(REWARDS["pickscore.tiny.config"]["logit_scale"])
    return found


def clip_config(config: dict) -> dict:
    """transformers' sizes -> open_clip's."""
    vision, text = config["vision"], config["text"]
    return {
        "embed_dim": config["projection_dim"],
        "vision_cfg": {
            "image_size": vision["image_size"],
            "layers": vision["num_hidden_layers"],
            "width": vision["hidden_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "patch_size": vision["patch_size"],
            "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
            "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
        },
    }


def write_scorers(folder: Path) -> Path:
    """Every published file of every scorer, in miniature."""
    for repository, file in (of for files in rewards.FILES.values() for of in files):
        path = folder / repository.split("/")[1] / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if file == "model.safetensors":
            save_file(tensors_of("pickscore.tiny"), path)
        elif file == "HPS_v2_compressed.pt":
            config = clip_config(REWARDS["pickscore.tiny.config"])
            clip = rewards.load_clip(config, tensors_of("pickscore.tiny"), path, "cpu")
            torch.save({"state_dict": {name: tensor.half() for name, tensor in clip.state_dict().items()}}, path)
        elif file == HEAD.name:
            head = {0: (1024, 48), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
            head = {f"layers.{i}.weight": shape for i, shape in head.items()}
            head |= {name.replace("weight", "bias"): shape[:1] for name, shape in head.items()}
            torch.save({name: oracle_tensor(name, shape) for name, shape in head.items()}, path)
        elif file == "ImageReward.pt":
            tensors, name = tensors_of("imagereward.tiny"), "blip.visual_encoder.patch_embed.proj.weight"
            tensors[name] = tensors[name][..., :14, :14].clone()  # so that it sees 56 pixels, as the others
            torch.save(tensors, path)
        else:
            path.write_text("\n".join(WORDS["vocab"]) + "\n", encoding="utf-8")
    return folder
