"""Specification of spin/data.py: what is drawn when, and rows of captioned images."""

import json
import os
import shutil
import tracemalloc
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from spin.data import CaptionedImages, batch_rows, noise_generator, random_draws
from spin.infra.errors import InputError
from spin.infra.images import read_image
from spin.infra.inspection import check_rows, check_unchanged, find_faults

seeds = st.integers(0, 2**62)
iterations = st.integers(1, 9)
steps = st.integers(1, 1000)
positions = st.integers(0, 4000)

# -----------------------------------------------------------------------------
# batch_rows: which rows a step trains on


@given(seeds, iterations, st.integers(1, 7), st.integers(1, 12))
def test_every_row_comes_once_before_any_comes_again(seed, iteration, batch_size, num_rows):
    rows = []
    for step in range(1, batch_size * num_rows + 1):
        rows += batch_rows(seed, iteration, step, batch_size, num_rows)
    for start in range(0, len(rows), num_rows):
        epoch = rows[start : start + num_rows]
        assert sorted(epoch) == list(range(num_rows))


@given(seeds, iterations, steps, st.integers(1, 7), st.integers(1, 12))
def test_the_same_step_trains_on_the_same_rows(seed, iteration, step, batch_size, num_rows):
    rows = batch_rows(seed, iteration, step, batch_size, num_rows)
    assert len(rows) == batch_size
    batch_rows(seed + 1, iteration + 1, step, batch_size, num_rows)  # no state is kept in between
    assert batch_rows(seed, iteration, step, batch_size, num_rows) == rows


@given(seeds, iterations)
def test_every_iteration_epoch_and_seed_has_an_order_of_its_own(seed, iteration):
    """Two random orders of 20 rows are equal once in 2 x 10^18 times."""
    num_rows = 20
    order = batch_rows(seed, iteration, 1, num_rows, num_rows)
    next_epoch = batch_rows(seed, iteration, 2, num_rows, num_rows)
    next_iteration = batch_rows(seed, iteration + 1, 1, num_rows, num_rows)
    next_seed = batch_rows(seed + 1, iteration, 1, num_rows, num_rows)
    assert order != list(range(num_rows))
    assert order != next_epoch
    assert order != next_iteration
    assert order != next_seed


def test_every_order_of_rows_is_equally_likely():
    """Of three rows there are six: each comes 100 of 600 times, give or take 4.5 deviations."""
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(600):
        order = tuple(batch_rows(seed, 1, 1, 3, 3))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    deviation = (600 * (1 / 6) * (5 / 6)) ** 0.5
    assert all(abs(count - 100) < 4.5 * deviation for count in counts.values())


# -----------------------------------------------------------------------------
# random_draws: everything random in one pair

SHAPE = (4, 2, 3)


def all_draws(seed: int, iteration: int, step: int, position: int) -> dict[str, Tensor]:
    return random_draws(seed, iteration, step, position, SHAPE, 1000, independent_noise=True)


def assert_all_differ(draws: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """Check that no draw is shared. Timesteps are left out: two may well be equal."""
    names = {"t", "flip", "eps", "posterior_noise", "eps_gen", "drop"}
    assert draws.keys() == others.keys() == names
    for name in draws.keys() - {"t"}:
        assert not torch.equal(draws[name], others[name]), name


@given(seeds, iterations, steps, positions)
def test_draws_are_a_function_of_seed_iteration_step_and_position(seed, iteration, step, position):
    draws = all_draws(seed, iteration, step, position)
    again = all_draws(seed, iteration, step, position)
    for name in draws:
        assert torch.equal(draws[name], again[name])
    assert_all_differ(draws, all_draws(seed + 1, iteration, step, position))
    assert_all_differ(draws, all_draws(seed, iteration + 1, step, position))
    assert_all_differ(draws, all_draws(seed, iteration, step + 1, position))
    assert_all_differ(draws, all_draws(seed, iteration, step, position + 1))


@given(seeds, iterations, steps, positions)
def test_a_second_noise_is_drawn_only_if_asked_for_and_changes_no_other_draw(
    seed, iteration, step, position
):
    with_second_noise = all_draws(seed, iteration, step, position)
    draws = random_draws(seed, iteration, step, position, SHAPE, 1000)
    assert draws.keys() == with_second_noise.keys() - {"eps_gen"}
    for name in draws:
        assert torch.equal(draws[name], with_second_noise[name])


@given(seeds, st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 1000))
def test_draws_have_the_shapes_that_are_asked_for(seed, shape, num_timesteps):
    draws = random_draws(seed, 1, 1, 0, tuple(shape), num_timesteps, independent_noise=True)
    assert draws["t"].dtype == torch.int64
    assert 0 <= draws["t"] < num_timesteps
    for name in ("t", "flip", "drop"):
        assert draws[name].shape == ()
    for name in ("eps", "posterior_noise", "eps_gen"):
        assert draws[name].shape == tuple(shape)
        assert draws[name].dtype == torch.float32


@given(seeds, st.integers(1, 8))
def test_every_timestep_is_drawn_from_the_first_to_the_last(seed, num_timesteps):
    """In 400 draws, one of 8 timesteps is missed once in 10^22 times."""
    drawn = set()
    for position in range(400):
        draws = random_draws(seed, 1, 1, position, (1,), num_timesteps)
        drawn.add(draws["t"].item())
    assert drawn == set(range(num_timesteps))


