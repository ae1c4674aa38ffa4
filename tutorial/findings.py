"""What evidence.py measured, as tables: differences between models, with intervals over bases.

    python tutorial/findings.py

It reads evidence/results.csv and writes evidence/results.md, in seconds.

One comparison is primary. It was chosen before these scores were made, but after a run of train.py
on base 0 had been seen. The p-values of all others, which are secondary, are corrected for their
number (Holm 1979).
"""

import argparse
import csv
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from spin.infra.cli import run_script  # noqa: E402
from spin.infra.files import atomic_write  # noqa: E402
from tutorial.evidence import FOLDS  # noqa: E402


@dataclass(frozen=True)
class Comparison:
    """What one model scores above another: "run/model" each, or "theta_0" for the second."""

    first: str
    second: str
    metric: str
    setting: str  # "7.5", "best reward", "best energy"; "" for the error
    images: str  # "mean of 5", "best of 5"; "real" for the error

    def __str__(self) -> str:
        return f"{self.first} minus {self.second}"


PRIMARY = Comparison("story/spin-2", "story/sft", "energy", "best energy", "mean of 5")

# The claims of the paper for (C.6), and the same of the bounded loss
CLAIMS = [
    ("story/spin-1", "story/sft"),
    ("story/spin-2", "story/dpo"),
    ("story/sft", "theta_0"),
    ("story/spin-2", "story/spin-1"),
    ("story/spin-3", "story/spin-2"),
    ("story/spin-2", "story/sft"),
    ("bounded/bounded-1", "story/sft"),
    ("bounded/bounded-2", "story/dpo"),
    ("bounded/bounded-2", "bounded/bounded-1"),
    ("bounded/bounded-3", "bounded/bounded-2"),
    ("bounded/bounded-2", "story/sft"),
    ("bounded/bounded-3", "story/sft"),
    ("bounded/bounded-2", "story/spin-2"),
    ("bounded/bounded-3", "story/spin-3"),
]

# Where a claim is tested: (metric, setting, images). Energy is of all five images of a prompt.
PLACES = [
    ("reward", "7.5", "mean of 5"),
    ("reward", "best reward", "mean of 5"),
    ("reward", "best reward", "best of 5"),
    ("energy", "7.5", "mean of 5"),
    ("energy", "best energy", "mean of 5"),
]

# What else changes from theta_0 to each model.
CHANGES = [
    ("error", "", "real"),
    ("spread", "7.5", "mean of 5"),
    ("aligned", "7.5", "mean of 5"),
    ("clean", "7.5", "mean of 5"),
]


# ---- The scores ----------------------------------------------------------------------------------


class Scores:
    """results.csv: for every model, metric and place the scores of all bases, seeds and folds."""

    def __init__(self, path: Path):
        self.values: dict[tuple, dict[tuple[str, str], list[float]]] = defaultdict(dict)
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                model = f"{row['run']}/{row['model']}".strip("/")
                key = (model, row["metric"], row["setting"], row["images"])
                folds = [float(row[f"fold {i}"]) for i in range(FOLDS)]
                self.values[key][row["base"], row["seed"]] = folds

    def models(self) -> list[str]:
        """Return the names of all models, "run/model" or "theta_0", in the table's order."""
        return list(dict.fromkeys(key[0] for key in self.values))

    def jobs(self, comparison: Comparison) -> tuple[list[str], list[str]]:
        """Return the bases and the seeds for which both models are scored, in every combination."""
        jobs = set(self.of(comparison.first, comparison))
        if comparison.second != "theta_0":  # which has no seed: it is there for every one
            jobs &= set(self.of(comparison.second, comparison))
        bases = sorted({base for base, _ in jobs})
        seeds = sorted({seed for _, seed in jobs})
        complete = [seed for seed in seeds if all((base, seed) in jobs for base in bases)]
        return bases, complete

    def of(self, model: str, comparison: Comparison) -> dict[tuple[str, str], list[float]]:
        """Return {(base, seed): means over folds} of one of a comparison's models."""
        key = (model, comparison.metric, comparison.setting, comparison.images)
        return self.values.get(key, {})

    def differences(self, comparison: Comparison) -> np.ndarray:
        """Return what the first model scores above the second: [bases,seeds,FOLDS]."""
        bases, seeds = self.jobs(comparison)
        first = self.of(comparison.first, comparison)
        second = self.of(comparison.second, comparison)
        values = np.zeros((len(bases), len(seeds), FOLDS))
        for i, base in enumerate(bases):
            for j, seed in enumerate(seeds):
                other = second[base, "" if comparison.second == "theta_0" else seed]
                values[i, j] = np.subtract(first[base, seed], other)
        return values


