"""evaluate.py on the miniature world, and on a tiny Stable Diffusion with tiny scorers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
import sample
import train
from spin import toy
from spin.eval import comparison, sweep, world
from spin.eval.comparison import SEED, STRIDE, ModelSource
from spin.eval.scorers import ToyScorer, load_scorer
from spin.infra.errors import InputError
from spin.infra.files import hash_files
from spin.infra.prompts import read_prompts

FEW = ["--num-prompts", "10", "--num-images", "2", "--batch-size", "20", "--device", "cpu"]
IMAGES = "images/{}/guidance-3-32px"


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "toy"
    flags = "--loss spin --steps 2 --iterations 1 --num-prompts 32 --sampler-steps 5 --guidance 3"
    more = "--score none --grid-prompts 0 --device cpu"
    train.main([*flags.split(), *more.split(), "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def evaluated(toy_run) -> tuple[Path, dict]:
    """Return the folder with images, scores and results, and the results."""
    return toy_run / "evaluation", evaluate.main([str(toy_run), *FEW])


@pytest.fixture
def copied(evaluated, tmp_path) -> Path:
    """Return a copy of the evaluation's folder, to be changed."""
    return shutil.copytree(evaluated[0], tmp_path / "evaluation")


@pytest.fixture
def sampled(monkeypatch) -> list[str]:
    """Return a list that will hold the prompts that are sampled from now on."""
    prompts_sampled = []
    sample_images = comparison.sample_images

    def counting(pipe, prompts, *args, **kwargs):
        prompts_sampled.extend(prompts)
        return sample_images(pipe, prompts, *args, **kwargs)

    monkeypatch.setattr(comparison, "sample_images", counting)
    return prompts_sampled


@pytest.fixture
def scored(monkeypatch) -> list[str]:
    """Return a list that will hold the prompts of the models' images scored from now on.

    Real images are scored each time, by a scorer of their own.
    """
    prompts_scored = []
    score = toy.score

    def counting(images, prompts):
        prompts_scored.extend(prompts)
        return score(images, prompts)

    def score_real(vae, prompts, images_per_prompt):
        metrics = (*toy.METRICS, *toy.SET_METRICS)
        return {metric: np.ones((len(prompts), images_per_prompt)) for metric in metrics}

    monkeypatch.setattr(toy, "score", counting)
    monkeypatch.setattr(world, "score_real", score_real)
    return prompts_scored


def times_of_images(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (folder / "images").rglob("*.png")}


def levels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=int)


def caption(prompt: int) -> str:
    return toy.split()["test"][prompt].caption



# ---- The miniature world -------------------------------------------------------------------------


def test_the_results_of_a_run(evaluated):
    out, results = evaluated
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert list(results["models"]) == ["base", "spin-1"] and results["metric"] == "reward"
    for model, metrics in results["models"].items():
        assert list(metrics) == [*toy.METRICS, *toy.SET_METRICS]
        for summary in metrics.values():
            assert summary["low"] <= summary["mean"] <= summary["high"]
            assert summary["n"] == 10 and "median" in summary
        single = results["tables"][evaluate.SINGLE_TITLE][model]["reward"]["mean"]
        assert single < metrics["reward"]["mean"], "the best of two is better than one"

    base = results["models"]["base"]["reward"]["mean"]
    spin_1 = results["models"]["spin-1"]["reward"]["mean"]
    difference = results["differences"]["spin-1 - base"]["reward"]["mean"]
    assert difference == pytest.approx(spin_1 - base, abs=1e-9)


def test_the_results_say_what_they_depend_on(evaluated):
    config = evaluated[1]["config"]
    assert config["guidance"] == [3] and config["steps"] == 5 and config["sampler"] == "ddim"
    assert config["count"] == 10 and config["seed"] == SEED
    assert set(config["hashes"]) == {"base", "spin-1"} and config["scorer_hashes"]["toy"]
    assert len(config["prompts_hash"]) == 16
    assert config["commit"] and config["versions"]["torch"]


