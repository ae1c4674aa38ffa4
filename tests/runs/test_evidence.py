"""The experiments behind tutorial/evidence: statistics, bookkeeping, and that what is told is what they found."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spin.infra import run
from spin.toy import world as toy
from spin.checkpoint import pipeline as weights
from tutorial import experiments, findings, intervals, tables
from tutorial import pretrain_toy as pretrain
from tutorial.experiments import HELD_OUT, Look

EVIDENCE = Path(experiments.ROOT, "tutorial/evidence")


def test_pooled_by_hand():
    values = np.array([[[1.0, 2.0], [3.0, 2.0]], [[5.0, 4.0], [5.0, 6.0]]])  # 2 bases, 2 seeds, 2 prompts
    # means of bases 2 and 5, of seeds 3 and 4, of prompts 3.5 and 3.5: variances 4.5, 0.5 and 0, halved 2.25 + 0.25
    found = intervals.pooled(values)
    assert found["mean"] == 3.5 and found["by_base"] == [2.0, 5.0]
    freedom = 2.5**2 / (2.25**2 + 0.25**2)  # 1.2195
    assert found["high"] - 3.5 == pytest.approx(intervals.student(freedom, 0.95) * 2.5**0.5, rel=1e-3)
    assert found["high"] - 3.5 == pytest.approx(3.5 - found["low"])
    # of these bases: 0.25, one degree of freedom
    assert found["here"][1] - 3.5 == pytest.approx(12.706 * 0.5, rel=1e-3)
    assert intervals.pooled(values[:1])["by_base"] == [2.0]


@pytest.mark.parametrize(
    "freedom, level, t", [(1, 0.95, 12.706), (2, 0.95, 4.303), (3.7, 0.95, 2.868), (10, 0.9, 1.812), (1e6, 0.95, 1.960)]
)
def test_quantiles_of_students_t(freedom, level, t):
    assert intervals.student(freedom, level) == pytest.approx(t, rel=2e-3)


@pytest.mark.parametrize("of_base, of_seed, of_both", [(0.05, 0.03, 0.03), (0.005, 0.015, 0.005), (0.05, 0.0, 0.03)])
def test_the_interval_covers_where_bases_seeds_and_prompts_all_vary(of_base, of_seed, of_both):
    rng, within, here, count = np.random.default_rng(0), 0, 0, 1000
    for _ in range(count):
        base, seed, prompt = rng.normal(0, of_base, (3, 1, 1)), rng.normal(0, of_seed, (3, 1)), rng.normal(0, 0.2, 200)
        values = 1.0 + base + seed + prompt + rng.normal(0, of_both, (3, 3, 1)) + rng.normal(0, 0.2, (3, 3, 200))
        found = intervals.pooled(values)
        within += found["low"] <= 1.0 <= found["high"]
        here += found["here"][0] <= 1.0 + base.mean() <= found["here"][1]
    assert 0.93 <= within / count <= 0.995 and 0.93 <= here / count <= 0.995  # a little wide rather than narrow


def all_jobs(folder: Path):
    return [job for part in findings.MAKERS for job in [*experiments.trials_of(part), *experiments.jobs(folder, part)]]


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A folder of runs in which SPIN gains 0.2 and then 0.1 an iteration, at any guidance, and nothing else does."""
    gains = {"spin-1": 0.2, "spin-2": 0.3, "spin-3": 0.4}
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("runs")
    prompts = {split: rng.normal(6.0, 1.0, len(scenes)) for split, scenes in toy.split().items()}

    def pictures(split: str, count: int, gain: float) -> dict:
        reward = prompts[split][:, None] + gain + rng.normal(0, 0.05, (len(prompts[split]), count))
        return {m: np.round(reward, 4).tolist() for m in ("reward", "aligned", "clean", "palette")} | {"guidance": 2.0}

    def make(job) -> None:
        models = {}
        for model, looks in job.looks.items():
            gain = gains.get(model, 0.0) if job.name in ("claims", "spin") else 0.0  # of self-play as it is tuned
            if job.start == "to_1":  # a better last step, of which less is left to gain for who was trained without it
                gain += 0.06 if job.name == "claims" else 0.1
            looks = sorted(looks, key=lambda look: look.pictures)  # of two with one name, that of more pictures
            models[model] = {look.name: pictures(look.split, look.pictures, gain) for look in looks}
            models[model] |= {HELD_OUT: rng.normal(1.0, 0.01, 200).tolist()}
        found = {"commit": "0123456789abcdef", "flags": job.flags, "models": models, "seconds": 60.0}
        found |= {"gradient": {"theta_0, shared": {"variance": 2.0, "signal": 1.0, "batches": 3}}}
        run.write_json(folder / job.place / "scores.json", found)
        with open(folder / job.place / "log.jsonl", "w") as log:
            for model in ("sft", "dpo", "spin-1", "spin-2", "spin-3"):
                for step in range(1, 101):
                    line = {"model": model, "step": step, "loss": 0.5, "implicit_accuracy": 0.75, "seconds": 0.1}
                    line |= {"delta_data": 0.001 if job.name == "failure" else -0.001, "delta_gen": 0.0015}
                    log.write(json.dumps(line) + "\n")

    for kind in experiments.TRIALS:
        for job in experiments.trials(kind):
            make(job)
    for part in findings.MAKERS:
        for job in experiments.jobs(folder, part):
            make(job)
    for base in experiments.BASES:
        facts = {"seconds": 60, "commit": "0123456789abcdef", "aligned": 1.0, "reward": 6.0, "clean": 5.0}
        run.write_json(folder / f"base-{base}" / "pretrain.json", dict.fromkeys(("web", "theta_0"), facts))
    return folder