# ---- Intervals -----------------------------------------------------------------------------------


@dataclass
class Interval:
    """A mean over bases, seeds and prompts, its 95% interval, and the p-value of its being 0."""

    mean: float
    low: float
    high: float
    p_value: float
    by_base: list[float]

    def __str__(self) -> str:
        digits = 4 if max(abs(self.low), abs(self.high)) < 0.1 else 3
        return f"{self.mean:+.{digits}f} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


def pooled(values: np.ndarray, level: float = 0.95) -> Interval:
    """Return the interval for the mean of values [bases,seeds,folds] of a population of all three.

    Bases, seeds and groups of prompts are crossed samples: a seed draws the same batches for every
    base, and the prompts are the same everywhere. The variance of the mean is at most the sum of
    three, each that of one kind's means over their number (Cameron, Gelbach and Miller 2011, whose
    terms to be subtracted are left out). Student's t has the degrees of freedom of Welch and
    Satterthwaite. A kind of which there is but one adds nothing: it is taken as given.
    """
    parts = []  # (variance of the mean, degrees of freedom)
    for axis, count in enumerate(values.shape):
        if count > 1:
            others = tuple(other for other in range(3) if other != axis)
            means = values.mean(axis=others)
            parts.append((means.var(ddof=1) / count, count - 1))
    mean = float(values.mean())
    variance = sum(part for part, _ in parts)
    by_base = values.mean(axis=(1, 2)).tolist()
    if variance == 0:
        return Interval(mean, mean, mean, float(mean == 0), by_base)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    t, cumulative = student_t(freedom)
    half = float(np.interp((1 + level) / 2, cumulative, t)) * math.sqrt(variance)
    p_value = 2 * (1 - float(np.interp(abs(mean) / math.sqrt(variance), t, cumulative)))
    return Interval(mean, mean - half, mean + half, p_value, by_base)


def student_t(freedom: float) -> tuple[np.ndarray, np.ndarray]:
    """Return a grid of t from 0 on, and the cumulative distribution of Student's t on it.

    With t = sqrt(freedom) tan(angle), the density of the angle is proportional to
    cos(angle)^(freedom - 1), on (-pi/2, pi/2).
    """
    angle = np.linspace(0, np.pi / 2, 20_001)
    density = np.cos(angle) ** (freedom - 1)
    areas = np.cumsum(density[1:] + density[:-1])  # trapezoids
    cumulative = np.concatenate([[0.5], 0.5 + 0.5 * areas / areas[-1]])
    return math.sqrt(freedom) * np.tan(angle[:-1]), cumulative[:-1]  # t is infinite at pi/2


def holm(p_values: list[float]) -> list[float]:
    """Return p-values corrected for their number, in the same order (Holm 1979)."""
    order = np.argsort(p_values)
    corrected = np.empty(len(p_values))
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected.tolist()


def coverage(values: np.ndarray, worlds: int = 1000, seed: int = 0) -> float:
    """Return how often `pooled` covers the truth, in simulated worlds like values [B,S,F].

    A world has normal effects of its bases, seeds and folds, and noise in each cell, with the
    variances that the values' own means show (an effect's variance includes its share of the noise,
    so that it is rather too large). The truth is 0.
    """
    rng = np.random.default_rng(seed)
    centered = values - values.mean()
    effects = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        effects.append(centered.mean(axis=others, keepdims=True))
    noise = (centered - sum(effects)).std()
    covered = 0
    for _ in range(worlds):
        world = noise * rng.standard_normal(values.shape)
        for effect in effects:
            spread = effect.std(ddof=1) if effect.size > 1 else 0.0
            world += spread * rng.standard_normal(effect.shape)
        interval = pooled(world)
        covered += interval.low <= 0 <= interval.high
    return covered / worlds


