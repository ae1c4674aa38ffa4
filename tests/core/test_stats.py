"""Intervals that cover what they should, pairing, win rates, significance, tables."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spin.eval import stats
from spin.eval.stats import compare, interval, significant_sign, wins

seeds = st.integers(0, 2**32)


def exponential(seed: int, count: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).exponential(size=count)


# ---- Intervals -----------------------------------------------------------------------------------


@given(seeds)
def test_an_interval_holds_the_mean_and_ignores_the_order(seed):
    values = exponential(seed)
    found = interval(values)
    assert found["mean"] == pytest.approx(values.mean()) and found["n"] == 40
    assert found["low"] < found["mean"] < found["high"]

    wider = interval(values, level=0.99)
    assert wider["low"] < found["low"] and wider["high"] > found["high"]

    shuffled = interval(np.random.default_rng(seed).permutation(values))
    assert shuffled["low"] == pytest.approx(found["low"], abs=0.03)
    assert shuffled["mean"] == pytest.approx(found["mean"])


@given(seeds)
def test_an_interval_scales_and_shifts_with_its_values(seed):
    values = exponential(seed)
    found = interval(values)
    moved = interval(values * 3 + 1)
    for key in ("mean", "low", "high"):
        assert moved[key] == pytest.approx(3 * found[key] + 1)


@pytest.mark.parametrize("value", [1.0, 0.3, 0.1 + 0.2, 7.66])
@pytest.mark.parametrize("count", [1, 7, 100, 200])
def test_equal_values_have_an_interval_without_width(value, count):
    expected = {"mean": value, "low": value, "high": value, "n": count}
    assert interval(np.full(count, value)) == expected


def test_an_interval_is_that_of_a_normal_mean():
    values = np.random.default_rng(0).standard_normal(1000)
    found = interval(values)
    half = 1.96 * values.std() / np.sqrt(1000)
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.003)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.003)


def test_ninety_five_of_a_hundred_intervals_cover():
    covered = []
    for seed in range(400):
        found = interval(exponential(seed, 200))
        covered.append(found["low"] < 1 < found["high"])
    assert 0.91 < np.mean(covered) < 0.975  # the mean of 400 has a standard deviation of 0.011


@pytest.mark.parametrize("count, t", [(10, 2.2622), (30, 2.0452), (100, 1.9842)])
def test_few_values_widen_an_interval_as_students_t_does(count, t):
    """t: the 97.5 % quantile of Student's t with count - 1 degrees of freedom, from a table."""
    expected = t / 1.95996 * np.sqrt(count / (count - 1))
    assert stats.small_sample_factor(count, 0.95) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]]])
def test_what_is_no_list_of_values_is_refused(values):
    with pytest.raises(ValueError, match="at least one"):
        interval(np.array(values))


# ---- Comparisons ---------------------------------------------------------------------------------


@given(seeds)
def test_win_rates_of_both_sides_make_one(seed):
    a, b = np.random.default_rng(seed).integers(0, 4, size=(2, 30))
    assert np.mean(wins(a, b)) + np.mean(wins(b, a)) == pytest.approx(1)
    assert list(wins([1, 2, 2], [2, 1, 2])) == [0, 1, 0.5]


def test_differences_are_paired():
    """Two models differ by 0.1 on prompts that differ widely: only pairing makes it significant."""
    hard = 10 * exponential(0, 50)
    noise = 0.01 * np.random.default_rng(1).standard_normal(50)
    result = compare({"base": {"reward": hard}, "new": {"reward": hard + 0.1 + noise}})

    base = result["models"]["base"]["reward"]
    assert base["low"] < result["models"]["new"]["reward"]["mean"] < base["high"]
    assert base["median"] == pytest.approx(np.median(hard))

    difference = result["differences"]["new - base"]["reward"]
    assert difference["mean"] == pytest.approx(0.1, abs=0.01)
    assert difference["win_rate"]["mean"] == 1
    assert significant_sign(difference) == 1


def test_every_model_is_compared_with_each_one_before_it():
    scores = {name: {"r": np.array([value])} for name, value in [("a", 1), ("b", 3), ("c", 7)]}
    differences = compare(scores)["differences"]
    means = {pair: metrics["r"]["mean"] for pair, metrics in differences.items()}
    assert means == {"b - a": 2, "c - a": 6, "c - b": 4}


def test_less_is_better_where_one_says_so():
    a = np.array([1.0, 2.0, 3.0, 4.0])
    b = np.array([0.5, 1.5, 2.5, 5.0])
    result = compare({"a": {"x": a, "y": a}, "b": {"x": b, "y": b}}, less_is_better=["y"])
    found = result["differences"]["b - a"]
    assert found["x"]["win_rate"]["mean"] == 0.25
    assert found["y"]["win_rate"]["mean"] == 0.75
    assert found["x"]["mean"] == found["y"]["mean"] == -0.125


