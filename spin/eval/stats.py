"""Bootstrap intervals, paired differences and win rates of scores. NumPy only; no model."""

import math
from collections.abc import Collection
from functools import lru_cache
from itertools import combinations
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000
FEW = 10  # a difference over fewer prompts is never called significant
Summary = dict[str, float]  # mean, low, high, n


def interval(values: np.ndarray, level: float = 0.95, seed: int = 0) -> Summary:
    """Return the mean of values [N] and a confidence interval for it: mean, low, high and n.

    The interval is for the mean of the population that the values are a sample of: a percentile
    bootstrap, widened by `small_sample_factor`, within the range of the values.
    If all values are equal, its width is 0, which is too narrow for rates near 0 or 1.
    Raises ValueError if there are no values.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(
            f"an interval needs a list of at least one number, not shape {values.shape}"
        )

    mean = values.mean()
    resampled_means = resample_weights(len(values), seed) @ values
    ends = np.quantile(resampled_means, [(1 - level) / 2, (1 + level) / 2])
    widened = mean + small_sample_factor(len(values), level) * (ends - mean)
    clipped = np.clip([mean, *widened], values.min(), values.max())
    mean, low, high = clipped.tolist()
    return {"mean": mean, "low": low, "high": high, "n": len(values)}


@lru_cache(maxsize=4)
def resample_weights(count: int, seed: int) -> np.ndarray:
    """Return [RESAMPLES,count]: the weight of each of `count` values in each resample's mean."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), RESAMPLES) / count


def small_sample_factor(count: int, level: float) -> float:
    """Return the factor by which a bootstrap interval of `count` values is too narrow.

    The bootstrap's variance divides by N instead of N - 1, and its quantiles are the normal's
    instead of Student's t, which is expanded here as in Abramowitz and Stegun, 26.7.5.
    """
    degrees = max(1, count - 1)
    z = NormalDist().inv_cdf((1 + level) / 2)
    first_order = (z**3 + z) / (4 * degrees)
    second_order = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    t = z + first_order + second_order
    return t / z * np.sqrt(1 + 1 / degrees)


def wins(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return 1 where a > b, 0 where a < b, and 1/2 where they tie."""
    return 0.5 * (1 + np.sign(np.asarray(a) - np.asarray(b)))


def best_of(scores: dict[str, np.ndarray], metrics: list[str]) -> dict[str, np.ndarray]:
    """Return each prompt's scores for the best of its k images: {metric: [N,k]} -> {metric: [N]}.

    The best image has the highest plain average of `metrics`; the first of those that tie.
    If there are several `metrics`, that average is returned as another metric, "average".
    """
    average = np.mean([scores[metric] for metric in metrics], axis=0)  # [N,k]
    candidates = dict(scores)
    if len(metrics) > 1:
        candidates = {"average": average, **scores}

    best = average.argmax(axis=1)
    rows = np.arange(len(best))
    return {metric: values[rows, best] for metric, values in candidates.items()}


def median_of(scores: dict[str, np.ndarray], metric: str) -> dict[str, np.ndarray]:
    """Return each prompt's scores for the image with the median of a metric, as `best_of` does.

    Of an even number of images it is the lower one of the two in the middle.
    """
    order = scores[metric].argsort(axis=1)  # [N,k]
    middle = order[:, (order.shape[1] - 1) // 2]
    rows = np.arange(len(middle))
    return {name: values[rows, middle] for name, values in scores.items()}


def summarize(scores: dict[str, np.ndarray]) -> dict[str, Summary]:
    """Return each metric's interval and "median": {metric: [N]} -> {metric: summary}."""
    summaries = {}
    for metric, values in scores.items():
        summaries[metric] = {**interval(values), "median": float(np.median(values))}
    return summaries


def compare(
    scores: dict[str, dict[str, np.ndarray]], less_is_better: Collection[str] = ()
) -> dict[str, dict]:
    """Summarize and compare models: {model: {metric: [N]}}, with the same N prompts for all.

    Return {"models", "differences"}:

    models: {model: what `summarize` returns}.
    differences: {"b - a": {metric: its interval and "win_rate"}}, paired by prompt, for every
        model b and each model a before it. win_rate: the interval of how often b is better.

    less_is_better: the metrics of which a lower score wins.
    """
    models = {name: summarize(scores_of_model) for name, scores_of_model in scores.items()}
    differences: dict[str, dict] = {}
    for a, b in combinations(scores, 2):
        pair = {}
        for metric in scores[a]:
            difference = scores[b][metric] - scores[a][metric]
            won = wins(difference, 0)
            if metric in less_is_better:
                won = 1 - won
            pair[metric] = {**interval(difference), "win_rate": interval(won)}
        differences[f"{b} - {a}"] = pair
    return {"models": models, "differences": differences}


def win_rates(compared: dict, metric: str) -> dict[str, dict[str, Summary | str]]:
    """Return {a: {b: how often a is better than b}} from what `compare` returned; "" for b = a."""
    names = list(compared["models"])
    rates: dict[str, dict[str, Summary | str]] = {name: dict.fromkeys(names, "") for name in names}
    for pair, metrics in compared["differences"].items():
        b, a = pair.split(" - ")
        rate = metrics[metric]["win_rate"]
        rates[b][a] = rate
        rates[a][b] = {
            "mean": 1 - rate["mean"],
            "low": 1 - rate["high"],
            "high": 1 - rate["low"],
        }
    return rates


def significant_sign(difference: Summary) -> int:
    """Return 1 or -1 if a difference is significantly above or below 0, and 0 if neither.

    It is significant if its interval excludes 0 and is over at least FEW prompts.
    """
    if difference["n"] < FEW:
        return 0
    if difference["low"] > 0:
        return 1
    if difference["high"] < 0:
        return -1
    return 0


def format_cell(value: Summary | float | str, digits: int = 3, sign: str = "") -> str:
    """Return a table's cell: `mean [low, high]`, a number, or a text as it is.

    An interval has more than `digits` decimals if two digits of its width need them.
    sign: "+" shows the sign of positive numbers too.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        return f"{value:{sign}.{digits}f}"

    width = value["high"] - value["low"]
    if width > 1e-9:
        digits = max(digits, 1 - math.floor(math.log10(width)))
    mean = f"{value['mean']:{sign}.{digits}f}"
    low = f"{value['low']:{sign}.{digits}f}"
    high = f"{value['high']:{sign}.{digits}f}"
    return f"{mean} [{low}, {high}]"


def format_table(
    rows: dict[str, dict[str, Summary | float | str]],
    digits: int = 3,
    sign: str = "",
    corner: str = "",
) -> str:
    """Return a Markdown table: a line for each of `rows`, a column for each key of its values.

    Its columns are aligned, so that a terminal shows a table, too.
    corner: the first column's title.
    """
    columns = list(next(iter(rows.values())))
    lines = [[corner, *columns]]
    for name, row in rows.items():
        cells = [format_cell(row[column], digits, sign) for column in columns]
        lines.append([name, *cells])

    widths = []
    for column in zip(*lines):
        widths.append(max(3, *(len(cell) for cell in column)))
    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines.insert(1, rules)
    texts = []
    for first, *others in lines:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        texts.append(f"| {' | '.join(cells)} |")
    return "\n".join(texts)
