"""The evidence's programs: what a job appends to results.csv, and what is made of it."""

import argparse
import csv
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from spin import step, toy
from spin.checkpoint import load_pipeline
from spin.eval import world
from spin.infra.errors import InputError
from spin.infra.shards import LatentShards
from spin.pairs import rows_of_steps
from tutorial import evidence, findings, marks, variants
from tutorial.findings import Comparison, Scores, holm, pooled

# ---- A job ---------------------------------------------------------------------------------------

EVIDENCE = Path(findings.__file__).parent / "evidence"
SMALL = "--steps 2 --sampler-steps 2 --batch-size 4"


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> tuple[Path, list[dict]]:
    """The folder of a small job, and the rows that it appended."""
    folder = tmp_path_factory.mktemp("job")
    captions = world.captions
    with pytest.MonkeyPatch.context() as patch:
        runs = {"story": f"--loss all --iterations 2 {SMALL}"}
        after = {"after": f"--loss spin --iterations 1 --unet {{story}}/sft/checkpoint {SMALL}"}
        patch.setattr(evidence, "POINTS", {"claims": runs, "after-sft": after})
        patch.setattr(evidence, "TOY", {**evidence.TOY, "sampler_steps": 2})
        patch.setattr(evidence, "SWEEP", (3.0, 7.5))
        patch.setattr(evidence, "IMAGES", 2)
        patch.setattr(world, "captions", lambda split: captions(split)[:20])
        argv = ["--points", "claims", "after-sft", "--number", "4", "--seed", "1"]
        argv += ["--runs", str(folder / "runs"), "--out", str(folder / "results.csv")]
        rows = evidence.main(argv)
        assert evidence.main(argv) == [], "nothing is scored twice"
    return folder, rows


def test_a_job_scores_every_model_of_every_run_once(job):
    folder, rows = job
    models = dict.fromkeys((row["seed"], row["run"], row["model"]) for row in rows)
    assert list(models) == [
        ("", "", "theta_0"),
        ("1", "story", "sft"),
        ("1", "story", "dpo"),
        ("1", "story", "spin-1"),
        ("1", "story", "spin-2"),
        ("1", "story", "bounded-1"),
        ("1", "story", "bounded-2"),
        ("1", "after", "spin-1"),
    ]
    with open(folder / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["model"] for row in table] == [row["model"] for row in rows]
    assert {row["base"] for row in table} == {"4"}
    keys = [tuple(row[key] for key in (*evidence.MODEL_KEYS, *evidence.ROW_KEYS)) for row in table]
    assert len(set(keys)) == len(keys)


def test_a_row_is_the_mean_over_groups_of_prompts(job):
    """A fold holds every tenth prompt; here two of 20."""
    folder, rows = job
    [row] = [
        row for row in rows
        if row["model"] == "theta_0" and row["setting"] == "7.5"
        and row["images"] == "mean of 5" and row["metric"] == "reward"
    ]  # fmt: skip
    [path] = (folder / "runs/base-4/evaluation/images").glob("theta_0/guidance-7.5-32px")
    paths = sorted(path.glob("*.png"))
    assert len(paths) == 40
    prompts = [scene.caption for scene in toy.split()["test"][:20] for _ in range(2)]
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) / 255 for path in paths])
    rewards = toy.score(images, prompts)["reward"].reshape(20, 2)
    expected = rewards.mean(axis=1).reshape(2, 10).mean(axis=0)
    assert [float(row[f"fold {i}"]) for i in range(10)] == pytest.approx(expected, rel=1e-3)


