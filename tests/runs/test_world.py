"""The results of the miniature world: at the run's guidance, at each model's best, real images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from spin import toy
from spin.checkpoint import load_pipeline
from spin.eval import comparison, world
from spin.eval.comparison import Evaluation, ModelSource
from spin.infra.run import Run
from spin.sampler import SamplingOptions

PROMPTS = world.captions("test")[:4]
OPTIONS = SamplingOptions(steps=2, guidance=7.5, height=32, width=32)


def score(folder: Path, sweep_guidance: list[float], split: str = "test") -> dict:
    """Score the base under two names in `folder`, a run's."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"seed": 0}))
    base = ModelSource(str(toy.BASE))
    evaluation = Evaluation(folder / "evaluation", PROMPTS, 2, OPTIONS)
    return world.score_models(
        Run(folder), {"base": base, "sft": base}, evaluation, sweep_guidance, split, 8, "cpu"
    )


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("world") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        validation = world.captions("validation")[:6]
        monkeypatch.setattr(world, "captions", lambda split: validation)
        return folder, score(folder, [1.0, 3.0])


def test_both_verdicts_stand_in_the_results(scored):
    folder, results = scored
    assert results["title"] == "4 test prompts, 2 images each"
    assert results["setting"] == "guidance 7.5"
    assert results["at_best_guidance"]["setting"] == "best guidance"
    text = (folder / "results.md").read_text()
    assert text.count("| SFT stays within 0.05 of theta_0 | ") == 1
    assert "| reward, guidance 7.5 " in text and "| reward, best guidance " in text
    assert "# 4 test prompts, 2 images each, guidance 7.5\n" in text
    assert "# 4 test prompts, 2 images each, best guidance\n" in text
    assert json.loads((folder / "results.json").read_text()) == results


def test_the_best_guidance_is_chosen_on_validation_prompts_by_their_mean_reward(scored):
    folder, results = scored
    stored = {}
    for guidance in (1, 3):
        path = folder / f"evaluation/validation/scores/base/guidance-{guidance}-32px-toy.json"
        scores = json.loads(path.read_text()).values()
        assert len(scores) == 6, "one image for each validation prompt"
        stored[guidance] = np.mean([image["reward"] for image in scores])
    best = max(stored, key=stored.get)
    assert results["at_best_guidance"]["best_guidance"] == {"base": best, "sft": best}
    images = folder / f"evaluation/images/base/guidance-{best}-32px"
    assert len(list(images.glob("*.png"))) == 8, "the test prompts at that guidance"
    assert not (folder / f"evaluation/images/base/guidance-{4 - best}-32px").exists()
    [table] = results["at_best_guidance"]["tables"].values()
    assert table["base"]["1"]["mean"] == pytest.approx(stored[1])
    assert table["base"]["best at"] == f"{best}"


def test_every_table_of_scores_has_a_row_of_real_images(scored):
    folder, results = scored
    assert results["real"].keys() == results["models"]["base"].keys()
    assert results["at_best_guidance"]["real"] == results["real"]
    lines = (folder / "results.md").read_text().splitlines()
    rows_of_real = [line for line in lines if line.startswith("| real ")]
    # the summary; for each verdict scores and medians; guidance
    assert len(rows_of_real) == 6
    [table] = results["at_best_guidance"]["tables"].values()
    assert table["real"]["best at"] == "any"
    assert table["real"]["1"] == table["real"]["3"]
    assert table["real"]["1"]["n"] == 6, "validation prompts"
    assert "real" not in results["models"], "it is no model, and loses no contest"


def test_real_images_are_scored_after_a_round_trip_through_the_autoencoder():
    vae = load_pipeline(toy.BASE).freeze().vae
    real = world.score_real(vae, PROMPTS, 3)
    assert real.keys() == {*toy.METRICS, *toy.SET_METRICS}
    assert all(values.shape == (4, 3) for values in real.values())
    assert (real["aligned"] == 1).all()
    assert (real["spread"] > 0.01).all()
    assert len(np.unique(real["reward"])) == 12, "each image is another drawing"
    drawings = np.stack([toy.ideal_image(toy.SCENE_OF_CAPTION[prompt]) for prompt in PROMPTS])
    assert real["reward"].mean() < toy.score(drawings, PROMPTS)["reward"].mean() - 0.5


def test_a_second_look_samples_nothing(scored, monkeypatch):
    folder, results = scored
    monkeypatch.setattr(comparison, "sample_images", None)  # a call would fail
    assert score(folder, [1.0, 3.0]) == results


@pytest.mark.parametrize("sweep_guidance, split", [([7.5], "test"), ([1.0, 3.0], "validation")])
def test_there_is_one_verdict_where_there_is_nothing_to_choose(tmp_path, sweep_guidance, split):
    """A single value; or prompts to report on that are those on which would be chosen."""
    results = score(tmp_path / "run", sweep_guidance, split)
    assert "at_best_guidance" not in results
    assert not (tmp_path / "run/evaluation/validation").exists()


def test_other_values_to_look_at_are_looked_at(scored, tmp_path, monkeypatch):
    folder, results = scored
    copy = shutil.copytree(folder, tmp_path / "run")
    validation = world.captions("validation")[:6]
    monkeypatch.setattr(world, "captions", lambda split: validation)
    other = score(copy, [2.0, 3.0])
    assert set(other["at_best_guidance"]["best_guidance"].values()) <= {2.0, 3.0}
    [table] = other["at_best_guidance"]["tables"].values()
    assert list(table["base"]) == ["best at", "2", "3"]


def test_three_sentences_say_what_came_out(scored):
    _, results = scored
    gain, best, energy = world.conclusions(results)
    assert " ".join(gain.split()) == (
        "At the run's guidance, sft gains the most reward over theta_0: "
        "sft +0.000 [+0.000, +0.000]."
    )
    reward = results["at_best_guidance"]["models"]["sft"]["reward"]["mean"]
    assert best == (
        "With each model at its own best guidance, base comes first by reward: "
        f"base {reward:.2f}, sft {reward:.2f}."
    )
    energy = " ".join(energy.split())
    own = results["models"]["base"]["energy"]["mean"]
    at_best = results["at_best_guidance"]["models"]["base"]["energy"]["mean"]
    real = results["real"]["energy"]["mean"]
    assert energy == (
        f"By energy (real images: {real:.4f}), the best images at the run's guidance are those of "
        f"base, {own:.4f} (theta_0's {own:.4f}); with each model at its own best guidance, those "
        f"of base, {at_best:.4f} (theta_0's {at_best:.4f})."
    )


def test_a_run_without_trained_models_has_nothing_to_conclude(scored):
    _, results = scored
    assert world.conclusions({**results, "models": {"base": results["models"]["base"]}}) == []
