"""The miniature world from end to end: its base, the story that `python train.py` tells, and how the base was made."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import sample
import train
from spin import data, pairs, sampler
from spin.eval import comparison as judge
from spin.eval import scorers as rewards
from spin.infra import run
from spin.toy import world as toy
from spin.checkpoint import pipeline as weights
from spin.infra.run import InputError
from spin.text import Tokenizer
from tutorial import pretrain_toy as pretrain

FEW = "--steps 3 --iterations 1 --score-images 1 --device cpu --out".split()
MODELS = ["base", "sft", "dpo", "spin-1"]


@pytest.fixture(scope="module")
def base():
    sd = weights.load(toy.BASE)
    for network in (sd.unet, sd.vae, sd.text_encoder):
        network.requires_grad_(False)
    return sd


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "toy"
    return out, train.main([*FEW, str(out)])


# ---------------------------------------------------------------------------------------------------------------------
# the base


def test_the_base_is_small_and_tells_how_it_was_made():
    assert sum(path.stat().st_size for path in toy.BASE.rglob("*")) <= 8e6
    made = json.loads((toy.BASE / "pretrain.json").read_text())
    assert made["theta_0"]["aligned"] > 0.8 and made["theta_0"]["seconds"] > 0


def test_the_base_draws_what_it_is_told(base, tmp_path):
    prompts = [scene.caption for scene in toy.split()["test"]]
    contest = judge.Contest(prompts, 1, judge.SEED, pairs.how_to_draw(train.parse(["--device", "cpu"])), tmp_path)
    scores = contest.score("base", contest.draw("base", "", lambda: base, 64), rewards.load("toy"))
    assert scores["aligned"].mean() >= 0.8, "all five attributes are right"
    assert scores["reward"].mean() > 6 and scores["reward"].shape == (200, 1)


def test_the_vocabulary_is_small_and_splits_words_as_clip_does(base):
    clip, ours = Tokenizer(), base.text_encoder.tokenizer
    assert len(ours.vocab) < 620
    for scene in toy.SCENES[::7]:
        ids = [{v: k for k, v in t.vocab.items()}[i] for t in (clip, ours) for i in t.encode(scene.caption)]
        assert ids[: len(ids) // 2] == ids[len(ids) // 2 :]


def test_the_defaults_are_the_tunings_best():
    table = json.loads((Path(train.__file__).parent / "tutorial/evidence/tuning.json").read_text())
    for method in ("spin", "sft", "dpo"):
        trials = [trial for trial in table["trials"] if trial["method"] == method]
        assert len(trials) == 15
        best = max(trials, key=lambda trial: trial["reward"]["mean"])
        for name in train.TUNED[method]:
            assert best[name.replace("_", "-")] == np.ravel(train.TOY[name])[0]


# ---------------------------------------------------------------------------------------------------------------------
# the story


def test_every_file_of_the_story(story):
    out, _ = story
    files = "config.json log.jsonl lock curves.png results.json results.md results.png samples/grid.png".split()
    files += ["iter1/generated/shard-00000.safetensors"]
    files += [f"{place}/{file}" for place in ("iter1", "sft", "dpo") for file in ("checkpoint", "state/state.pt")]
    for name in files:
        assert (out / name).exists(), name
    assert not list(out.rglob("*.part"))


def test_the_results(story):
    out, returned = story
    results = json.loads((out / "results.json").read_text())
    assert returned["results"] == results and list(results["models"]) == MODELS
    for of in results["models"].values():
        assert list(of) == list(toy.METRICS)
        for summary in of.values():
            assert summary["low"] <= summary["mean"] <= summary["high"] and summary["n"] == 200
    assert results["models"]["base"]["aligned"]["mean"] >= 0.8
    assert set(results["differences"]) == {f"{b} - {a}" for j, b in enumerate(MODELS) for a in MODELS[:j]}
    for name, of in results["differences"].items():
        b, a = name.split(" - ")
        gap = results["models"][b]["reward"]["mean"] - results["models"][a]["reward"]["mean"]
        assert of["reward"]["mean"] == pytest.approx(gap, abs=1e-9)
        assert 0 <= of["reward"]["win_rate"]["mean"] <= 1
    assert results["config"]["guidance"] == 3 and results["config"]["versions"]["torch"] in torch.__version__
    said = (out / "results.md").read_text()
    assert all(f"| {name} |" in said for name in MODELS) and "SPIN-1 beats SFT: " in said


def test_evaluate_goes_on_with_the_pictures_of_the_story(story, monkeypatch, tmp_path):
    out, returned = story
    monkeypatch.setattr(sampler, "pictures", None)  # none is to be drawn
    found = evaluate.main([str(out), "--num-images", "1", "--device", "cpu"])
    assert found["models"] == returned["results"]["models"] and found["claims"] == returned["results"]["claims"]


def test_the_grid_shows_every_model_and_the_ideal_picture_last(story):
    out, _ = story
    grid = np.asarray(Image.open(out / "samples/grid.png").convert("RGB"))
    scene = toy.split()["test"][0]
    ideal = toy.to_pil(toy.ideal(scene)).resize((128, 128), Image.Resampling.NEAREST)
    assert grid.shape[1] == 190 + 5 * 134
    np.testing.assert_array_equal(grid[25 : 25 + 128, -134:-6], np.asarray(ideal))
    drawn = Image.open(out / "samples/spin-1/0.png")
    assert drawn.text["parameters"].splitlines()[0] == scene.caption


def test_the_link_is_self_plays_alone(tmp_path):
    flags = "--steps 1 --iterations 1 --link hinge --score none --grid-prompts 0 --device cpu --out".split()
    first_loss = {line["model"]: line["first_loss"] for line in train.main([*flags, str(tmp_path / "run")])["models"]}
    assert first_loss["spin-1"] == 1 and first_loss["dpo"] == pytest.approx(math.log(2), abs=1e-6)


def test_baselines_see_the_same_batches(story, base):
    """Real latents, noise and timesteps of a step are those of self-play; only the other image of the pair differs."""
    out, _ = story
    args = train.parse(["--device", "cpu", "--iterations", "2", "--steps", "3"])
    images = data.CaptionedImages(toy.CURATED, toy.SIDE, pairs=True)
    [cache] = (out / "cache").iterdir()
    real = data.LatentShards(cache, range(600))
    steps = {s: data.batch_rows(0, 1, s, 16, 600) for s in (1, 2, 3)}
    rows, generated = steps[2], data.LatentShards(out / "iter1/generated", sorted(sum(steps.values(), [])))
    stages = {name: train.Stage.of(name, args) for name in ("spin-1", "spin-2", "sft", "dpo")}
    assert stages["sft"].batches == stages["dpo"].batches == stages["spin-1"].batches + stages["spin-2"].batches
    assert stages["spin-1"].batches == [(1, 1), (1, 2), (1, 3)]
    batch = {
        name: pairs.read(args, base, stages[name].loss, images, real, generated, rows, (1, 2, 0))
        for name in ("spin-1", "sft", "dpo")
    }
    assert "x0_gen" not in batch["sft"]
    for name in ("x0_data", "eps", "t", "context"):
        assert torch.equal(batch["spin-1"][name], batch["sft"][name])
        assert torch.equal(batch["spin-1"][name], batch["dpo"][name])
    assert torch.equal(batch["spin-1"]["x0_gen"], generated.read("x0", rows))
    mean, logvar = base.vae.encode(images.image(rows[3], rejected=True)[None])
    noise = data.draw(0, 1, 2, 3, (4, 8, 8), 1000)["posterior"]
    rejected = (mean + (0.5 * logvar).exp() * noise) * base.vae.scaling_factor
    torch.testing.assert_close(batch["dpo"]["x0_gen"][3], rejected[0], atol=5e-3, rtol=2e-3)


def test_the_log_of_the_story(story):
    out, returned = story
    log = run.Run(out).read_log()
    assert [line["model"] for line in log] == ["spin-1"] * 3 + ["sft"] * 3 + ["dpo"] * 3
    assert [line["step"] for line in log] == [1, 2, 3] * 3
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) == log[6]["loss"]
    assert 0 < log[3]["loss"] < 1 and "margin" not in log[3]
    assert [line["model"] for line in returned["models"]] == ["spin-1", "sft", "dpo"]


def test_the_finished_story_is_not_told_again(story):
    out, returned = story
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".safetensors", ".json")}
    before.pop(out / "config.json")
    assert train.main([*FEW, str(out)])["results"] == returned["results"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_baseline_alone_and_a_model_drawn_from(tmp_path):
    result = train.main([*FEW, str(tmp_path / "run"), "--loss", "sft", "--score", "validation", "--grid-prompts", "0"])
    assert list(result["results"]["models"]) == ["base", "sft"]
    assert result["results"]["models"]["sft"]["reward"]["n"] == 100
    prompt = toy.SCENES[5].caption
    model = str(tmp_path / "run/sft/checkpoint")
    [path] = sample.main(["--model", model, "--prompt", prompt, "--out", str(tmp_path), "--steps", "10"])
    assert Image.open(path).size == (32, 32)


def test_a_run_is_not_continued_on_other_data(story):
    out, _ = story
    with pytest.raises(InputError, match="begun with seed 0, now 1"):
        train.main([*FEW, str(out), "--seed", "1"])


# ---------------------------------------------------------------------------------------------------------------------
# how the base was made


def test_pretraining(tmp_path, capsys):
    flags = "--pictures 64 --vae-steps 3 --web-steps 2 --sft-steps 2 --out".split()
    made = pretrain.main([*flags, str(tmp_path / "a")])
    assert made["vae"]["steps"] == 3 and made["web"]["loss"] == pytest.approx(1, abs=0.2)
    for stage in ("vae", "web", "theta_0"):
        sd = weights.load(tmp_path / "a" / stage)
        assert sd.vae.downscale == 4 and made[stage]["seconds"] >= 0
    x = pretrain.to_tensor([toy.ideal(scene) for scene in toy.SCENES[:64]])
    mean, logvar = pretrain.encode(sd, x)
    assert mean.shape == logvar.shape == (64, 4, 8, 8) and 0.1 < sd.vae.scaling_factor < 20
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.safetensors")}
    assert pretrain.main([*flags, str(tmp_path / "a")])["theta_0"] == made["theta_0"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(InputError, match="begun with"):
        pretrain.main([*flags, str(tmp_path / "a"), "--vae-steps", "4"])
    again = pretrain.main([*flags, str(tmp_path / "b")])
    assert again["theta_0"]["loss"] == made["theta_0"]["loss"], "the same seed, the same weights"