def test_the_best_guidance_is_that_of_each_metric_on_the_validation_prompts(monkeypatch):
    """Reward is best where it is highest, energy where it is lowest."""
    validation = {  # guidance: (reward, energy)
        1.0: (1.0, 0.4),
        1.5: (2.0, 0.3),
        2.0: (3.0, 0.1),
        3.0: (5.0, 0.2),
        5.0: (4.0, 0.5),
        7.5: (3.0, 0.6),
        10.0: (2.0, 0.7),
    }
    swept = []

    def made_up(evaluation, models, hashes, guidance):
        is_test = evaluation.prompts == world.captions("test")
        swept.append((is_test, list(guidance)))
        scores = {}
        for value in guidance:
            reward, energy = (value, value) if is_test else validation[value]
            scores[value] = {
                "reward": np.full((200, 5), reward) + [-0.2, 0.2, 0.0, -0.1, 0.1],
                "energy": np.full((200, 5), energy),
                "clean": np.tile([9.0, 1.0, 5.0, 5.0, 5.0], (200, 1)),
                "aligned": np.zeros((200, 5)),
            }
        return scores

    def made_up_error(pipe, split):
        return np.full(200, 0.1 if split == "test" else 0.9)

    monkeypatch.setattr(evidence, "sample_and_score", made_up)
    monkeypatch.setattr(evidence, "denoising_error", made_up_error)
    model = evidence.Model("", "", "theta_0", evidence.ModelSource(str(toy.BASE)), Path())
    rows = evidence.score(model)
    assert swept == [(False, list(validation)), (True, [2.0, 3.0, 7.5])]
    guidance = {row["setting"]: row["guidance"] for row in rows}
    assert guidance == {"7.5": "7.5", "best reward": "3", "best energy": "2", "": ""}
    found = {}
    for row in rows:
        found[row["setting"], row["images"], row["metric"]] = float(row["fold 0"])
    for setting, value in guidance.items():
        if setting:
            assert found[setting, "mean of 5", "reward"] == pytest.approx(float(value))
            assert found[setting, "best of 5", "reward"] == pytest.approx(float(value) + 0.2)
            assert found[setting, "mean of 5", "clean"] == 5
            assert found[setting, "best of 5", "clean"] == 1, "of the image with most reward"
    assert found["", "real", "error"] == 0.1, "on the scenes of the test prompts"


def test_a_run_with_a_variant_is_trained_under_it(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        train, "main", lambda argv: calls.append((step.spin_loss is variants.charged_loss, argv))
    )
    args = argparse.Namespace(base=str(toy.BASE), seed=3)
    evidence.train_run(args, tmp_path, "spin-charged", "--loss spin --variant charge --beta 500")
    evidence.train_run(args, tmp_path, "story", "--loss all")
    (is_charged, argv), (story_is_charged, _) = calls
    assert is_charged and not story_is_charged
    assert argv[-4:] == ["--loss", "spin", "--beta", "500"]
    assert "--variant" not in argv and "charge" not in argv


# What is in a run's name: {pattern: the flags that it stands for}
NAMES = {
    r"^story$": "--loss all",
    r"^(sft|dpo)\b": "--loss {}",
    r"^spin\b": "--loss spin",
    r"^(?:bounded|correlation)\b": "--loss spin-bounded",
    r"-(\d+)x$": "--steps {}00",  # of 100
    r"-long$": "--iterations 1 --steps 300",
    r"^bounded-(\d{3,4})\b": "--steps {}",
    r"-at-(\d)$": "--guidance {}",
    r"-(\d+)-steps$": "--sampler-steps {}",
    r"-beta-(\d+)\b": "--beta {}",
    r"-unclipped$": "--clip 0",
    r"-independent$": "--noise independent",
    r"-after-sft$": "--unet {{story}}/sft/checkpoint",
    r"-charged$": "--variant charge",
    r"^correlation\b": "--variant correlation",
    r"^spin-(path|guided-path)$": "--variant {}",
    r"-pixels$": "--variant pixels",
    r"-best$": "--save-every 20 --variant best-promoted",
}


