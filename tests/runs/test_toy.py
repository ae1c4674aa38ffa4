"""The miniature world: its scenes, its images, the score, and how its base was pretrained."""

import json
import multiprocessing
from collections.abc import Callable
from dataclasses import astuple, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from PIL import Image

from spin import toy
from spin.checkpoint import load_pipeline
from spin.infra.errors import InputError
from spin.sampler import decode_latents
from spin.toy import SCENES, Scene, ideal_image
from spin.toy.pictures import careless_description, curated_image, web_image, with_mistakes
from spin.toy.score import DRAWINGS, drawings_of
from spin.toy.scenes import ATTRIBUTES, COLORS, PLACES, SHAPES, SIZES, paint, shape_mask
from tutorial import pretrain_toy, tune_toy

scenes = st.sampled_from(SCENES)
seeds = st.integers(0, 2**32)


def score_one(image: np.ndarray, scene: Scene) -> dict[str, float]:
    """Return the metrics of one image, judged by a scene's caption."""
    metrics = toy.score(image[None], [scene.caption])
    return {name: values[0] for name, values in metrics.items()}


# ---- Scenes --------------------------------------------------------------------------------------


def test_scenes_and_their_split():
    assert len(SCENES) == 900
    assert len({scene.caption for scene in SCENES}) == 900
    parts = toy.split()
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 600,
        "validation": 100,
        "test": 200,
    }
    together = set(parts["train"]) | set(parts["validation"]) | set(parts["test"])
    assert len(together) == 900, "no scene is in two parts"


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_value_is_seen_in_training(name):
    values = {getattr(scene, name) for scene in toy.split()["train"]}
    assert values == set(ATTRIBUTES[name])


def test_the_attributes_are_those_of_a_scene():
    assert list(ATTRIBUTES) == [field.name for field in fields(Scene)]


def test_captions():
    scene = Scene("small", "red", "circle", "at the top left", "blue")
    assert scene.caption == "a small red circle at the top left on a blue background"
    assert replace(scene, size=None, place=None).caption == "a red circle on a blue background"
    assert replace(scene, background=None, place="in the centre").caption == (
        "a small red circle in the centre"
    )


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="'hexagon': only circle, square, triangle"):
        shape_mask("hexagon", 6, (16, 16))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [5.6, 8.6])
def test_shapes_have_about_the_same_area(shape, radius):
    mask = shape_mask(shape, radius, (16, 16))
    area = {
        "circle": np.pi * radius**2,
        "square": (2 * 0.88 * radius) ** 2,
        "triangle": 3**1.5 * (0.62 * radius) ** 2,
    }
    assert mask.sum() == pytest.approx(area[shape], rel=0.03)
    assert 0.6 < mask.sum() / (np.pi * radius**2) < 1.1


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_anti_aliased(shape):
    mask = shape_mask(shape, 6, (16, 16))
    assert mask.min() == 0
    assert mask.max() == 1
    assert ((mask > 0) & (mask < 1)).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_moves_and_turns(shape):
    mask = shape_mask(shape, 6, (12, 12))
    moved = shape_mask(shape, 6, (15, 10))
    np.testing.assert_allclose(mask[4:20, 4:20], moved[2:18, 7:23], atol=1e-6)
    upright = shape_mask(shape, 6, (16, 16))
    upside_down = shape_mask(shape, 6, (16, 16), np.pi)
    np.testing.assert_allclose(upside_down, upright[::-1, ::-1], atol=1e-5)


def test_a_triangle_points_up():
    widths = shape_mask("triangle", 8, (16, 16)).sum(1)
    widths = widths[widths > 1]
    assert widths[0] < widths[-2]


# ---- The score -----------------------------------------------------------------------------------


@given(scenes)
def test_an_ideal_image_scores_top(scene):
    result = score_one(ideal_image(scene), scene)
    assert result["aligned"] == 1
    assert result["palette"] < 1e-4
    assert result["clean"] > 9.95
    assert result["reward"] > 9.999