def test_the_files_of_the_results(evaluated):
    out = evaluated[0]
    text = (out / "results.md").read_text()
    title = "# 10 prompts, the best of 2 images each (energy and spread: all 2), guidance 3\n"
    assert text.startswith(title)
    assert "| spin-1 - base |" in text and "Medians." in text
    assert Image.open(out / "results.png").width == 920
    assert Image.open(out / "grid.png").size == (190 + 2 * 198, 25 + 6 * 198)


def test_every_image_states_how_it_was_made(evaluated):
    out, results = evaluated
    seeds = {}
    for model in ("base", "spin-1"):
        paths = sorted((out / IMAGES.format(model)).iterdir())
        assert len(paths) == 20
        seeds[model] = []
        for path in paths:
            prompt, line = Image.open(path).text["parameters"].splitlines()
            assert prompt == caption(int(path.name[:5]))
            settings = dict(pair.split(": ") for pair in line.split(", "))
            seeds[model].append(int(settings.pop("Seed")))
            assert settings == {
                "Steps": "5",
                "Sampler": "ddim",
                "CFG scale": "3.0",
                "Eta": "0.0",
                "Precision": "float32",
                "Model": model,
                "Model hash": results["config"]["hashes"][model],
                "Size": "32x32",
            }
    assert seeds["base"] == seeds["spin-1"], "every model starts from the same noise"
    assert len(set(seeds["base"])) == 20


def test_sample_makes_such_an_image_again(evaluated, toy_run, tmp_path):
    [again] = sample.main(
        ["--model", str(toy_run / "iter1/checkpoint"), "--prompt", caption(3)]
        + ["--seed", str(SEED + 3 * STRIDE + 1), "--steps", "5", "--guidance", "3"]
        + ["--device", "cpu", "--out", str(tmp_path)]
    )
    original = evaluated[0] / IMAGES.format("spin-1") / "00003-1.png"
    assert np.abs(levels(again) - levels(original)).max() <= 1


def test_real_images_stand_beside_the_models(evaluated):
    """In the table of each prompt's best image, and in that of all images."""
    folder, results = evaluated
    assert results["real"]["aligned"]["mean"] == 1
    assert results["real"].keys() == results["models"]["base"].keys()
    single = results["tables"][evaluate.SINGLE_TITLE]
    assert list(single) == ["base", "spin-1", "real"]
    assert single["real"]["reward"]["mean"] < results["real"]["reward"]["mean"], "best of two"
    lines = (folder / "results.md").read_text().splitlines()
    assert sum(line.startswith("| real ") for line in lines) == 3  # the third are the medians


def test_the_sweep_takes_each_model_at_its_best(evaluated, toy_run, copied):
    results = evaluate.main([str(toy_run), *FEW, "--guidance", "3", "1", "--out", str(copied)])
    table = results["tables"][sweep.SAME_PROMPTS.format("reward")]
    real = table.pop("real")
    assert real["best at"] == "any" and real["3"] == real["1"]
    assert real["3"]["mean"] == results["real"]["reward"]["mean"]
    for model, row in table.items():
        assert list(row) == ["best at", "3", "1"]
        best = "1" if row["1"]["mean"] > row["3"]["mean"] else "3"
        assert row["best at"] == best == f"{results['config']['best_guidance'][model]:g}"
        assert results["models"][model]["reward"]["mean"] == row[best]["mean"]
        assert row["3"]["mean"] == evaluated[1]["models"][model]["reward"]["mean"]
    assert "The reward by guidance." in (copied / "results.md").read_text()