@given(seeds)
def test_two_models_win_rates_add_up_to_one(seed):
    rng = np.random.default_rng(seed)
    scores = {}
    for name in "abc":
        scores[name] = {"r": rng.integers(0, 5, 30) / 4, "less": rng.integers(0, 5, 30) / 4}
    compared = compare(scores, less_is_better=["less"])

    for metric, sign in (("r", 1), ("less", -1)):
        rates = stats.win_rates(compared, metric)
        for a, b in [("a", "b"), ("a", "c"), ("b", "c"), ("c", "a")]:
            there = rates[a][b]
            back = rates[b][a]
            assert there["mean"] + back["mean"] == pytest.approx(1)
            assert there["low"] + back["high"] == pytest.approx(1)
            assert there["low"] <= there["mean"] <= there["high"]
            won = wins(sign * scores[a][metric], sign * scores[b][metric])
            assert there["mean"] == pytest.approx(won.mean())
        assert rates["a"]["a"] == rates["b"]["b"] == rates["c"]["c"] == ""


@given(seeds)
def test_the_order_of_prompts_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    scores = {name: {"r": rng.integers(0, 5, 30) / 4} for name in "ab"}
    order = rng.permutation(30)
    shuffled = {name: {"r": metrics["r"][order]} for name, metrics in scores.items()}
    expected = compare(scores)["differences"]["b - a"]["r"]
    found = compare(shuffled)["differences"]["b - a"]["r"]
    assert found["mean"] == pytest.approx(expected["mean"])
    assert found["win_rate"]["mean"] == pytest.approx(expected["win_rate"]["mean"])


# ---- Significance --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "low, high, n, sign",
    [(0.1, 0.2, 10, 1), (-0.2, -0.1, 10, -1), (-0.1, 0.1, 10, 0), (0, 1, 10, 0), (1, 1, 9, 0)],
)
def test_a_difference_is_significant_if_its_interval_excludes_zero(low, high, n, sign):
    """And if it is over at least ten prompts."""
    assert significant_sign({"mean": (low + high) / 2, "low": low, "high": high, "n": n}) == sign


@pytest.mark.parametrize("count", [10, 30, 100])
def test_equal_models_differ_significantly_at_no_more_than_the_nominal_rate(count):
    a, b = np.random.default_rng(count).standard_normal((2, 3000, count))
    signs = [significant_sign(interval(difference)) for difference in a - b]
    rate = np.mean(np.array(signs) != 0)
    assert 0.03 < rate < 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / 3000)


# ---- The best of k -------------------------------------------------------------------------------


@given(seeds, st.integers(1, 6), st.integers(1, 3))
def test_the_best_of_k(seed, k, num_metrics):
    rng = np.random.default_rng(seed)
    scores = {f"m{i}": rng.standard_normal((20, k)) for i in range(num_metrics)}
    before = {metric: values.copy() for metric, values in scores.items()}
    found = stats.best_of(scores, list(scores))

    average = sum(scores.values()) / num_metrics  # [20,k]
    best = average.argmax(axis=1)
    for metric, values in scores.items():
        assert np.array_equal(found[metric], values[range(20), best])
        assert np.array_equal(values, before[metric])
    assert ("average" in found) == (num_metrics > 1)
    if num_metrics > 1:
        np.testing.assert_allclose(found["average"], average.max(axis=1))


@given(seeds, st.integers(1, 6))
def test_the_best_of_k_by_one_metric_of_several(seed, k):
    rng = np.random.default_rng(seed)
    scores = {"by": rng.standard_normal((20, k)), "other": rng.standard_normal((20, k))}
    found = stats.best_of(scores, ["by"])
    assert np.array_equal(found["by"], scores["by"].max(axis=1))
    assert set(found) == {"by", "other"}


def test_the_first_of_equal_images_is_the_best():
    found = stats.best_of({"by": np.ones((1, 3)), "tag": np.array([[7, 8, 9]])}, ["by"])
    assert found["tag"].tolist() == [7]


@pytest.mark.parametrize("k, middle", [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2)])
def test_the_image_with_the_median_score(k, middle):
    """Of an even number, the lower of the two in the middle."""
    rng = np.random.default_rng(k)
    scores = {"by": rng.standard_normal((20, k)), "other": rng.standard_normal((20, k))}
    found = stats.median_of(scores, "by")
    np.testing.assert_array_equal(found["by"], np.sort(scores["by"], axis=1)[:, middle])
    for row in range(20):
        image = list(scores["by"][row]).index(found["by"][row])
        assert found["other"][row] == scores["other"][row, image]


# ---- Tables --------------------------------------------------------------------------------------


def test_a_table_has_a_line_for_each_row():
    rows = {"a": {"x": 1.0, "y": "text"}, "b": {"x": interval(np.full(4, 2.0)), "y": -0.5}}
    assert stats.format_table(rows, digits=1, sign="+").splitlines() == [
        "|     |                 x |    y |",
        "| --- | ----------------: | ---: |",
        "| a   |              +1.0 | text |",
        "| b   | +2.0 [+2.0, +2.0] | -0.5 |",
    ]


def test_a_cell_shows_two_digits_of_an_intervals_width():
    narrow = {"mean": 0.29912, "low": 0.29541, "high": 0.30271}
    assert stats.format_cell(narrow) == "0.2991 [0.2954, 0.3027]"
    wide = {"mean": 29.912, "low": -29.541, "high": 30.271}
    assert stats.format_cell(wide) == "29.912 [-29.541, 30.271]"
