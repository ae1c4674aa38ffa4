"""Image files: RGB from every mode, refusals of broken files, PNGs that state their making."""

import zlib

import helpers
import numpy as np
import pytest
import torch
from PIL import Image

from spin.infra.errors import InputError
from spin.infra.images import format_parameters, read_image, read_parameters
from spin.infra.images import save_png, to_pil, to_rgb

# ---- Reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_a_mode_becomes_rgb_as_it_looks(mode):
    image = Image.new("RGBA", (8, 8), "white")
    image.paste("black", [0, 0, 4, 8])
    found = to_rgb(image.convert(mode))
    assert found.mode == "RGB"
    assert found.getpixel((1, 1)) == (0, 0, 0) and found.getpixel((6, 6)) == (255, 255, 255)


def test_what_is_transparent_is_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    found = to_rgb(image)
    assert found.getpixel((0, 0)) == (255, 255, 255)
    assert found.getpixel((1, 0)) == (127, 127, 127)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (20, 10), "black")
    image.paste("white", [0, 0, 20, 5])  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees, clockwise
    image.save(tmp_path / "a.png", exif=exif)
    found = read_image(tmp_path / "a.png")
    assert found.size == (10, 20)
    assert found.getpixel((8, 10)) == (255, 255, 255) and found.getpixel((1, 10)) == (0, 0, 0)


def test_sixteen_bits_become_eight():
    values = np.array([[0, 128 * 257, 65535]], dtype=np.uint16)
    found = to_rgb(Image.fromarray(values))
    assert np.asarray(found)[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_known_white_are_refused(mode, tmp_path):
    Image.new(mode, (8, 8)).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match=r"a\.tiff: not a readable image \(32 bits per pixel"):
        read_image(tmp_path / "a.tiff")


def with_huge_size(png: bytes) -> bytes:
    """Return a PNG of few bytes whose header promises 900 million pixels."""
    header = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    checksum = zlib.crc32(header).to_bytes(4, "big")
    return png[:8] + (13).to_bytes(4, "big") + header + checksum + png[33:]


@pytest.mark.parametrize("damage", ["truncated", "huge", "text", "empty"])
def test_a_broken_file_is_refused_by_name(damage, tmp_path):
    path = tmp_path / "a.png"
    helpers.photograph("broken", (64, 64)).save(path)
    whole = path.read_bytes()
    damaged = {
        "truncated": whole[: len(whole) // 2],
        "huge": with_huge_size(whole),
        "text": b"no image",
        "empty": b"",
    }
    path.write_bytes(damaged[damage])
    reason = r" \(Image size" if damage == "huge" else ""
    with pytest.raises(InputError, match=rf"a\.png: not a readable image{reason}"):
        read_image(path)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"b\.png: not a readable image"):
        read_image(tmp_path / "b.png")


# ---- Writing -------------------------------------------------------------------------------------


def test_levels_are_rounded_to_the_nearest():
    values = torch.tensor([-1.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 2.0])
    image = to_pil(values.expand(3, 1, 5))
    assert image.mode == "RGB" and image.size == (5, 1)
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 1, 255, 255]


def test_a_png_states_how_it_was_made(tmp_path):
    image = helpers.photograph("stated", (24, 16))
    path = tmp_path / "folder" / "a.png"
    save_png(image, path, "größer, and\u3000wider", {"Seed": 3, "Negative prompt": "blurry"})
    assert np.array_equal(np.asarray(read_image(path)), np.asarray(image))
    expected = "größer, and\u3000wider\nNegative prompt: blurry\nSeed: 3, Size: 24x16"
    assert read_parameters(path) == expected
    assert format_parameters("a cat", {"Seed": 3, "Negative prompt": ""}) == "a cat\nSeed: 3"


def test_what_states_nothing_reads_as_nothing(tmp_path):
    save_png(Image.new("RGB", (2, 2)), tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no image")
    for name in ("plain.png", "text.png", "missing.png"):
        assert read_parameters(tmp_path / name) == ""