@pytest.fixture(scope="module")
def many_draws() -> dict[str, Tensor]:
    """4000 pairs' draws: [4000] and [4000,4,8,8]."""
    draws = []
    for step in range(40):
        for position in range(100):
            draws.append(random_draws(0, 1, step, position, (4, 8, 8), 1000, True))
    return {name: values.double() for name, values in default_collate(draws).items()}


def test_timesteps_are_uniform(many_draws):
    t = many_draws["t"]
    standard_error = 1000 / 12**0.5 / 4000**0.5
    assert abs(t.mean() - 499.5) < 4.5 * standard_error
    assert t.min() < 5
    assert t.max() > 994
    expected_std = 1000 / 12**0.5
    assert t.std().item() == pytest.approx(expected_std, rel=0.05)


@pytest.mark.parametrize("name", ["flip", "drop"])
def test_flip_and_drop_are_uniform_in_0_1(many_draws, name):
    values = many_draws[name]
    for probability in (0.05, 0.25, 0.5, 0.9):
        share = (values < probability).double().mean()
        standard_error = (probability * (1 - probability) / 4000) ** 0.5
        assert abs(share - probability) < 4.5 * standard_error
    assert values.min() >= 0
    assert values.max() < 1


@pytest.mark.parametrize("name", ["eps", "posterior_noise", "eps_gen"])
def test_noise_is_standard_normal(many_draws, name):
    values = many_draws[name]
    count = values.numel()
    assert abs(values.mean()) < 4.5 / count**0.5
    assert abs(values.var() - 1) < 4.5 * (2 / count) ** 0.5
    assert abs((values**4).mean() - 3) < 4.5 * (96 / count) ** 0.5


def test_the_noises_of_a_pair_are_independent(many_draws):
    bound = 4.5 / many_draws["eps"].numel() ** 0.5
    assert abs((many_draws["eps"] * many_draws["posterior_noise"]).mean()) < bound
    assert abs((many_draws["eps"] * many_draws["eps_gen"]).mean()) < bound
    assert abs((many_draws["posterior_noise"] * many_draws["eps_gen"]).mean()) < bound


def test_mirroring_dropping_and_the_timestep_are_independent(many_draws):
    draws = torch.stack([many_draws[name] for name in ("flip", "drop", "t")])
    correlations = torch.corrcoef(draws)
    off_diagonal = correlations - torch.eye(3)
    assert off_diagonal.abs().max() < 4.5 / 4000**0.5


# -----------------------------------------------------------------------------
# noise_generator: the noise of a generated image


def first_noise(seed: int, iteration: int, row: int) -> Tensor:
    return torch.randn(8, generator=noise_generator(seed, iteration, row))


@given(seeds, iterations, st.integers(0, 10**6))
def test_the_noise_of_a_generated_image_is_a_function_of_seed_iteration_and_row(
    seed, iteration, row
):
    noise = first_noise(seed, iteration, row)
    assert torch.equal(noise, first_noise(seed, iteration, row))
    assert not torch.equal(noise, first_noise(seed + 1, iteration, row))
    assert not torch.equal(noise, first_noise(seed, iteration + 1, row))
    assert not torch.equal(noise, first_noise(seed, iteration, row + 1))


# -----------------------------------------------------------------------------
# CaptionedImages: images


def write_row(folder: Path, image: Image.Image, name: str = "a.png", **others) -> Path:
    """Write a folder of one captioned image."""
    image.save(folder / name)
    helpers.write_metadata(folder, [{"file_name": name, "text": "a caption", **others}])
    return folder


def test_an_image_is_a_square_between_minus_1_and_1(image_folder):
    """Whatever the size, mode and orientation of its file."""
    images = CaptionedImages(image_folder, 32)
    assert len(images) == 12
    for row in range(12):
        image = images.image(row)
        assert image.shape == (3, 32, 32)
        assert image.dtype == torch.float32
        assert image.min() >= -1
        assert image.max() <= 1
        assert image.std() > 0.1  # the shape is in the image
        assert image[:, 0, 0].min() > 0.9  # on white, also where the file is transparent


@given(side=st.integers(9, 40), extra=st.integers(0, 60), upright=st.booleans())
def test_the_center_of_the_short_side_is_kept(side, extra, upright, tmp_path_factory):
    """An image that is blue in its central square and red elsewhere becomes blue."""
    folder = tmp_path_factory.mktemp("square")
    width = side if upright else side + 2 * extra
    height = side + 2 * extra if upright else side
    image = Image.new("RGB", (width, height), "red")
    left = (width - side) // 2
    top = (height - side) // 2
    image.paste("blue", [left, top, left + side, top + side])
    found = CaptionedImages(write_row(folder, image), side).image(0)
    blue = torch.tensor([-1.0, -1.0, 1.0])[:, None, None].expand(3, side, side)
    torch.testing.assert_close(found, blue, rtol=0, atol=0)


def test_resizing_averages_instead_of_skipping(tmp_path):
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[::2] = 255
    image = CaptionedImages(write_row(tmp_path, Image.fromarray(stripes)), 8).image(0)
    assert image[:, 1:-1].abs().max() < 0.1  # gray, neither black nor white


def test_a_broken_image_is_refused_by_name(tmp_path):
    folder = write_row(tmp_path, Image.new("RGB", (64, 64)))
    content = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"a\.png: not a readable image"):
        CaptionedImages(folder, 8).image(0)


# -----------------------------------------------------------------------------
# CaptionedImages: rows


