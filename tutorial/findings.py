"""What evidence.py measured, as tables: differences between models, with intervals over bases.

    python tutorial/findings.py

It reads results.csv and second.csv in tutorial/evidence and writes results.md and second.md beside
them, in one or two minutes.

One comparison is primary. It was chosen before these scores were made, but after a run of train.py
on base 0 had been seen. All others of CLAIMS and POINTS are secondary, and the p-values of those
over COUNTED_BASES or more are corrected for their number (Holm 1979). What each model scores above
theta_0 is printed as well, and not corrected.
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
    ("story/spin-3", "story/sft"),
    ("story/bounded-1", "story/sft"),
    ("story/bounded-2", "story/dpo"),
    ("story/bounded-2", "story/bounded-1"),
    ("story/bounded-3", "story/bounded-2"),
    ("story/bounded-2", "story/sft"),
    ("story/bounded-3", "story/sft"),
    ("story/bounded-2", "story/spin-2"),
    ("story/bounded-3", "story/spin-3"),
]

# Where a claim is tested: (metric, setting, images). Energy is of all five images of a prompt.
PLACES = [
    ("reward", "7.5", "mean of 5"),
    ("reward", "7.5", "best of 5"),
    ("reward", "best reward", "mean of 5"),
    ("reward", "best reward", "best of 5"),
    ("energy", "7.5", "mean of 5"),
    ("energy", "best energy", "mean of 5"),
]

# Comparisons over COUNTED_BASES or more are counted for the correction, and those over
# STARRED_BASES can get a star. Three bases tell too little of their own spread for a very small
# p-value to be believed.
COUNTED_BASES = 3
STARRED_BASES = 5

# What the runs of the other points are compared with.
SPIN = "story/spin-3"
BOUNDED = "story/bounded-3"
POINTS = {
    "At equal cost, drawing counted": [
        (SPIN, "sft-16x/sft"),
        (BOUNDED, "sft-16x/sft"),
        (SPIN, "dpo-6x/dpo"),
        (BOUNDED, "dpo-6x/dpo"),
        ("sft-16x/sft", "story/sft"),
        ("dpo-6x/dpo", "story/dpo"),
    ],
    "Renewal: three opponents against one, as many steps": [
        (SPIN, "spin-long/spin-1"),
        (BOUNDED, "bounded-300/bounded-1"),
    ],
    "How far an iteration goes: 100, 300, 1000 steps": [
        ("bounded-300/bounded-3", BOUNDED),
        ("bounded-1000/bounded-3", BOUNDED),
        ("bounded-300/bounded-3", "bounded-300/bounded-2"),
        ("bounded-1000/bounded-2", "bounded-1000/bounded-1"),
        ("bounded-1000/bounded-3", "bounded-1000/bounded-2"),
        ("bounded-300-at-3/bounded-3", "bounded-at-3/bounded-3"),
        ("bounded-1000-at-3/bounded-3", "bounded-at-3/bounded-3"),
        ("bounded-best/bounded-3", BOUNDED),
    ],
    "The bound, and clipping": [
        (BOUNDED, "correlation/bounded-3"),
        ("bounded-unclipped/bounded-3", "correlation-unclipped/bounded-3"),
        ("bounded-unclipped/bounded-3", BOUNDED),
        ("spin-unclipped/spin-3", SPIN),
        (BOUNDED, "spin-unclipped/spin-3"),
    ],
    "What is learned: other opponents": [
        ("spin-at-1/spin-3", SPIN),
        ("spin-at-3/spin-3", SPIN),
        ("spin-50-steps/spin-3", SPIN),
        ("spin-pixels/spin-3", SPIN),
        ("spin-path/spin-3", SPIN),
        ("spin-guided-path/spin-3", SPIN),
        ("bounded-at-1/bounded-3", BOUNDED),
        ("bounded-at-3/bounded-3", BOUNDED),
        ("bounded-50-steps/bounded-3", BOUNDED),
        ("bounded-pixels/bounded-3", BOUNDED),
        ("bounded-at-3/bounded-3", "story/sft"),
    ],
    "Independent noise": [
        ("spin-independent/spin-3", SPIN),
        ("bounded-independent/bounded-3", BOUNDED),
        (BOUNDED, "spin-independent/spin-3"),
    ],
    "The failure on purpose, and remedies": [
        ("spin-beta-500/spin-3", SPIN),
        ("spin-beta-500-charged/spin-3", "spin-beta-500/spin-3"),
        ("spin-charged/spin-3", SPIN),
    ],
    "Self-play after SFT": [
        ("spin-after-sft/spin-3", "story/sft"),
        ("bounded-after-sft/bounded-3", "story/sft"),
        ("spin-after-sft/spin-3", "sft-16x/sft"),
        ("bounded-after-sft/bounded-3", "sft-16x/sft"),
        ("spin-after-sft/spin-3", SPIN),
        ("bounded-after-sft/bounded-3", BOUNDED),
    ],
}

# What else changes from theta_0 to each model.
CHANGES = [
    ("error", "", "real"),
    ("spread", "7.5", "mean of 5"),
    ("aligned", "7.5", "mean of 5"),
    ("clean", "7.5", "mean of 5"),
]


# ---- The scores ----------------------------------------------------------------------------------


class Scores:
    """A table of evidence.py: for every model, metric and place all bases, seeds and folds."""

    def __init__(self, path: Path, only_seed: str | None = None):
        """path: of the table, a .csv. only_seed: the seed whose rows to keep (None: all)."""
        self.values: dict[tuple, dict[tuple[str, str], list[float]]] = defaultdict(dict)
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                if only_seed is not None and row["seed"] not in (only_seed, ""):
                    continue
                model = f"{row['run']}/{row['model']}".strip("/")
                key = (model, row["metric"], row["setting"], row["images"])
                folds = [float(row[f"fold {i}"]) for i in range(FOLDS)]
                self.values[key][row["base"], row["seed"]] = folds

    def models(self) -> list[str]:
        """Return the names of all models, "run/model" or "theta_0", in the table's order."""
        return list(dict.fromkeys(key[0] for key in self.values))

    def jobs(self, comparison: Comparison) -> list[tuple[str, str]]:
        """Return (base, seed) of every job that has scored both models, in order."""
        jobs = set(self.of(comparison.first, comparison))
        if comparison.second != "theta_0":  # which has no seed: it is there for every one
            jobs &= set(self.of(comparison.second, comparison))
        return sorted(jobs)

    def count_bases(self, comparison: Comparison) -> int:
        """Return on how many bases both models were scored by one job."""
        return len({base for base, _ in self.jobs(comparison)})

    def of(self, model: str, comparison: Comparison) -> dict[tuple[str, str], list[float]]:
        """Return {(base, seed): means over folds} of one of a comparison's models."""
        key = (model, comparison.metric, comparison.setting, comparison.images)
        return self.values.get(key, {})

    def differences(self, comparison: Comparison) -> np.ndarray:
        """Return what the first model scores above the second: [bases,seeds,FOLDS].

        It is NaN for a base and a seed that are not of one job.
        """
        jobs = self.jobs(comparison)
        bases = sorted({base for base, _ in jobs})
        seeds = sorted({seed for _, seed in jobs})
        first = self.of(comparison.first, comparison)
        second = self.of(comparison.second, comparison)
        values = np.full((len(bases), len(seeds), FOLDS), np.nan)
        for base, seed in jobs:
            other = second[base, "" if comparison.second == "theta_0" else seed]
            values[bases.index(base), seeds.index(seed)] = np.subtract(first[base, seed], other)
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

    A base and a seed that were not tried together are NaN, and count as `filled` has them.
    """
    values = filled(values)
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
    angle, cumulative = student_t(freedom)
    scale = math.sqrt(freedom * variance)
    half = scale * math.tan(np.interp((1 + level) / 2, cumulative, angle))
    p_value = 2 * (1 - float(np.interp(math.atan(abs(mean) / scale), angle, cumulative)))
    return Interval(mean, mean - half, mean + half, p_value, by_base)


def filled(values: np.ndarray) -> np.ndarray:
    """Return values [bases,seeds,folds] with sums of a base's and a seed's effect in place of NaN.

    The effects are fitted to the other values by least squares. Raises ValueError if these do not
    determine them: if some bases share no seed with the others, not even by way of third ones.
    """
    known = ~np.isnan(values[:, :, 0])
    if known.all():
        return values.copy()
    bases, seeds = known.shape
    base, seed = np.nonzero(known)  # of each known value
    design = np.concatenate([np.eye(bases)[base], np.eye(seeds)[seed]], axis=1)
    effects, _, rank, _ = np.linalg.lstsq(design, values[known])
    if rank < bases + seeds - 1:
        raise ValueError("some bases and seeds cannot be compared with the others")
    sums = effects[:bases, None] + effects[None, bases:]
    return np.where(known[:, :, None], values, sums)


def student_t(freedom: float) -> tuple[np.ndarray, np.ndarray]:
    """Return angles from 0 to pi / 2, and how likely it is that Student's t is below each.

    An angle stands for t = sqrt(freedom) tan(angle). Its density on (-pi/2, pi/2) is proportional
    to cos(angle)^(freedom - 1).
    """
    angle = np.linspace(0, np.pi / 2, 2001)
    middle = (angle[1:] + angle[:-1]) / 2
    area = np.cumsum(np.cos(middle) ** (freedom - 1))
    return angle, np.concatenate([[0.5], 0.5 + 0.5 * area / area[-1]])


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

    A world has normal effects of its bases, seeds and folds, and noise in each job (a base with a
    seed) and in each of its folds, with the variances that the values' own means show (an effect's
    variance includes its share of the noise, so that it is rather too large). The truth is 0. What
    is NaN in the values is so in each world.
    """
    rng = np.random.default_rng(seed)
    centered = filled(values)
    centered -= centered.mean()
    effects = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        effects.append(centered.mean(axis=others, keepdims=True))
    residual = centered - sum(effects)
    of_job = residual.mean(axis=2, keepdims=True)
    missing = np.isnan(values)
    of_fold = (residual - of_job)[~missing]
    bases, seeds, folds = values.shape
    jobs = (~missing[:, :, 0]).sum()
    job_spread = spread_of(of_job, jobs - (bases + seeds - 1))
    fold_spread = spread_of(of_fold, (jobs - 1) * (folds - 1))

    covered = 0
    for _ in range(worlds):
        world = fold_spread * rng.standard_normal(values.shape)
        world += job_spread * rng.standard_normal(of_job.shape)
        for effect in effects:
            spread = effect.std(ddof=1) if effect.size > 1 else 0.0
            world += spread * rng.standard_normal(effect.shape)
        world[missing] = np.nan
        interval = pooled(world)
        covered += interval.low <= 0 <= interval.high
    return covered / worlds


