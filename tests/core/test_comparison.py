"""The paper's claims, the verdicts on them, and the files that state them."""

import json

import numpy as np
import pytest
from PIL import Image

from spin.eval import comparison, stats
from spin.eval.comparison import ModelSource, judge_claims

STORY = {"base": 7.0, "sft": 7.01, "dpo": 7.02, "spin-1": 7.1, "spin-2": 7.2, "spin-3": 7.3}


def rewards(means: dict[str, float], count: int = 60) -> dict[str, dict[str, np.ndarray]]:
    """Return scores with these means, up to noise of 0.01."""
    noise = 0.01 * np.random.default_rng(0).standard_normal((len(means), count))
    return {name: {"reward": means[name] + row} for name, row in zip(means, noise)}


def differences(means: dict[str, float], count: int = 60) -> dict[str, dict]:
    return stats.compare(rewards(means, count))["differences"]


# ---- Claims --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed, verdicts",
    [
        ({}, ["holds", "holds", "holds", "holds", "holds"]),
        ({"sft": 7.12}, ["fails", "holds", "fails", "holds", "holds"]),
        ({"sft": 6.5}, ["holds", "holds", "fails", "holds", "holds"]),  # ruined is no plateau
        ({"sft": 7.05}, ["holds", "holds", "undecided", "holds", "holds"]),
        ({"dpo": 7.2}, ["holds", "undecided", "holds", "holds", "holds"]),
        ({"spin-3": 7.15}, ["holds", "holds", "holds", "holds", "fails"]),
    ],
)
def test_verdicts(changed, verdicts):
    claims = judge_claims(differences({**STORY, **changed}), "reward")
    assert [claim["claim"] for claim in claims] == [
        "SPIN-1 beats SFT",
        "SPIN-2 beats Diffusion-DPO",
        "SFT stays within 0.05 of theta_0",
        "SPIN-2 beats SPIN-1",
        "SPIN-3 beats SPIN-2",
    ]
    assert [claim["verdict"] for claim in claims] == verdicts


def test_a_claim_needs_its_models():
    assert judge_claims(differences({"base": 7.0}), "reward") == []
    assert judge_claims(differences({"base": 7.0, "spin-1": 7.0, "spin-3": 7.0}), "reward") == []
    [claim] = judge_claims(differences({"sft": 7.0, "spin-1": 6.5}), "reward")
    assert claim["claim"] == "SPIN-1 beats SFT" and claim["verdict"] == "fails"
    assert claim["difference"]["mean"] == pytest.approx(-0.5, abs=0.01)


def test_a_bounded_player_is_compared_with_the_spin_player_of_its_iteration():
    means = {"spin-1": 7.0, "spin-2": 7.2, "bounded-1": 7.1, "bounded-2": 7.1}
    claims = judge_claims(differences(means), "reward")
    verdicts = {claim["claim"]: claim["verdict"] for claim in claims}
    assert verdicts == {
        "SPIN-2 beats SPIN-1": "holds",
        "bounded-1 beats SPIN-1": "holds",
        "bounded-2 beats SPIN-2": "fails",
    }


def test_a_plateau_is_of_the_reward_alone():
    ones = {"hps": np.ones(20)}
    compared = stats.compare({"base": ones, "sft": ones})
    assert judge_claims(compared["differences"], "hps") == []


@pytest.mark.parametrize("names", [("base", "sft"), ("sft", "spin-1")])
def test_few_prompts_decide_nothing(names):
    few = differences({names[0]: 7.0, names[1]: 7.0}, count=9)
    assert [claim["verdict"] for claim in judge_claims(few, "reward")] == ["undecided"]


# ---- Files ---------------------------------------------------------------------------------------


def compare_story(means: dict[str, float]) -> dict:
    return comparison.compare("a title", "guidance 3", rewards(means), [], "reward", {"seed": 3})


def compare_both(at_best: dict[str, float]) -> dict:
    """Return STORY's results at one guidance, and others at each model's best."""
    results = compare_story(STORY)
    scores = rewards(at_best)
    best = comparison.compare("a title", "best guidance", scores, [], "reward", {})
    return {**results, "at_best_guidance": best}


