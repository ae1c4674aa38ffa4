"""The miniature world from end to end: self-play and the baselines, their images and scores."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import evaluate
import sample
import train
from spin import sampler, toy
from spin.checkpoint import load_pipeline
from spin.data import batch_rows
from spin.eval import comparison, report
from spin.infra.errors import InputError
from spin.infra.run import Run
from spin.pairs import PairLoader
from spin.text import Tokenizer

STORY = """
    --iterations 1 --steps 3 --sampler-steps 5 --score validation --score-images 1 --device cpu
    --out
"""
MODELS = ["base", "sft", "dpo", "spin-1", "bounded-1"]


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> tuple[Path, dict]:
    """The folder of a finished run, and what train.py returned."""
    out = tmp_path_factory.mktemp("story") / "toy"
    return out, train.main([*STORY.split(), str(out)])


def test_every_file_of_the_story(story):
    out, _ = story
    files = ["config.json", "log.jsonl", "lock", "curves.png", "samples/grid.png"]
    files += ["results.json", "results.md", "results.png"]
    for player in ("iter1", "bounded-1"):
        files += [f"{player}/generated/shard-00000.safetensors"]
    for model in ("iter1", "bounded-1", "sft", "dpo"):
        files += [f"{model}/checkpoint/model_index.json", f"{model}/state/state.pt"]
    for name in files:
        assert (out / name).is_file(), name
    assert not list(out.rglob("*.part")), "a temporary file was left"


def test_the_data_are_drawn_beside_the_run(story):
    out, _ = story
    folder = out.parent / "toy-curated"
    assert json.loads((out / "config.json").read_text())["data"] == str(folder)
    assert toy.hash_curated_set(folder) == toy.CURATED_SHA256


def test_the_results_are_of_every_model_and_metric(story):
    out, returned = story
    results = json.loads((out / "results.json").read_text())
    assert returned["results"] == results
    assert list(results["models"]) == MODELS
    for metrics in results["models"].values():
        assert list(metrics) == list(toy.METRICS)  # an image a prompt is no set
        for summary in metrics.values():
            assert summary["low"] <= summary["mean"] <= summary["high"]
            assert summary["n"] == 100
    text = (out / "results.md").read_text()
    for name in MODELS:
        assert f"| {name} " in text
    assert "| by reward " in text and "| SPIN-1 beats SFT " in text


def test_the_results_are_of_every_difference(story):
    results = story[1]["results"]
    assert len(results["differences"]) == 10
    for pair, metrics in results["differences"].items():
        first, second = pair.split(" - ")
        means = results["models"]
        difference = means[first]["reward"]["mean"] - means[second]["reward"]["mean"]
        assert metrics["reward"]["mean"] == pytest.approx(difference, abs=1e-9)
        assert 0 <= metrics["reward"]["win_rate"]["mean"] <= 1


def test_the_results_state_the_runs_config(story):
    out, returned = story
    config = json.loads((out / "config.json").read_text())
    assert returned["results"]["config"] == config


def test_the_base_samples_what_the_prompts_say_and_guidance_is_needed_for_that():
    pipe = load_pipeline(toy.BASE).freeze()
    prompts = [scene.caption for scene in toy.split()["validation"][:50]]
    aligned = {}
    for guidance in (1.0, 7.5):
        latents = sampler.sample(pipe, prompts, steps=20, guidance=guidance)
        images = sampler.decode_latents(pipe, latents).permute(0, 2, 3, 1).numpy()
        aligned[guidance] = toy.score(images, prompts)["aligned"].mean()
    assert aligned[7.5] >= 0.9
    assert aligned[1.0] < 0.6


def test_the_log_of_the_story(story):
    out, returned = story
    log = Run(out).read_log()
    trained = ["spin-1", "bounded-1", "sft", "dpo"]
    assert [line["model"] for line in log] == list(np.repeat(trained, 3))
    assert [line["step"] for line in log] == [1, 2, 3] * 4
    assert [row["model"] for row in returned["models"]] == trained
    spin, bounded, sft, dpo = log[::3]
    assert spin["loss"] == dpo["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert bounded["loss"] == pytest.approx(0, abs=1e-6)
    assert list(bounded) == list(spin)
    assert 0 < sft["loss"] < 1
    assert "margin" not in sft


def scored_images(out: Path, model: str) -> list[Image.Image]:
    """Return the images that a model of the story is scored by, one a prompt."""
    paths = sorted((out / "evaluation/images" / model).glob("*/*.png"))
    assert len(paths) == 100
    return [Image.open(path) for path in paths]


def rows_at_quartiles(out: Path) -> list[int]:
    """Return the prompts whose images by theta_0 have the rewards nearest to the quartiles."""
    images = [np.asarray(image) / 255 for image in scored_images(out, "base")]
    prompts = [scene.caption for scene in toy.split()["validation"]]
    rewards = toy.score(np.stack(images), prompts)["reward"]
    return [int(np.abs(rewards - np.quantile(rewards, q)).argmin()) for q in (0.25, 0.5, 0.75)]


def cell_of_grid(out: Path, row: int, column: int) -> np.ndarray:
    """Return a cell of grid.png, [32,32,3]: there, each pixel is 3 x 3 pixels."""
    grid = np.asarray(Image.open(out / "samples/grid.png").convert("RGB")).astype(int)
    top = 25 + row * 102
    left = 190 + column * 102
    cell = grid[top : top + 96, left : left + 96]
    np.testing.assert_array_equal(cell, cell[::3, ::3].repeat(3, 0).repeat(3, 1))
    return cell[::3, ::3]


def test_the_grid_shows_every_model_and_the_ideal_image_last(story):
    out, _ = story
    width, height = Image.open(out / "samples/grid.png").size
    assert width == 190 + 6 * 102  # the prompts, and six columns of 96 pixels and a gap
    assert height == 25 + 6 * 102  # the titles, and two rows for each of three prompts
    for i, row in enumerate(rows_at_quartiles(out)):
        for column, model in enumerate(MODELS):
            image = Image.open(out / f"samples/{model}/{i}.png")
            np.testing.assert_array_equal(cell_of_grid(out, 2 * i, column), np.asarray(image))
        ideal = toy.to_pil(toy.ideal_image(toy.split()["validation"][row]))
        np.testing.assert_array_equal(cell_of_grid(out, 2 * i, len(MODELS)), np.asarray(ideal))


def test_below_each_image_is_what_it_differs_from_the_ideal_by(story):
    out, _ = story
    for row in (0, 2, 4):
        ideal = cell_of_grid(out, row, len(MODELS))
        for column in range(len(MODELS)):
            difference = cell_of_grid(out, row, column) - ideal
            amplified = np.clip(128 + report.DIFFERENCE_GAIN * difference, 0, 255)
            np.testing.assert_array_equal(cell_of_grid(out, row + 1, column), amplified)
            assert difference.any()
        assert (cell_of_grid(out, row + 1, len(MODELS)) == 128).all(), "the ideal's own: none"


def test_the_grids_images_are_those_scored_images_that_are_at_quartiles(story):
    """They are sampled one at a time, which may round otherwise than many at once do."""
    out, _ = story
    for model in MODELS:
        scored = scored_images(out, model)
        for i, row in enumerate(rows_at_quartiles(out)):
            image = Image.open(out / f"samples/{model}/{i}.png")
            settings = image.text["parameters"].split(", Size: ")[0]
            assert scored[row].text["parameters"].startswith(settings + ", ")
            change = np.asarray(image).astype(int) - np.asarray(scored[row])
            assert np.abs(change).max() <= 1


def test_theta_0_is_scored_before_training_and_not_again(story):
    out, _ = story
    images = list(out.glob("evaluation/images/base/*/*.png"))
    assert len(images) == 100
    newest = max(path.stat().st_mtime_ns for path in images)
    first_generated = out / "iter1/generated/shard-00000.safetensors"
    assert newest < first_generated.stat().st_mtime_ns


def test_without_scores_the_grid_has_the_first_test_prompts(tmp_path):
    args = train.parse_args(["--score", "none", "--grid-prompts", "4", "--device", "cpu"])
    grid = train.sample_grid(args, Run(tmp_path), images=None)
    assert grid.prompts == [scene.caption for scene in toy.split()["test"][:4]]
    assert len(set(grid.seeds)) == len(grid.ideal_images) == 4
    assert not list(tmp_path.iterdir()), "nothing is sampled to choose them"


def test_evaluate_uses_the_images_that_the_story_was_scored_by(story, tmp_path, monkeypatch):
    out, returned = story
    prompts = tmp_path / "prompts.txt"
    captions = [scene.caption for scene in toy.split()["validation"]]
    prompts.write_text("\n".join(captions))
    monkeypatch.setattr(comparison, "sample_images", None)  # a call would fail
    more = "--metrics toy --num-images 1 --device cpu"
    results = evaluate.main([str(out), "--prompts", str(prompts), *more.split()])
    assert results["models"] == returned["results"]["models"]
    assert results["claims"] == returned["results"]["claims"]


def test_a_finished_story_is_not_repeated(story):
    out, returned = story
    paths = [*out.rglob("*.safetensors"), *out.glob("*/*/*.png"), out / "results.json"]
    before = {path: path.stat().st_mtime_ns for path in paths}
    assert train.main([*STORY.split(), str(out)])["results"] == returned["results"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_seed_needs_another_folder(story):
    out, _ = story
    with pytest.raises(InputError, match="started with --seed 0, now 1"):
        train.main([*STORY.split(), str(out), "--seed", "1"])


def test_a_changed_curated_set_is_refused(story, tmp_path):
    toy.write_curated_set(tmp_path / "toy-curated")
    Image.new("RGB", (32, 32)).save(tmp_path / "toy-curated/0007.png")
    with pytest.raises(InputError, match="toy-curated: not the miniature world's curated set"):
        train.main([*STORY.split(), str(tmp_path / "run")])


SHORT = """
    --steps 2 --batch-size 4 --num-prompts 12 --sampler-steps 2 --grid-prompts 0 --score none
    --device cpu