@pytest.mark.parametrize(
    "name, flags", [run for runs in evidence.POINTS.values() for run in runs.items()]
)
def test_a_runs_name_says_all_its_flags(name, flags):
    expected = []
    for pattern, meant in NAMES.items():
        found = re.search(pattern, name)
        if found:
            expected += re.findall(r"--\S+ \S+", meant.format(*found.groups()))
    assert sorted(re.findall(r"--\S+ \S+", flags)) == sorted(expected)


def test_a_trained_model_is_not_the_base(job):
    _, rows = job
    errors = {(row["run"], row["model"]): row["fold 0"] for row in rows if row["metric"] == "error"}
    assert len(errors) == 8
    assert len(set(errors.values())) == 8, "each model was loaded with its own UNet"


def test_another_base_of_the_same_number_is_refused(tmp_path):
    """The shipped base is the committed tables' base 0, and that of the first world alone."""
    base = str(toy.BASE)
    evidence.check_base(EVIDENCE / "results.csv", 0, base)
    for name, number in [("results.csv", 1), ("second.csv", 0)]:
        with pytest.raises(InputError, match=f"{name} has rows of another base {number}"):
            evidence.check_base(EVIDENCE / name, number, base)
    evidence.check_base(EVIDENCE / "results.csv", 5, base)
    evidence.check_base(tmp_path / "missing.csv", 0, base)


def test_the_error_is_that_of_fresh_curated_images():
    """theta_0's on images that nobody trains on is about that of the tutorial, chapter 3."""
    error = evidence.denoising_error(load_pipeline(toy.BASE).freeze(), "test")
    assert error.shape == (200,)
    assert error.mean() == pytest.approx(0.035, abs=0.002)


# ---- Differences ---------------------------------------------------------------------------------


def write_results(path: Path, scores: dict[tuple[str, str, str], float]) -> None:
    """Write results.csv with the reward of {(base, seed, run/model): score}, and more per fold."""
    rows = []
    for (base, seed, name), score in scores.items():
        run, _, model = name.rpartition("/")
        row = {"base": base, "seed": seed, "run": run, "model": model}
        row |= {"setting": "7.5", "guidance": "7.5", "images": "mean of 5", "metric": "reward"}
        row |= {f"fold {i}": score + i for i in range(evidence.FOLDS)}
        rows.append(row | {"commit": "0"})
    evidence.append_rows(path, rows)


def test_differences_are_paired_by_base_seed_and_prompts(tmp_path):
    scores = {}
    for i, base in enumerate("01"):
        scores[base, "", "theta_0"] = float(i)
        for j, seed in enumerate("02"):
            scores[base, seed, "story/sft"] = 10 * i + 100 * j
            scores[base, seed, "story/spin-1"] = 10 * i + 100 * j + 1 + i + 5 * j
    write_results(tmp_path / "results.csv", scores)
    table = Scores(tmp_path / "results.csv")
    place = ("reward", "7.5", "mean of 5")
    gaps = table.differences(Comparison("story/spin-1", "story/sft", *place))
    assert gaps.shape == (2, 2, evidence.FOLDS)
    np.testing.assert_allclose(gaps[:, :, 0], [[1, 6], [2, 7]])
    np.testing.assert_allclose(gaps, gaps[:, :, :1] + np.zeros(evidence.FOLDS))
    gains = table.differences(Comparison("story/sft", "theta_0", *place))
    np.testing.assert_allclose(gains[:, :, 3], [[0, 100], [9, 109]])


def test_a_base_and_a_seed_that_were_not_tried_together_are_nan(tmp_path):
    scores = {("0", "", "theta_0"): 0.0, ("1", "", "theta_0"): 0.0}
    for base, seed in [("0", "0"), ("0", "1"), ("1", "0")]:
        scores[base, seed, "story/sft"] = 1.0
    write_results(tmp_path / "results.csv", scores)
    comparison = Comparison("story/sft", "theta_0", "reward", "7.5", "mean of 5")
    table = Scores(tmp_path / "results.csv")
    assert table.jobs(comparison) == [("0", "0"), ("0", "1"), ("1", "0")]
    assert np.isnan(table.differences(comparison)[:, :, 0]).tolist() == [[False] * 2, [False, True]]
    assert findings.format_jobs(table, comparison) == "2 x 2 (3)"

    of_seed_0 = Scores(tmp_path / "results.csv", only_seed="0")
    assert of_seed_0.jobs(comparison) == [("0", "0"), ("1", "0")]
    assert findings.format_jobs(of_seed_0, comparison) == "2 x 1"