@given(scenes, scenes)
def test_an_image_of_another_scene_is_not_aligned(scene, other):
    result = score_one(ideal_image(other), scene)
    assert result["aligned"] == (scene == other)
    assert result["clean"] > 9.95, "clean does not look at the prompt"
    assert (result["reward"] > 9.9) == (scene == other)


@given(scenes, st.sampled_from(list(ATTRIBUTES)), st.data())
def test_each_wrong_attribute_is_noticed(scene, name, data):
    excluded = (getattr(scene, name), scene.color, scene.background)
    others = [value for value in ATTRIBUTES[name] if value not in excluded]
    wrong = replace(scene, **{name: data.draw(st.sampled_from(others))})
    assert score_one(ideal_image(wrong), scene)["aligned"] == 0


def with_noise(image, amount):
    return image + 0.1 * amount * np.random.default_rng(0).standard_normal(image.shape)


def washed_out(image, amount):
    return (1 - 0.3 * amount) * image + 0.3 * amount * 0.55


def cluttered(image, amount):
    circle = shape_mask("circle", 2 * amount, (27.5, 27.5))[..., None]
    return (1 - circle) * image + circle * (1 - image)


def tinted(image, amount):
    return image + amount * np.array([0.1, -0.1, 0.05])


def ringing(image, amount):
    """Return the image with a dark and a bright ring along its edges, as of a poor autoencoder."""
    neighbors = [np.roll(image, shift, axis) for shift in (-1, 1) for axis in (0, 1)]
    return image + 0.5 * amount * (image - np.mean(neighbors, axis=0))


def spiked(image, amount):
    """Return the image with a thin spike, of up to 16 pixels, through whatever is there."""
    result = image.copy()
    length = round(16 * amount)
    result[8 : 8 + length, 4] = 1 - result[8 : 8 + length, 4]
    return result


def oversaturated(image, amount):
    """Return the image with its colors pushed away from gray, as a large guidance does."""
    return np.clip(image + 0.3 * amount * (image - 0.5), 0, 1)


DEFECTS = [with_noise, washed_out, cluttered, tinted, ringing, spiked, oversaturated]


@pytest.mark.parametrize("defect", DEFECTS)
@given(scene=scenes)
def test_a_defect_lowers_clean_and_reward_and_more_of_it_lowers_them_more(defect, scene):
    perfect = score_one(ideal_image(scene), scene)
    some = score_one(defect(ideal_image(scene), 0.5), scene)
    more = score_one(defect(ideal_image(scene), 1.0), scene)
    assert perfect["clean"] - 0.1 > some["clean"] > more["clean"]
    assert perfect["reward"] - 0.1 > some["reward"] > more["reward"]
    if defect in (washed_out, tinted):
        assert more["palette"] > some["palette"] > 0.01


@given(scenes)
def test_a_shift_of_two_pixels_costs_reward_only(scene):
    x, y = PLACES[scene.place]
    mask = shape_mask(scene.shape, SIZES[scene.size], (x + 2, y - 1))
    image = paint(mask, COLORS[scene.color], COLORS[scene.background])
    result = score_one(image, scene)
    assert result["aligned"] == 1
    assert result["clean"] > 9.9
    assert result["reward"] < 8


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_a_blank_image_is_not_aligned(level):
    result = score_one(np.full((32, 32, 3), level, np.float32), SCENES[0])
    assert result["aligned"] == 0
    assert np.isfinite(list(result.values())).all()


def test_a_batch_is_scored_image_by_image():
    some = SCENES[::100]
    images = [web_image(scene, np.random.default_rng(i)) for i, scene in enumerate(some)]
    together = toy.score(np.stack(images), [scene.caption for scene in some])
    for i, scene in enumerate(some):
        for name, value in score_one(images[i], scene).items():
            assert together[name][i] == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_the_score_of_a_set_by_hand():
    """On gray images, a distance is the difference of the levels."""
    scene = SCENES[0]
    drawings = drawings_of(scene)
    gray = np.full((2, 32, 32, 3), 0.5)
    gray[1] = 0.75
    scores = toy.score_set(gray, scene.caption)
    assert scores["spread"] == pytest.approx(0.25)
    to_drawings = np.sqrt(((gray[:, None] - drawings) ** 2).mean((2, 3, 4))).mean()
    assert scores["energy"] == pytest.approx(to_drawings - 0.125)


