"""Images in, latents on disk, and draws that depend on nothing but where they stand."""

import json
import shutil
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tqdm import tqdm

from spin import data
from spin.data import CaptionedImages, LatentShards, batch_rows, draw, read_prompts
from spin.infra.run import InputError

# ---------------------------------------------------------------------------------------------------------------------
# images


def folder_of(tmp_path: Path, picture: Image.Image, name: str = "a.png", **row) -> Path:
    picture.save(tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a caption"} | row))
    return tmp_path


def test_pictures_of_all_sizes_and_modes(pictures):
    images = CaptionedImages(pictures, 32)
    assert len(images) == 12
    modes = {Image.open(images.row(i)[1][0]).mode for i in range(12)}
    assert {"RGB", "RGBA", "L", "LA"} <= modes
    for row in range(len(images)):
        image = images.image(row)
        assert image.shape == (3, 32, 32) and image.dtype == torch.float32
        assert -1 <= image.min() and image.max() <= 1
        assert image.std() > 0.1  # the shape is in the picture
        assert image[:, 0, 0].min() > 0.9  # and stands on white, also where the file is transparent


def test_preference_pairs(tmp_path):
    folder = folder_of(tmp_path, Image.new("RGB", (8, 8), "white"), rejected_file_name="bad.png")
    assert len(CaptionedImages(folder, 8).row(0)[1]) == 1  # not asked for, not looked at
    with pytest.raises(InputError, match="line 1: no image 'bad.png'"):
        CaptionedImages(folder, 8, pairs=True).row(0)
    Image.new("RGB", (8, 8), "black").save(folder / "bad.png")
    images = CaptionedImages(folder, 8, pairs=True)
    assert images.image(0).min() == 1 and images.image(0, rejected=True).max() == -1
    before = images.hash()
    Image.new("RGB", (9, 90), "black").save(folder / "bad.png")
    assert images.hash() != before != CaptionedImages(folder, 8).hash()
    with pytest.raises(InputError, match="line 1: no rejected_file_name, which DPO needs"):
        CaptionedImages(folder_of(tmp_path, Image.new("RGB", (8, 8))), 8, pairs=True).row(0)
    with pytest.raises(InputError, match="leaves the folder"):
        row = folder_of(tmp_path, Image.new("RGB", (8, 8)), rejected_file_name="../out.png")
        CaptionedImages(row, 8, pairs=True).row(0)


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (20, 20), (31, 20)])
def test_the_centre_of_the_short_side_is_kept(size, tmp_path):
    """A picture whose two ends are red has none left once the square in its middle is cut out."""
    picture = Image.new("RGB", size, "red")
    width, height = size
    picture.paste("blue", [(width - 20) // 2, (height - 20) // 2, (width + 20) // 2, (height + 20) // 2])
    image = CaptionedImages(folder_of(tmp_path, picture), 20).image(0)
    expected = torch.tensor([-1.0, -1.0, 1.0])[:, None, None].expand(3, 20, 20)
    torch.testing.assert_close(image[:, 1:-1, 1:-1], expected[:, 1:-1, 1:-1])


def test_resizing_averages_instead_of_skipping(tmp_path):
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[::2] = 255
    image = CaptionedImages(folder_of(tmp_path, Image.fromarray(stripes)), 8).image(0)
    assert image[:, 1:-1].abs().max() < 0.1  # grey, not black and white


def test_exif_orientation_is_applied(tmp_path):
    picture = Image.new("RGB", (20, 20), "black")
    picture.paste("white", [0, 0, 20, 10])  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    picture.save(tmp_path / "a.png", exif=exif)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}')
    image = CaptionedImages(tmp_path, 20).image(0)
    assert image[:, :, 12:].min() == 1 and image[:, :, :8].max() == -1


def test_sixteen_bits(tmp_path):
    values = np.full((8, 8), 128 * 257, dtype=np.uint16)
    image = CaptionedImages(folder_of(tmp_path, Image.fromarray(values)), 8).image(0)
    torch.testing.assert_close(image, torch.full((3, 8, 8), 128 / 127.5 - 1))


def test_caption_is_accepted_for_text(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": "two words"}\n\n')
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    images = CaptionedImages(tmp_path, 8)
    assert len(images) == 1 and images.caption(0) == "two words"


GOOD = '{"file_name": "a.png", "text": "a caption"}'
BAD_ROWS = {
    "no such file": "",
    "no rows": "\n",
    "line 2: not a JSON object": GOOD + "\nnonsense",
    "line 1: not a JSON object with file_name and text": '{"file_name": "a.png"}',
    "line 1: an empty caption": '{"file_name": "a.png", "text": "  "}',
    "line 1: '../a.png' leaves the folder": '{"file_name": "../a.png", "text": "a"}',
    "line 1: '/etc/passwd' leaves the folder": '{"file_name": "/etc/passwd", "text": "a"}',
    "line 1: no image 'b.png'": '{"file_name": "b.png", "text": "a"}',
    "line 1: no image 'a\\nb'": '{"file_name": "a\\nb", "text": "a"}',
    "line 1: no image '\\x00'": '{"file_name": "\\u0000", "text": "a"}',
    "line 1: no image 'xxx": '{"file_name": "' + "x" * 5000 + '", "text": "a"}',
    "line 1: not a JSON object with": '{"file_name": "a.png", "text": "\\ud800"}',
    "line 1: not a JSON object": "[" * 100_000,
}


@pytest.mark.parametrize("expected", BAD_ROWS)
def test_bad_metadata_is_one_line(expected, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    if BAD_ROWS[expected]:
        (tmp_path / "metadata.jsonl").write_text(BAD_ROWS[expected])
    with pytest.raises(InputError) as error:
        images = CaptionedImages(tmp_path, 8)
        for i in range(len(images)):
            images.row(i)
    assert expected in str(error.value) and "\n" not in str(error.value)


def bad_and_good_rows(folder: Path) -> Path:
    """Nine rows; the first, sixth and last can be used."""
    Image.new("RGB", (32, 32), "red").save(folder / "good.png")
    content = (folder / "good.png").read_bytes()
    (folder / "broken.png").write_bytes(content[: len(content) // 2])
    (folder / "text.jpg").write_text("no picture")
    chunk = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"  # 900 million pixels in few bytes
    bomb = content[:8] + (13).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + content[33:]
    (folder / "bomb.png").write_bytes(bomb)
    names = ["good", "missing", "broken", "bomb", "../good", "good", "text.jpg", "good"]
    rows = [{"file_name": name if "." in name[2:] else f"{name}.png", "text": f"caption {name}"} for name in names]
    rows.insert(4, {"file_name": "good.png", "text": " "})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return folder


def test_inspection_names_every_row_that_cannot_be_used(tmp_path):
    images = CaptionedImages(bad_and_good_rows(tmp_path), 8)
    found = dict(images.inspect(tqdm(disable=True)))
    reasons = ["no image 'missing.png'", "broken.png: not a readable", "bomb.png: not a readable image (Image size",
               "an empty caption", "leaves the folder", "text.jpg: not a readable"]  # fmt: skip
    assert list(found) == [1, 2, 3, 4, 5, 7]
    for problem, reason in zip(found.values(), reasons):
        assert reason in problem and "\n" not in problem
    images.keep(np.array([0, 6, 8]))
    assert len(images) == 3 and all(images.image(i).mean(dim=(1, 2))[0] > 0.5 for i in range(3))


def test_a_million_rows_are_not_held_in_memory(tmp_path):
    line = '{"file_name": "%06d.png", "text": "a caption of some length, number %06d"}\n'
    with open(tmp_path / "metadata.jsonl", "w") as file:
        file.writelines(line % (i, i) for i in range(1_000_000))
    size = (tmp_path / "metadata.jsonl").stat().st_size
    tracemalloc.start()
    images = CaptionedImages(tmp_path, 8)
    shards = LatentShards(tmp_path / "cache", range(len(images)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(images) == 1_000_000 and peak < 70e6 < size
    Image.new("RGB", (8, 8)).save(tmp_path / "999999.png")
    assert images.caption(999_999) == "a caption of some length, number 999999"
    assert images.image(999_999).shape == (3, 8, 8) and len(shards.missing()) == -(-1_000_000 // data.SHARD)
    assert len(CaptionedImages(tmp_path, 8, first=10)) == 10


def test_a_broken_image_is_named(tmp_path):
    folder = folder_of(tmp_path, Image.new("RGB", (64, 64)))
    content = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"a\.png: not a readable image"):
        CaptionedImages(folder, 8).image(0)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_white(mode, tmp_path):
    Image.new(mode, (8, 8)).save(tmp_path / "a.tiff")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.tiff", "text": "a"}')
    with pytest.raises(InputError, match=r"a\.tiff: not a readable image \(32 bits a pixel"):
        CaptionedImages(tmp_path, 8).image(0)


def test_the_hash_tells_data_apart(pictures, tmp_path):
    folder = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    before = CaptionedImages(folder, 8).hash()
    assert before == CaptionedImages(pictures, 64).hash()
    Image.new("RGB", (9, 9)).save(folder / "0.jpg")
    assert before != CaptionedImages(folder, 8).hash()


@pytest.mark.parametrize(
    "name, text",
    [
        ("p.txt", "one\n\n two \n"),
        ("p.txt", "\ufeffone\ntwo"),
        ("p.json", '["one", {"prompt": "two"}]'),
        ("p.jsonl", '{"text": "one"}\n{"caption": "two", "id": 3}\n'),
    ],
)
def test_prompt_files(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path / name) == ["one", "two"]


@pytest.mark.parametrize(
    "name, text",
    [
        ("p.txt", "\n"),
        ("p.json", "[1]"),
        ("p.jsonl", '{"words": "one"}'),
        ("p.json", "{"),
        ("p.json", '"a cat"'),
        ("p.json", '{"prompt": "a cat"}'),
        ("p.json", '["a cat", "a lone \\ud800"]'),
        ("p.json", "[" * 100_000),
    ],
)
def test_prompt_files_without_prompts(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=r"p\.json|p\.txt") as error:
        read_prompts(tmp_path / name)
    assert "\n" not in str(error.value)


def test_what_is_wrong_with_a_prompt_file_is_said(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"Prompt": "one"}')
    with pytest.raises(InputError, match="not a list of prompts .no prompt, text or caption."):
        read_prompts(tmp_path / "p.jsonl")
    (tmp_path / "p.tsv").write_text("Prompt\tCategory\n")
    with pytest.raises(InputError, match="its name ends in none of .txt, .json, .jsonl"):
        read_prompts(tmp_path / "p.tsv")


# ---------------------------------------------------------------------------------------------------------------------
# latents on disk


def test_shards_hold_what_was_written_and_know_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 4)
    rows = [3, 5, 7, 8, 20, 21, 30, 31, 40, 41]
    shards = LatentShards(tmp_path / "latents", rows)
    assert shards.missing() == [(0, rows[:4]), (1, rows[4:8]), (2, rows[8:])]
    values = {row: torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(row)) for row in rows}
    for shard, held in shards.missing():
        if shard != 1:
            shards.write(shard, {"x0": torch.stack([values[row] for row in held])})
    assert LatentShards(tmp_path / "latents", rows).missing() == [(1, rows[4:8])]
    read = shards.read("x0", [41, 3, 8])
    assert read.dtype == torch.float32
    assert torch.equal(read, torch.stack([values[row].half().float() for row in (41, 3, 8)]))
    shards.path(0).write_bytes(b"damaged")
    with pytest.raises(InputError, match="shard-00000.safetensors: missing or damaged; delete it"):
        LatentShards(tmp_path / "latents", rows).read("x0", [3])


# ---------------------------------------------------------------------------------------------------------------------
# draws

seeds = st.integers(0, 2**40)


@given(seeds, st.integers(1, 9), st.integers(1, 7), st.integers(1, 12))
def test_an_epoch_draws_every_row_once(seed, iteration, batch_size, count):
    steps = range(1, batch_size * count + 1)
    drawn = [row for step in steps for row in batch_rows(seed, iteration, step, batch_size, count)]
    for epoch in range(0, len(drawn), count):
        assert sorted(drawn[epoch : epoch + count]) == list(range(count))


@given(seeds, st.integers(1, 5), st.integers(1, 5), st.integers(0, 5))
def test_a_draw_depends_on_its_place_alone(seed, iteration, step, place):
    def same(a, b):
        return all(torch.equal(a[name], b[name]) for name in a)

    here = draw(seed, iteration, step, place, (4, 2, 3), 1000)
    assert same(here, draw(seed, iteration, step, place, (4, 2, 3), 1000))
    for i in range(4):
        other = [seed, iteration, step, place]
        other[i] += 1
        assert not same(here, draw(*other, (4, 2, 3), 1000))


def test_draws_have_the_distribution_they_should():
    draws = [draw(0, 1, step, place, (4, 8, 8), 1000) for step in range(40) for place in range(10)]
    t = torch.stack([d["t"] for d in draws]).double()
    assert 0 <= t.min() < 20 and 980 < t.max() <= 999
    assert abs(t.mean() - 499.5) < 4 * 288.7 / 20  # four standard errors
    assert abs(torch.stack([d["flip"] for d in draws]).mean() - 0.5) < 4 * 0.289 / 20
    for name in ("eps", "posterior"):
        values = torch.stack([d[name] for d in draws])
        assert abs(values.mean()) < 4 / values.numel() ** 0.5
        assert abs(values.var() - 1) < 4 * (2 / values.numel()) ** 0.5
    eps, posterior = (torch.stack([d[name] for d in draws]).flatten() for name in ("eps", "posterior"))
    assert abs((eps * posterior).mean()) < 4 / eps.numel() ** 0.5  # independent of each other


@given(seeds, st.integers(1, 5), st.integers(0, 100))
def test_the_noise_of_a_generated_image_depends_on_its_row(seed, iteration, row):
    first = torch.randn(8, generator=data.generator(seed, iteration, row))
    assert torch.equal(first, torch.randn(8, generator=data.generator(seed, iteration, row)))
    for other in [(seed + 1, iteration, row), (seed, iteration + 1, row), (seed, iteration, row + 1)]:
        assert not torch.equal(first, torch.randn(8, generator=data.generator(*other)))
