"""Repeat the story of the miniature world over bases and seeds: what holds beyond one run?

    python tutorial/pretrain_toy.py --seed 1 --vae spin/toy/base --out runs/base-1    (and 2, ...)
    python tutorial/repeat_toy.py --bases spin/toy/base runs/base-1/base runs/base-2/base

Every base is fine-tuned with every seed, by `python train.py`; finished runs are not repeated. The
program writes story.json, with each run's differences, and story.md, a table with intervals over
the bases, in tutorial/evidence.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from spin import toy  # noqa: E402
from spin.eval.stats import Summary, format_cell  # noqa: E402
from spin.infra.cli import SEED_TYPE, provenance, run_script  # noqa: E402
from spin.infra.files import atomic_write, write_json  # noqa: E402

# Of two models, what the first one gains over the second.
PAIRS = (
    *("sft - base", "dpo - base", "spin-1 - base", "spin-2 - base", "spin-3 - base"),
    *("spin-1 - sft", "spin-2 - dpo", "spin-2 - sft", "spin-3 - sft"),
    *("spin-2 - spin-1", "spin-3 - spin-2"),
)
METRICS = ("reward", "energy", "clean", "aligned")

SWEEP = ("2", "3", "5", "7.5", "10")  # wider than in `python train.py`

# 97.5% quantiles of Student's t by degrees of freedom (Abramowitz and Stegun, table 26.10)
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}


def main(argv: list[str] | None = None) -> dict:
    """Run what is missing. Return what story.json holds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--bases", nargs="+", default=[str(toy.BASE)], help="checkpoints (default: the committed)"
    )
    parser.add_argument(
        "--seeds", type=SEED_TYPE, nargs="+", default=[0, 1], help="of fine-tuning (default: 0 1)"
    )
    parser.add_argument(
        "--runs", default="runs/story", help="folder for the runs (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        default=str(ROOT / "tutorial" / "evidence"),
        help="folder for the table (default: tutorial/evidence)",
    )
    args = parser.parse_args(argv)
    if len(args.bases) > len(STUDENT_T) + 1:
        parser.error(f"--bases: at most {len(STUDENT_T) + 1}, see STUDENT_T")

    runs = []
    for number, base in enumerate(args.bases):
        for seed in args.seeds:
            folder = Path(args.runs, f"base-{number}-seed-{seed}")
            flags = ["--model", base, "--preset", "toy", "--seed", str(seed), "--device", "cpu"]
            flags += ["--score-guidance", *SWEEP]
            returned = train.main([*flags, "--out", str(folder)])
            runs.append({"base": number, "seed": seed, **summarize_run(returned["results"])})

    story = {"versions": provenance()["versions"], "threads": torch.get_num_threads(), "runs": runs}
    write_json(Path(args.out, "story.json"), story)
    with atomic_write(Path(args.out, "story.md")) as path:
        path.write_text(format_story(runs))
    return story


def summarize_run(results: dict) -> dict:
    """Return a run's commit, each model's best guidance, and the mean differences of PAIRS.

    The differences are {"at the run's guidance" or "each at its best": {metric: {pair: mean}}}.
    """
    at_best = results["at_best_guidance"]
    verdicts = {"at the run's guidance": results, "each at its best": at_best}
    differences: dict[str, dict] = {}
    for name, verdict in verdicts.items():
        differences[name] = {}
        for metric in METRICS:
            differences[name][metric] = {
                pair: verdict["differences"][pair][metric]["mean"] for pair in PAIRS
            }
    return {
        "commit": results["config"]["commit"],
        "best_guidance": at_best["best_guidance"],
        "differences": differences,
    }


def interval_over_bases(values: np.ndarray) -> Summary:
    """Return the mean of values [bases,seeds] and its 95% interval: mean, low, high and n.

    A base is one observation, the mean over its seeds: the runs of a base are not independent. The
    interval is Student's t over the bases. It assumes that their means are normally distributed,
    and is wide with three bases, as it should be.
    """
    means = values.mean(axis=1)
    margin = STUDENT_T[len(means) - 1] * means.std(ddof=1) / np.sqrt(len(means))
    return {
        "mean": float(means.mean()),
        "low": float(means.mean() - margin),
        "high": float(means.mean() + margin),
        "n": len(means),
    }


def format_story(runs: list[dict]) -> str:
    """Return story.md: for each verdict and metric a table with a line for each pair of models."""
    bases = sorted({run["base"] for run in runs})
    seeds = sorted({run["seed"] for run in runs})
    columns = [f"base {base}, seed {seed}" for base in bases for seed in seeds]

    lines = []
    for verdict in runs[0]["differences"]:
        for metric in METRICS:
            lines += [f"## {metric}, {verdict}", ""]
            lines.append(f"| | mean over {len(bases)} bases | {' | '.join(columns)} |")
            lines.append("|---" * (2 + len(columns)) + "|")
            for pair in PAIRS:
                values = np.zeros((len(bases), len(seeds)))
                for run in runs:
                    row = bases.index(run["base"])
                    column = seeds.index(run["seed"])
                    values[row, column] = run["differences"][verdict][metric][pair]
                cells = [f"{value:+.4f}" for value in values.ravel()]
                mean = f"{values.mean():+.4f}"
                if len(bases) > 1:
                    mean = format_cell(interval_over_bases(values), sign="+")
                lines.append(f"| {pair.replace(' - ', ' minus ')} | {mean} | {' | '.join(cells)} |")
            lines.append("")

    commits = ", ".join(sorted({run["commit"][:9] for run in runs}))
    lines += [
        f"`python tutorial/repeat_toy.py`, commits {commits}. Each value is a mean over 200 test",
        "prompts with 2 images each. Brackets: 95% intervals, Student's t over the bases' means.",
        "Lower energy is better.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    advice = "finished runs are kept; the same command goes on"
    sys.exit(run_script("repeat_toy.py", main, advice))
