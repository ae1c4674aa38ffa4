"""Image files: read as RGB, and written as PNGs that state how the image was made."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from spin.infra.errors import InputError
from spin.infra.files import atomic_write


def read_image(path: Path) -> Image.Image:
    """Read an image file as RGB.

    Raises InputError if the file is damaged or not an image, or has more than 179 million pixels,
    which is Pillow's limit.
    """
    try:
        with Image.open(path) as file:
            return to_rgb(file)
    except Exception as error:  # a broken file can make Pillow's many readers raise anything
        reason = str(error) or type(error).__name__
        raise InputError(f"{path}: not a readable image ({reason})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of 8 or 16 bits in RGB: rotated as its EXIF data says, on a white background.

    Raises ValueError for 32 bits a pixel: such files do not say which value is white.
    """
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("I", "F"):
        raise ValueError(
            f"32 bits per pixel, mode {upright.mode}: white is undefined; convert to 8 or 16 bits"
        )

    if upright.mode.startswith("I;16"):
        levels = np.asarray(upright, dtype=np.float32) / 257  # 65535 / 255
        return Image.fromarray(levels.clip(0, 255).astype(np.uint8)).convert("RGB")

    if upright.has_transparency_data:
        white = Image.new("RGBA", upright.size, "white")
        return Image.alpha_composite(white, upright.convert("RGBA")).convert("RGB")

    return upright.convert("RGB")


def to_pil(image: Tensor) -> Image.Image:
    """Return an image [3,H,W] in [0,1] as 8-bit RGB, rounded to the nearest level."""
    levels = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def format_parameters(prompt: str, settings: dict) -> str:
    """Return how an image was made, in the format of Stable Diffusion programs.

    settings: for example {"Seed": 1, "Steps": 50}. A "Negative prompt" has a line of its own.
    """
    lines = [prompt]
    if settings.get("Negative prompt"):
        lines.append(f"Negative prompt: {settings['Negative prompt']}")
    others = [f"{name}: {value}" for name, value in settings.items() if name != "Negative prompt"]
    lines.append(", ".join(others))
    return "\n".join(lines)


def save_png(
    image: Image.Image, path: Path, prompt: str = "", settings: dict | None = None
) -> None:
    """Write a PNG atomically. With settings, its text chunk "parameters" states how it was made."""
    info = PngImagePlugin.PngInfo()
    if settings is not None:
        size = f"{image.width}x{image.height}"
        info.add_itxt("parameters", format_parameters(prompt, {**settings, "Size": size}))
    with atomic_write(path) as part:
        image.save(part, format="PNG", pnginfo=info)


def read_parameters(path: Path) -> str:
    """Return a PNG's text chunk "parameters", or "" if there is no such chunk, image or file."""
    try:
        with Image.open(path) as image:
            return image.info.get("parameters", "")
    except OSError:
        return ""
