"""Intervals that cover what they should, pairing, win rates, and the verdicts drawn from them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spin.eval import comparison as judge
from spin.eval import stats
from spin.eval import plots as viz
from spin.eval.stats import compare, interval, resolved, wins

seeds = st.integers(0, 2**32)


def sample(seed: int, count: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).exponential(size=count)


@given(seeds)
def test_an_interval_holds_the_mean_and_ignores_the_order(seed):
    values = sample(seed)
    found = interval(values)
    assert found["mean"] == pytest.approx(values.mean()) and found["n"] == 40
    assert found["low"] < found["mean"] < found["high"]
    assert interval(values * 3 + 1)["low"] == pytest.approx(3 * found["low"] + 1)
    wider = interval(values, level=0.99)
    assert wider["low"] < found["low"] and wider["high"] > found["high"]
    other = interval(np.random.default_rng(seed).permutation(values))
    assert other["low"] == pytest.approx(found["low"], abs=0.03) and other["mean"] == pytest.approx(found["mean"])


@pytest.mark.parametrize("value", [1.0, 0.3, 0.1 + 0.2, 7.66])
@pytest.mark.parametrize("count", [1, 7, 100, 200])
def test_equal_values_have_an_interval_without_width(value, count):
    assert interval(np.full(count, value)) == {"mean": value, "low": value, "high": value, "n": count}


def test_an_interval_is_that_of_a_normal_mean():
    values = np.random.default_rng(0).standard_normal(1000)
    found = interval(values)
    half = 1.96 * values.std() / np.sqrt(1000)
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.003)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.003)


def test_ninety_five_of_a_hundred_intervals_cover():
    covered = [f["low"] < 1 < f["high"] for f in (interval(sample(seed, 200)) for seed in range(400))]
    assert 0.91 < np.mean(covered) < 0.975  # the mean of 400 has a standard deviation of 0.011


def test_no_values_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        interval(np.array([]))


@given(seeds)
def test_win_rates_of_both_sides_make_one(seed):
    a, b = np.random.default_rng(seed).integers(0, 4, size=(2, 30))
    assert np.mean(wins(a, b)) + np.mean(wins(b, a)) == pytest.approx(1)
    assert list(wins([1, 2, 2], [2, 1, 2])) == [0, 1, 0.5]


def test_differences_are_paired():
    """Two models that agree but for 0.1 on prompts that differ widely: resolved only because pairs are compared."""
    hard = 10 * sample(0, 50)
    noise = 0.01 * np.random.default_rng(1).standard_normal(50)
    result = compare({"base": {"reward": hard}, "new": {"reward": hard + 0.1 + noise}})
    low, high = result["models"]["base"]["reward"]["low"], result["models"]["base"]["reward"]["high"]
    assert low < result["models"]["new"]["reward"]["mean"] < high
    difference = result["differences"]["new - base"]["reward"]
    assert difference["mean"] == pytest.approx(0.1, abs=0.01) and resolved(difference) == 1
    assert difference["win_rate"]["mean"] == 1
    assert resolved(compare({"a": {"r": hard}, "b": {"r": hard - 1}})["differences"]["b - a"]["r"]) == -1


@pytest.mark.parametrize("count", [10, 30, 100])
def test_equal_models_are_resolved_at_no_more_than_the_nominal_rate(count):
    values = np.random.default_rng(count).standard_normal((2, 3000, count))
    found = np.mean([resolved(interval(a - b)) != 0 for a, b in zip(*values)])
    assert 0.03 < found < 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / 3000)


def test_nothing_is_concluded_from_a_few_prompts():
    few = compare({"a": {"r": np.zeros(9)}, "b": {"r": np.ones(9)}})["differences"]["b - a"]["r"]
    assert few["low"] == few["high"] == 1 and resolved(few) == 0
    still = compare({name: {"reward": np.zeros(9)} for name in ("base", "sft")})["differences"]
    assert [line["verdict"] for line in judge.claims(still, "reward")] == ["is not resolved"]
    assert resolved(compare({"a": {"r": np.zeros(10)}, "b": {"r": np.ones(10)}})["differences"]["b - a"]["r"]) == 1


def rewards(**means: float) -> dict[str, dict[str, np.ndarray]]:
    spread = 0.01 * np.random.default_rng(0).standard_normal((len(means), 60))
    return {n.replace("_", "-"): {"reward": m + noise} for (n, m), noise in zip(means.items(), spread)}


def differences(**means: float) -> dict[str, dict]:
    return compare(rewards(**means))["differences"]


STORY = {"base": 7.0, "sft": 7.01, "dpo": 7.02, "spin_1": 7.1, "spin_2": 7.2, "spin_3": 7.3}


@pytest.mark.parametrize(
    "changed, verdicts",
    [
        ({}, ["holds"] * 5),
        ({"sft": 7.12}, ["fails", "holds", "fails", "holds", "holds"]),
        ({"sft": 6.5}, ["holds", "holds", "fails", "holds", "holds"]),  # ruined: that is no plateau
        ({"sft": 7.05}, ["holds", "holds", "is not resolved", "holds", "holds"]),
        ({"dpo": 7.2}, ["holds", "is not resolved", "holds", "holds", "holds"]),
        ({"spin_3": 7.15}, ["holds", "holds", "holds", "holds", "fails"]),
    ],
)
def test_claims(changed, verdicts):
    assert [found["verdict"] for found in judge.claims(differences(**STORY | changed), "reward")] == verdicts


def test_claims_need_their_models():
    found = judge.claims(differences(base=7.0, sft=7.0, spin_1=6.5), "reward")
    assert [(line["claim"], line["verdict"]) for line in found] == [
        ("SPIN-1 beats SFT", "fails"),
        ("SFT plateaus, staying within 0.05 of theta_0", "holds"),
    ]
    assert judge.claims(differences(base=7.0), "reward") == []
    plateau = [
        found for found in judge.claims(differences(base=7.0, sft=7.0), "reward") if "plateaus" in found["claim"]
    ]
    assert plateau and not judge.claims(
        compare({"base": {"hps": np.ones(3)}, "sft": {"hps": np.ones(3)}})["differences"], "hps"
    )


def test_less_is_better_where_one_says_so():
    a, b = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.5, 1.5, 2.5, 5.0])
    [found] = compare({"a": {"x": a, "y": a}, "b": {"x": b, "y": b}}, less_is_better=["y"])["differences"].values()
    assert found["x"]["win_rate"]["mean"] == 0.25 and found["y"]["win_rate"]["mean"] == 0.75
    assert found["x"]["mean"] == found["y"]["mean"] == -0.125


def test_the_report_says_what_the_numbers_say(tmp_path):
    found = judge.compare("a title", rewards(**STORY), [], "reward", {"seed": 3})
    judge.write(tmp_path, found | {"tables": {"more": {"a": {"b": 1.0}}}})
    text = (tmp_path / "results.md").read_text()
    assert text.startswith("# a title\n") and "\n\nmore\n\n|  | b |\n" in text
    assert "SPIN-1 beats SFT: this holds, the difference being +0.0" in text
    [line] = [line for line in text.splitlines() if line.startswith("| spin-3 - base ")]
    assert "| +0.2991 [+0.295" in line, "two digits of the interval's width are shown"
    [line] = [line for line in text.splitlines() if line.startswith("| spin-3 |") and "1.00 [1.00, 1.00]" in line]
    assert line == "| spin-3 | 1.00 [1.00, 1.00]" + " | 1.00 [1.00, 1.00]" * 4 + " |  |"
    assert "- reward: resolved: sft > base, dpo > base, " in text
    assert (tmp_path / "results.png").stat().st_size > 1000
    brief = judge.markdown(found, brief=True)
    assert "spin-3 - base" not in brief and "SPIN-1 beats SFT" in brief and "more" not in brief
    assert stats.markdown({"m": {"r": interval(np.full(4, 2.0))}}, 1).splitlines()[-1] == "| m | 2.0 [2.0, 2.0] |"


@given(seeds, st.integers(1, 6), st.integers(1, 3))
def test_the_best_of_k(seed, k, metrics):
    rng = np.random.default_rng(seed)
    scores = {f"m{i}": rng.standard_normal((20, k)) for i in range(metrics)}
    before = {name: values.copy() for name, values in scores.items()}
    found = stats.best_of(scores, list(scores))
    for n in range(20):
        averages = [np.mean([of[n, j] for of in scores.values()]) for j in range(k)]
        for name, values in scores.items():
            assert found[name][n] == values[n, int(np.argmax(averages))]
        assert metrics == 1 or found["average"][n] == pytest.approx(max(averages))
    assert ("average" in found) == (metrics > 1)
    assert all(np.array_equal(before[name], values) for name, values in scores.items())
    order = rng.permutation(20)
    shuffled = stats.best_of({name: values[order] for name, values in scores.items()}, list(scores))
    assert all(np.array_equal(shuffled[name], found[name][order]) for name in found)
    only = stats.best_of(scores, ["m0"])
    assert np.array_equal(only["m0"], scores["m0"].max(1)) and "average" not in only


@given(seeds)
def test_two_models_win_rates_add_up_to_one(seed):
    rng = np.random.default_rng(seed)
    scores = {name: {"r": rng.integers(0, 5, 30) / 4, "less": rng.integers(0, 5, 30) / 4} for name in "abc"}
    found = compare(scores, less_is_better=["less"])
    for metric, sign in (("r", 1), ("less", -1)):
        rates = stats.win_rates(found, metric)
        for one in "abc":
            assert rates[one][one] == ""
            for other in set("abc") - {one}:
                there, back = rates[one][other], rates[other][one]
                assert there["mean"] + back["mean"] == pytest.approx(1) == there["low"] + back["high"]
                assert there["low"] <= there["mean"] <= there["high"]
                won = wins(sign * scores[one][metric], sign * scores[other][metric])
                assert there["mean"] == pytest.approx(won.mean())
    order = rng.permutation(30)
    again = compare({name: {m: v[order] for m, v in of.items()} for name, of in scores.items()}, ["less"])
    for name, of in found["differences"].items():
        for metric, summary in of.items():
            assert again["differences"][name][metric]["mean"] == pytest.approx(summary["mean"])
            assert again["differences"][name][metric]["win_rate"]["mean"] == pytest.approx(summary["win_rate"]["mean"])


def test_verdicts_in_words():
    rng = np.random.default_rng(0)
    scores = {"a": {"r": rng.standard_normal(50)}}
    scores |= {"b": {"r": scores["a"]["r"] + 1}, "c": {"r": scores["a"]["r"] + rng.standard_normal(50)}}
    said = stats.verdicts(compare(scores)["differences"], "r")
    assert said == "resolved: b > a, c < b; not resolved: c and a"


def test_the_chart_puts_points_and_intervals_in_their_places():
    points = {"low": {"mean": 1.0, "low": 0.5, "high": 1.2}, "high": {"mean": 3.0, "low": 2.9, "high": 3.6}}
    chart = np.asarray(viz.interval_chart("reward", points, 460, 240))
    left, right = chart[:, 76:261], chart[:, 261:]
    dots = [np.argwhere((half == viz.COLOURS[1]).all(2))[:, 0].mean() for half in (left, right)]
    bars = [np.ptp(np.argwhere((half == viz.COLOURS[0]).all(2))[:, 0]) for half in (left, right)]
    assert dots[0] - dots[1] == pytest.approx(2 / (3.1 * 1.1) * 176, abs=2), "pixels for 2.0 on an axis of 3.1, padded"
    assert bars[0] == pytest.approx(bars[1], abs=3) and bars[0] == pytest.approx(0.7 / (3.1 * 1.1) * 176, abs=3)