def mean_energy(draw: Callable[[Scene, np.random.Generator], np.ndarray]) -> float:
    """Return the mean energy of four images each of 60 scenes."""
    energies = []
    for row, scene in enumerate(SCENES[::15]):
        rng = np.random.default_rng([2, row])
        images = np.stack([draw(scene, rng) for _ in range(4)])
        energies.append(toy.score_set(images, scene.caption)["energy"])
    return np.mean(energies)


def test_the_energy_is_least_for_images_that_are_distributed_as_the_data():
    """Not for the ideal image, which is the mode of the data, nor for one drawing repeated."""
    real = mean_energy(curated_image)
    assert real < 0.9 * mean_energy(lambda scene, rng: ideal_image(scene))
    rest = np.random.default_rng(3)
    repeated = {scene: curated_image(scene, rest) for scene in SCENES[::15]}
    assert real < 0.9 * mean_energy(lambda scene, rng: repeated[scene])
    assert real < 0.6 * mean_energy(web_image)
    assert real < 0.5 * mean_energy(lambda scene, rng: np.full((32, 32, 3), 0.5))


def test_the_drawings_that_sets_are_compared_with_are_in_no_data_set():
    scene = toy.split()["train"][7]
    drawings = drawings_of(scene)
    assert len(np.unique(drawings.reshape(DRAWINGS, -1), axis=0)) == DRAWINGS
    for row in range(7, toy.NUM_ROWS, 600):
        _, image = toy.curated_row(row)
        distance = np.sqrt(((drawings - image) ** 2).mean((1, 2, 3)))
        assert 0.001 < distance.min() < 0.1, "drawn anew, of the same scene"
    fit = toy.score(drawings, [scene.caption] * DRAWINGS)
    assert fit["aligned"].all()


def test_scores_are_those_of_the_published_tables():
    """Recorded at commit 0a7cbd9, which made tutorial/evidence."""
    scene = SCENES[7]
    result = score_one(web_image(scene, np.random.default_rng(0)), scene)
    assert result["aligned"] == 1
    assert result["clean"] == pytest.approx(3.283582, rel=1e-5)
    assert result["reward"] == pytest.approx(4.409439, rel=1e-5)
    assert result["palette"] == pytest.approx(0.0732472, rel=1e-5)


def test_a_prompt_of_another_world_is_refused():
    with pytest.raises(KeyError, match="an astronaut"):
        toy.score(np.zeros((1, 32, 32, 3), np.float32), ["an astronaut"])


# ---- Two ways to paint a scene, and careless captions --------------------------------------------


def test_curated_images_are_right_and_clean_and_web_images_less():
    some = SCENES[::9]
    prompts = [scene.caption for scene in some]
    means = {}
    for paint_scene in (curated_image, web_image):
        images = np.stack(
            [paint_scene(scene, np.random.default_rng(i)) for i, scene in enumerate(some)]
        )
        assert images.min() >= 0
        assert images.max() <= 1
        assert images.dtype == np.float32
        metrics = toy.score(images, prompts)
        means[paint_scene] = {name: values.mean() for name, values in metrics.items()}
    assert means[curated_image]["aligned"] == 1
    assert means[curated_image]["clean"] > means[web_image]["clean"] + 1
    assert means[curated_image]["reward"] > means[web_image]["reward"] + 1
    assert means[web_image]["aligned"] < 1


@given(scenes, seeds)
def test_mistakes(scene, seed):
    rng = np.random.default_rng(seed)
    assert with_mistakes(scene, 0.0, rng) == scene
    wrong = with_mistakes(scene, 1.0, rng)
    for name in ATTRIBUTES:
        assert getattr(wrong, name) != getattr(scene, name)
    assert wrong.color != wrong.background


