"""The intervals in the README and the tutorial are those of the committed results.

Each claim below names words and results. Its page must have a sentence, a list item or a table row
with these words and exactly these intervals, in this order.
"""

import json
import re
from pathlib import Path

import pytest

from spin.config import TOY
from tutorial import tune_toy
from tutorial.findings import Comparison, Scores, pooled

ROOT = Path(__file__).parent.parent.parent
EVIDENCE = json.loads((ROOT / "tutorial/evidence/evidence.json").read_text())
TUNING = json.loads((ROOT / "tutorial/evidence/tuning.json").read_text())
INTERVAL = re.compile(r"[+-]\d+\.\d+ \[[+-]\d+\.\d+, [+-]\d+\.\d+\]")

SPIN_1_SFT = "claims/claims/SPIN-1 beats SFT"
SPIN_2_DPO = "claims/claims/SPIN-2 beats Diffusion-DPO"
SFT_300 = "claims/claims/SFT plateaus: 300 steps stay within 0.05 of theta_0"
SFT_900 = "claims/claims/SFT plateaus: 900 steps stay within 0.05 of theta_0"
RENEWED = "claims/claims/a renewed opponent helps: SPIN-3 beats 300 steps against theta_0"
CONTINUED = "claims/claims/so does continuing: 300 steps against theta_0 beat 100, SPIN-1"
WEB_SPIN_3_SFT = "web/claims/SPIN-3 beats SFT"
AT_1 = "learned/gains/at guidance 1"
AT_2 = "learned/gains/at guidance 2"
AT_3 = "learned/gains/at guidance 3"
PIXELS = "learned/gains/at 3, through pixels"
TRACELESS = "ending/gains/SPIN-1 whose opponents drew so"

