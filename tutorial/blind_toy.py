"""Can the difference be seen? Sheets of images without names, for an observer who orders them.

    python tutorial/blind_toy.py sheets RUN --out FOLDER    (RUN: train.py's --out)
    python tutorial/blind_toy.py judge FOLDER

`sheets` writes sheet1.png to sheet6.png and key.json, which the observer must not see. A row of a
sheet shows the ideal image of one of sixty random test prompts, then images A, B and C by theta_0,
SFT and SPIN-3, in random order. The observer writes answers.json, {"orders": [...]} with sixty
strings such as "BAC": the image that is nearest to the ideal comes first. `judge` says how often
each model's came first, and how often one was nearer than another's, with exact binomial intervals.
"""

import argparse
import sys
from math import comb
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from spin import toy  # noqa: E402
from spin.eval import plots  # noqa: E402
from spin.infra.cli import SEED_TYPE, run_script  # noqa: E402
from spin.infra.errors import InputError  # noqa: E402
from spin.infra.files import read_json, write_json  # noqa: E402
from spin.infra.images import read_image, save_png  # noqa: E402

MODELS = ("base", "sft", "spin-3")
NAMES = "ABC"
PROMPTS = 60
ROWS = 10  # of a sheet


def main(argv: list[str] | None = None) -> dict:
    """Return the key, or the counts that `judge` prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=["sheets", "judge"])
    parser.add_argument("folder", help="sheets: a run of train.py; judge: what sheets wrote")
    parser.add_argument("--out", default="runs/blind", help="default: %(default)s")
    parser.add_argument("--seed", type=SEED_TYPE, default=11, help="of prompts and order (11)")
    args = parser.parse_args(argv)
    if args.task == "sheets":
        return draw_sheets(Path(args.folder), Path(args.out), args.seed)
    return judge(Path(args.folder))


def draw_sheets(run: Path, out: Path, seed: int) -> dict:
    """Write the sheets and key.json, and return the key."""
    guidance = read_json(run / "config.json")["guidance"]
    scenes = toy.split()["test"]
    rng = np.random.default_rng(seed)
    prompts = sorted(rng.choice(len(scenes), PROMPTS, replace=False).tolist())
    orders = [rng.permutation(len(MODELS)).tolist() for _ in prompts]

    rows = []
    for prompt, order in zip(prompts, orders):
        row = [toy.to_pil(toy.ideal_image(scenes[prompt]))]
        for model in order:
            folder = run / "evaluation/images" / MODELS[model] / f"guidance-{guidance:g}-32px"
            row.append(read_image(folder / f"{prompt:05d}-0.png"))
        rows.append(row)

    for start in range(0, PROMPTS, ROWS):
        numbers = [str(start + i + 1) for i in range(ROWS)]
        sheet = plots.grid(rows[start : start + ROWS], ["ideal", *NAMES], numbers, cell=128)
        save_png(sheet, out / f"sheet{start // ROWS + 1}.png")
    names = [np.array(MODELS)[order].tolist() for order in orders]
    key = {"prompts": prompts, "order": names}
    write_json(out / "key.json", key)
    return key


def judge(folder: Path) -> dict:
    """Print and return {outcome: [how often, low, high]} of the sixty answers."""
    answers = read_json(folder / "answers.json")["orders"]
    key = read_json(folder / "key.json")["order"]
    if len(answers) != len(key) or any(sorted(answer) != sorted(NAMES) for answer in answers):
        raise InputError(f"{folder / 'answers.json'}: must be {len(key)} orders such as BAC")
    rankings = []
    for answer, order in zip(answers, key):
        rankings.append([order[NAMES.index(name)] for name in answer])

    counts = {}
    for model in MODELS:
        counts[f"{model} is nearest"] = sum(ranking[0] == model for ranking in rankings)
    for better, worse in (("spin-3", "base"), ("spin-3", "sft"), ("sft", "base")):
        counts[f"{better} is nearer than {worse}"] = sum(
            ranking.index(better) < ranking.index(worse) for ranking in rankings
        )
    result = {}
    for outcome, count in counts.items():
        low, high = binomial_interval(count, len(rankings))
        result[outcome] = [count, low, high]
        share = count / len(rankings)
        print(f"{outcome}: {count} of {len(rankings)}, {share:.2f} [{low:.2f}, {high:.2f}]")
    return result


def binomial_interval(count: int, trials: int) -> tuple[float, float]:
    """Return the exact 95% interval of a probability (Clopper and Pearson 1934)."""

    def at_most(k: int, p: float) -> float:
        return sum(comb(trials, i) * p**i * (1 - p) ** (trials - i) for i in range(k + 1))

    low = 0.0
    high = 1.0
    if count > 0:
        low = root(lambda p: at_most(count - 1, p) - 0.975)
    if count < trials:
        high = root(lambda p: at_most(count, p) - 0.025)
    return low, high


def root(function) -> float:
    """Return where a function that falls from above 0 to below it on [0,1] is 0, by bisection."""
    left, right = 0.0, 1.0
    for _ in range(60):
        middle = (left + right) / 2
        if function(middle) > 0:
            left = middle
        else:
            right = middle
    return left


if __name__ == "__main__":
    sys.exit(run_script("blind_toy.py", main, "nothing is lost; start again"))