def test_the_best_guidance_is_chosen_on_other_prompts(evaluated, toy_run, copied, sampled):
    """And reported on these, at that guidance alone."""
    command = [str(toy_run), *FEW, "--guidance", "3", "1", "--validation", "--out", str(copied)]
    results = evaluate.main(command)
    table = results["tables"][sweep.VALIDATION.format("reward")]
    real = table.pop("real")
    assert real["3"]["mean"] != results["real"]["reward"]["mean"], "of other prompts"
    validation_prompts = [scene.caption for scene in toy.split()["validation"][:10]]
    assert set(sampled[: 4 * 20]) == set(validation_prompts)  # 2 models, 2 values of guidance
    for model, row in table.items():
        best = "1" if row["1"]["mean"] > row["3"]["mean"] else "3"
        assert row["best at"] == best == f"{results['config']['best_guidance'][model]:g}"
        assert results["models"][model]["reward"]["n"] == 10
        if best == "3":
            assert results["models"][model] == evaluated[1]["models"][model]
    assert "on which the best is chosen" in (copied / "results.md").read_text()
    on_test = sampled[4 * 20 :]
    at_best = [model for model, row in table.items() if row["best at"] == "1"]
    assert len(on_test) == 20 * len(at_best)  # those at guidance 3 were there


def test_the_choice_is_that_of_the_validation_prompts_even_if_it_is_wrong(
    toy_run, copied, monkeypatch
):
    """A model that looks best at 1 on the validation prompts is reported at 1."""
    score = toy.score
    validation_prompts = {scene.caption for scene in toy.split()["validation"]}

    def misleading_score(images, prompts):
        scores = score(images, prompts)
        if set(prompts) <= validation_prompts:
            scores["reward"] = 10 - scores["reward"]
        return scores

    monkeypatch.setattr(toy, "score", misleading_score)
    command = [str(toy_run), *FEW, "--guidance", "3", "1", "--out", str(copied)]
    right = evaluate.main(command)["config"]["best_guidance"]
    wrong = evaluate.main([*command, "--validation"])["config"]["best_guidance"]
    assert right.keys() == wrong.keys()
    for model in right:
        assert {right[model], wrong[model]} == {1.0, 3.0}


# ---- What is reused, and what is not -------------------------------------------------------------


def test_nothing_is_done_twice(evaluated, toy_run, copied, sampled, scored):
    command = [str(toy_run), *FEW, "--out", str(copied)]
    before = times_of_images(copied)
    assert evaluate.main(command)["models"] == evaluated[1]["models"]
    assert times_of_images(copied) == before and not sampled and not scored


def test_a_missing_image_is_sampled_again_and_has_its_score(
    evaluated, toy_run, copied, sampled, scored
):
    path = copied / IMAGES.format("base") / "00004-1.png"
    before = levels(path)
    path.unlink()
    results = evaluate.main([str(toy_run), *FEW, "--out", str(copied)])
    assert sampled == [caption(4)] and len(scored) <= 1
    assert np.abs(levels(path) - before).max() <= 1  # sampled alone, it may be rounded differently
    for model, metrics in evaluated[1]["models"].items():
        for metric, summary in metrics.items():
            assert results["models"][model][metric] == pytest.approx(summary, abs=0.02)


def test_more_images_are_added(toy_run, copied, sampled, scored):
    results = evaluate.main([str(toy_run), *FEW, "--num-images", "3", "--out", str(copied)])
    assert len(sampled) == len(scored) == 20
    assert results["models"]["base"]["reward"]["n"] == 10


@pytest.mark.parametrize("flag, stated", [("--steps=4", "Steps: 4, "), ("--eta=0.5", "Eta: 0.5, ")])
def test_other_settings_are_sampled_anew(flag, stated, toy_run, copied, sampled):
    evaluate.main([str(toy_run), *FEW, flag, "--out", str(copied)])
    assert len(sampled) == 40
    path = copied / IMAGES.format("base") / "00004-1.png"
    assert stated in Image.open(path).text["parameters"]