def test_findings_of_runs_of_which_the_answer_is_known(made_up, tmp_path):
    out = tmp_path / "out" / "evidence"
    found = findings.main(["--runs", str(made_up), "--out", str(out)])
    assert found == json.loads((out / "evidence.json").read_text())
    said = {line["claim"]: line["single"] for line in found["claims"]["claims"]}
    assert said["SPIN-1 beats SFT"]["mean"] == pytest.approx(0.2, abs=0.01)
    assert said["SPIN-2 beats Diffusion-DPO"]["verdict"] == said["SPIN-3 beats SPIN-2"]["verdict"] == "holds"
    assert said["SFT plateaus: 300 steps stay within 0.05 of theta_0"]["verdict"] == "holds"
    assert found["web"]["gains"]["SPIN-3"]["reward"]["mean"] == pytest.approx(0.4, abs=0.01)
    assert found["claims"]["gains"]["SPIN-2"]["best_of_five"]["mean"] == pytest.approx(0.3, abs=0.01)
    assert set(found["failure"]["failure"]["alarms"]["10"]) == {10}
    assert found["lengths"]["rows"]["3 x 100 steps"]["reward_less_reference"]["mean"] == 0
    assert set(found["failure"]["claims"]["alarms"]["10"]) == {None}
    ending = {name: of["at_3"]["reward"]["mean"] for name, of in found["ending"].items() if "at_3" in of}
    expected = {"alone": 0.1, "change": -0.04, "change_traceless": 0.0, "made_up": -0.04, "less_usual": 0.0}
    assert ending == pytest.approx(expected | {"less_usual_to_1": 0.04}, abs=0.01)
    assert {path.name for path in (out.parent / "figures").iterdir()} == {
        f"evidence_{part}.png" for part in ("claims", "steps", "web", "learned", "ending", "map", "failure")
    }
    told = (out / "tables.md").read_text()
    assert all(f"## {title}" in told for title, _ in tables.PARTS.values())
    assert tables.gap(said["SPIN-1 beats SFT"]) in told