# ---- Intervals -----------------------------------------------------------------------------------


def test_with_one_base_and_one_seed_the_interval_is_students_over_prompts():
    values = np.array([1.0, 2.0, 4.0, 5.0]).reshape(1, 1, 4)
    interval = pooled(values)
    half = 3.18245 * np.std([1, 2, 4, 5], ddof=1) / 2  # t of 3 degrees of freedom
    found = [interval.low, interval.mean, interval.high]
    assert found == pytest.approx([3 - half, 3, 3 + half], abs=1e-4)


def test_variances_of_bases_seeds_and_prompts_add_up():
    """With Welch's and Satterthwaite's degrees of freedom."""
    values = np.zeros((2, 2, 2))
    values += np.array([0.0, 0.6])[:, None, None] + np.array([0.0, 0.8])[None, :, None]
    interval = pooled(values)
    parts = [0.3**2, 0.4**2]  # of the mean: (0.6 / 2)^2, (0.8 / 2)^2, one degree of freedom each
    freedom = sum(parts) ** 2 / sum(part**2 for part in parts)
    angle, cumulative = findings.student_t(freedom)
    t = math.sqrt(freedom) * math.tan(np.interp(0.975, cumulative, angle))
    assert interval.high - interval.mean == pytest.approx(t * 0.5, rel=1e-6)


def test_what_is_missing_is_the_sum_of_its_bases_and_its_seeds_effects():
    """Where the values are such sums, the interval is that of the whole table."""
    rng = np.random.default_rng(0)
    folds = rng.standard_normal(10)
    values = rng.standard_normal((4, 1, 1)) + rng.standard_normal((1, 3, 1)) + folds
    holes = values.copy()
    holes[1:, 1] = np.nan
    holes[:-1, 2] = np.nan
    np.testing.assert_allclose(findings.filled(holes), values)
    assert str(pooled(holes)) == str(pooled(values))
    np.testing.assert_array_equal(findings.filled(values), values)


def test_a_seed_of_one_base_shifts_the_mean_by_what_it_changes_there():
    """By hand: base 0 has 1 and 3, base 1 has 5; so base 1's missing one is 7."""
    values = np.array([[1.0, 3.0], [5.0, np.nan]])[:, :, None]
    assert findings.filled(values)[1, 1, 0] == pytest.approx(7)
    assert pooled(values).mean == pytest.approx(4)
    assert pooled(values).by_base == pytest.approx([2, 6])


def test_bases_that_share_no_seed_are_refused():
    values = np.array([[1.0, np.nan], [np.nan, 2.0]])[:, :, None]
    with pytest.raises(ValueError, match="cannot be compared"):
        pooled(values)


@pytest.mark.parametrize(
    "freedom, quantile", [(1, 12.7062), (2, 4.30265), (4, 2.77645), (30, 2.04227)]
)
def test_the_quantiles_of_students_t_are_the_published_ones(freedom, quantile):
    angle, cumulative = findings.student_t(freedom)
    t = math.sqrt(freedom) * math.tan(np.interp(0.975, cumulative, angle))
    assert t == pytest.approx(quantile, rel=1e-5)


def test_the_p_value_fits_the_interval():
    """It is 0.05 where the interval ends at 0."""
    values = np.array([1.0, 2.0, 4.0, 5.0]).reshape(1, 1, 4)
    interval = pooled(values)
    assert pooled(values - interval.low).p_value == pytest.approx(0.05, abs=1e-4)
    assert pooled(values - interval.mean).p_value == pytest.approx(1, abs=1e-4)


