"""Intervals for means over several bases, seeds and prompts, and what they say of a claim."""

import math
from statistics import NormalDist

import numpy as np

from spin.eval.comparison import PLATEAU


def pooled(values: np.ndarray, level: float = 0.95) -> dict:
    """mean, low, high of [bases,seeds,prompts]: an interval for the mean over all bases, seeds and prompts of this
    kind; and here, [low, high]: one for the mean over all seeds and prompts, but these very bases.

    Bases, seeds and prompts are crossed samples, a seed drawing the same batches and noise for every base: the variance
    of the mean is that of the bases' means over their number, plus the same of the seeds' and of the prompts' (Cameron,
    Gelbach and Miller 2011, without the terms that are subtracted there: a little too wide). Student's t, its degrees
    of freedom by Welch and Satterthwaite. What there is but one of is taken as given."""
    sides = [values.mean(others) for others in ((1, 2), (0, 2), (0, 1))]
    parts = [(of.var(ddof=1) / len(of), len(of) - 1) for of in sides if len(of) > 1]
    (low, high), here = (interval(values.mean(), of, level) for of in (parts, parts[len(values) > 1 :]))
    by_base = [rounded(value) for value in sides[0]]
    return {"mean": rounded(values.mean()), "low": low, "high": high, "here": here, "by_base": by_base}


def interval(mean: float, parts: list[tuple[float, int]], level: float) -> list[float]:
    """parts: variances of the mean and their degrees of freedom."""
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / count for part, count in parts) if variance else 1.0
    half = student(freedom, level) * math.sqrt(variance)
    return [rounded(mean - half), rounded(mean + half)]


def rounded(value: float) -> float:
    return round(float(value), 4)


def student(freedom: float, level: float) -> float:
    """The quantile of Student's t between whose negative and itself the share `level` lies."""
    angle = np.linspace(0, np.pi / 2, 20_001)  # t = sqrt(freedom) tan(angle), whose density is cos^(freedom - 1)
    share = np.cumsum(np.cos(angle) ** (freedom - 1))
    at = angle[np.searchsorted(share, level * share[-1])]
    return math.sqrt(freedom) * math.tan(at) if freedom < 1e4 else NormalDist().inv_cdf((1 + level) / 2)


def verdict(gap: dict, plateau: bool = False) -> str:
    """Of "a beats b", or of "a plateaus": that it stays within PLATEAU of b."""
    low, high = gap["low"], gap["high"]
    holds, fails = low > 0, high < 0
    if plateau:
        holds, fails = -PLATEAU < low and high < PLATEAU, low > PLATEAU or high < -PLATEAU
    return "holds" if holds else "fails" if fails else "is not resolved"