def test_images_are_of_a_models_weights_not_of_its_name(evaluated, toy_run, copied, sampled):
    folder = copied.parent / "model"
    shutil.copytree(toy_run / "iter1/checkpoint", folder)
    command = ["--models", f"base={toy.BASE}", f"spin-1={folder}", "--metrics", "toy", *FEW]
    command += ["--steps", "5", "--guidance", "3", "--resolution", "32", "--out", str(copied)]
    results = evaluate.main(command)
    assert results["models"]["base"] == evaluated[1]["models"]["base"]
    assert len(sampled) == 20, "the base's are reused; this model has one checkpoint, not two"

    sampled.clear()
    unet = "unet/diffusion_pytorch_model.safetensors"
    shutil.copy(toy.BASE / unet, folder / unet)
    results = evaluate.main(command)
    assert len(sampled) == 20
    assert results["models"]["spin-1"] == results["models"]["base"]


def test_a_unet_alone_borrows_the_rest(evaluated, toy_run, copied, sampled):
    unet = toy_run / "iter1/checkpoint/unet"
    command = ["--models", f"base={toy.BASE}", f"x={unet}", "--metrics", "toy", *FEW]
    command += ["--steps", "5", "--guidance", "3", "--resolution", "32", "--out", str(copied)]
    results = evaluate.main(command)
    assert len(sampled) == 20
    expected = evaluated[1]["models"]["spin-1"]["reward"]
    assert results["models"]["x"]["reward"] == pytest.approx(expected, abs=1e-6)

    sampled.clear()
    command[2] = f"x={toy.BASE}"
    results = evaluate.main(command)
    assert len(sampled) == 20, "a hash that begins as another does is another"
    assert results["models"]["x"] == results["models"]["base"]


def test_damaged_files_are_made_again(evaluated, toy_run, copied, sampled):
    (copied / IMAGES.format("base") / "00004-1.png").write_bytes(b"no image")
    path = copied / "scores/base/guidance-3-32px-toy.json"
    scores = json.loads(path.read_text())
    for key in list(scores)[:3]:
        scores[key] = {"aligned": 1.0}  # as an earlier version may have stored
    path.write_text(json.dumps(scores))
    results = evaluate.main([str(toy_run), *FEW, "--out", str(copied)])
    assert len(sampled) == 1
    for metric, summary in evaluated[1]["models"]["base"].items():
        assert results["models"]["base"][metric] == pytest.approx(summary, abs=0.02)
    kept = set(json.loads(path.read_text()))
    assert len(kept - set(scores)) <= 1  # the image's, if it was rounded differently
    assert kept >= set(list(scores)[:3])


def test_a_truncated_image_is_refused_by_name(toy_run, copied):
    path = copied / IMAGES.format("base") / "00000-0.png"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"guidance-3-32px/00000-0\.png: not a readable image"):
        evaluate.main([str(toy_run), *FEW, "--out", str(copied)])


class ConstantScorer(ToyScorer):
    """Scores every image the same."""

    def __init__(self, value: float):
        self.value = value
        self.hash = f"constant {value}"

    def score(self, images, prompts):
        return {metric: np.full(len(prompts), self.value) for metric in self.metrics}


def test_another_scorer_scores_anew(toy_run, copied, monkeypatch):
    monkeypatch.setattr(sweep, "load_scorer", lambda *args: ConstantScorer(1.0))
    results = evaluate.main([str(toy_run), *FEW, "--out", str(copied)])
    assert results["models"]["base"]["reward"]["mean"] == 1

    monkeypatch.setattr(sweep, "load_scorer", lambda *args: ConstantScorer(np.nan))
    with pytest.raises(InputError, match="toy: a score is not finite"):
        evaluate.main([str(toy_run), *FEW, "--out", str(copied)])