"""


def test_the_baselines_train_on_the_batches_of_self_play(tmp_path, monkeypatch):
    """Prompts, noise and timesteps are the same; so are SFT's real images. DPO has none."""
    load = PairLoader.load
    batches: dict[str, dict] = {"spin": {}, "spin-bounded": {}, "sft": {}, "dpo": {}}

    def recording(loader, iteration, step, start, end):
        batch = load(loader, iteration, step, start, end)
        batches[loader.loss][iteration, step] = batch
        return batch

    monkeypatch.setattr(PairLoader, "load", recording)
    train.main([*SHORT.split(), "--iterations", "2", "--out", str(tmp_path / "run")])
    preferences = load_file(toy.BASE / toy.PREFERENCES)
    steps = [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(list(of_loss) == steps for of_loss in batches.values())
    for step in steps:
        spin = batches["spin"][step]
        sft = batches["sft"][step]
        dpo = batches["dpo"][step]
        for name in ("eps", "t", "context"):
            assert torch.equal(spin[name], sft[name])
            assert torch.equal(spin[name], dpo[name])
        assert torch.equal(spin["x0_data"], sft["x0_data"])
        assert "x0_gen" not in sft

        rows = batch_rows(0, *step, batch_size=4, num_rows=12)
        preferred = preferences["preferred"][rows]
        rejected = preferences["rejected"][rows]
        torch.testing.assert_close(dpo["x0_data"], preferred.float(), rtol=0, atol=0)
        torch.testing.assert_close(dpo["x0_gen"], rejected.float(), rtol=0, atol=0)
        for real in spin["x0_data"]:
            assert not any(torch.allclose(real, image, atol=0.1) for image in preferred.float())


def test_the_players_of_a_run_with_all_losses_are_those_of_runs_with_one(tmp_path):
    """To the bit, and also after the bounded player's second iteration was lost."""
    weights = "checkpoint/unet/diffusion_pytorch_model.safetensors"
    short = [*SHORT.split(), "--iterations", "2"]
    together = tmp_path / "together"
    train.main([*short, "--out", str(together)])
    shutil.rmtree(together / "bounded-2")
    train.main([*short, "--out", str(together)])
    for loss, player in (("spin", "iter"), ("spin-bounded", "bounded-")):
        alone = tmp_path / loss
        train.main([*short, "--loss", loss, "--out", str(alone)])
        for k in (1, 2):
            expected = (alone / f"iter{k}" / weights).read_bytes()
            assert (together / f"{player}{k}" / weights).read_bytes() == expected
    models = report.models_of_run(Run(together), comparison.ModelSource(str(toy.BASE)), 2)
    assert list(models) == ["base", "sft", "dpo", "spin-1", "spin-2", "bounded-1", "bounded-2"]
    assert Path(models["bounded-2"].unet) == together / "bounded-2/checkpoint"


def test_a_baseline_alone_is_scored_and_sampled_from(tmp_path):
    out = tmp_path / "run"
    more = "--iterations 1 --loss sft --score validation --score-images 1"
    result = train.main([*SHORT.split(), *more.split(), "--out", str(out)])
    assert list(result["results"]["models"]) == ["base", "sft"]
    assert not (out / "iter1").exists()

    model = ["--model", str(out / "sft/checkpoint"), "--prompt", toy.SCENES[5].caption]
    [path] = sample.main([*model, "--steps", "2", "--device", "cpu", "--out", str(tmp_path)])
    assert Image.open(path).size == (32, 32)


def test_the_base_has_a_small_vocabulary_and_splits_words_as_clip_does():
    tokenizer = load_pipeline(toy.BASE).text_encoder.tokenizer
    clip = Tokenizer()
    assert len(tokenizer.vocab) < 620
    words = {index: word for word, index in tokenizer.vocab.items()}
    clip_words = {index: word for word, index in clip.vocab.items()}
    for scene in toy.SCENES[::7]:
        tokens = [words[index] for index in tokenizer.encode(scene.caption)]
        clip_tokens = [clip_words[index] for index in clip.encode(scene.caption)]
        assert tokens == clip_tokens