# ---- Tables --------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> str:
    """Write results.md, and return its text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    evidence = ROOT / "tutorial" / "evidence"
    parser.add_argument("--results", default=str(evidence / "results.csv"), help="what to read")
    parser.add_argument("--out", default=str(evidence / "results.md"), help="what to write")
    args = parser.parse_args(argv)

    scores = Scores(Path(args.results))
    text = format_tables(scores)
    with atomic_write(Path(args.out)) as temporary:
        temporary.write_text(text)
    return text


def format_tables(scores: Scores) -> str:
    """Return results.md: the primary comparison, the claims, and all gains over theta_0."""
    parts = ["# What was measured"]
    primary = pooled(scores.differences(PRIMARY))
    bases, seeds = scores.jobs(PRIMARY)
    share = coverage(scores.differences(PRIMARY))
    parts.append(
        f"Bases: {len(bases)}; seeds of fine-tuning on every base: {len(seeds)}. Brackets: 95% intervals over "
        "bases, seeds and prompts. Lower energy, palette and error are better."
    )
    parts.append(
        f"The primary comparison, {PRIMARY} by {PRIMARY.metric}, each model at its best guidance: "
        f"{primary}, p = {primary.p_value:.4f}. By base: {format_values(primary.by_base)}. In "
        f"{share:.3f} of 1000 simulated worlds with effects of the same size, such an interval "
        "covers the truth."
    )

    # ---- the claims, whose p-values are corrected together
    comparisons = []
    for first, second in CLAIMS:
        for place in PLACES:
            comparison = Comparison(first, second, *place)
            if comparison != PRIMARY and has_scores(scores, comparison):
                comparisons.append(comparison)
    intervals = {comparison: pooled(scores.differences(comparison)) for comparison in comparisons}
    corrected = holm([interval.p_value for interval in intervals.values()])
    significant = dict(zip(comparisons, (p_value < 0.05 for p_value in corrected)))

    lines = table_head(["", *(", ".join(place) for place in PLACES)])
    for first, second in CLAIMS:
        cells = [f"{first} minus {second}"]
        for place in PLACES:
            comparison = Comparison(first, second, *place)
            cell = f"{primary} (primary)" if comparison == PRIMARY else ""
            if comparison in intervals:
                mark = " *" if significant[comparison] else ""
                cell = f"{intervals[comparison]}{mark}"
            cells.append(cell)
        lines.append(f"| {' | '.join(cells)} |")
    parts.append(f"*: p < 0.05 after a correction for {len(comparisons)} comparisons (Holm).")
    parts.append("\n".join(lines))

    # ---- every model minus theta_0
    places = [*PLACES, *CHANGES]
    titles = [", ".join(filter(None, place)) for place in places]
    lines = table_head(["minus theta_0", "n", *titles])
    for model in scores.models():
        if model == "theta_0":
            continue
        bases, seeds = scores.jobs(Comparison(model, "theta_0", *places[0]))
        cells = [model, f"{len(bases)} x {len(seeds)}"]
        for place in places:
            cells.append(str(pooled(scores.differences(Comparison(model, "theta_0", *place)))))
        lines.append(f"| {' | '.join(cells)} |")
    parts.append("What each model scores above theta_0. n: bases x seeds.")
    parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def has_scores(scores: Scores, comparison: Comparison) -> bool:
    bases, seeds = scores.jobs(comparison)
    return bool(bases and seeds)


def table_head(columns: list[str]) -> list[str]:
    """Return the first two lines of a Markdown table."""
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def format_values(values: list[float]) -> str:
    return ", ".join(f"{value:+.4f}" for value in values)


if __name__ == "__main__":
    sys.exit(run_script("findings.py", main, advice="nothing is lost; start again"))