def test_an_interrupted_evaluation_ends_as_if_it_had_not_been(
    evaluated, toy_run, monkeypatch, tmp_path
):
    save_png = comparison.save_png
    saved = []

    def interrupted(image, path, *args):
        if len(saved) == 7:
            raise KeyboardInterrupt
        saved.append(path)
        save_png(image, path, *args)

    monkeypatch.setattr(comparison, "save_png", interrupted)
    command = [str(toy_run), *FEW, "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(command)
    assert len(times_of_images(tmp_path)) == 7

    monkeypatch.undo()
    results = evaluate.main(command)
    for model, metrics in evaluated[1]["models"].items():
        for metric, summary in metrics.items():
            found = results["models"][model][metric]
            assert found == pytest.approx(summary, abs=0.02), "batches of other sizes round"


# ---- Paths ---------------------------------------------------------------------------------------


def test_a_run_is_read_from_another_folder(evaluated, toy_run, tmp_path, monkeypatch, sampled):
    """And a ~ is the home folder, also where the shell does not expand it."""
    monkeypatch.setenv("HOME", str(toy_run.parent))
    monkeypatch.chdir(tmp_path)
    results = evaluate.main(["~/toy", *FEW, "--out=~/toy/evaluation"])
    assert results["models"] == evaluated[1]["models"] and not sampled
    assert not list(tmp_path.iterdir())


def test_a_run_of_an_earlier_version_finds_the_base_that_has_moved(
    evaluated, toy_run, tmp_path, sampled
):
    shutil.copytree(toy_run, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["model"] = "/somewhere/spin/toy_base"
    config["link"] = "logistic"  # a flag that it had
    path.write_text(json.dumps(config))
    results = evaluate.main([str(tmp_path / "run"), *FEW])
    assert results["models"] == evaluated[1]["models"] and not sampled


def test_only_the_base_of_the_miniature_world_may_have_moved():
    config = {"model": "/somewhere/model", "world": False}
    assert evaluate.base_of_run(config) == ModelSource("/somewhere/model")


def test_another_model_that_has_moved_is_not_replaced_by_the_base():
    config = {"model": "/somewhere/model", "world": True, "model_hash": "0123456789abcdef"}
    with pytest.raises(InputError, match="/somewhere/model: the run's model no longer exists"):
        evaluate.base_of_run(config)


def test_a_run_whose_base_has_changed_is_refused(toy_run, tmp_path):
    """All models of the run have its VAE and its text encoder."""
    run = shutil.copytree(toy_run, tmp_path / "run")
    base = shutil.copytree(toy.BASE, tmp_path / "base")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"model": str(base)}))
    evaluate.main([str(run), "--device", "cpu", "--num-prompts", "1", "--num-images", "1"])
    with open(base / "vae/config.json", "a") as file:
        file.write("\n")
    with pytest.raises(InputError, match="base, which it was started with, have changed"):
        evaluate.main([str(run), "--device", "cpu"])


def test_a_unet_with_a_text_encoder_of_its_own_is_refused(tmp_path):
    for part in ("unet", "text_encoder"):
        shutil.copytree(toy.BASE / part, tmp_path / part)
    with pytest.raises(InputError, match="has a text encoder of its own, but no VAE"):
        evaluate.name_models([str(toy.BASE), f"tuned={tmp_path}"])


def test_names_of_models(monkeypatch):
    base = str(toy.BASE)
    assert evaluate.name_models([base]) == {"base": ModelSource(base)}
    models = evaluate.name_models([f"a={base}", f"b={base}/unet"])
    assert models["b"] == ModelSource(base, unet=f"{base}/unet")
    assert list(evaluate.name_models([f"{base}/../base", f"..={base}"])) == ["base", "model"]
    with pytest.raises(InputError, match="two models are named base; rename one of them: base-2="):
        evaluate.name_models([base, base])
    monkeypatch.setenv("HOME", str(toy.BASE.parent))
    assert evaluate.name_models(["a=~/base"]) == {"a": ModelSource(base)}


