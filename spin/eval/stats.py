"""Bootstrap intervals, paired differences and win rates of scores: NumPy arrays, no model."""

import math
from collections.abc import Collection, Sequence
from functools import lru_cache
from itertools import combinations
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000
FEW = 10  # prompts: from fewer nothing is concluded
Summary = dict[str, float]


def interval(values: np.ndarray, level: float = 0.95, seed: int = 0) -> Summary:
    """mean, low, high, n of values [N]: an interval for the mean over what the N stand for. The percentile bootstrap's,
    resampled RESAMPLES times, widened as Student's t is over the normal, which N values call for. Where all N agree it
    has no width, its weakness for shares near 0 or 1. ValueError for no values."""
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"an interval needs a list of at least one number, not shape {values.shape}")
    low, high = np.quantile(shares(len(values), seed) @ values, [(1 - level) / 2, (1 + level) / 2])
    z, freedom = NormalDist().inv_cdf((1 + level) / 2), max(1, len(values) - 1)
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)  # Student's, about
    wider = t / z * np.sqrt(1 + 1 / freedom)
    low, high = values.mean() + wider * (np.array([low, high]) - values.mean())
    found = np.clip([values.mean(), low, high], values.min(), values.max())  # which widening may leave
    return dict(zip(("mean", "low", "high"), found.tolist())) | {"n": len(values)}


@lru_cache(maxsize=4)
def shares(count: int, seed: int) -> np.ndarray:
    """[RESAMPLES,count]: the share that each of `count` values has in each resample."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES) / count


def wins(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 where a > b, 0 where a < b, one half where they tie."""
    return 0.5 * (1 + np.sign(np.asarray(a) - np.asarray(b)))


def best_of(scores: dict[str, np.ndarray], judged_by: Sequence[str]) -> dict[str, np.ndarray]:
    """{metric: [N,k]} -> {metric: [N]}: of a prompt's k pictures the one with most on the plain average of `judged_by`.
    The first of those that tie. That average is a metric of its own, "average", where it is one of several."""
    average = np.mean([scores[metric] for metric in judged_by], axis=0)
    scores = {"average": average} | scores if len(judged_by) > 1 else scores
    return {metric: np.take_along_axis(v, average.argmax(1)[:, None], 1)[:, 0] for metric, v in scores.items()}


def compare(scores: dict[str, dict[str, np.ndarray]], less_is_better: Collection[str] = ()) -> dict[str, dict]:
    """{model: {metric: [N]}}, prompt i being the same for all -> {"models": ..., "differences": ...}.
    models: {model: {metric: interval, with "median"}}. differences, paired by prompt, of every two, the later minus the
    earlier: {"b - a": {metric: interval, with "win_rate": interval of how often b is better}}; better is more, or less.
    """
    told = lambda v: interval(v) | {"median": float(np.median(v))}  # noqa: E731
    models = {name: {metric: told(v) for metric, v in of.items()} for name, of in scores.items()}
    differences: dict[str, dict] = {}
    for a, b in combinations(scores, 2):
        of = differences[f"{b} - {a}"] = {}
        for metric in scores[a]:
            x, y = scores[b][metric], scores[a][metric]
            won = wins(y, x) if metric in less_is_better else wins(x, y)
            of[metric] = interval(x - y) | {"win_rate": interval(won)}
    return {"models": models, "differences": differences}


def win_rates(compared: dict, metric: str) -> dict[str, dict[str, Summary | str]]:
    """{a: {b: how often a is better than b}}, every model against every other, from what `compare` found."""
    rates: dict[str, dict[str, Summary | str]] = {a: dict.fromkeys(compared["models"], "") for a in compared["models"]}
    for name, of in compared["differences"].items():
        (b, a), won = name.split(" - "), of[metric]["win_rate"]
        rates[b][a] = won
        rates[a][b] = {"mean": 1 - won["mean"], "low": 1 - won["high"], "high": 1 - won["low"]}
    return rates


def resolved(difference: Summary) -> int:
    """1 if the interval lies above 0, -1 if below, 0 if it holds 0, or is of fewer than FEW: not resolved."""
    return 0 if difference["n"] < FEW else int(difference["low"] > 0) - int(difference["high"] < 0)


def verdicts(differences: dict[str, dict], metric: str) -> str:
    """Which models' means differ, in words."""
    signs = {name: resolved(of[metric]) for name, of in differences.items()}
    said = [name.replace(" - ", " > " if sign > 0 else " < ") for name, sign in signs.items() if sign]
    open_ones = [name.replace(" - ", " and ") for name, sign in signs.items() if not sign]
    return f"resolved: {', '.join(said) or 'none'}; not resolved: {', '.join(open_ones) or 'none'}"


def markdown(rows: dict[str, dict[str, Summary | float | str]], digits: int = 3, sign: str = "") -> str:
    """A table: a line for each of `rows`, a column for each metric, `mean [low, high]`. sign: "+" shows it."""

    def cell(value: Summary | float | str) -> str:
        if isinstance(value, dict):
            width = value["high"] - value["low"]  # of which two digits are shown, where `digits` would not
            places = max(digits, 1 - math.floor(math.log10(width))) if width > 1e-9 else digits
            mean, low, high = (f"{value[key]:{sign}.{places}f}" for key in ("mean", "low", "high"))
            return f"{mean} [{low}, {high}]"
        return value if isinstance(value, str) else f"{value:{sign}.{digits}f}"

    metrics = list(next(iter(rows.values())))
    lines = [["", *metrics], ["---", *["---:"] * len(metrics)]]
    lines += [[name, *(cell(of[metric]) for metric in metrics)] for name, of in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