def spread_of(noise: np.ndarray, freedom: int) -> float:
    """Return the standard deviation of noise with so many degrees of freedom, 0 if it has none."""
    return math.sqrt((noise**2).sum() / freedom) if freedom > 0 else 0.0


# ---- Tables --------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Write the tables of each file of scores beside it, as NAME.md."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    evidence = ROOT / "tutorial" / "evidence"
    parser.add_argument(
        "scores",
        nargs="*",
        type=Path,
        default=[evidence / "results.csv", evidence / "second.csv"],
        help="what to read, NAME.csv (default: the evidence's two)",
    )
    args = parser.parse_args(argv)

    for path in args.scores:
        text = format_tables(Scores(path))
        with atomic_write(path.with_suffix(".md")) as temporary:
            temporary.write_text(text)


def format_tables(scores: Scores) -> str:
    """Return NAME.md: the primary comparison, the claims, the other points, all gains."""
    family = secondary_comparisons(scores)
    significant = significant_of(family, scores)
    parts = ["# What was measured", format_primary(scores)]
    parts += [format_coverage(scores, [PRIMARY, *family]), format_family(family)]
    for title, pairs in {"The claims": CLAIMS, **POINTS}.items():
        places = PLACES if pairs is CLAIMS else [*PLACES, *CHANGES]
        lines = format_comparisons(pairs, places, scores, significant)
        if len(lines) > 2:
            parts += [f"## {title}", "\n".join(lines)]
    parts += ["## What each model scores above theta_0", "\n".join(format_gains(scores))]
    return "\n\n".join(parts) + "\n"


