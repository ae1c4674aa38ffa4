"""evaluate.py on the miniature world and on a tiny Stable Diffusion with every scorer in miniature."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
import sample
import train
from spin import data, sampler
from spin.eval import comparison as judge
from spin.eval import scorers as rewards
from spin.infra import run
from spin.toy import world as toy
from spin.eval import plots as viz
from spin.infra.run import InputError

SINGLE = "One picture a prompt: the mean over all."
FEW = "--num-prompts 10 --num-images 2 --batch-size 20 --device cpu".split()


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "toy"
    flags = "--loss spin --steps 2 --iterations 1 --score none --grid-prompts 0 --device cpu --out".split()
    train.main([*flags, str(out)])
    return out


@pytest.fixture(scope="module")
def evaluated(toy_run) -> tuple[Path, dict]:
    return toy_run / "evaluation", evaluate.main([str(toy_run), *FEW])


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.png") if path.parent != folder}


@pytest.fixture
def counted(monkeypatch) -> list:
    """The jobs that are drawn from now on."""
    drawn, real = [], sampler.pictures

    def pictures(sd, jobs, *args, **settings):
        drawn.extend(jobs)
        return real(sd, jobs, *args, **settings)

    monkeypatch.setattr(sampler, "pictures", pictures)
    return drawn


# ---------------------------------------------------------------------------------------------------------------------
# the miniature world


def test_what_a_run_is_told_of(evaluated):
    out, found = evaluated
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(found))
    assert list(found["models"]) == ["base", "spin-1"] and found["metric"] == "reward"
    for of in found["models"].values():
        assert list(of) == list(toy.METRICS)
        assert all(s["low"] <= s["mean"] <= s["high"] and s["n"] == 10 and "median" in s for s in of.values())
    for name, of in found["tables"][SINGLE].items():
        assert of["reward"]["mean"] < found["models"][name]["reward"]["mean"], "the best of two is better than one"
    [(name, of)] = found["differences"].items()
    gap = found["models"]["spin-1"]["reward"]["mean"] - found["models"]["base"]["reward"]["mean"]
    assert name == "spin-1 - base" and of["reward"]["mean"] == pytest.approx(gap, abs=1e-9)
    config = found["config"]
    assert config["guidance"] == [3] and config["steps"] == 20 and config["sampler"] == "ddim" and config["count"] == 10
    assert (
        set(config["hashes"]) == {"base", "spin-1"}
        and config["scorer_hashes"]["toy"]
        and len(config["prompts_hash"]) == 16
    )
    assert config["commit"] and config["versions"]["torch"] and config["seed"] == judge.SEED
    text = (out / "results.md").read_text()
    assert text.startswith("# 10 prompts, the best of 2 pictures each, guidance 3\n")
    assert "| spin-1 - base |" in text and "- reward: resolved: " in text and "Medians." in text
    assert Image.open(out / "results.png").width == 920
    assert Image.open(out / "grid.png").size == (190 + 2 * 198, 25 + 6 * 198)


def test_every_picture_says_how_it_was_made_and_sample_draws_it_again(evaluated, toy_run, tmp_path):
    out, found = evaluated
    paths = {name: sorted((out / "images" / name).rglob("*.png")) for name in ("base", "spin-1")}
    assert all(len(of) == 20 for of in paths.values())
    seeds = []
    for name, of in paths.items():
        for path in of:
            prompt, line = Image.open(path).text["parameters"].splitlines()
            settings = dict(pair.split(": ") for pair in line.split(", "))
            assert prompt == toy.split()["test"][int(path.name[:5])].caption
            assert settings["Steps"] == "20" and settings["CFG scale"] == "3.0" and settings["Size"] == "32x32"
            assert settings["Eta"] == "0.0" and settings["Precision"] == "float32"
            assert settings["Model"] == name and settings["Model hash"] == found["config"]["hashes"][name]
            seeds.append(int(settings["Seed"]))
    assert len(set(seeds[:20])) == 20 and seeds[:20] == seeds[20:], "every model draws from the same noise"
    prompt = toy.split()["test"][3].caption
    model = str(toy_run / "iter1/checkpoint")
    flags = ["--seed", str(judge.SEED + 3 * judge.STRIDE + 1), "--steps", "20", "--guidance", "3", "--device", "cpu"]
    [again] = sample.main(["--model", model, "--prompt", prompt, *flags, "--out", str(tmp_path)])
    theirs, ours = (np.asarray(Image.open(p), int) for p in (again, out / "images/spin-1/guidance-3-32px/00003-1.png"))
    assert np.abs(theirs - ours).max() <= 1


def test_nothing_is_done_twice(evaluated, toy_run, counted, monkeypatch):
    out, found = evaluated
    before = stamps(out)
    scored, real = [], toy.score
    monkeypatch.setattr(toy, "score", lambda images, prompts: scored.extend(prompts) or real(images, prompts))
    assert evaluate.main([str(toy_run), *FEW])["models"] == found["models"]
    assert stamps(out) == before and not counted and not scored
    path = out / "images/base/guidance-3-32px/00004-1.png"
    pixels = np.asarray(Image.open(path))
    path.unlink()
    assert evaluate.main([str(toy_run), *FEW])["models"] == found["models"]
    assert len(counted) == 1 and not scored, "the same picture has the same score"
    assert np.abs(np.asarray(Image.open(path), int) - pixels).max() <= 1
    more = evaluate.main([str(toy_run), *FEW, "--num-images", "3"])
    assert len(counted) == len(scored) + 1 == 1 + 20 and more["models"]["base"]["reward"]["n"] == 10


def test_what_was_made_otherwise_is_made_again(evaluated, toy_run, counted, tmp_path):
    folder = tmp_path / "evaluation"
    shutil.copytree(evaluated[0], folder)
    evaluate.main([str(toy_run), *FEW, "--steps", "5", "--out", str(folder)])
    assert len(counted) == 40
    text = Image.open(folder / "images/base/guidance-3-32px/00004-1.png").text["parameters"]
    assert "Steps: 5, " in text
    counted.clear()
    shutil.copytree(toy_run / "iter1/checkpoint", tmp_path / "model")
    command = ["--models", f"base={toy.BASE}", f"spin-1={tmp_path / 'model'}", "--metrics", "toy", *FEW]
    command += ["--steps", "5", "--guidance", "3", "--resolution", "32", "--out", str(folder)]
    first = evaluate.main(command)
    assert len(counted) == 20, "the base's are there; the run's model had the base's other parts, and another hash"
    shutil.copy(toy.BASE / "unet/diffusion_pytorch_model.safetensors", tmp_path / "model/unet")
    second = evaluate.main(command)
    assert len(counted) == 40 and first["models"]["base"] == second["models"]["base"] == second["models"]["spin-1"]
    counted.clear()
    unet = ["--models", f"base={toy.BASE}", f"x={toy_run / 'iter1/checkpoint/unet'}", *command[3:], *FEW]
    with_unet = evaluate.main(unet)
    assert len(counted) == 20 and with_unet["models"]["x"] != first["models"]["base"]
    assert (
        evaluate.main(["--models", f"base={toy.BASE}", f"x={toy.BASE}", *unet[3:]])["models"]["x"]
        == first["models"]["base"]
    )
    assert len(counted) == 40, "a hash that begins as another does is another"
    evaluate.main([*command, "--eta", "0.5"])
    assert len(counted) == 80


def test_damaged_files_are_made_again(evaluated, toy_run, counted, tmp_path):
    folder = tmp_path / "evaluation"
    shutil.copytree(evaluated[0], folder)
    (folder / "images/base/guidance-3-32px/00004-1.png").write_bytes(b"no picture")
    [scores] = folder.glob("scores/base/*32px-toy.json")
    known = json.loads(scores.read_text())
    scores.write_text(json.dumps(known | {key: {"aligned": 1.0} for key in list(known)[:3]}))
    found = evaluate.main([str(toy_run), *FEW, "--out", str(folder)])
    assert len(counted) == 1 and found["models"]["spin-1"] == evaluated[1]["models"]["spin-1"]
    assert set(json.loads(scores.read_text())) >= set(known)
    path = folder / "images/base/guidance-3-32px/00000-0.png"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"guidance-3-32px/00000-0\.png: not a readable image"):
        evaluate.main([str(toy_run), *FEW, "--out", str(folder)])


def test_another_scorer_scores_anew(evaluated, toy_run, monkeypatch, tmp_path):
    folder = tmp_path / "evaluation"
    shutil.copytree(evaluated[0], folder)
    scorer = rewards.load("toy")
    other = replace(
        scorer, hash="another", score=lambda pictures, prompts: {m: np.ones(len(prompts)) for m in scorer.metrics}
    )
    monkeypatch.setattr(rewards, "load", lambda *args: other)
    found = evaluate.main([str(toy_run), *FEW, "--out", str(folder)])
    assert found["models"]["base"]["reward"]["mean"] == 1
    broken = replace(
        other, hash="broken", score=lambda pictures, prompts: {m: np.full(len(prompts), np.nan) for m in scorer.metrics}
    )
    monkeypatch.setattr(rewards, "load", lambda *args: broken)
    with pytest.raises(InputError, match="toy: a score is not finite"):
        evaluate.main([str(toy_run), *FEW, "--out", str(folder)])


def test_an_interrupted_evaluation_ends_as_if_it_had_not_been(evaluated, toy_run, monkeypatch, tmp_path):
    real, left = viz.save_png, [7]

    def interrupted(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(*args)

    monkeypatch.setattr(viz, "save_png", interrupted)
    command = [str(toy_run), *FEW, "--out", str(tmp_path / "out")]
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(command)
    assert len(stamps(tmp_path / "out")) == 7
    monkeypatch.undo()
    found = evaluate.main(command)
    for name, of in evaluated[1]["models"].items():
        for metric, summary in of.items():
            assert found["models"][name][metric] == pytest.approx(summary, abs=0.02), "batches of other sizes round"


def test_the_sweep_takes_each_model_at_its_best(evaluated, toy_run):
    found = evaluate.main([str(toy_run), *FEW, "--guidance", "3", "1"])
    sweep = found["tables"][evaluate.SWEEP.format("reward")]
    for name, of in sweep.items():
        assert list(of) == ["best at", "3", "1"]
        best = max(("1", "3"), key=lambda g: of[g]["mean"])
        assert f"{found['config']['best_guidance'][name]:g}" == best == of["best at"]
        assert found["models"][name]["reward"]["mean"] == of[best]["mean"]
        assert of["3"]["mean"] == evaluated[1]["models"][name]["reward"]["mean"]
    assert "The reward over guidance." in (evaluated[0] / "results.md").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# the paper's metrics, in miniature


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": "a red circle"}, {"text": "a cat on the moon"}, {"caption": "oil painting of a horse"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_papers_metrics(tiny_folder, tiny2_folder, prompts, scorers, small_scorers, tmp_path, capsys):
    (tmp_path / "iter3").mkdir()
    shutil.copytree(tiny_folder / "unet", tmp_path / "iter3/unet")  # a UNet alone, as the authors published theirs
    metrics = ["pickscore", "hps", "aesthetic", "clip", "imagereward"]
    command = ["--models", f"first={tiny_folder}", str(tiny2_folder), str(tmp_path / "iter3/unet"), "--paper"]
    command += ["--prompts", str(prompts), "--metrics", *metrics, "--scorers", str(scorers), "--num-images", "3"]
    command += [
        "--steps",
        "2",
        "--guidance",
        "2",
        "--resolution",
        "64",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "out"),
    ]
    found = evaluate.main(command)
    assert list(found["models"]) == ["first", "model", "iter3"] and found["metric"] == "average"
    assert list(found["models"]["first"]) == ["average", *metrics]
    assert found["models"]["first"] == found["models"]["iter3"], "the same weights draw the same pictures"
    assert found["differences"]["iter3 - first"]["average"]["win_rate"]["mean"] == 0.5
    for of in found["models"].values():
        assert of["average"]["mean"] == pytest.approx(np.mean([of[m]["mean"] for m in metrics]), abs=1e-4)
    assert set(found["config"]["scorer_hashes"]) == set(metrics)
    assert found["config"]["scorers"] == str(scorers)
    assert found["config"]["prompts_hash"] == run.hash_files([prompts], data.read_prompts(prompts))

    # one model's scores, by hand
    images = sorted((tmp_path / "out/images/model").rglob("*.png"))
    asked = [Image.open(path).text["parameters"].splitlines()[0] for path in images]
    assert asked[::3] == ["a red circle", "a cat on the moon", "oil painting of a horse"] and asked[0] == asked[2]
    pictures = [Image.open(path) for path in images]
    by_hand = {m: rewards.load(m, scorers).score(pictures, asked)[m].reshape(3, 3) for m in metrics}
    picked = np.mean(list(by_hand.values()), axis=0).argmax(1)
    for m in metrics:
        values = by_hand[m][np.arange(3), picked]
        assert found["models"]["model"][m]["mean"] == pytest.approx(values.mean(), abs=1e-4)
        assert found["models"]["model"][m]["median"] == pytest.approx(np.median(values), abs=1e-4)
        assert found["tables"][SINGLE]["model"][m]["mean"] == pytest.approx(by_hand[m].mean(), abs=1e-4)
    printed = capsys.readouterr().out
    assert "Published, not measured here" in printed and "| SPIN-3 | 22.00 | 6.25 | 91.6 % | 70.2 % |" in printed


def test_names_of_models():
    assert evaluate.named([str(toy.BASE)]) == {"toy_base": (str(toy.BASE), None)}
    assert evaluate.named([f"a={toy.BASE}", f"b={toy.BASE / 'unet'}"])["b"] == (str(toy.BASE), f"{toy.BASE / 'unet'}")
    assert list(evaluate.named([f"{toy.BASE}/../toy_base", f"..={toy.BASE}"])) == ["toy_base", "model"]
    with pytest.raises(InputError, match="two are called toy_base; give one another name: toy_base-2="):
        evaluate.named([str(toy.BASE), str(toy.BASE)])


def test_a_prompt_of_another_world(toy_run, prompts, tmp_path):
    with pytest.raises(InputError, match="toy scores 32 x 32 pixels by captions of its world: 'a red circle'"):
        evaluate.main([str(toy_run), *FEW, "--prompts", str(prompts), "--out", str(tmp_path)])