# {page: [(words, results by their place in evidence.json)]}
CLAIMS = {
    "tutorial/11_stable_diffusion.md": [
        ("theta_0", ["ending/alone/at_3/clean"]),
    ],
    "tutorial/16_explanations.md": [
        ("SPIN-3 minus such a control was not resolved", [f"{RENEWED}/single"]),
    ],
    "tutorial/21_appendix.md": [
        ("SPIN-3 minus SPIN-2", ["claims/claims/SPIN-3 beats SPIN-2/five"]),
    ],
    "tutorial/evidence/earlier_world.md": [
        # 1. The four claims
        (
            "SPIN-1 beats SFT by",
            [
                f"{SPIN_1_SFT}/five",
                f"{SPIN_2_DPO}/five",
                f"{SPIN_1_SFT}/clean_five",
                f"{SPIN_2_DPO}/clean_five",
            ],
        ),
        (
            "By the best of five images",
            [f"{SPIN_1_SFT}/best_of_five", f"{SPIN_2_DPO}/best_of_five"],
        ),
        ("SFT stands still", [f"{SFT_300}/five", f"{SFT_900}/single", f"{SFT_300}/single"]),
        ("SPIN-1's own gain over theta_0", ["claims/gains/SPIN-1/single"]),
        (
            "SPIN-1 less SFT is",
            [
                f"{SPIN_1_SFT}/best_guidance",
                f"{SPIN_2_DPO}/best_guidance",
                f"{SPIN_2_DPO}/clean_best_guidance",
            ],
        ),
        ("at guidance 2 instead of 3", ["claims/theta_0/guidance/at_2"]),
        (
            "SPIN-2 beats SPIN-1 by the mean of five",
            ["claims/claims/SPIN-2 beats SPIN-1/five", "claims/claims/SPIN-3 beats SPIN-2/five"],
        ),
        (
            "Three hundred steps against theta_0 alone",
            ["claims/gains/SPIN, 300 steps at theta_0/single", f"{RENEWED}/single"],
        ),
        ("from 100 to 300 steps", [f"{CONTINUED}/single", f"{CONTINUED}/clean"]),
        # 2. From a base that is not at its plateau
        (
            "At 3 SFT gains",
            [
                "web/gains/SFT/single",
                "web/claims/SPIN-1 beats SFT/single",
                f"{WEB_SPIN_3_SFT}/single",
            ],
        ),
        ("SPIN-3 beats DPO", ["web/claims/SPIN-3 beats DPO/single"]),
        ("best guidance of 1 to 5", [f"{WEB_SPIN_3_SFT}/best_guidance"]),
        ("the fraction of images that show all of it", [f"{WEB_SPIN_3_SFT}/aligned"]),
        ("of clean SPIN-3 gains", ["web/gains/SPIN-3/clean", f"{WEB_SPIN_3_SFT}/clean"]),
        ("its best guidance for reward", [f"{WEB_SPIN_3_SFT}/clean_best_guidance"]),
        ("as it should for a model that learns", ["web/gains/SFT/held_out_percent"]),
        (
            "SPIN-1 leaves it as it was",
            ["web/gains/SPIN-1/held_out_percent", "web/gains/SPIN-3/held_out_percent"],
        ),
        # 3. What is learned
        (
            "Opponents *without* guidance",
            [f"{AT_1}/at_1/reward", f"{AT_1}/at_3/reward", f"{AT_1}/at_1/clean"],
        ),
        ("Opponents at 2", [f"{AT_2}/at_1/clean", f"{AT_2}/at_3/clean", f"{AT_2}/at_5/clean"]),
        ("Opponents at 3", [f"{AT_3}/at_1/clean", f"{AT_3}/at_3/clean", f"{AT_3}/at_5/clean"]),
        (
            "sampled in 50",
            [
                "learned/gains/at 3, 50 sampling steps/clean_less_reference",
                "learned/judged_at_50/difference/clean",
            ],
        ),
        (
            "theta_0 gains without training",
            ["ending/alone/at_3/clean", "ending/alone/at_3/reward", f"{AT_3}/at_3/clean"],
        ),
        ("With both models judged so", ["ending/change/at_3/clean"]),
        ("opponents left no trace", ["ending/change_traceless/at_3/clean"]),
        ("what the trace has taught", ["ending/made_up/at_3/clean", "ending/made_up/at_5/clean"]),
        (
            "Where nothing leaves a trace",
            [
                f"{TRACELESS}/at_3/clean",
                f"{TRACELESS}/at_5/clean",
                "ending/gains/that one, both judged as usual/at_3/clean",
                "ending/less_usual/at_3/clean",
            ],
        ),
        (
            "The error of the predicted noise",
            [
                "claims/gains/SPIN-1/held_out_percent",
                "claims/gains/SPIN-2/held_out_percent",
                "claims/gains/SFT, 300 steps/held_out_percent",
            ],
        ),
        (
            "rounded to 8 bits",
            [
                f"{PIXELS}/at_3/clean",
                f"{PIXELS}/clean_less_reference",
                f"{PIXELS}/at_1/clean",
                f"{PIXELS}/reward_less_reference",
            ],
        ),
        ("On stored paths", ["learned/gains/at 3, (C.5) on the path/at_3/reward"]),
        # 4. Choices that the paper leaves open
        (
            "independent noise less shared",
            [
                "choices/rows/independent noise/reward_less_reference",
                "choices/rows/independent noise/clean_less_reference",
            ],
        ),
        ("hinge and logistic", ["choices/rows/hinge/clean_less_reference"]),
        (
            "Correlation, which never saturates",
            [
                "choices/rows/correlation/reward_less_reference",
                "choices/rows/correlation/clean_less_reference",
            ],
        ),
        (
            "Prompt dropout",
            ["choices/rows/a tenth of the prompts dropped/reward_less_reference"],
        ),
        ("With beta 200 clean falls", ["map/cells/0/clean", "map/cells/12/clean"]),
        (
            "One iteration of 600 steps",
            [
                "lengths/rows/1 x 600 steps/reward_less_reference",
                "lengths/rows/2 x 225 steps/clean_less_reference",
            ],
        ),
        ("One of 300, the cheapest", ["lengths/rows/1 x 300 steps/reward_less_reference"]),
        # 5. The failure on purpose
        ("With beta 200 and learning rate 1e-4", ["failure/failure/reward"]),
    ],
}


def find_result(place: str) -> dict:
    """Return the result at a place in evidence.json: keys, numbers of rows, or a claim's text."""
    value = EVIDENCE
    for key in place.split("/"):
        if isinstance(value, dict):
            value = value[key]
        elif key.isdecimal():
            value = value[int(key)]
        else:
            [value] = [row for row in value if row["claim"] == key]
    return value


def format_result(place: str) -> str:
    result = find_result(place)
    digits = 1 if place.endswith("percent") else 3
    mean, low, high = [f"{result[key]:+.{digits}f}" for key in ("mean", "low", "high")]
    return f"{mean} [{low}, {high}]"


def sentences(page: str) -> list[str]:
    """Split a page's prose into sentences, list items and rows of tables, each on one line."""
    prose = re.sub(r"^ *```.*?^ *```$", "", page, flags=re.MULTILINE | re.DOTALL)
    pieces = re.split(r"\n\s*\n|\n(?=\||- )", prose)
    lines = [" ".join(piece.split()) for piece in pieces]
    found = []
    for line in lines:
        found += re.split(r"(?<=\.)[*)]*\s+", line)
    return found


CASES = [(page, words, places) for page in CLAIMS for words, places in CLAIMS[page]]