def test_seeds_that_are_not_whole_are_left_out(made_up, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(made_up, runs)
    (runs / "theta_0-1/seed-2/continued/scores.json").unlink()
    found = findings.collect(runs)
    assert found["claims"]["about"]["seeds"] == found["choices"]["about"]["seeds"] == [0, 1]
    assert found["web"]["about"]["seeds"] == [0, 1, 2]


def test_a_part_without_runs_stays_as_it_was(made_up, tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "out" / "evidence"
    shutil.copytree(made_up, runs)
    before = findings.main(["--runs", str(runs), "--out", str(out)])
    for seed in experiments.SEEDS:
        (runs / f"theta_0-1/seed-{seed}/hinge/scores.json").unlink()
    assert "choices" not in findings.collect(runs)
    assert findings.main(["--runs", str(runs), "--out", str(out)]) == before


def test_no_two_jobs_share_a_folder(made_up):
    places = [job.place for job in all_jobs(made_up)]
    assert len(places) == len(set(places)) > 200


def test_a_job_from_end_to_end(tmp_path):
    """Trains two steps twice, the second time with the first opponent's images of the first run."""
    look = Look("validation", 1.0, 1, 2)
    flags = "--loss spin --iterations 1 --steps 2 --num-prompts 8 --sampler-steps 2"
    first = experiments.Job("claims", "claims", 0, 0, flags, {"spin-1": (look,)})
    other = experiments.Job("choices", "hinge", 0, 0, flags + " --link hinge", {"spin-1": (look,)}, again=True)
    for job in (first, other):
        experiments.do(job, tmp_path)
        (scores,) = run.read_json(tmp_path / job.place / "scores.json")["models"].values()
        assert np.shape(scores[look.name]["reward"]) == (100, 1) and len(scores[HELD_OUT]) == 200
        assert job.done(tmp_path)
    assert "generating" not in (tmp_path / other.place / "output.txt").read_text()
    assert "generating" in (tmp_path / first.place / "output.txt").read_text()
    assert not replace(first, flags=flags + " --beta 5").done(tmp_path)  # another run than the one that is there
    noise = experiments.gradient_noise(tmp_path, replace(first, name="gradient", flags="--num-prompts 8"), batches=3)
    assert set(noise) == {f"{at}, {kind}" for at in ("theta_0", "spin-1") for kind in ("shared", "independent")}
    assert noise["theta_0, independent"]["variance"] > noise["theta_0, shared"]["variance"] > 0
    ending = replace(first, flags="", start="to_1", models="theta_0/claims")  # the same model, another last step
    changed = replace(first, flags=flags + " --beta 5")  # begun anew in the same folder
    found = []
    for job in (first, ending, changed):
        experiments.do(job, tmp_path)
        assert job.done(tmp_path)
        found.append(run.read_json(tmp_path / job.place / "scores.json")["models"]["spin-1"][look.name]["reward"])
    assert found[0] != found[1] and found[0] != found[2]
    config = run.read_json(tmp_path / "base-0" / "to_1" / "scheduler" / "scheduler_config.json")
    assert config["set_alpha_to_one"] and not weights.load(toy.BASE).scheduler.config["set_alpha_to_one"]


def test_a_base_has_the_common_autoencoder_and_base_0_its_committed_end(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(pretrain, "main", asked.append)
    for base in (0, 1):
        experiments.make_base(base, tmp_path)
    assert asked == [["--seed", str(b), "--vae", str(toy.BASE), "--out", str(tmp_path / f"base-{b}")] for b in (0, 1)]
    assert weights.checkpoint_hash(tmp_path / "base-0/theta_0") == weights.checkpoint_hash(toy.BASE)
    assert not (tmp_path / "base-1/theta_0").exists()


def test_tables_and_prose_say_what_the_results_file_says():
    found = run.read_json(EVIDENCE / "evidence.json")
    told = (EVIDENCE / "tables.md").read_text()
    assert told == tables.markdown(found)
    told += (EVIDENCE / "tuning.md").read_text()
    section = (experiments.ROOT / "README.md").read_text().split("\n## Evidence\n")[1].split("\n## ")[0]
    chapters = [chapter.read_text() for chapter in sorted((experiments.ROOT / "tutorial").glob("*.md"))]
    counts = []
    for text in ((EVIDENCE / "README.md").read_text(), section, *chapters):
        numbers = re.findall(r"[+-]\d+\.\d+ \[[^\]]+\]", " ".join(text.split()))
        assert [number for number in numbers if number not in told] == []
        counts.append(len(numbers))
    assert counts[0] > 50 and counts[1] > 10 and counts[-1] > 5, "the evidence, the README, chapter 10"