def test_very_small_p_values_of_three_bases_come_up_too_often():
    """Where bases differ twice as much as prompts. So three bases get no stars."""
    rng = np.random.default_rng(0)
    rates = {}
    for bases in (3, 5):
        found = 0
        for _ in range(10_000):
            values = 2 * bases**0.5 * rng.standard_normal((bases, 1, 1))
            found += pooled(values + 10**0.5 * rng.standard_normal((1, 1, 10))).p_value < 0.001
        rates[bases] = found / 10_000
    assert rates[3] > 0.003 > rates[5]


def test_stars_are_for_five_bases_alone(tmp_path):
    scores = {}
    for base in "01234":
        scores[base, "", "theta_0"] = 0.0
        step = 0.001 * (int(base) - 2)
        scores[base, "0", "story/sft"] = step
        scores[base, "0", "story/spin-1"] = 1 + 2 * step
        if base in "012":
            scores[base, "0", "sft-16x/sft"] = 2 + 2 * step
    write_results(tmp_path / "results.csv", scores)
    table = Scores(tmp_path / "results.csv")
    place = ("reward", "7.5", "mean of 5")
    over_five = Comparison("story/spin-1", "story/sft", *place)
    over_three = Comparison("sft-16x/sft", "story/sft", *place)
    family = findings.secondary_comparisons(table)
    assert {over_five, over_three} <= set(family)
    assert findings.significant_of(family, table) == {over_five}


