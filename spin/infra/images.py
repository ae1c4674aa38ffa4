"""Image files: read as RGB, and written as PNGs that state how the image was made."""

import zlib
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, PngImagePlugin
from torch import Tensor

from spin.infra.errors import InputError
from spin.infra.files import atomic_write, refuse_lfs_pointer

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # what a PNG's pixels depend on
PNG_XMP = b"XML:com.adobe.xmp\0\0"  # how an iTXt chunk begins that holds XMP, uncompressed

JPEG_SIGNATURE = b"\xff\xd8"
JPEG_EXIF = b"Exif\0\0"
JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\0"

# EXIF orientation -> how to turn the image upright. 1 is upright; undefined values are ignored.
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path: Path) -> Image.Image:
    """Read an image file as RGB. Of a file with several images, it is the first.

    Raises InputError if the file is damaged or not an image, or has more than 179 million pixels,
    which is Pillow's limit. Damaged metadata is no damage to the image.
    """
    refuse_lfs_pointer(path)
    try:
        # Given a path, Pillow maps some files into memory, and scrambles turned TIFFs (Pillow 13).
        with open(path, "rb") as file:
            return decode_image(file)
    except Exception as error:  # a broken file can make Pillow's many readers raise anything
        reason = str(error) or type(error).__name__
    try:
        return decode_image(BytesIO(read_without_metadata(path)))
    except Exception:
        raise InputError(f"{path}: not a readable image ({reason})") from None


def decode_image(file: BinaryIO) -> Image.Image:
    image = Image.open(file)
    if image.format == "PNG":
        image.verify()  # its checksums, which Pillow's decoder ignores; then it must be opened anew
        file.seek(0)
        image = Image.open(file)
    return to_rgb(image)


def read_without_metadata(path: Path) -> bytes:
    """Return a PNG or JPEG file without its metadata, but for what states the orientation.

    Pillow refuses a whole file for a wrong bit, a missing byte or a long text in its metadata.
    Raises ValueError for another file, IndexError for a JPEG of which only metadata are left.
    """
    with open(path, "rb") as file:
        start = file.read(len(PNG_SIGNATURE))
        if start == PNG_SIGNATURE:
            return strip_png(start + file.read())
        if start.startswith(JPEG_SIGNATURE):
            return strip_jpeg(start + file.read())
    raise ValueError("neither PNG nor JPEG")


def strip_png(png: bytes) -> bytes:
    # a PNG is a series of chunks: length of the content, name, content, checksum
    kept = [PNG_SIGNATURE]
    start = len(PNG_SIGNATURE)
    while start < len(png):
        length = int.from_bytes(png[start : start + 4], "big")
        name = png[start + 4 : start + 8]
        end = start + 8 + length
        content = png[start + 8 : end]
        checksum = png[end : end + 4]
        if not is_png_metadata(name) or states_orientation(name, content, checksum):
            kept.append(png[start : end + 4])
        start = end + 4
    return b"".join(kept)


def is_png_metadata(name: bytes) -> bool:
    """Return whether no pixel depends on a chunk of this name, be one letter of it damaged."""
    for needed in PIXEL_CHUNKS:
        equal_letters = [letter == other for letter, other in zip(name, needed)]
        if sum(equal_letters) >= 3:
            return False
    return name[:1].islower()  # which is how PNG marks a chunk that a decoder may ignore


def states_orientation(name: bytes, content: bytes, checksum: bytes) -> bool:
    """Return whether a PNG's chunk is undamaged EXIF or XMP."""
    if zlib.crc32(name + content) != int.from_bytes(checksum, "big"):
        return False
    return name == b"eXIf" or (name == b"iTXt" and content.startswith(PNG_XMP))


def strip_jpeg(jpeg: bytes) -> bytes:
    # a JPEG begins with segments: 255, marker, length of what follows, content
    kept = [JPEG_SIGNATURE]
    start = len(JPEG_SIGNATURE)
    while jpeg[start] == 0xFF and jpeg[start + 1] != 0xDA:  # until the pixels begin
        end = start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big")
        if not is_jpeg_metadata(jpeg[start + 1], jpeg[start + 4 : end]):
            kept.append(jpeg[start:end])
        start = end
    return b"".join([*kept, jpeg[start:]])


def is_jpeg_metadata(marker: int, content: bytes) -> bool:
    """Return whether neither the colors nor the orientation depend on a JPEG's segment."""
    if marker not in range(0xE0, 0xF0):  # APP0 to APP15
        return False
    if marker == 0xE1:
        return not content.startswith((JPEG_EXIF, JPEG_XMP))
    # libjpeg learns from these two whether the colors are YCbCr, and ignores shorter ones
    is_jfif = marker == 0xE0 and content.startswith(b"JFIF\0") and len(content) >= 14
    is_adobe = marker == 0xEE and content.startswith(b"Adobe") and len(content) >= 12
    return not (is_jfif or is_adobe)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of 8 or 16 bits in RGB: rotated as its EXIF data says, on a white background.

    Raises ValueError if which value is white cannot be known.
    """
    # Pillow reads 16 bits of PGM files as 32, scaled so that white is 65535.
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if is_16_bit and image.format == "TIFF":
        check_white(image.tag_v2)
    upright = turn_upright(image)

    if is_16_bit:
        values = np.asarray(upright)
        levels = (values.astype(np.float32) / 257).clip(0, 255).astype(np.uint8)  # 65535 / 255
        if "transparency" in upright.info:
            levels[values == upright.info["transparency"]] = 255
        return Image.fromarray(levels).convert("RGB")

    if upright.mode in ("I", "F"):
        raise ValueError(
            f"32 bits per pixel or signed levels, mode {upright.mode}: white is undefined; "
            "convert to 8 or 16 bits"
        )

    if upright.has_transparency_data:
        if upright.mode == "La":
            upright = upright.convert("LA")  # Pillow has no other way
        white = Image.new("RGBA", upright.size, "white")
        return Image.alpha_composite(white, upright.convert("RGBA")).convert("RGB")

    return upright.convert("RGB")


def check_white(tags) -> None:
    """Raise ValueError if a 16-bit TIFF's tags say that white is not 65535, as Pillow assumes."""
    if tags.get(ExifTags.Base.BitsPerSample) == (12,):
        raise ValueError("12 bits per pixel; convert to 8 or 16 bits")
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:
        raise ValueError("16 bits per pixel of which white is 0; convert to 8 bits")


def turn_upright(image: Image.Image) -> Image.Image:
    """Return the image turned as its EXIF (or XMP) orientation says. Unreadable EXIF says nothing.

    ImageOps.exif_transpose rewrites all EXIF data, which fails if any of it is damaged.
    """
    image.load()  # in a PNG, EXIF data may come after the pixels
    try:
        method = TRANSPOSE.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow's reader of EXIF data can raise anything
        return image
    if method is None:
        return image
    return image.transpose(method)


def to_pil(image: Tensor) -> Image.Image:
    """Return an image [3,H,W] in [0,1] as 8-bit RGB, rounded to the nearest level.

    Raises InputError for an image that is not finite: NaN would become black.
    """
    if not image.isfinite().all():
        raise InputError("an image is not finite (NaN or infinity): it is not written")
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