def test_careless_captions_are_wrong_in_8_and_short_in_20_of_100():
    rng = np.random.default_rng(0)
    shapes_right = []
    sizes_missing = []
    sizes_wrong = []  # of those that are there
    for scene in SCENES * 4:
        words = careless_description(scene, rng).caption.split()
        shapes_right.append(scene.shape in words)
        sizes = [word for word in words if word in SIZES]
        sizes_missing.append(sizes == [])
        if sizes:
            sizes_wrong.append(sizes != [scene.size])
    assert np.mean(shapes_right) == pytest.approx(0.92, abs=0.02)
    assert np.mean(sizes_missing) == pytest.approx(0.2, abs=0.03)
    assert np.mean(sizes_wrong) == pytest.approx(0.08, abs=0.02)


# ---- The curated set -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def curated_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "toy-curated"
    toy.write_curated_set(folder)
    return folder


@pytest.fixture(scope="module")
def curated_images() -> np.ndarray:
    """All images of the curated set, [3000,32,32,3]."""
    return np.stack([image for _, image in toy.curated_set()])


def test_the_curated_set_is_the_one_of_the_published_tables(curated_folder):
    assert toy.hash_curated_set(curated_folder) == toy.CURATED_SHA256


def test_the_curated_set_is_a_data_set_like_any_other(curated_folder):
    lines = (curated_folder / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == toy.NUM_ROWS
    for row, (caption, image) in zip(rows[::100], list(toy.curated_set())[::100], strict=True):
        assert row.keys() == {"file_name", "text"}
        assert row["text"] == caption
        written = np.asarray(Image.open(curated_folder / row["file_name"]))
        np.testing.assert_array_equal(written, np.asarray(toy.to_pil(image)))
    assert rows[7]["file_name"] == "0007.png"
    names = {"metadata.jsonl"} | {row["file_name"] for row in rows}
    assert {path.name for path in curated_folder.iterdir()} == names
    assert list(curated_folder.parent.iterdir()) == [curated_folder], "no temporary folder is left"


def test_five_clean_images_of_each_training_scene(curated_images):
    """Row r shows scene r % 600. The score knows that by the image, whatever the caption says."""
    scenes = toy.split()["train"]
    assert len(curated_images) == 5 * len(scenes) == 3000
    prompts = [scene.caption for scene in scenes] * 5
    scores = toy.score(curated_images[::7], prompts[::7])
    assert scores["aligned"].mean() == 1
    assert scores["clean"].mean() > 6  # web images of these scenes: 2.7


def test_every_image_is_drawn_anew(curated_images):
    assert len(np.unique(curated_images.reshape(toy.NUM_ROWS, -1), axis=0)) == toy.NUM_ROWS
    of_one_scene = curated_images[7::600]
    assert len(of_one_scene) == 5
    for i in range(5):
        for j in range(i):
            difference = np.abs(of_one_scene[i] - of_one_scene[j])
            assert difference.max() > 0.03, "they can be told apart in 8 bits"


def test_the_captions_of_the_curated_set_are_as_careless_as_the_webs():
    """Four attributes may be missing, and all five wrong: .92 (.8 * .92)^4 of them are complete."""
    complete = []
    allowed = []
    for row in range(toy.NUM_ROWS):
        description, _ = toy.curated_row(row)
        scene = toy.split()["train"][row % 600]
        complete.append(description == scene)
        assert description.shape is not None
        stated = [value for value in astuple(description) if value is not None]
        allowed.append(set(stated) <= set(astuple(scene)))
    assert np.mean(complete) == pytest.approx(0.92 * (0.8 * 0.92) ** 4, abs=0.025)
    assert 0.65 < np.mean(allowed) < 0.8


def test_a_scene_has_several_captions():
    captions = {toy.curated_row(row)[0].caption for row in range(7, toy.NUM_ROWS, 600)}
    assert len(captions) > 1


def test_a_row_does_not_depend_on_the_rows_before_it():
    rows = list(toy.curated_set())
    for row in (0, 7, 607, 2999):
        description, image = toy.curated_row(row)
        caption, same_image = rows[row]
        assert description.caption == caption
        np.testing.assert_array_equal(image, same_image)


def test_a_complete_curated_set_is_kept(curated_folder):
    before = (curated_folder / "0000.png").stat().st_mtime_ns
    toy.write_curated_set(curated_folder)
    assert (curated_folder / "0000.png").stat().st_mtime_ns == before


def test_an_incomplete_curated_set_is_refused_by_name(tmp_path):
    folder = tmp_path / "toy-curated"
    toy.write_curated_set(folder)
    (folder / "0003.png").unlink()
    with pytest.raises(InputError, match="0003.png is missing.*delete this folder"):
        toy.write_curated_set(folder)


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="toy-curated: cannot be written"):
        toy.write_curated_set(tmp_path / "file" / "toy-curated")


