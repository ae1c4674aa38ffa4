"""The miniature world: its scenes, its pictures, and the score that judges them."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from spin import data
from spin.toy import world as toy
from spin.infra.run import InputError
from spin.toy.world import SCENES, Scene, coverage, ideal, score
from spin.toy import pictures as drawing

scenes = st.sampled_from(SCENES)
seeds = st.integers(0, 2**32)


def judged(scene: Scene, picture: np.ndarray) -> dict[str, float]:
    return {name: values[0] for name, values in score(picture[None], [scene.caption]).items()}


def test_scenes_and_their_split():
    assert len(SCENES) == len({scene.caption for scene in SCENES}) == 900
    parts = toy.split()
    assert {name: len(part) for name, part in parts.items()} == {"train": 600, "validation": 100, "test": 200}
    assert len({scene for part in parts.values() for scene in part}) == 900, "no prompt is in two parts"
    for field in fields(Scene):  # every value is seen in training
        values = {getattr(scene, field.name) for scene in parts["train"]}
        assert values == set(toy.VALUES[field.name])


def test_captions():
    scene = Scene("small", "red", "circle", "at the top left", "blue")
    assert scene.caption == "a small red circle at the top left on a blue background"
    assert replace(scene, size=None, place=None).caption == "a red circle on a blue background"


@pytest.mark.parametrize("shape", toy.SHAPES)
@pytest.mark.parametrize("radius", [5.6, 8.6])
def test_shapes_have_about_the_same_area(shape, radius):
    mask = coverage(shape, radius, (16, 16))
    area = {"circle": np.pi * radius**2, "square": (2 * 0.88 * radius) ** 2, "triangle": 3**1.5 * (0.62 * radius) ** 2}
    assert mask.sum() == pytest.approx(area[shape], rel=0.03)
    assert 0.6 < mask.sum() / (np.pi * radius**2) < 1.1
    assert mask.min() == 0 and mask.max() == 1 and ((mask > 0) & (mask < 1)).any(), "edges are anti-aliased"


@pytest.mark.parametrize("shape", toy.SHAPES)
def test_a_shape_moves_and_turns(shape):
    here, there = coverage(shape, 6, (12, 12)), coverage(shape, 6, (15, 10))
    np.testing.assert_allclose(here[4:20, 4:20], there[2:18, 7:23], atol=1e-6)
    turned = coverage(shape, 6, (16, 16), np.pi)
    np.testing.assert_allclose(turned, coverage(shape, 6, (16, 16))[::-1, ::-1], atol=1e-5)


def test_a_triangle_points_up():
    rows = coverage("triangle", 8, (16, 16)).sum(1)
    inside = rows[rows > 1]
    assert inside[0] < inside[-2] and np.argmax(rows) > 16


@given(scenes)
def test_a_perfect_rendering_scores_top(scene):
    result = judged(scene, ideal(scene))
    assert result["aligned"] == 1 and result["palette"] < 1e-4
    assert result["clean"] > 9.95 and result["reward"] > 9.999


@given(scenes, scenes)
def test_a_picture_of_another_scene_is_not_aligned(scene, other):
    result = judged(scene, ideal(other))
    assert result["aligned"] == (scene == other)
    assert result["clean"] > 9.95, "cleanliness does not look at the prompt"
    assert (result["reward"] > 9.9) == (scene == other)


@given(scenes, st.sampled_from([field.name for field in fields(Scene)]), st.data())
def test_each_wrong_attribute_is_found(scene, name, drawn):
    taken = (getattr(scene, name), scene.colour, scene.background)
    wrong = replace(scene, **{name: drawn.draw(st.sampled_from([v for v in toy.VALUES[name] if v not in taken]))})
    assert judged(scene, ideal(wrong))["aligned"] == 0


def clutter(picture, amount):
    blob = coverage("circle", 2 * amount, (27.5, 27.5))[..., None]
    return (1 - blob) * picture + blob * (1 - picture)


DEFECTS = {
    "noise": lambda picture, a: picture + 0.1 * a * np.random.default_rng(0).standard_normal(picture.shape),
    "wash-out": lambda picture, a: (1 - 0.3 * a) * picture + 0.3 * a * 0.55,
    "clutter": clutter,
    "tint": lambda picture, a: picture + a * np.array([0.1, -0.1, 0.05]),
}


@pytest.mark.parametrize("name", DEFECTS)
@given(scene=scenes)
def test_each_defect_lowers_what_it_should_and_more_of_it_lowers_more(name, scene):
    clean, some, more = (judged(scene, DEFECTS[name](ideal(scene), amount)) for amount in (0, 0.5, 1))
    assert clean["clean"] - 0.1 > some["clean"] > more["clean"]
    assert clean["reward"] - 0.1 > some["reward"] > more["reward"]
    if name in ("wash-out", "tint"):
        assert more["palette"] > some["palette"] > 0.01


@given(scenes)
def test_a_shift_of_two_pixels_costs_reward_only(scene):
    centre = np.add(toy.PLACES[scene.place], (2, -1))
    mask = coverage(scene.shape, toy.SIZES[scene.size], centre)
    result = judged(scene, toy.paint(mask, toy.COLOURS[scene.colour], toy.COLOURS[scene.background]))
    assert result["aligned"] == 1 and result["clean"] > 9.9 and result["reward"] < 8


def test_a_blank_picture_is_not_aligned():
    for level in (0.0, 0.5, 1.0):
        result = judged(SCENES[0], np.full((32, 32, 3), level, np.float32))
        assert result["aligned"] == 0 and np.isfinite(list(result.values())).all()


def test_a_batch_is_scored_picture_by_picture():
    some = SCENES[::100]
    pictures = np.stack([drawing.web(scene, np.random.default_rng(i)) for i, scene in enumerate(some)])
    together = score(pictures, [scene.caption for scene in some])
    for i, scene in enumerate(some):
        for name, value in judged(scene, pictures[i]).items():
            assert together[name][i] == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_a_prompt_of_another_world_is_refused():
    with pytest.raises(KeyError, match="an astronaut"):
        score(np.zeros((1, 32, 32, 3), np.float32), ["an astronaut"])


def test_the_three_ways_of_drawing_are_ordered():
    """Curated pictures are right and clean; web pictures less; losers are wrong besides."""
    some = SCENES[::9]
    prompts, means = [scene.caption for scene in some], {}
    for draw in (drawing.curated, drawing.web, drawing.loser):
        pictures = np.stack([draw(scene, np.random.default_rng(i)) for i, scene in enumerate(some)])
        assert pictures.min() >= 0 and pictures.max() <= 1 and pictures.dtype == np.float32
        means[draw.__name__] = {name: values.mean() for name, values in score(pictures, prompts).items()}
    assert means["curated"]["aligned"] == 1
    for name in ("clean", "reward"):
        assert means["curated"][name] > means["web"][name] + 1
    assert means["web"]["aligned"] > means["loser"]["aligned"] + 0.2


@given(scenes, seeds)
def test_mistakes(scene, seed):
    rng = np.random.default_rng(seed)
    assert drawing.mistaken(scene, rng, 0.0) == scene
    wrong = drawing.mistaken(scene, rng, 1.0)
    assert all(getattr(wrong, field.name) != getattr(scene, field.name) for field in fields(Scene))
    assert wrong.colour != wrong.background


def test_careless_captions_are_wrong_or_short_as_often_as_said():
    rng = np.random.default_rng(0)
    captions = [drawing.careless_caption(scene, rng) for scene in SCENES for _ in range(4)]
    pairs = [(caption.split(), scene) for caption, scene in zip(captions, np.repeat(SCENES, 4))]
    told = [scene.shape in words for words, scene in pairs]
    assert np.mean(told) == pytest.approx(0.92, abs=0.02)
    sized = [next((word for word in words if word in toy.SIZES), None) for words, _ in pairs]
    assert np.mean([size is None for size in sized]) == pytest.approx(0.2, abs=0.03)
    wrong = [size != scene.size for size, (_, scene) in zip(sized, pairs) if size]
    assert np.mean(wrong) == pytest.approx(0.08, abs=0.02)


def test_the_curated_set_is_a_data_set_like_any_other(tmp_path):
    images = data.CaptionedImages(toy.CURATED, toy.SIDE, pairs=True)
    captions = [images.caption(i) for i in range(len(images))]
    assert captions == [scene.caption for scene in toy.split()["train"]]
    right, rejected = (
        np.stack([(images.image(i, which).permute(1, 2, 0).numpy() + 1) / 2 for i in range(600)])
        for which in (False, True)
    )
    assert score(right, captions)["aligned"].mean() == 1
    assert 0.3 < score(rejected, captions)["aligned"].mean() < 0.6
    row = json.loads((toy.CURATED / "metadata.jsonl").read_text().splitlines()[7])
    assert row == {"file_name": "007.png", "text": captions[7], "rejected_file_name": "rejected/007.png"}


def test_the_curated_set_can_be_drawn_again(tmp_path):
    drawing.main([str(tmp_path / "again")])
    files = sorted(path.relative_to(toy.CURATED) for path in toy.CURATED.rglob("*.*"))
    assert len(files) == 1201
    assert (tmp_path / "again/metadata.jsonl").read_bytes() == (toy.CURATED / "metadata.jsonl").read_bytes()
    for name in files:  # pixels: another zlib may pack them into other bytes
        if name.suffix == ".png":
            ours, theirs = (np.asarray(Image.open(folder / name)) for folder in (toy.CURATED, tmp_path / "again"))
            np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(InputError, match="does not exist yet"):
        drawing.main([str(tmp_path / "again")])
