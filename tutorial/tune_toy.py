"""Choose the miniature world's hyperparameters: seven trials a method on the validation prompts.

    python tutorial/tune_toy.py        (about 65 minutes of one CPU core; again: goes on)
    python tutorial/tune_toy.py --base runs/base-1/base --number 1

Writes tutorial/evidence/tuning.json and tuning.md. The setting whose last model earns the most
reward on base 0 gives the defaults of `train.py --preset toy`. Other bases check that choice. Test
prompts are not used.
"""

import argparse
import platform
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from spin import toy  # noqa: E402
from spin.config import TOY  # noqa: E402
from spin.infra.cli import provenance, run_script  # noqa: E402
from spin.infra.files import atomic_write, read_json, write_json  # noqa: E402
from spin.infra.run import Run  # noqa: E402

# flags of train.py that are the same in all trials
FIXED = [
    *("--score", "validation"),
    *("--score-images", "2"),
    *("--grid-prompts", "0"),
    *("--save-every", "0"),
    *("--device", "cpu"),
]

# {method: flags of train.py for each trial}
TRIALS = {
    "sft": [{"sft-lr": lr} for lr in (2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)],
    "dpo": [
        {"dpo-lr": 1e-5, "dpo-beta": 50},
        {"dpo-lr": 3e-5, "dpo-beta": 10},
        {"dpo-lr": 3e-5, "dpo-beta": 50},
        {"dpo-lr": 3e-5, "dpo-beta": 200},
        {"dpo-lr": 3e-5, "dpo-beta": 1000},
        {"dpo-lr": 1e-4, "dpo-beta": 50},
        {"dpo-lr": 1e-4, "dpo-beta": 200},
    ],
    "spin": [
        {"lr": 2e-5, "beta": 2000},
        {"lr": 2e-5, "beta": 10000},
        {"lr": 5e-5, "beta": 500},
        {"lr": 5e-5, "beta": 2000},
        {"lr": 5e-5, "beta": 10000},
        {"lr": 1e-4, "beta": 2000},
        {"lr": 1e-4, "beta": 10000},
    ],
    "spin-bounded": [
        {"lr": 2e-5, "beta": 2000},
        {"lr": 5e-5, "beta": 2000},
        {"lr": 5e-5, "beta": 200},
        {"lr": 5e-5, "beta": 20000},
        {"lr": 1e-4, "beta": 2000},
        {"lr": 2e-4, "beta": 2000},
        {"lr": 4e-4, "beta": 2000},
    ],
}


def main(argv: list[str] | None = None) -> list[dict]:
    """Run the trials on one base. Return the rows of tuning.json: one for each trial and base."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default=str(toy.BASE), help="checkpoint of theta_0")
    parser.add_argument("--number", type=int, default=0, help="of the base, for the table")
    methods = list(TRIALS)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=methods,
        default=methods,
        help="methods to tune; the others' rows are kept (default: all)",
    )
    parser.add_argument(
        "--runs", default="runs/tuning", help="folder for the trials' runs (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        default=str(ROOT / "tutorial" / "evidence"),
        help="folder for the table (default: tutorial/evidence)",
    )
    args = parser.parse_args(argv)

    table = Path(args.out, "tuning.json")
    earlier_rows = []
    if table.exists():
        earlier_rows = read_json(table)["trials"]

    rows = []
    for row in earlier_rows:
        if row["base"] != args.number or row["method"] not in args.methods:
            rows.append(row)
    runs = Path(args.runs, f"base-{args.number}")
    for method in args.methods:
        for flags in TRIALS[method]:
            row = run_trial(args.base, method, flags, runs)
            rows.append({"base": args.number, **row})
    rows.sort(key=lambda row: (methods.index(row["method"]), row["base"]))  # keeps trials in order

    hardware = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    about = {
        "versions": provenance()["versions"],
        "hardware": hardware,
        "seed": TOY["seed"],
        "fixed": FIXED,
    }
    write_json(table, {**about, "trials": rows})
    with atomic_write(Path(args.out, "tuning.md")) as path:
        path.write_text(format_table(rows, hardware))
    return rows


def run_trial(base: str, method: str, flags: dict[str, float], runs: Path) -> dict:
    """Train and score one setting of a method, unless its run is finished. Return its row.

    base: checkpoint of theta_0.

    The run's folder holds how many seconds the trial took, since its last start, in trial.json.
    """
    values = [f"{value:g}" for value in flags.values()]
    folder = runs / "-".join([method, *values])
    argv = ["--preset", "toy", "--model", base, "--loss", method, *FIXED, "--out", str(folder)]
    for name, value in zip(flags, values):
        argv += [f"--{name}", value]
    timing = folder / "trial.json"
    started = time.perf_counter()
    train.main(argv)
    if not timing.exists():
        write_json(timing, {"seconds": round(time.perf_counter() - started)})

    results = read_json(folder / "results.json")
    model = list(results["models"])[-1]
    training_seconds = sum(line["seconds"] for line in Run(folder).read_log())
    return {
        "method": method,
        "model": model,
        "commit": results["config"]["commit"],
        **flags,
        "training_seconds": round(training_seconds),
        "seconds": read_json(timing)["seconds"],
        "reward": results["models"][model]["reward"],
        "aligned": results["models"][model]["aligned"],
        "gain": results["differences"][f"{model} - base"]["reward"],
    }


def format_table(rows: list[dict], hardware: str) -> str:
    """Return tuning.md: a Markdown table with a line for each trial, a method's best one bold."""
    bases = sorted({row["base"] for row in rows})
    trials = {}  # {(method, setting): {base: row}}
    for row in rows:
        flags = TRIALS[row["method"]][0]
        setting = ", ".join(f"{name} {row[name]:g}" for name in flags)
        trials.setdefault((row["method"], setting), {})[row["base"]] = row

    rewards = {}  # {method: {setting: reward on the first base}}, to three digits
    for (method, setting), of_base in trials.items():
        reward = of_base[bases[0]]["reward"]["mean"]
        rewards.setdefault(method, {})[setting] = round(reward, 3)

    header = ["model", "setting"]
    for base in bases:
        header += [f"base {base}: reward", "gain over theta_0", "aligned"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for (method, setting), of_base in trials.items():
        model = next(iter(of_base.values()))["model"]
        is_best = setting == max(rewards[method], key=rewards[method].get)  # of equals, the first
        cells = [model, f"**{setting}**" if is_best else setting]
        for base in bases:
            if base not in of_base:
                cells += [""] * 3
                continue
            row = of_base[base]
            cells += [
                "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**row["reward"]),
                "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**row["gain"]),
                f"{row['aligned']['mean']:.3f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")

    commits = ", ".join(sorted({row["commit"][:9] for row in rows}))
    minutes = sum(row["seconds"] for row in rows) / 60
    lines += [
        "",
        f"`python tutorial/tune_toy.py`, commit {commits}, {hardware}, seed {TOY['seed']};",
        f"{minutes:.0f} minutes in all, sampling and scoring included. "
        "100 validation prompts, 2 images each, 95% bootstrap intervals over prompts. "
        f"Bold: the best by reward on base {bases[0]}; the default.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    advice = "finished trials are kept; the same command goes on"
    sys.exit(run_script("tune_toy.py", main, advice))