# ---- The paper's metrics, in miniature -----------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [
        {"prompt": "a red circle"},
        {"text": "a cat on the moon"},
        {"caption": "oil painting of a horse"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


METRICS = ["pickscore", "hps", "aesthetic", "clip", "imagereward"]


def test_the_papers_metrics(
    tiny_folder, tiny2_folder, prompts, scorers, small_scorers, tmp_path, capsys
):
    (tmp_path / "iter3").mkdir()
    unet = tmp_path / "iter3" / "unet"
    shutil.copytree(tiny_folder / "unet", unet)  # alone, as the authors published theirs
    results = evaluate.main(
        ["--models", f"first={tiny_folder}", str(tiny2_folder), str(unet), "--paper"]
        + ["--prompts", str(prompts), "--metrics", *METRICS, "--scorers", str(scorers)]
        + ["--num-images", "3", "--steps", "2", "--guidance", "2", "--resolution", "64"]
        + ["--device", "cpu", "--out", str(tmp_path / "out")]
    )
    models = results["models"]
    assert list(models) == ["first", "model", "iter3"] and results["metric"] == "average"
    assert list(models["first"]) == ["average", *METRICS]
    assert models["first"] == models["iter3"], "the same weights sample the same images"
    assert results["differences"]["iter3 - first"]["average"]["win_rate"]["mean"] == 0.5
    for metrics in models.values():
        mean = np.mean([metrics[metric]["mean"] for metric in METRICS])
        assert metrics["average"]["mean"] == pytest.approx(mean, abs=1e-4)

    config = results["config"]
    assert set(config["scorer_hashes"]) == set(METRICS) and config["scorers"] == str(scorers)
    assert config["prompts_hash"] == hash_files([prompts], read_prompts(prompts))
    printed = capsys.readouterr().out
    assert "Published, not measured here" in printed
    [published] = [line for line in printed.splitlines() if line.startswith("| SPIN-3 ")]
    assert published.split() == "| SPIN-3 | 22.00 | 6.25 | 91.6% | 70.2% |".split()
    assert printed.index(evaluate.MEDIAN_TITLE) < printed.index(evaluate.OTHERS_TITLE)
    check_by_hand(results, tmp_path / "out/images/model", scorers)


def check_by_hand(results: dict, folder: Path, scorers: Path) -> None:
    """Score a model's images again, and pick the best of each prompt's three."""
    paths = sorted(folder.rglob("*.png"))
    stated = [Image.open(path).text["parameters"].splitlines()[0] for path in paths]
    assert stated[::3] == ["a red circle", "a cat on the moon", "oil painting of a horse"]
    assert stated[0] == stated[1] == stated[2]

    images = [Image.open(path) for path in paths]
    scores = {}
    for metric in METRICS:
        scorer = load_scorer(metric, scorers)
        scores[metric] = scorer.score(images, stated)[metric].reshape(3, 3)
    best = np.mean(list(scores.values()), axis=0).argmax(axis=1)
    for metric in METRICS:
        values = scores[metric][range(3), best]
        found = results["models"]["model"][metric]
        assert found["mean"] == pytest.approx(values.mean(), abs=1e-4)
        assert found["median"] == pytest.approx(np.median(values), abs=1e-4)
        single = results["tables"][evaluate.SINGLE_TITLE]["model"][metric]["mean"]
        assert single == pytest.approx(scores[metric].mean(), abs=1e-4)
        of_medians = results["tables"][evaluate.MEDIAN_TITLE]["model"][metric]["mean"]
        middle = np.argsort(scores["pickscore"], axis=1)[:, 1]
        assert of_medians == pytest.approx(scores[metric][range(3), middle].mean(), abs=1e-4)


def test_a_prompt_of_another_world_is_refused(toy_run, prompts, tmp_path):
    reason = "toy needs 32 x 32 pixels and captions of its world: 'a red circle'"
    with pytest.raises(InputError, match=reason):
        evaluate.main([str(toy_run), *FEW, "--prompts", str(prompts), "--out", str(tmp_path)])