def test_holms_correction():
    """Multiplied by how many are left, and never below a smaller one's."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_coverage_is_that_of_simulated_worlds():
    """The intervals are made for such worlds, and rather wide; half as wide they miss often."""
    rng = np.random.default_rng(1)
    values = rng.standard_normal((5, 1, 1)) + rng.standard_normal((5, 3, 10))
    assert 0.93 <= findings.coverage(values, worlds=300) <= 1.0
    holes = values.copy()
    holes[1:, 1:] = np.nan
    assert 0.93 <= findings.coverage(holes, worlds=300) <= 1.0

    def half_as_wide(values, pooled=findings.pooled):
        interval = pooled(values)
        interval.low = interval.mean - (interval.mean - interval.low) / 2
        interval.high = interval.mean + (interval.high - interval.mean) / 2
        return interval

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(findings, "pooled", half_as_wide)
        assert findings.coverage(values, worlds=300) < 0.93


@pytest.mark.parametrize("of_seeds, of_jobs", [(0, 0), (0.5, 0.5), (1, 0), (0, 2)])
def test_intervals_cover_the_truth_where_few_jobs_of_many_were_run(of_seeds, of_jobs):
    """Five bases with one seed, two more seeds on one of them, and one of these on another.

    of_seeds, of_jobs: standard deviations; that of the bases is 1.
    """
    rng = np.random.default_rng(0)
    missing = np.ones((5, 3), dtype=bool)
    missing[:, 0] = missing[0] = missing[1, 1] = False
    covered = 0
    for _ in range(300):
        values = rng.standard_normal((5, 1, 1)) + 0.5 * rng.standard_normal((1, 1, 10))
        values = values + of_seeds * rng.standard_normal((1, 3, 1))
        values = values + of_jobs * rng.standard_normal((5, 3, 1))
        values[missing] = np.nan
        interval = pooled(values)
        covered += interval.low <= 0 <= interval.high
    assert covered / 300 >= 0.93


# ---- The tables ----------------------------------------------------------------------------------


def test_every_comparison_is_of_models_that_the_evidence_scores():
    scored = {"theta_0"}
    names = {"spin": "spin", "spin-bounded": "bounded", "sft": "sft", "dpo": "dpo"}
    for runs in evidence.POINTS.values():
        for run, flags in runs.items():
            words = flags.split()
            loss = words[words.index("--loss") + 1]
            iterations = 3
            if "--iterations" in words:
                iterations = int(words[words.index("--iterations") + 1])
            for player in names if loss == "all" else [loss]:
                name = names[player]
                if name in ("sft", "dpo"):
                    scored.add(f"{run}/{name}")
                    continue
                first = 1 if run in evidence.ALL_ITERATIONS else iterations
                scored.update(f"{run}/{name}-{k}" for k in range(first, iterations + 1))
    compared = set()
    for pairs in [findings.CLAIMS, *findings.POINTS.values()]:
        for pair in pairs:
            compared.update(pair)
    assert compared <= scored, compared - scored
    runs_compared = {model.split("/")[0] for model in compared}
    assert runs_compared >= {run for runs in evidence.POINTS.values() for run in runs}


def test_the_tables_name_the_primary_comparison_and_have_a_row_for_each_claim(job):
    folder, _ = job
    findings.main([str(folder / "results.csv")])
    text = (folder / "results.md").read_text()
    assert "The primary comparison, story/spin-2 minus story/sft by energy" in text
    assert "(primary)" in text
    row = "| story/spin-2 minus story/dpo "
    [line] = [line for line in text.splitlines() if line.startswith(row)]
    assert line.count("[") == len(findings.PLACES)
    assert "| story/bounded-1 minus theta_0 | 1 x 1 |" in text
    assert not math.isnan(pooled(Scores(folder / "results.csv").differences(findings.PRIMARY)).low)


# ---- Marks in latents ----------------------------------------------------------------------------


def test_a_detector_finds_an_offset_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(600, 4, 8, 8, generator=generator)
    others = torch.randn(600, 4, 8, 8, generator=generator)
    assert marks.detect(real, others) == pytest.approx(0.5, abs=0.06)
    others[:, 0] += 0.5
    assert marks.detect(real, others) > 0.9


def test_every_opponent_of_a_job_is_compared_with_the_real_images(job, tmp_path):
    folder, _ = job
    argv = ["--runs", str(folder / "runs"), "--out", str(tmp_path / "marks.csv")]
    rows = marks.main(argv)
    assert [(row["of"], row["opponent"]) for row in rows] == [
        ("spin-1", "theta_0"),
        ("spin-2", "spin-1"),
        ("bounded-1", "theta_0"),
        ("bounded-2", "bounded-1"),
    ]
    with open(tmp_path / "marks.csv", newline="") as file:
        assert list(csv.DictReader(file)) == rows
    for key in ("latents", "pixels", "offset 0", "offset 3"):
        assert rows[0][key] == rows[2][key], "both losses began with the same opponent"
    assert rows[0]["base"] == "4" and rows[0]["seed"] == "1"


def test_a_folder_without_runs_has_no_marks(tmp_path):
    with pytest.raises(InputError, match="no runs of evidence.py"):
        marks.main(["--runs", str(tmp_path)])


def test_a_mark_is_looked_for_in_what_was_generated_and_in_what_went_through_pixels(
    job, monkeypatch
):
    folder, _ = job
    run = train.Run(folder / "runs/base-4/seed-1/story")
    measured = []
    monkeypatch.setattr(
        marks, "detect", lambda real, generated: measured.append((real, generated)) or 0.5
    )
    monkeypatch.setattr(marks, "through_pixels", lambda pipe, latents: latents + 100)
    row, _ = marks.measure(run, "spin")
    rows = rows_of_steps(1, [(1, 1), (1, 2)], 4, toy.NUM_ROWS)
    expected = LatentShards(run.model_folder("spin-1") / "generated", rows).read("x0", rows)
    (real, generated), (same_real, through_pixels) = measured[:2]  # of the first opponent
    assert torch.equal(generated, expected)
    assert torch.equal(through_pixels, expected + 100)
    assert torch.equal(real, same_real) and not torch.equal(real, generated)
    offset = generated[:, 2].mean() - real[:, 2].mean()
    assert float(row["offset 2"]) == pytest.approx(offset.item(), abs=1e-3)