def test_the_report_states_what_the_numbers_are(tmp_path):
    results = compare_story(STORY)
    results["tables"] = {"more": {"a": {"b": 1.0}}}
    comparison.write_results(tmp_path, results)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert Image.open(tmp_path / "results.png").width >= 460

    lines = (tmp_path / "results.md").read_text().splitlines()
    assert lines[0] == "# a title, guidance 3"
    assert cells(lines[lines.index("more") + 2]) == ["", "b"]
    [claim] = [cells(line) for line in lines if "beats SFT" in line]
    assert claim[0] == "SPIN-1 beats SFT" and claim[1].startswith("holds, +0.0")
    [difference] = [line for line in lines if line.startswith("| spin-3 - base ")]
    assert "| +0.2991 [+0.295" in difference and difference.endswith("] * |")
    assert ["spin-3", *["1.00 [1.00, 1.00]"] * 5, ""] in [cells(line) for line in lines]


def test_a_difference_that_is_not_significant_has_no_mark():
    text = comparison.format_markdown(compare_story({"a": 7.0, "b": 7.0}))
    [difference] = [line for line in text.splitlines() if line.startswith("| b - a ")]
    assert difference.endswith("] |")


def test_the_summary_is_the_table_of_scores_and_the_verdicts():
    text = comparison.format_summary(compare_story(STORY))
    assert "spin-3 - base" not in text and "Medians" not in text
    assert "| spin-3 | 7.2" in text and "SPIN-1 beats SFT" in text
    assert comparison.format_markdown(compare_story(STORY)).startswith(text)


def test_two_verdicts_stand_side_by_side():
    results = compare_both({**STORY, "spin-1": 6.5})
    lines = comparison.format_summary(results).splitlines()
    assert lines[0] == "# a title"
    assert cells(lines[2]) == ["", "reward, guidance 3", "reward, best guidance"]
    [scores] = [cells(line) for line in lines if line.startswith("| spin-1 ")]
    assert scores[1].startswith("7.09") and scores[2].startswith("6.49")
    [claim] = [cells(line) for line in lines if "SPIN-1 beats SFT" in line]
    assert claim[1].startswith("holds, +0.0873") and claim[2].startswith("fails, -0.5")

    text = comparison.format_markdown(results)
    assert text.index("# a title, guidance 3\n") < text.index("# a title, best guidance\n")
    assert text.count("| spin-3 - base ") == 2


def test_the_chart_has_a_panel_for_each_verdict():
    one = comparison.results_chart(compare_story(STORY))
    two = comparison.results_chart(compare_both(STORY))
    assert two.width == 2 * one.width and two.height == one.height


def cells(line: str) -> list[str]:
    """Return the cells of a table's line."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_metrics_of_which_less_is_better_are_named():
    scores = rewards({"a": 7.0, "b": 7.5})
    results = comparison.compare("a title", "guidance 3", scores, ["reward"], "reward", {})
    text = " ".join(comparison.format_markdown(results).split())
    assert "Lower is better: reward." in text
    assert stats.win_rates(results, "reward")["a"]["b"]["mean"] == 1


def test_a_single_model_needs_no_comparison(tmp_path):
    comparison.write_results(tmp_path, compare_story({"base": 7.0}))
    text = (tmp_path / "results.md").read_text()
    assert "Differences" not in text and "beats" not in text


# ---- Models --------------------------------------------------------------------------------------


def test_a_checkpoint_that_models_share_is_hashed_once(monkeypatch, tmp_path):
    hashed = []

    def record(path):
        hashed.append(path.name)
        return f"hash of {path.name}"

    monkeypatch.setattr(comparison, "hash_checkpoint", record)
    for name in ("base", "unet", "other"):
        (tmp_path / name).mkdir()
    base = str(tmp_path / "base")
    models = {
        "base": ModelSource(base),
        "tuned": ModelSource(base, unet=str(tmp_path / "unet")),
        "other": ModelSource(str(tmp_path / "other")),
    }
    assert comparison.hash_models(models) == {
        "base": "hash of base",
        "tuned": "hash of base-hash of unet",
        "other": "hash of other",
    }
    assert sorted(hashed) == ["base", "other", "unet"]