def format_primary(scores: Scores) -> str:
    """Return a paragraph on how to read the tables, and one on the primary comparison."""
    interval = pooled(scores.differences(PRIMARY))
    return (
        "Brackets: 95% intervals over bases, seeds and prompts, given the one base or seed where "
        "there is but one; n: bases x seeds, with the number of jobs where not all were tried "
        "together. Lower energy and error are better. Guidance: 7.5, or each model's best by "
        "reward or by energy.\n\n"
        f"The primary comparison, {PRIMARY} by {PRIMARY.metric}, each model at its best guidance: "
        f"{interval}, p = {interval.p_value:.4f}, n = {format_jobs(scores, PRIMARY)}. By base: "
        f"{format_values(interval.by_base)}."
    )


def format_coverage(scores: Scores, comparisons: list[Comparison]) -> str:
    """Return a paragraph on what the intervals of comparisons can be trusted for."""
    covered: dict[int, list[float]] = defaultdict(list)  # by the number of bases
    for seed, comparison in enumerate(comparisons):
        values = scores.differences(comparison)
        covered[len(values)].append(coverage(values, seed=seed))
    parts = []
    for bases, rates in sorted(covered.items()):
        part = f"over {bases} base{'s' * (bases > 1)} {np.mean(rates):.1%}"
        if len(rates) > 1:
            part += f" on average of {len(rates)}, from {min(rates):.1%} to {max(rates):.1%}"
        parts.append(part)
    return (
        "How often such intervals cover the truth, in 1000 simulated worlds for each comparison, "
        "with effects of the sizes found, and with the same base or seed where there is but one: "
        f"{'; '.join(parts)}."
    )


