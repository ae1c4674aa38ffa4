"""Image files: RGB from every mode, refusals of broken files, PNGs that state their making."""

import struct
import zlib
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from spin.infra.errors import InputError
from spin.infra.images import (
    TRANSPOSE,
    format_parameters,
    read_image,
    read_parameters,
    save_png,
    to_pil,
    to_rgb,
)

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


def oriented_image() -> Image.Image:
    """Return an image that each of the eight orientations makes another one."""
    image = Image.new("RGB", (12, 8), "black")
    image.paste("red", [0, 0, 6, 4])
    image.paste("blue", [6, 0, 12, 4])
    return image


def save_oriented(path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if path.suffix == ".webp" else {}
    oriented_image().save(path, exif=exif, **options)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_means_what_it_means_to_pillow(orientation, suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    save_oriented(path, orientation)
    with Image.open(path) as file:
        expected = ImageOps.exif_transpose(file).convert("RGB")
    assert expected.size == ((12, 8) if orientation < 5 else (8, 12))
    assert np.array_equal(np.asarray(read_image(path)), np.asarray(expected))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_is_not_defined_turns_nothing(orientation, tmp_path):
    save_oriented(tmp_path / "a.png", orientation)
    found = read_image(tmp_path / "a.png")
    assert np.array_equal(np.asarray(found), np.asarray(oriented_image()))


def test_an_orientation_may_be_stated_in_xmp(tmp_path):
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    oriented_image().save(tmp_path / "a.jpg", xmp=xmp)
    assert read_image(tmp_path / "a.jpg").size == (8, 12)


# ---- Faults of the metadata ----------------------------------------------------------------------


def png_chunk(name: bytes, content: bytes, checksum: int | None = None) -> bytes:
    if checksum is None:
        checksum = zlib.crc32(name + content)
    return len(content).to_bytes(4, "big") + name + content + checksum.to_bytes(4, "big")


def with_chunk(png: bytes, chunk: bytes) -> bytes:
    """Return a PNG with a chunk after its header."""
    return png[:33] + chunk + png[33:]


# EXIF data that says: turn a quarter (6); resolution -1 / 0, which Pillow reads and cannot write.
ORIENTATION = b"\x01\x12" + b"\0\x03\0\0\0\x01" + b"\0\x06\0\0"  # one short number
RESOLUTION = b"\x01\x1a" + b"\0\x0a\0\0\0\x01" + b"\0\0\0\x26"  # one signed rational, at byte 38
BAD_RATIONAL = b"".join(
    [
        b"Exif\0\0" + b"MM\0*\0\0\0\x08" + b"\0\x02",  # two entries
        ORIENTATION,
        RESOLUTION,
        b"\0\0\0\0" + b"\xff\xff\xff\xff" + b"\0\0\0\0",
    ]
)


def test_exif_data_that_pillow_cannot_rewrite_still_turns_the_image(tmp_path):
    """Such files are written by cameras and image editors."""
    oriented_image().save(tmp_path / "a.jpg", exif=BAD_RATIONAL, quality=100, subsampling=0)
    with Image.open(tmp_path / "a.jpg") as file:
        expected = file.transpose(Image.Transpose.ROTATE_270)
        with pytest.raises(struct.error):
            ImageOps.exif_transpose(file)
    found = read_image(tmp_path / "a.jpg")
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_an_orientation_that_is_a_string_turns_nothing(tmp_path):
    string = b"\x01\x12" + b"\0\x02\0\0\0\x02" + b"6\0\0\0"
    exif = BAD_RATIONAL.replace(ORIENTATION, string)
    oriented_image().save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as file:
        assert file.getexif()[0x0112] == "6"
    assert read_image(tmp_path / "a.png").size == (12, 8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"junk that is no TIFF", b"MM\0*\xff\xff\xff\xff", b"II*\0"])
def test_exif_data_that_cannot_be_read_turns_nothing(exif, suffix, tmp_path):
    options = {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"a.{suffix}"
    oriented_image().save(path, exif=b"Exif\0\0" + exif, **options)
    assert read_image(path).size == (12, 8)


LONG_TEXT = zlib.compress(b"workflow" * 300_000)

# Chunks of a PNG with which Pillow refuses the whole file.
BAD_CHUNKS = {
    "a long text": png_chunk(b"zTXt", b"workflow\0\0" + LONG_TEXT),
    "a long international text": png_chunk(b"iTXt", b"workflow\0\x01\0\0\0" + LONG_TEXT),
    "a text with a wrong checksum": png_chunk(b"tEXt", b"parameters\0a cat", checksum=0),
    "a text compressed in an unknown way": png_chunk(b"zTXt", b"parameters\0\x07a cat"),
    "half a resolution": png_chunk(b"pHYs", b"\0\0"),
    "half a gamma": png_chunk(b"gAMA", b"\0"),
    "a large color profile": png_chunk(b"iCCP", b"icc\0\0" + LONG_TEXT),
    "a color profile compressed in an unknown way": png_chunk(b"iCCP", b"icc\0\x07profile"),
    "EXIF data with a wrong checksum": png_chunk(b"eXIf", b"MM\0*", checksum=0),
    "C2PA's chunk with a wrong checksum": png_chunk(b"caBX", b"jumb", checksum=0),
    "an unknown chunk with a wrong checksum": png_chunk(b"vpAg", b"\0\0", checksum=0),
    "half a count of frames": png_chunk(b"acTL", b"\0\0"),
    "half a frame": png_chunk(b"fcTL", b"\0\0"),
}


@pytest.mark.parametrize("fault", BAD_CHUNKS)
def test_a_fault_of_a_pngs_metadata_is_not_a_fault_of_the_image(fault, tmp_path):
    path = tmp_path / "a.png"
    save_oriented(path, 6)
    expected = read_image(path)
    assert expected.size == (8, 12)
    path.write_bytes(with_chunk(path.read_bytes(), BAD_CHUNKS[fault]))
    with pytest.raises((OSError, ValueError, SyntaxError)):
        Image.open(path).load()
    assert np.array_equal(np.asarray(read_image(path)), np.asarray(expected))


PNG_XMP = b'XML:com.adobe.xmp\0\0\0\0\0<rdf:Description tiff:Orientation="6"/>'


@pytest.mark.parametrize("fault", BAD_CHUNKS)
def test_an_orientation_in_a_pngs_xmp_outlives_the_fault(fault, tmp_path):
    path = tmp_path / "a.png"
    oriented_image().save(path)
    with_xmp = with_chunk(path.read_bytes(), png_chunk(b"iTXt", PNG_XMP))
    path.write_bytes(with_xmp)
    expected = read_image(path)
    assert expected.size == (8, 12)
    path.write_bytes(with_chunk(with_xmp, BAD_CHUNKS[fault]))
    assert np.array_equal(np.asarray(read_image(path)), np.asarray(expected))


@pytest.mark.parametrize("xmp", ["damaged", "long"])
def test_xmp_that_is_itself_the_fault_turns_nothing(xmp, tmp_path):
    path = tmp_path / "a.png"
    oriented_image().save(path)
    chunks = {
        "damaged": png_chunk(b"iTXt", PNG_XMP, checksum=0),
        "long": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\x01\0\0\0" + LONG_TEXT),
    }
    path.write_bytes(with_chunk(path.read_bytes(), chunks[xmp]))
    assert np.array_equal(np.asarray(read_image(path)), np.asarray(oriented_image()))


def jpeg_segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content


# Segments of a JPEG with which Pillow refuses the whole file.
BAD_SEGMENTS = {
    "a short color profile": jpeg_segment(0xE2, b"ICC_PROFILE\0"),
    "a short JFIF segment": jpeg_segment(0xE0, b"JFIF\0"),
    "a short Adobe segment": jpeg_segment(0xEE, b"Adobe"),
    "half a resource of Photoshop": jpeg_segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed"),
}


RGB_BY_ADOBE = jpeg_segment(0xEE, b"Adobe\0\x64\0\0\0\0\0")


def write_jpeg(path: Path, colors: str) -> None:
    """Write a JPEG that is turned a quarter, and whose colors are said in one of four ways."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = helpers.photograph("segments", (24, 16))
    if colors == "CMYK":
        image = image.convert("CMYK")
    image.save(path, exif=exif, keep_rgb=colors.startswith("RGB"))
    jpeg = path.read_bytes()
    if colors == "YCbCr, by JFIF against Adobe":
        header = jpeg.index(b"\xff\xdb")  # the first segment that is no metadata
        jpeg = jpeg[:header] + RGB_BY_ADOBE + jpeg[header:]
    if colors == "RGB, by Adobe alone":  # and not by the names of the channels
        header = jpeg.index(b"\xff\xc0")
        jpeg = jpeg[:header] + jpeg[header:].replace(b"R\x11", b"\1\x11", 1)
        pixels = jpeg.index(b"\xff\xda")
        jpeg = jpeg[:pixels] + jpeg[pixels:].replace(b"R\0", b"\1\0", 1)
    path.write_bytes(jpeg)


@pytest.mark.parametrize("fault", BAD_SEGMENTS)
@pytest.mark.parametrize(
    "colors", ["YCbCr", "YCbCr, by JFIF against Adobe", "RGB, by Adobe alone", "CMYK"]
)
def test_a_fault_of_a_jpegs_metadata_is_not_a_fault_of_the_image(fault, colors, tmp_path):
    path = tmp_path / "a.jpg"
    write_jpeg(path, colors)
    expected = read_image(path)
    assert expected.size == (16, 24)
    whole = path.read_bytes()
    path.write_bytes(whole[:2] + BAD_SEGMENTS[fault] + whole[2:])
    with pytest.raises((OSError, IndexError, struct.error)):
        Image.open(path).load()
    assert np.array_equal(np.asarray(read_image(path)), np.asarray(expected))


def test_an_orientation_in_a_jpegs_xmp_outlives_the_fault(tmp_path):
    path = tmp_path / "a.jpg"
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    oriented_image().save(path, xmp=xmp)
    whole = path.read_bytes()
    path.write_bytes(whole[:2] + BAD_SEGMENTS["a short Adobe segment"] + whole[2:])
    assert read_image(path).size == (8, 12)


def test_a_damaged_jpeg_is_refused_whatever_its_metadata(tmp_path):
    path = tmp_path / "a.jpg"
    helpers.photograph("broken", (64, 64)).save(path)
    whole = path.read_bytes()
    damaged = whole[:2] + BAD_SEGMENTS["a short Adobe segment"] + whole[2:]
    for length in (3, 30, 200, len(damaged) // 2):
        path.write_bytes(damaged[:length])
        with pytest.raises(InputError, match=r"a\.jpg: not a readable image"):
            read_image(path)


@pytest.mark.parametrize("fault", ["a long text", "half a gamma"])
def test_a_damaged_image_is_refused_whatever_its_metadata(fault, tmp_path):
    path = tmp_path / "a.png"
    helpers.photograph("broken", (64, 64)).save(path)
    png = with_chunk(path.read_bytes(), BAD_CHUNKS[fault])
    path.write_bytes(png[:-2000])
    with pytest.raises(InputError, match=r"a\.png: not a readable image"):
        read_image(path)


@pytest.mark.parametrize("chunk", [b"IHDR", b"PLTE", b"tRNS", b"IDAT"])
def test_what_the_pixels_depend_on_is_not_metadata(chunk, tmp_path):
    """One wrong bit in its name must not make it vanish."""
    path = tmp_path / "a.png"
    image = helpers.photograph("palette", (32, 32)).quantize(16)
    image.save(path, transparency=bytes(range(0, 256, 16)))
    png = path.read_bytes()
    assert png.count(chunk) == 1
    for position in range(4):
        for bit in (4, 32):  # 32 makes it lower case, as the names of metadata are
            wrong = bytearray(chunk)
            wrong[position] ^= bit
            path.write_bytes(png.replace(chunk, bytes(wrong)))
            with pytest.raises(InputError, match=r"a\.png: not a readable image"):
                read_image(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_an_invalid_color_profile_is_ignored(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    oriented_image().save(path, icc_profile=b"no profile")
    assert read_image(path).size == (12, 8)


def test_a_git_lfs_pointer_is_called_what_it_is(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n")
    with pytest.raises(InputError, match=r"a\.png: a Git LFS pointer.*`git lfs pull`"):
        read_image(path)


# ---- Depths and modes ----------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["P5 4 1 65535", "P2 4 1 65535", "P5 4 1 1023", "P2 4 1 4095"])
def test_sixteen_bits_of_a_pgm_are_those_of_a_png(header, tmp_path):
    """Its header says which value is white."""
    white = int(header.split()[-1])
    levels = np.array([[0, white // 3, white // 2, white]])
    if header.startswith("P5"):
        content = levels.astype(">u2").tobytes()
    else:
        content = " ".join(map(str, levels[0])).encode()
    (tmp_path / "a.pgm").write_bytes(header.encode() + b"\n" + content)
    sixteen_bits = (levels * (65535 / white)).round().astype(np.uint16)
    Image.fromarray(sixteen_bits).save(tmp_path / "a.png")
    found = np.asarray(read_image(tmp_path / "a.pgm"))
    assert np.array_equal(found, np.asarray(read_image(tmp_path / "a.png")))
    assert found[0, :, 0].tolist() == [0, 85, 127, 255]


def test_a_transparent_level_of_sixteen_bits_is_white(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 1000, 65535]], dtype=np.uint16)).save(path)
    path.write_bytes(with_chunk(path.read_bytes(), png_chunk(b"tRNS", (1000).to_bytes(2, "big"))))
    assert np.asarray(read_image(path))[0, :, 0].tolist() == [0, 255, 255]


def write_tiff(path: Path, bits: int, white: int, sample_format: int = 1) -> None:
    """Write a gray TIFF of 2 x 1 pixels, all bits 0. white: 1 if the largest value is white."""
    content = bytes(2 * bits // 8)
    tags = {256: 2, 257: 1, 258: bits, 259: 1, 262: white, 273: 134, 277: 1, 278: 1}
    tags |= {279: len(content), 339: sample_format}
    entries = [struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items()]
    header = b"II*\0" + struct.pack("<IH", 8, len(entries))
    path.write_bytes(header + b"".join(entries) + bytes(4) + content)


@pytest.mark.parametrize(
    "bits, white, sample_format, reason",
    [
        (12, 1, 1, "12 bits per pixel"),
        (16, 0, 1, "16 bits per pixel of which white is 0"),
        (16, 1, 2, "32 bits per pixel or signed levels, mode I"),
        (32, 1, 1, "32 bits per pixel or signed levels, mode I"),
        (32, 1, 3, "32 bits per pixel or signed levels, mode F"),
    ],
)
def test_a_tiff_is_refused_if_its_white_is_not_known(bits, white, sample_format, reason, tmp_path):
    write_tiff(tmp_path / "a.tiff", bits, white, sample_format)
    with pytest.raises(InputError, match=rf"a\.tiff: not a readable image \({reason}"):
        read_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("bits, white, expected", [(16, 1, 0), (8, 1, 0), (8, 0, 255)])
def test_the_other_tiffs_are_read(bits, white, expected, tmp_path):
    write_tiff(tmp_path / "a.tiff", bits, white)
    assert read_image(tmp_path / "a.tiff").getpixel((0, 0)) == (expected, expected, expected)


def test_gray_with_associated_alpha_is_read():
    assert to_rgb(Image.new("La", (2, 2))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_of_several_images_the_first_is_read(suffix, tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert read_image(path).getpixel((4, 4)) == (255, 0, 0)


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


@pytest.mark.parametrize("mode", ["L", "I;16", "CMYK", "P"])
@pytest.mark.parametrize("orientation", [5, 6, 8])
def test_a_turned_tiff_is_not_scrambled(mode, orientation, tmp_path):
    """As it is by Pillow 13, given a path, if it is not compressed."""
    image = helpers.photograph("x", (64, 48)).convert("L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(tmp_path / "a.tif", exif=exif)
    upright = image.transpose(TRANSPOSE[orientation])
    expected = np.asarray(to_rgb(upright))
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.tif")), expected)


@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_a_png_that_ends_in_zeros_is_refused(kept, tmp_path):
    """As after a power cut: Pillow's decoder does not look at checksums, and reads black rows."""
    path = tmp_path / "a.png"
    helpers.photograph("x", (160, 120)).save(path)
    content = path.read_bytes()
    length = int(kept * len(content))
    path.write_bytes(content[:length] + bytes(len(content) - length))
    with pytest.raises(InputError, match="not a readable image"):
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