def test_several_processes_may_write_the_curated_set_at_once(tmp_path):
    folder = tmp_path / "toy-curated"
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=toy.write_curated_set, args=(folder,)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert toy.hash_curated_set(folder) == toy.CURATED_SHA256
    assert list(tmp_path.iterdir()) == [folder]


# ---- The base and the settings -------------------------------------------------------------------


def test_the_base_is_small_and_its_report_is_there():
    files = [path for path in toy.BASE.rglob("*") if path.is_file()]
    files.remove(toy.BASE / toy.PREFERENCES)  # data, not a part of the checkpoint
    assert sum(path.stat().st_size for path in files) <= 8e6
    report = json.loads((toy.BASE / "pretrain.json").read_text())
    assert report["base"]["aligned"] > 0.8
    assert report["base"]["seconds"] > 0


def test_the_base_has_the_sizes_and_the_tokenizer_of_pretrain_toy():
    base = load_pipeline(toy.BASE)
    new = pretrain_toy.new_pipeline(seed=0)
    assert new.text_encoder.tokenizer.vocab == base.text_encoder.tokenizer.vocab
    for part in ("unet", "vae", "text_encoder"):
        expected = {name: t.shape for name, t in getattr(base, part).state_dict().items()}
        shapes = {name: t.shape for name, t in getattr(new, part).state_dict().items()}
        assert shapes == expected


PRETRAIN = ["--images", "64", "--vae-steps", "3", "--steps", "4", "--rows", "5"]


@pytest.fixture(scope="module")
def fast_scores():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pretrain_toy, "SAMPLING_STEPS", 1)
        yield