def format_family(family: list[Comparison]) -> str:
    """Return a sentence on what a star means."""
    if not family:
        return f"None of these is over {STARRED_BASES} bases, so none is called significant."
    return (
        f"*: over {STARRED_BASES} bases or more, and p < 0.05 after a correction (Holm) for all "
        f"{len(family)} secondary comparisons over {COUNTED_BASES} bases or more, those of all "
        "tables but the last."
    )


def secondary_comparisons(scores: Scores) -> list[Comparison]:
    """Return those of CLAIMS and POINTS over COUNTED_BASES or more, but the primary one."""
    comparisons = [Comparison(*pair, *place) for pair in CLAIMS for place in PLACES]
    for pairs in POINTS.values():
        for pair in pairs:
            comparisons += [Comparison(*pair, *place) for place in [*PLACES, *CHANGES]]
    family = []
    for comparison in dict.fromkeys(comparisons):
        if comparison != PRIMARY and scores.count_bases(comparison) >= COUNTED_BASES:
            family.append(comparison)
    return family


def significant_of(family: list[Comparison], scores: Scores) -> set[Comparison]:
    """Return those over STARRED_BASES or more with p < 0.05, corrected for the family's size."""
    p_values = [pooled(scores.differences(comparison)).p_value for comparison in family]
    significant = set()
    for comparison, p_value in zip(family, holm(p_values)):
        if p_value < 0.05 and scores.count_bases(comparison) >= STARRED_BASES:
            significant.add(comparison)
    return significant


def format_comparisons(
    pairs: list, places: list, scores: Scores, significant: set[Comparison]
) -> list[str]:
    """Return the lines of a table with a row for each pair that is scored."""
    titles = [", ".join(filter(None, place)) for place in places]
    lines = table_head(["", "n", *titles])
    for first, second in pairs:
        comparisons = [Comparison(first, second, *place) for place in places]
        if not scores.jobs(comparisons[0]):
            continue
        cells = [str(comparisons[0]), format_jobs(scores, comparisons[0])]
        for comparison in comparisons:
            mark = " *" if comparison in significant else ""
            mark = " (primary)" if comparison == PRIMARY else mark
            cells.append(f"{pooled(scores.differences(comparison))}{mark}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def format_gains(scores: Scores) -> list[str]:
    """Return the lines of a table of what every model scores above theta_0."""
    models = [model for model in scores.models() if model != "theta_0"]
    pairs = [(model, "theta_0") for model in models]
    return format_comparisons(pairs, [*PLACES, *CHANGES], scores, set())


def format_jobs(scores: Scores, comparison: Comparison) -> str:
    """Return "5 x 1" for five bases with one seed each, or "5 x 2 (7)" if only 7 jobs are there."""
    jobs = scores.jobs(comparison)
    bases = scores.count_bases(comparison)
    seeds = len({seed for _, seed in jobs})
    count = "" if len(jobs) == bases * seeds else f" ({len(jobs)})"
    return f"{bases} x {seeds}{count}"


def table_head(columns: list[str]) -> list[str]:
    """Return the first two lines of a Markdown table."""
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def format_values(values: list[float]) -> str:
    return ", ".join(f"{value:+.4f}" for value in values)


if __name__ == "__main__":
    sys.exit(run_script("findings.py", main, advice="nothing is lost; start again"))