def test_caption_is_accepted_for_text(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": "two words"}\n\n')
    images = CaptionedImages(tmp_path, 8)
    assert len(images) == 1
    assert images.caption(0) == "two words"


def test_a_limit_keeps_the_first_rows(image_folder):
    all_rows = CaptionedImages(image_folder, 8)
    limited = CaptionedImages(image_folder, 8, limit=5)
    assert len(limited) == 5
    for row in range(5):
        assert limited.caption(row) == all_rows.caption(row)


GOOD_ROW = '{"file_name": "a.png", "text": "a caption"}'

# a part of the message -> the content of metadata.jsonl
BAD_METADATA = {
    "no rows": "\n",
    "line 2: not a JSON object": GOOD_ROW + "\nnonsense",
    "line 3: not a JSON object": GOOD_ROW + "\n\nnonsense",
    "line 1: not a JSON object with file_name and text": '{"file_name": "a.png"}',
    "line 1: an empty caption": '{"file_name": "a.png", "text": "  "}',
    "line 1: '../a.png' is outside the folder": '{"file_name": "../a.png", "text": "a"}',
    "line 1: '/etc/passwd' is outside the folder": '{"file_name": "/etc/passwd", "text": "a"}',
    "line 1: no image 'b.png'": '{"file_name": "b.png", "text": "a"}',
    "line 1: no image 'a\\nb'": '{"file_name": "a\\nb", "text": "a"}',
    "line 1: file_name is malformed: it has a NUL": '{"file_name": "\\u0000", "text": "a"}',
    "line 1: no image 'xx": json.dumps({"file_name": "x" * 254, "text": "a"}),
    "line 1: no image 'xxx": json.dumps({"file_name": "x" * 5000, "text": "a"}),
    "line 1: text is malformed: it has a lone": '{"file_name": "a.png", "text": "\\ud800"}',
    "line 1: not a JSON object": "[" * 100_000,
    "line 1: text is a list; choose one": '{"file_name": "a.png", "text": ["a", "b"]}',
    "line 1: text is 5, not a string": '{"file_name": "a.png", "text": 5}',
    "line 1: text is true, not a string": '{"file_name": "a.png", "text": true, "caption": "a"}',
    "line 1: caption is 0.5, not a string": '{"file_name": "a.png", "caption": 0.5}',
    "line 1: caption is null, not a": '{"file_name": "a.png", "text": null, "caption": null}',
    "line 1: text is null, not a string": '{"file_name": "a.png", "text": null}',
    "line 1: an empty": '{"file_name": "a.png", "text": "", "caption": " "}',
    "line 1: caption is null, not": '{"file_name": "a.png", "text": "", "caption": null}',
    "line 1: not a JSON object with file_name and text (or caption), but a list; write each of": (
        f"[\n{GOOD_ROW},\n{GOOD_ROW}\n]"
    ),
    "(or caption), but a list; write each of its entries on a line": f"[{GOOD_ROW}, {GOOD_ROW}]",
    "line 1: file_name is 5, not a string": '{"file_name": 5, "text": "a"}',
    "line 1: file_name is null, not a string": '{"file_name": null, "text": "a"}',
    "line 1: file_name is a list; choose one": '{"file_name": ["a.png"], "text": "a"}',
    "line 1: no image '~/a.png'": '{"file_name": "~/a.png", "text": "a"}',
    "line 1: the key 'text' comes twice": '{"file_name": "a.png", "text": "a", "text": "b"}',
}


@pytest.mark.parametrize("message", BAD_METADATA)
def test_bad_metadata_is_refused_in_one_line(message, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(BAD_METADATA[message])
    with pytest.raises(InputError) as error:
        images = CaptionedImages(tmp_path, 8)
        for row in range(len(images)):
            images.read_row(row)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", [None, "", "  "])
def test_a_text_that_says_nothing_leaves_the_caption(text, tmp_path):
    """A table whose two columns are exported as JSON has both keys in every line."""
    folder = write_row(tmp_path, Image.new("RGB", (8, 8)))
    helpers.write_metadata(
        folder, [{"file_name": "a.png", "text": text, "caption": "a good caption"}]
    )
    assert CaptionedImages(folder, 8).caption(0) == "a good caption"


def test_text_comes_before_caption(tmp_path):
    folder = write_row(tmp_path, Image.new("RGB", (8, 8)), caption="another caption")
    assert CaptionedImages(folder, 8).caption(0) == "a caption"


def test_metadata_of_windows_is_read(tmp_path):
    """It has a byte order mark, and its lines end with two characters."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    content = f"{GOOD_ROW}\r\n{GOOD_ROW}\r\n"
    (tmp_path / "metadata.jsonl").write_text(content, encoding="utf-8-sig", newline="")
    images = CaptionedImages(tmp_path, 8)
    assert [images.caption(row) for row in range(len(images))] == ["a caption", "a caption"]


def test_a_line_that_is_not_utf_8_is_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = '{"file_name": "a.png", "text": "größer"}'
    (tmp_path / "metadata.jsonl").write_text(f"{GOOD_ROW}\n{row}\n", encoding="latin-1")
    images = CaptionedImages(tmp_path, 8)
    assert images.caption(0) == "a caption"
    with pytest.raises(InputError, match="line 2: not UTF-8 text; save the file as UTF-8"):
        images.caption(1)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_metadata_in_utf_16_is_refused_as_a_whole(encoding, tmp_path):
    mark = "" if encoding == "utf-16" else "\ufeff"
    (tmp_path / "metadata.jsonl").write_text(mark + GOOD_ROW, encoding=encoding)
    with pytest.raises(InputError, match=r"metadata.jsonl: it begins as UTF-16 does; save it as"):
        CaptionedImages(tmp_path, 8)


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1234\n"


@pytest.mark.parametrize("name", ["metadata.jsonl", "a.png"])
def test_a_git_lfs_pointer_is_called_what_it_is(name, tmp_path):
    write_row(tmp_path, Image.new("RGB", (8, 8)))
    (tmp_path / name).write_text(LFS_POINTER)
    with pytest.raises(InputError, match=rf"{name}: a Git LFS pointer.*`git lfs pull`"):
        CaptionedImages(tmp_path, 8).image(0)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.parquet"])
def test_another_format_of_metadata_is_to_be_converted(name, tmp_path):
    (tmp_path / name).write_text("file_name,text\na.png,a caption\n")
    reason = f"metadata.jsonl: no such file; convert {name} to it: it must have a line"
    with pytest.raises(InputError, match=reason):
        CaptionedImages(tmp_path, 8)


def test_metadata_that_is_a_folder_is_not_called_missing(tmp_path):
    (tmp_path / "metadata.jsonl").mkdir()
    with pytest.raises(InputError, match="metadata.jsonl: not readable .Is a directory"):
        CaptionedImages(tmp_path, 8)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "images"
    folder.mkdir()
    write_row(folder, Image.new("RGB", (8, 8)))
    assert len(CaptionedImages("~/images", 8)) == 1


def test_a_folder_without_metadata_is_refused(tmp_path):
    with pytest.raises(InputError, match="metadata.jsonl: no such file") as error:
        CaptionedImages(tmp_path, 8)
    assert "\n" not in str(error.value)


# the file that is there -> what is said of it, after "metadata.jsonl: no such file; "
IN_PLACE_OF_METADATA = {
    "metadata.json1": "rename 'metadata.json1' to it",
    "metadata.json": "rename 'metadata.json' to it",
    "metadata.jsonl.txt": "rename 'metadata.jsonl.txt' to it",
    "Metadata.JSONL": "rename 'Metadata.JSONL' to it",
    "captions.jsonl": "rename 'captions.jsonl' to it",
    "train/metadata.jsonl": "there is one in '/.*/train': give that folder",
    "data/train/metadata.jsonl": "there is one in '/.*/data/train': give that folder",
    "a.txt": "captions in files like 'a.txt' are not read; it must have a line",
    "a.caption": "captions in files like 'a.caption' are not read; it must have a line",
    "a.png.txt": "captions in files like 'a.png.txt' are not read; it must have a line",
    "images.zip": "unpack 'images.zip' first",
    "notes.txt": "it must have a line with file_name and text for each image",
}


@pytest.mark.parametrize("name", IN_PLACE_OF_METADATA)
def test_what_is_there_in_place_of_metadata_is_named(name, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(GOOD_ROW)
    reason = f"metadata.jsonl: no such file; {IN_PLACE_OF_METADATA[name]}"
    with pytest.raises(InputError, match=reason) as error:
        CaptionedImages(tmp_path, 8)
    assert "\n" not in str(error.value)


def test_a_missing_folder_is_quoted_so_that_a_blank_is_seen(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match="/images ': no such folder"):
        CaptionedImages(f"{tmp_path}/images ", 8)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("images.zip", "images.zip: not a folder; unpack it first"),
        ("images.tar.gz", "images.tar.gz: not a folder; unpack it first"),
        ("IMAGES.ZIP", "IMAGES.ZIP: not a folder; unpack it first"),
        ("metadata.jsonl", "metadata.jsonl: not a folder; give the one that it is in"),
        ("0.png", "0.png: not a folder$"),
    ],
)
def test_a_file_in_place_of_the_folder_is_not_called_missing(name, reason, tmp_path):
    (tmp_path / name).write_text(GOOD_ROW)
    with pytest.raises(InputError, match=reason):
        CaptionedImages(tmp_path / name, 8)


def test_metadata_behind_a_broken_link_is_called_that(tmp_path):
    (tmp_path / "metadata.jsonl").symlink_to("missing.jsonl")
    with pytest.raises(InputError, match="metadata.jsonl: only a broken link"):
        CaptionedImages(tmp_path, 8)


@pytest.mark.parametrize(
    "name, there",
    [
        ("train/0.jpg", "0.jpg"),
        ("data/train/a/0.jpg", "a/0.jpg"),
        ("../train/0.jpg", "0.jpg"),
        ("/home/me/train/0.jpg", "0.jpg"),
        ("0.jpg", "images/0.jpg"),
        ("train\\0.jpg", "train/0.jpg"),
        ("C:\\train\\0.jpg", "0.jpg"),
        ("0.jpg", "0.JPG"),
        ("0.JPG", "0.jpg"),
        ("train/IMG_0.JPG", "img_0.jpg"),
        ("img_0.bmp", "IMG_0.BMP"),
        ("0.jpg", "0.png"),
        ("0", "0.webp"),
    ],
)
def test_where_a_missing_image_may_be_is_said(name, there, tmp_path):
    folder = tmp_path / "data"
    (folder / there).parent.mkdir(parents=True)
    (folder / there).write_text("an image")
    helpers.write_metadata(folder, [{"file_name": name, "text": "a caption"}])
    [fault] = find_faults(CaptionedImages(folder, 8))
    assert fault.endswith(f", but {there!r} is there: correct the name")


def test_images_that_are_still_in_an_archive_are_to_be_unpacked(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK")
    helpers.write_metadata(tmp_path, [{"file_name": "0.jpg", "text": "a caption"}])
    [fault] = find_faults(CaptionedImages(tmp_path, 8))
    assert fault.endswith("; if it is in 'images.zip', unpack that first")


@pytest.mark.parametrize("on_disk, in_metadata", [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("name", ["größe.png", "é/が.png"])
def test_a_name_in_the_other_form_of_unicode_is_the_same_name(name, on_disk, in_metadata, tmp_path):
    """macOS splits letters from their accents (NFD); most tables do not (NFC)."""
    path = tmp_path / unicodedata.normalize(on_disk, name)
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)
    row = {"file_name": unicodedata.normalize(in_metadata, name), "text": "a caption"}
    helpers.write_metadata(tmp_path, [row])
    images = CaptionedImages(tmp_path, 8)
    assert list(find_faults(images)) == [None]
    assert images.image(0)[0].min() == 1  # red


def test_a_name_of_two_forms_that_could_be_two_images_is_neither(tmp_path):
    """A name that is there as it is written is that image."""
    composed = unicodedata.normalize("NFC", "éé.png")
    decomposed = unicodedata.normalize("NFD", "éé.png")
    Image.new("RGB", (8, 8), "white").save(tmp_path / composed)
    Image.new("RGB", (8, 8), "black").save(tmp_path / decomposed)
    mixed = composed[0] + decomposed[2:]
    rows = [{"file_name": name, "text": "a"} for name in (composed, decomposed, mixed)]
    helpers.write_metadata(tmp_path, rows)
    images = CaptionedImages(tmp_path, 8)
    assert images.image(0).min() == 1
    assert images.image(1).max() == -1
    with pytest.raises(InputError, match="line 3: no image"):
        images.image(2)


FAULTS = {
    1: "no image 'missing.png'",
    2: "broken.png: not a readable image",
    3: "bomb.png: not a readable image (Image size",
    4: "an empty caption",
    5: "is outside the folder",
    7: "text.jpg: not a readable image",
}


def test_every_row_that_cannot_be_used_is_found(tmp_path):
    images = CaptionedImages(helpers.write_faulty_rows(tmp_path), 8)
    faults = list(find_faults(images))
    assert len(faults) == 9
    for row, fault in enumerate(faults):
        if row in FAULTS:
            assert f"metadata.jsonl line {row + 1}: " in fault
            assert FAULTS[row] in fault
            assert "\n" not in fault
        else:
            assert fault is None


def test_selected_rows_are_renumbered(tmp_path):
    images = CaptionedImages(helpers.write_faulty_rows(tmp_path), 8)
    images.select(np.array([0, 6, 8]))
    assert len(images) == 3
    for row in range(3):
        assert images.image(row)[0].mean() > 0.5  # red


def test_rows_are_not_held_in_memory(tmp_path):
    """But for their places in the file: at most 40 bytes a row, of lines of 75."""
    count = 200_000
    line = '{"file_name": "%06d.png", "text": "a caption of some length, number %06d"}\n'
    with open(tmp_path / "metadata.jsonl", "w") as file:
        file.writelines(line % (i, i) for i in range(count))
    tracemalloc.start()
    images = CaptionedImages(tmp_path, 8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(images) == count
    assert peak < 40 * count
    Image.new("RGB", (8, 8)).save(tmp_path / "199999.png")
    assert images.caption(199_999) == "a caption of some length, number 199999"


# -----------------------------------------------------------------------------
# CaptionedImages: rejected images


def test_rejected_images_are_read_where_they_are_asked_for(tmp_path):
    white = Image.new("RGB", (8, 8), "white")
    folder = write_row(tmp_path, white, rejected_file_name="rejected.png")
    assert CaptionedImages(folder, 8).read_row(0).rejected_image is None  # not even looked for
    with pytest.raises(InputError, match="line 1: no image 'rejected.png'"):
        CaptionedImages(folder, 8, with_rejected=True).read_row(0)
    Image.new("RGB", (8, 8), "black").save(folder / "rejected.png")
    images = CaptionedImages(folder, 8, with_rejected=True)
    assert images.image(0).min() == 1
    assert images.rejected_image(0).max() == -1


def test_every_row_needs_a_rejected_image_where_they_are_asked_for(tmp_path):
    folder = write_row(tmp_path, Image.new("RGB", (8, 8)))
    with pytest.raises(InputError, match="line 1: no rejected_file_name, which DPO needs"):
        CaptionedImages(folder, 8, with_rejected=True).read_row(0)


def test_a_rejected_image_must_not_leave_the_folder(tmp_path):
    folder = write_row(tmp_path, Image.new("RGB", (8, 8)), rejected_file_name="../out.png")
    with pytest.raises(InputError, match="'../out.png' is outside the folder"):
        CaptionedImages(folder, 8, with_rejected=True).read_row(0)


# -----------------------------------------------------------------------------
# CaptionedImages: links


def write_snapshot(folder: Path) -> Path:
    """Write a data set as the hub's cache has it: links into a folder of blobs."""
    blobs = folder / "blobs"
    snapshot = folder / "snapshots" / "main"
    blobs.mkdir()
    (snapshot / "photos").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(blobs / "aa11", format="PNG")
    helpers.write_metadata(blobs, [{"file_name": "photos/a.png", "text": "a caption"}])
    (blobs / "metadata.jsonl").rename(blobs / "bb22")
    (snapshot / "photos" / "a.png").symlink_to("../../../blobs/aa11")
    (snapshot / "metadata.jsonl").symlink_to("../../blobs/bb22")
    return snapshot


def test_a_link_that_leaves_the_folder_is_called_a_link(tmp_path):
    images = CaptionedImages(write_snapshot(tmp_path), 8)
    with pytest.raises(InputError, match="line 1: 'photos/a.png' leads out .*--follow-links"):
        images.image(0)


def test_links_may_be_followed(tmp_path):
    images = CaptionedImages(write_snapshot(tmp_path), 8, follow_links=True)
    assert images.caption(0) == "a caption"
    assert images.image(0)[0].min() == 1  # red
    assert list(find_faults(images)) == [None]


def test_a_folder_behind_a_link_may_be_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    folder = tmp_path / "data"
    elsewhere.mkdir()
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(elsewhere / "a.png")
    (folder / "photos").symlink_to(elsewhere)
    helpers.write_metadata(folder, [{"file_name": "photos/a.png", "text": "a caption"}])
    assert "--follow-links" in list(find_faults(CaptionedImages(folder, 8)))[0]
    assert list(find_faults(CaptionedImages(folder, 8, follow_links=True))) == [None]


@pytest.mark.parametrize("name", ["../a.png", "photos/../../a.png", "/etc/passwd"])
def test_a_name_that_leaves_the_folder_is_refused_even_with_follow_links(name, tmp_path):
    folder = tmp_path / "data"
    (folder / "photos").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    helpers.write_metadata(folder, [{"file_name": name, "text": "a caption"}])
    with pytest.raises(InputError, match="is outside the folder; move the image into it"):
        CaptionedImages(folder, 8, follow_links=True).image(0)


@pytest.mark.parametrize("follow_links", [False, True])
def test_links_within_the_folder_and_to_the_folder_need_no_flag(follow_links, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_row(folder, Image.new("RGB", (8, 8)))
    (folder / "a.png").rename(folder / "original.png")
    (folder / "a.png").symlink_to("original.png")
    (tmp_path / "link").symlink_to(folder)
    images = CaptionedImages(tmp_path / "link", 8, follow_links=follow_links)
    assert list(find_faults(images)) == [None]


def test_an_absolute_name_through_a_link_to_the_folder_is_hashed(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    entry = {"file_name": str(tmp_path / "link" / "a.png"), "text": "a caption"}
    helpers.write_metadata(folder, [entry])
    looks = tmp_path / "looks"
    before = hash_rows(folder, looks)
    assert hash_rows(folder, looks) == before


@pytest.mark.parametrize("target", ["../missing.png", "missing.png", "a.png"])
def test_a_broken_link_is_a_missing_image(target, tmp_path):
    """Of an image that git-annex or the hub has not fetched, only the link is there."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.png").symlink_to(target)
    helpers.write_metadata(folder, [{"file_name": "a.png", "text": "a caption"}])
    with pytest.raises(InputError, match="line 1: no image 'a.png' in "):
        CaptionedImages(folder, 8, follow_links=True).image(0)


# -----------------------------------------------------------------------------
# check_rows: what identifies the data


def hash_rows(folder: Path, looks: Path | None = None, skip: bool = False, **settings) -> str:
    """Return what identifies a folder's data. looks: where earlier looks are recorded, if any."""
    if looks is None:
        looks = folder.with_name(f"{folder.name}-looks")
        shutil.rmtree(looks, ignore_errors=True)
    return check_rows(CaptionedImages(folder, 8, **settings), looks, skip)


@pytest.fixture
def rows(tmp_path) -> Path:
    """A folder of three captioned images, each with a rejected one, in formats of a fixed size."""
    folder = tmp_path / "rows"
    folder.mkdir()
    lines = []
    for i, suffix in enumerate(["bmp", "tiff", "ppm"]):
        image = Image.new("RGB", (8, 8), (i, i, i))
        image.save(folder / f"{i}.{suffix}")
        image.save(folder / f"rejected-{i}.{suffix}")
        lines.append(
            {
                "file_name": f"{i}.{suffix}",
                "text": f"caption {i}",
                "rejected_file_name": f"rejected-{i}.{suffix}",
            }
        )
    helpers.write_metadata(folder, lines)
    return folder


@pytest.mark.parametrize("name", ["0.bmp", "1.tiff", "2.ppm"])
@pytest.mark.parametrize("with_mtime", [False, True])
def test_an_image_that_is_edited_in_place_is_other_data(name, with_mtime, rows, tmp_path):
    """Whether its time of modification changes, or is set back as `cp -p` and tar do."""
    looks = tmp_path / "looks"
    before = hash_rows(rows, looks)
    old = (rows / name).stat()
    Image.new("RGB", (8, 8), "red").save(rows / name)
    assert (rows / name).stat().st_size == old.st_size
    if with_mtime:
        os.utime(rows / name, ns=(old.st_atime_ns, old.st_mtime_ns))
    after = hash_rows(rows, looks)
    assert after != before
    assert after == hash_rows(rows)  # an earlier look changes nothing


def test_captions_and_the_order_of_rows_are_data(rows, tmp_path):
    looks = tmp_path / "looks"
    metadata = rows / "metadata.jsonl"
    lines = metadata.read_text().splitlines(keepends=True)
    hashes = {hash_rows(rows, looks)}
    metadata.write_text("".join(lines).replace("caption 1", "caption 7"))
    hashes.add(hash_rows(rows, looks))
    metadata.write_text("".join(reversed(lines)))
    hashes.add(hash_rows(rows, looks))
    metadata.write_text("".join(lines[:2]))
    hashes.add(hash_rows(rows, looks))
    assert len(hashes) == 4


def test_metadata_that_changes_after_it_was_read_is_refused(rows):
    """Its lines may have moved: a caption would go with another image."""
    images = CaptionedImages(rows, 8)
    images.caption(0)
    lines = (rows / "metadata.jsonl").read_text().splitlines()
    (rows / "metadata.jsonl").write_text("\n".join(reversed(lines)))
    status = (rows / "metadata.jsonl").stat()
    os.utime(rows / "metadata.jsonl", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(InputError, match="metadata.jsonl: has changed since it was read"):
        images.caption(0)


def test_two_images_that_change_places_are_other_data(rows, tmp_path, monkeypatch):
    """Also if they have one size, and were written within one tick of the file system's clock."""
    exact_stat = Path.stat

    def coarse_stat(path, **kwargs):
        status = exact_stat(path, **kwargs)
        return SimpleNamespace(
            st_mode=status.st_mode, st_size=status.st_size, st_mtime_ns=0, st_ctime_ns=0
        )

    looks = tmp_path / "looks"
    Image.new("RGB", (8, 8), "red").save(rows / "0.bmp")
    monkeypatch.setattr(Path, "stat", coarse_stat)
    before = hash_rows(rows, looks, with_rejected=True)
    lines = (rows / "metadata.jsonl").read_text().splitlines()
    entry = json.loads(lines[0])
    entry["file_name"], entry["rejected_file_name"] = "rejected-0.bmp", "0.bmp"
    lines[0] = json.dumps(entry)
    (rows / "metadata.jsonl").write_text("\n".join(lines))
    assert hash_rows(rows, looks, with_rejected=True) != before


def test_what_is_not_read_is_not_data(rows, tmp_path):
    looks = tmp_path / "looks"
    before = hash_rows(rows, looks)
    first_two = hash_rows(rows, limit=2)

    # rejected images that are not asked for, and times
    Image.new("RGB", (9, 9), "red").save(rows / "rejected-0.bmp")
    os.utime(rows / "1.tiff")
    assert hash_rows(rows, looks) == before

    # blank lines, keys that are not read, and names
    entries = [json.loads(line) for line in (rows / "metadata.jsonl").read_text().splitlines()]
    (rows / "0.bmp").rename(rows / "zero.bmp")
    entries[0] = {"id": 17, "text": "caption 0", "file_name": "zero.bmp"}
    lines = [json.dumps(entry) + "\n\n" for entry in entries]
    (rows / "metadata.jsonl").write_text("\n" + "".join(lines))
    assert hash_rows(rows, looks) == before

    # another folder
    copy = Path(shutil.copytree(rows, tmp_path / "copy"))
    assert hash_rows(copy, looks) == hash_rows(copy) == before

    # rows after the last
    Image.new("RGB", (8, 8), "red").save(rows / "2.ppm")
    assert hash_rows(rows, limit=2) == first_two


def test_rejected_images_are_data_where_they_are_asked_for(rows):
    without = hash_rows(rows)
    before = hash_rows(rows, with_rejected=True)
    assert before != without
    Image.new("RGB", (8, 8), "red").save(rows / "rejected-1.tiff")
    assert hash_rows(rows, with_rejected=True) != before
    assert hash_rows(rows) == without


def test_rows_that_are_skipped_are_not_data(rows):
    before = hash_rows(rows)
    with open(rows / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "missing.png", "text": "a caption"}\n')
    assert hash_rows(rows, skip=True) == before


def test_a_later_look_reads_only_what_has_changed(rows, tmp_path, monkeypatch):
    looks = tmp_path / "looks"
    before = hash_rows(rows, looks, with_rejected=True)
    read = []

    def spying(path):
        read.append(path.name)
        return read_image(path)

    monkeypatch.setattr("spin.infra.inspection.read_image", spying)
    assert hash_rows(rows, looks, with_rejected=True) == before
    assert read == []
    os.utime(rows / "1.tiff")
    assert hash_rows(rows, looks, with_rejected=True) == before
    assert read == ["1.tiff", "rejected-1.tiff"]
    renamed = rows.rename(tmp_path / "renamed")
    assert hash_rows(renamed, looks, with_rejected=True) == before
    assert read == ["1.tiff", "rejected-1.tiff"]


def test_a_bad_row_is_looked_at_every_time(rows, tmp_path):
    """Its file may have been put back with the times that it had."""
    looks = tmp_path / "looks"
    (rows / "0.bmp").rename(tmp_path / "0.bmp")
    for _ in range(2):
        with pytest.raises(InputError, match="1 of 3 rows cannot be used"):
            hash_rows(rows, looks)
    (tmp_path / "0.bmp").rename(rows / "0.bmp")
    assert hash_rows(rows, looks) == hash_rows(rows)


@pytest.mark.parametrize("damage", ["missing", "cut", "other", "empty", "nonsense"])
def test_damaged_records_are_made_anew(damage, rows, tmp_path):
    looks = tmp_path / "looks"
    before = hash_rows(rows, looks)
    records = (looks / "rows.txt").read_bytes()
    damaged = {
        "cut": records[: len(records) // 2],
        "other": records[::-1],
        "empty": b"",
        "nonsense": b"\xff\n" * 7,
    }
    if damage == "missing":
        (looks / "rows.txt").unlink()
    else:
        (looks / "rows.txt").write_bytes(damaged[damage])
    assert hash_rows(rows, looks) == before
    assert (looks / "rows.txt").read_bytes() == records


def test_a_look_that_is_interrupted_leaves_the_records_as_they_were(rows, tmp_path, monkeypatch):
    looks = tmp_path / "looks"
    hash_rows(rows, looks)
    records = (looks / "rows.txt").read_bytes()
    Image.new("RGB", (8, 8), "red").save(rows / "2.ppm")

    def crash(path):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("spin.infra.inspection.read_image", crash)
        with pytest.raises(MemoryError):
            hash_rows(rows, looks)
    assert (looks / "rows.txt").read_bytes() == records
    assert hash_rows(rows, looks) == hash_rows(rows)


def test_links_that_leave_the_folder_are_counted(tmp_path):
    snapshot = write_snapshot(tmp_path)
    reason = "1 of 1 rows cannot be used.* 1 lead out of the folder through a link; --follow-links"
    with pytest.raises(InputError, match=reason):
        hash_rows(snapshot, tmp_path / "looks")
    hash_rows(snapshot, tmp_path / "looks", follow_links=True)


def test_where_all_faults_are_links_there_is_nothing_to_fix(tmp_path):
    snapshot = write_snapshot(tmp_path)
    with pytest.raises(InputError, match="--follow-links allows it$"):
        hash_rows(snapshot, tmp_path / "looks", skip=True)
    with open(snapshot / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "missing.png", "text": "a caption"}\n')
    with pytest.raises(InputError, match="--follow-links allows it. Fix the others$"):
        hash_rows(snapshot, tmp_path / "looks", skip=True)


# -----------------------------------------------------------------------------
# check_rows: images that are enlarged


def write_sizes(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    folder.mkdir()
    lines = []
    for i, size in enumerate(sizes):
        Image.new("RGB", size).save(folder / f"{i}.png")
        lines.append({"file_name": f"{i}.png", "text": "a caption"})
    helpers.write_metadata(folder, lines)
    return folder


def test_images_that_are_enlarged_are_counted_at_every_start(tmp_path, capsys):
    """Also at a later one, which does not read them."""
    folder = write_sizes(tmp_path / "rows", [(514, 2), (1, 1), (7, 9), (8, 8), (8, 100)])
    looks = tmp_path / "looks"
    note = "note: 3 of 5 rows have an image smaller than 8 pixels on its short side, which is"
    first = hash_rows(folder, looks)
    assert capsys.readouterr().out.count(note) == 1
    assert hash_rows(folder, looks) == first
    assert capsys.readouterr().out.count(note) == 1
    check_rows(CaptionedImages(folder, 9), looks, skip=False)
    assert "note: 5 of 5 rows have an image smaller than 9 pixels" in capsys.readouterr().out


def test_a_rejected_image_that_is_enlarged_counts_for_its_row(rows, tmp_path, capsys):
    Image.new("RGB", (8, 7)).save(rows / "rejected-1.tiff")
    hash_rows(rows)
    assert "note" not in capsys.readouterr().out
    hash_rows(rows, with_rejected=True)
    assert "note: 1 of 3 rows" in capsys.readouterr().out


def test_bad_rows_are_not_counted_as_small(tmp_path, capsys):
    folder = write_sizes(tmp_path / "rows", [(4, 4), (4, 4), (8, 8)])
    (folder / "0.png").unlink()
    hash_rows(folder, skip=True)
    assert "note: 1 of 2 rows" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# check_unchanged: between the look at an image and its encoding


def checked(folder: Path, **settings) -> CaptionedImages:
    images = CaptionedImages(folder, 8, **settings)
    check_rows(images, folder.with_name("looks"), skip=True)
    return images


@pytest.mark.parametrize("name", ["0.bmp", "1.tiff", "rejected-2.ppm"])
def test_an_image_that_changes_after_it_was_checked_is_refused_by_its_row(name, rows):
    """Although its size and its time of modification are what they were."""
    images = checked(rows, with_rejected=True)
    check_unchanged(images, range(3))
    old = (rows / name).stat()
    Image.new("RGB", (8, 8), "red").save(rows / name)
    os.utime(rows / name, ns=(old.st_atime_ns, old.st_mtime_ns))
    line = int(name.split(".")[0].removeprefix("rejected-")) + 1
    check_unchanged(images, [row for row in range(3) if row != line - 1])
    with pytest.raises(InputError, match=f"line {line}: an image has changed since the data were"):
        check_unchanged(images, range(3))


def test_an_image_whose_times_alone_change_is_unchanged(rows):
    """Backups do that, and on some network drives each machine has times of its own."""
    images = checked(rows)
    os.utime(rows / "0.bmp")
    (rows / "1.tiff").chmod(0o600)
    check_unchanged(images, range(3))


def test_an_image_that_breaks_after_it_was_checked_is_refused(rows):
    images = checked(rows)
    (rows / "0.bmp").write_bytes(b"BM")
    with pytest.raises(InputError, match="line 1: an image has changed"):
        check_unchanged(images, [0])


def test_after_bad_rows_are_skipped_the_others_are_still_known(rows):
    (rows / "0.bmp").unlink()
    images = checked(rows)
    check_unchanged(images, range(2))
    Image.new("RGB", (8, 8), "red").save(rows / "2.ppm")
    check_unchanged(images, [0])
    with pytest.raises(InputError, match="line 3: an image has changed"):
        check_unchanged(images, [1])


def test_data_that_were_not_checked_are_not_compared(rows):
    check_unchanged(CaptionedImages(rows, 8), range(3))
