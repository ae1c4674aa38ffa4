"""How the miniature world's hyper-parameters were chosen: every method gets fifteen trials on the validation prompts.

    python tutorial/tuning.py           about an hour of one CPU core; again, it goes on where it stopped

Writes tutorial/evidence/tuning.json and tuning.md. The trial whose last model earns the most reward gives the defaults
of `train.py --preset toy`. Test prompts are not looked at.
"""

import argparse
import platform
import sys
from itertools import product
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from spin.infra import run  # noqa: E402

FIXED = "--score validation --score-images 2 --grid-prompts 0 --save-every 0 --device cpu".split()
TRIALS = {
    "sft": [
        {"sft-lr": lr}
        for lr in (1e-6, 2e-6, 3e-6, 5e-6, 1e-5, 2e-5, 3e-5, 4e-5, 5e-5, 7e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3)
    ],
    "dpo": [
        {"dpo-lr": lr, "dpo-beta": beta} for lr, beta in product((1e-6, 3e-6, 1e-5, 3e-5, 1e-4), (1000, 5000, 20000))
    ],
    "spin": [{"lr": lr, "beta": beta} for lr, beta in product((2e-6, 5e-6, 1e-5, 2e-5, 5e-5), (2000, 10000, 40000))],
}


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=list(TRIALS), default=list(TRIALS), help="default: all")
    parser.add_argument("--runs", default="runs/tuning", help="folder for the trials' runs (default: %(default)s)")
    parser.add_argument("--out", default=str(ROOT / "tutorial/evidence"), help="default: tutorial/evidence")
    args = parser.parse_args(argv)
    table = Path(args.out, "tuning.json")
    rows = run.read_json(table)["trials"] if table.exists() else []
    for method in args.methods:
        rows = [row for row in rows if row["method"] != method]
        for flags in TRIALS[method]:
            out = Path(args.runs, "-".join([method, *(f"{value:g}" for value in flags.values())]))
            chosen = [text for name, value in flags.items() for text in (f"--{name}", f"{value:g}")]
            results = train.main(["--loss", method, *chosen, *FIXED, "--out", str(out)])["results"]
            last = list(results["models"])[-1]
            row = {"method": method, "model": last, "commit": results["config"]["commit"]} | flags
            row |= {"training_seconds": round(sum(line["seconds"] for line in run.Run(out).read_log()))}
            row |= {"reward": results["models"][last]["reward"], "aligned": results["models"][last]["aligned"]}
            rows.append(row | {"gain": results["differences"][f"{last} - base"]["reward"]})
    write(Path(args.out), sorted(rows, key=lambda row: list(TRIALS).index(row["method"])))
    return rows


def write(folder: Path, rows: list[dict]) -> None:
    hardware = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    about = {"versions": run.provenance()["versions"], "hardware": hardware, "seed": train.TOY["seed"], "fixed": FIXED}
    run.write_json(folder / "tuning.json", about | {"trials": rows})
    lines = ["| model | setting | reward | gain over theta_0 | all five right | seconds of training |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in rows:
        setting = ", ".join(f"{name} {row[name]:g}" for name in TRIALS[row["method"]][0])
        best = max(other["reward"]["mean"] for other in rows if other["method"] == row["method"])
        setting = f"**{setting}**" if row["reward"]["mean"] == best else setting
        reward = "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**row["reward"])
        gain = "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**row["gain"])
        cells = [row["model"], setting, reward, gain, f"{row['aligned']['mean']:.3f}", str(row["training_seconds"])]
        lines.append(f"| {' | '.join(cells)} |")
    commits = ", ".join(sorted({row["commit"][:9] for row in rows}))
    made = f"`python tutorial/tuning.py`, commits {commits}, {hardware}, seed {about['seed']};"
    note = (
        "100 validation prompts, 2 pictures each, 95 % bootstrap intervals over prompts. Bold: the best; the default."
    )
    with run.whole(folder / "tuning.md") as part:
        part.write_text("\n".join([*lines, "", made, note, ""]))


if __name__ == "__main__":
    sys.exit(run.script("tuning.py", main))