@pytest.fixture(scope="module")
def pretrained(fast_scores, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("pretrained") / "base"
    return folder, pretrain_toy.main([*PRETRAIN, "--out", str(folder)])


def test_pretraining_writes_two_checkpoints(pretrained):
    folder, report = pretrained
    assert report["vae"]["steps"] == 3
    assert report["base"]["loss"] == pytest.approx(1, abs=0.2)
    for stage in ("vae", "base"):
        assert load_pipeline(folder / stage).vae.downscale == 4
        assert report[stage]["seconds"] >= 0
    assert json.loads((folder / "pretrain.json").read_text()) == report
    assert sorted(path.name for path in folder.iterdir()) == ["base", "pretrain.json", "vae"]


def test_scaled_latents_have_unit_variance(pretrained):
    folder, _ = pretrained
    vae = load_pipeline(folder / "vae").vae
    scenes = SCENES[::9]
    images = [web_image(scene, np.random.default_rng(i)) for i, scene in enumerate(scenes)]
    mean, logvar = pretrain_toy.encode(vae, pretrain_toy.to_tensor(images))
    assert mean.shape == logvar.shape == (100, 4, 8, 8)
    variance = (mean.var() + logvar.exp().mean()) * vae.scaling_factor**2
    assert variance.item() == pytest.approx(1, abs=0.1)


def test_a_finished_stage_is_not_trained_again(pretrained):
    folder, report = pretrained
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert pretrain_toy.main([*PRETRAIN, "--out", str(folder)])["base"] == report["base"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_other_settings_need_another_folder(pretrained):
    folder, _ = pretrained
    with pytest.raises(InputError, match="started with"):
        pretrain_toy.main([*PRETRAIN, "--vae-steps", "4", "--out", str(folder)])


def test_interrupted_pretraining_goes_on_to_the_same_weights(pretrained, tmp_path, monkeypatch):
    """It is stopped in the second stage, after the step that was saved last."""
    folder, report = pretrained
    learning_rate = pretrain_toy.learning_rate
    saved_before_start = []

    def stop_at_step_4(peak, step, steps):
        if steps == 4 and step == 4:
            raise KeyboardInterrupt
        return learning_rate(peak, step, steps)

    out = tmp_path / "again"
    monkeypatch.setattr(pretrain_toy, "SAVE_EVERY", 2)
    monkeypatch.setattr(pretrain_toy, "learning_rate", stop_at_step_4)
    with pytest.raises(KeyboardInterrupt):
        pretrain_toy.main([*PRETRAIN, "--out", str(out)])
    assert (out / "base-state.pt").exists()

    def note_the_step(peak, step, steps):
        saved_before_start.append(step)
        return learning_rate(peak, step, steps)

    monkeypatch.setattr(pretrain_toy, "learning_rate", note_the_step)
    again = pretrain_toy.main([*PRETRAIN, "--out", str(out)])
    assert saved_before_start == [3, 4], "two of the four steps were saved"
    assert again["base"]["loss"] == report["base"]["loss"]
    for part in ("unet", "vae", "text_encoder"):
        first = getattr(load_pipeline(folder / "base"), part).state_dict()
        second = getattr(load_pipeline(out / "base"), part).state_dict()
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), name


def test_the_mean_weight_of_a_timestep_is_1_and_noisier_ones_weigh_more():
    alphas_cumprod = torch.tensor([0.9, 0.25, 0.01])
    weights = pretrain_toy.timestep_weights(alphas_cumprod)
    assert weights.mean().item() == pytest.approx(1)
    assert (weights[2] / weights[1]).item() == pytest.approx(5)


def test_preferences_are_two_images_of_each_caption_the_better_one_preferred(pretrained):
    folder, _ = pretrained
    preferences = load_file(folder / "base" / toy.PREFERENCES)
    assert preferences.keys() == {"preferred", "rejected"}
    pipe = load_pipeline(folder / "base")
    rewards = {}
    for name, latents in preferences.items():
        assert latents.shape == (5, 4, 8, 8)
        assert latents.dtype == torch.float16
        images = decode_latents(pipe, latents.float()).permute(0, 2, 3, 1).numpy()
        rewards[name] = [
            pretrain_toy.nearness_to_description(image, toy.curated_row(row)[0])
            for row, image in enumerate(images)
        ]
    assert (np.array(rewards["preferred"]) > np.array(rewards["rejected"])).all()


@given(scenes)
def test_a_description_is_met_by_every_scene_that_it_allows(scene):
    image = ideal_image(scene)
    vague = replace(scene, size=None, place=None)
    assert pretrain_toy.nearness_to_description(image, scene) == 0
    assert pretrain_toy.nearness_to_description(image, vague) == 0
    other_shape = SHAPES[SHAPES.index(scene.shape) - 1]
    assert pretrain_toy.nearness_to_description(image, replace(vague, shape=other_shape)) < -0.01


def test_tuning_writes_a_row_for_each_trial(tmp_path, monkeypatch):
    monkeypatch.setattr(tune_toy, "TRIALS", {"sft": [{"sft-lr": 1e-5}, {"sft-lr": 2e-5}]})
    few = ["--iterations", "1", "--steps", "1", "--num-prompts", "16"]
    few += ["--sampler-steps", "1", "--score-images", "1"]
    monkeypatch.setattr(tune_toy, "FIXED", [*tune_toy.FIXED, *few])
    argv = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    rows = tune_toy.main(argv)
    assert [row["sft-lr"] for row in rows] == [1e-5, 2e-5]
    assert {row["model"] for row in rows} == {"sft"}
    assert rows[0]["reward"]["n"] == 100
    assert json.loads((tmp_path / "tuning.json").read_text())["trials"] == rows
    table = (tmp_path / "tuning.md").read_text()
    assert "| sft | sft-lr 1e-05 |" in table or "| sft | **sft-lr 1e-05** |" in table
    assert tune_toy.main(argv) == rows