@pytest.mark.parametrize("page, words, places", CASES)
def test_a_claim_has_the_intervals_of_its_results(page, words, places):
    expected = [format_result(place) for place in places]
    candidates = [line for line in sentences((ROOT / page).read_text()) if words in line]
    assert candidates, f"{page}: no sentence with {words!r}"
    assert expected in [INTERVAL.findall(line) for line in candidates]


@pytest.mark.parametrize("page", CLAIMS)
def test_every_interval_belongs_to_a_claim(page):
    stated = []
    for line in sentences((ROOT / page).read_text()):
        stated += INTERVAL.findall(line)
    claimed = []
    for _, places in CLAIMS[page]:
        claimed += [format_result(place) for place in places]
    assert sorted(stated) == sorted(claimed)


def test_other_chapters_quote_no_evidence():
    """A chapter that begins to must be added to CLAIMS."""
    others = {"tutorial/03_learning.md"}  # quotes tuning.md: see below
    for path in ROOT.glob("tutorial/*.md"):
        page = str(path.relative_to(ROOT))
        if page not in CLAIMS and page not in others:
            prose = " ".join(sentences(path.read_text()))  # a block's output is checked elsewhere
            assert INTERVAL.findall(prose) == [], page


def rewards_of(method: str, base: int) -> dict[tuple, float]:
    """Return {setting: mean reward} of all trials of a method on one base, to three digits."""
    flags = list(tune_toy.TRIALS[method][0])
    rewards = {}
    for row in TUNING["trials"]:
        if (row["method"], row["base"]) == (method, base):
            rewards[tuple(row[flag] for flag in flags)] = round(row["reward"]["mean"], 3)
    assert len(rewards) == len(tune_toy.TRIALS[method])
    return rewards


def best_trial(method: str) -> dict:
    """Return the row of the setting with the most reward on base 0; of equals, the first."""
    rewards = rewards_of(method, base=0)
    best = max(rewards, key=rewards.get)
    flags = list(tune_toy.TRIALS[method][0])
    for row in TUNING["trials"]:
        of_method = (row["method"], row["base"]) == (method, 0)
        if of_method and tuple(row[flag] for flag in flags) == best:
            return row
    raise AssertionError(method)


@pytest.mark.parametrize("method", tune_toy.TRIALS)
def test_on_another_base_the_choice_is_nearly_the_best(method):
    """It is the best there, too, but for SFT, whose neighbor is better by 0.048 of reward."""
    chosen = max(rewards_of(method, base=0), key=rewards_of(method, base=0).get)
    rewards = rewards_of(method, base=1)
    lost = max(rewards.values()) - rewards[chosen]
    assert lost == pytest.approx(0.048 if method == "sft" else 0, abs=5e-4)


def test_the_table_of_the_tuning():
    """tuning.md is what tune_toy.py writes of tuning.json."""
    table = tune_toy.format_table(TUNING["trials"], TUNING["hardware"])
    assert (ROOT / "tutorial/evidence/tuning.md").read_text() == table


def test_chapter_3_quotes_the_best_setting_of_sft():
    """On the validation prompts of bases 0 and 1, and on the test prompts of all bases."""
    rate = best_trial("sft")["sft-lr"]
    expected = []
    for row in TUNING["trials"]:
        if row["method"] == "sft" and row["sft-lr"] == rate:
            expected.append("{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**row["gain"]))
    compared = Comparison("story/sft", "theta_0", "reward", "7.5", "mean of 5")
    scores = Scores(ROOT / "tutorial/evidence/results.csv")
    expected.append(str(pooled(scores.differences(compared))))
    text = " ".join((ROOT / "tutorial/03_learning.md").read_text().split())
    assert INTERVAL.findall(text) == expected


@pytest.mark.parametrize("method", tune_toy.TRIALS)
def test_the_defaults_are_the_best_trials(method):
    best = best_trial(method)
    for flag in tune_toy.TRIALS[method][0]:
        default = TOY[flag.replace("-", "_")]
        assert default in (best[flag], [best[flag]]), f"--{flag}"


@pytest.mark.parametrize("method", tune_toy.TRIALS)
def test_the_best_trial_is_inside_its_grid(method):
    """A smaller and a larger value of every setting were tried, with the best of all others."""
    best = best_trial(method)
    flags = list(tune_toy.TRIALS[method][0])
    for flag in flags:
        others = [other for other in flags if other != flag]
        values = []
        for trial in tune_toy.TRIALS[method]:
            if all(trial[other] == best[other] for other in others):
                values.append(trial[flag])
        assert min(values) < best[flag] < max(values), f"--{flag}"


def test_every_method_has_the_same_number_of_trials():
    counts = {len(trials) for trials in tune_toy.TRIALS.values()}
    assert len(counts) == 1
