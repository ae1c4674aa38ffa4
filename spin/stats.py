"""Bootstrap intervals, paired differences and win rates of scores: NumPy arrays, no model."""

from collections.abc import Collection
from functools import lru_cache

import numpy as np

RESAMPLES = 10_000
Summary = dict[str, float]


def interval(values: np.ndarray, level: float = 0.95, seed: int = 0) -> Summary:
    """mean, low, high, n of values [N]: the percentile bootstrap's interval for the mean over what the N stand for.

    Resamples with replacement, RESAMPLES times. Where all N agree the interval has no width, which is its weakness
    for shares near 0 or 1. Raises ValueError for no values.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"an interval needs a list of at least one number, not shape {values.shape}")
    low, high = np.quantile(shares(len(values), seed) @ values, [(1 - level) / 2, (1 + level) / 2])
    found = np.clip([values.mean(), low, high], values.min(), values.max())  # rounding may leave that range
    return dict(zip(("mean", "low", "high"), found.tolist())) | {"n": len(values)}


@lru_cache(maxsize=4)
def shares(count: int, seed: int) -> np.ndarray:
    """[RESAMPLES,count]: the share that each of `count` values has in each resample."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES) / count


def wins(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 where a > b, 0 where a < b, one half where they tie."""
    return 0.5 * (1 + np.sign(np.asarray(a) - np.asarray(b)))


def compare(scores: dict[str, dict[str, np.ndarray]], less_is_better: Collection[str] = ()) -> dict[str, dict]:
    """{model: {metric: [N]}}, prompt i being the same for all -> {"models": ..., "differences": ...}.

    models: {model: {metric: interval}}. differences, of every model against each one before it, paired by prompt:
    {"b - a": {metric: interval of b - a, with "win_rate": interval of how often b is better}}, better being more but
    for the metrics that less_is_better names.
    """

    def better_first(metric: str, a: str, b: str) -> tuple[np.ndarray, np.ndarray]:
        pair = scores[b][metric], scores[a][metric]
        return pair[::-1] if metric in less_is_better else pair

    models = {name: {metric: interval(v) for metric, v in of.items()} for name, of in scores.items()}
    differences, names = {}, list(scores)
    for j, b in enumerate(names):
        for a in names[:j]:
            differences[f"{b} - {a}"] = {
                metric: interval(scores[b][metric] - v) | {"win_rate": interval(wins(*better_first(metric, a, b)))}
                for metric, v in scores[a].items()
            }
    return {"models": models, "differences": differences}


def resolved(difference: Summary) -> int:
    """1 if the interval lies above 0, -1 if below, 0 if it holds 0: not resolved."""
    return int(difference["low"] > 0) - int(difference["high"] < 0)


def markdown(rows: dict[str, dict[str, Summary]], digits: int = 3, sign: str = "") -> str:
    """A table: a line for each of `rows`, a column for each metric, `mean [low, high]`. sign: "+" shows it."""

    def cell(summary: Summary) -> str:
        mean, low, high = (f"{summary[key]:{sign}.{digits}f}" for key in ("mean", "low", "high"))
        return f"{mean} [{low}, {high}]"

    metrics = list(next(iter(rows.values())))
    lines = [["", *metrics], ["---", *["---:"] * len(metrics)]]
    lines += [[name, *(cell(of[metric]) for metric in metrics)] for name, of in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
