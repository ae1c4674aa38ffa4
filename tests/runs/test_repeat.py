"""The story repeated over bases and seeds: its summary, and the committed table."""

import json
from pathlib import Path

import numpy as np
import pytest

from spin.eval.stats import format_cell
from tutorial import repeat_toy


def test_the_interval_is_students_over_the_means_of_the_bases():
    """By hand: the means are 1, 2 and 3, their standard deviation 1, t = 4.303."""
    values = np.array([[0.0, 2.0], [2.0, 2.0], [2.5, 3.5]])
    interval = repeat_toy.interval_over_bases(values)
    assert interval["mean"] == pytest.approx(2)
    assert interval["high"] - 2 == pytest.approx(4.303 / np.sqrt(3))
    assert 2 - interval["low"] == pytest.approx(4.303 / np.sqrt(3))
    assert interval["n"] == 3


@pytest.mark.parametrize("bases", [2, 3, 5])
def test_95_of_100_intervals_cover_the_mean(bases):
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(4000):
        base_effects = rng.normal(0.3, 0.1, (bases, 1))
        interval = repeat_toy.interval_over_bases(base_effects + rng.normal(0, 0.05, (bases, 2)))
        covered.append(interval["low"] < 0.3 < interval["high"])
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def results_of(reward: float) -> dict:
    """Return results.json of a run in which every difference of reward is this, of others -0.01."""
    differences = {}
    for pair in repeat_toy.PAIRS:
        differences[pair] = {metric: {"mean": -0.01} for metric in repeat_toy.METRICS}
        differences[pair]["reward"] = {"mean": reward}
    at_best = {"differences": differences, "best_guidance": {"base": 5.0}}
    return {
        "differences": differences,
        "at_best_guidance": at_best,
        "config": {"commit": "0123456789abcdef"},
    }


def test_every_run_and_the_interval_are_in_the_table():
    runs = []
    for base in range(3):
        for seed in (0, 1):
            summary = repeat_toy.summarize_run(results_of(reward=0.1 * base + 0.02 * seed))
            runs.append({"base": base, "seed": seed, **summary})
    text = repeat_toy.format_story(runs)
    lines = text.splitlines()
    assert lines.count("## reward, at the run's guidance") == 1
    assert lines.count("## energy, each at its best") == 1
    row = next(line for line in lines if line.startswith("| spin-1 minus sft |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1].startswith("+0.110 [-0.1")
    assert cells[2:] == ["+0.0000", "+0.0200", "+0.1000", "+0.1200", "+0.2000", "+0.2200"]
    assert "commits 012345678." in text


# ---- The committed table -------------------------------------------------------------------------

EVIDENCE = Path(repeat_toy.__file__).parent / "evidence"
STORY = json.loads((EVIDENCE / "story.json").read_text())


def test_the_committed_table_is_that_of_the_committed_numbers():
    assert (EVIDENCE / "story.md").read_text() == repeat_toy.format_story(STORY["runs"])
    jobs = {(run["base"], run["seed"]) for run in STORY["runs"]}
    assert jobs == {(base, seed) for base in range(3) for seed in range(2)}


@pytest.mark.parametrize(
    "row, metric, pair",
    [
        ("SPIN-1 minus SFT, reward", "reward", "spin-1 - sft"),
        ("SPIN-2 minus Diffusion-DPO, reward", "reward", "spin-2 - dpo"),
        ("SFT minus theta_0, reward", "reward", "sft - base"),
        ("SPIN-2 minus SPIN-1, reward", "reward", "spin-2 - spin-1"),
        ("SPIN-3 minus SPIN-2, reward", "reward", "spin-3 - spin-2"),
        ("SPIN-2 minus SFT, reward", "reward", "spin-2 - sft"),
        ("SPIN-2 minus SFT, energy", "energy", "spin-2 - sft"),
    ],
)
def test_the_readme_says_what_the_table_says(row, metric, pair):
    cells = [row]
    for verdict in ("at the run's guidance", "each at its best"):
        values = np.zeros((3, 2))
        for run in STORY["runs"]:
            values[run["base"], run["seed"]] = run["differences"][verdict][metric][pair]
        cells.append(format_cell(repeat_toy.interval_over_bases(values), sign="+"))
    assert f"| {' | '.join(cells)} |" in (EVIDENCE.parent.parent / "README.md").read_text()
