"""Do opponents leave a mark in their latents? How well does a linear function tell them from real?

    python tutorial/marks.py --runs runs/evidence

For every base and seed of the evidence, and for each of RUNS, the latents that the opponents of all
iterations generated are compared with those of the real images of the same rows. The detector is
fitted on half of them and judged on the other half. It is judged once more on images that went
through pixels: decoded, rounded to 8 bits, and encoded again, as real images are.

The table is marks.csv in that folder, with a row for each opponent; tutorial/evidence/marks.csv is
that of the evidence. In "latents" and "pixels", 0.5 is a guess and 1 is never wrong. "offset 0" to
"offset 3" are how far the means of the latents' four channels are from those of real images.
"""

import argparse
import csv
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from spin import toy  # noqa: E402
from spin.checkpoint import load_pipeline  # noqa: E402
from spin.infra.cli import run_script  # noqa: E402
from spin.infra.errors import InputError  # noqa: E402
from spin.infra.files import atomic_write  # noqa: E402
from spin.infra.run import Run  # noqa: E402
from spin.infra.shards import LatentShards  # noqa: E402
from spin.pairs import rows_of_steps  # noqa: E402
from tutorial.variants import through_pixels  # noqa: E402

# (run, player) of the evidence's runs
RUNS = [
    ("story", "spin"),
    ("story", "bounded"),
    ("spin-independent", "spin"),
    ("bounded-independent", "bounded"),
]

RIDGE = 1e-3  # added to the variance of each of a latent's numbers, which is 1
BATCH = 100  # images that go through pixels at once


def main(argv: list[str] | None = None) -> list[dict]:
    """Write the table, and return its rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", default="runs/evidence", help="folder of the evidence's runs")
    parser.add_argument("--out", help="the table (default: marks.csv in the folder of the runs)")
    args = parser.parse_args(argv)

    rows = []
    for folder in sorted(Path(args.runs).glob("base-*/seed-*")):
        base = folder.parent.name.removeprefix("base-")
        seed = folder.name.removeprefix("seed-")
        for run, player in RUNS:
            if not (folder / run).exists():
                continue
            for measured in measure(Run(folder / run), player):
                rows.append({"base": base, "seed": seed, "run": run, **measured})
                print(rows[-1])
    if not rows:
        raise InputError(f"{args.runs} has no runs of evidence.py")
    table = Path(args.out or Path(args.runs, "marks.csv"))
    with atomic_write(table) as path, open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def measure(run: Run, player: str) -> list[dict]:
    """Return a row for the opponent of each iteration of a player, "spin" or "bounded"."""
    config = run.read_config()
    pipe = load_pipeline(run.checkpoint(f"{player}-1")).freeze()
    [cache] = (run.folder / "cache").iterdir()
    stored = LatentShards(cache, range(toy.NUM_ROWS))
    measured = []
    for k in range(1, config["iterations"] + 1):
        steps = [(k, step) for step in range(1, config["steps"][k - 1] + 1)]
        rows = rows_of_steps(config["seed"], steps, config["batch_size"], toy.NUM_ROWS)
        real = stored.read("mean", rows) * pipe.vae.scaling_factor
        folder = run.model_folder(f"{player}-{k}") / "generated"
        generated = LatentShards(folder, rows).read("x0", rows)
        again = torch.cat([through_pixels(pipe, batch) for batch in generated.split(BATCH)])
        row = {
            "opponent": f"{player}-{k - 1}" if k > 1 else "theta_0",
            "of": f"{player}-{k}",
            "latents": f"{detect(real, generated):.3f}",
            "pixels": f"{detect(real, again):.3f}",
        }
        for channel, offset in enumerate((generated - real).mean((0, 2, 3)).tolist()):
            row[f"offset {channel}"] = f"{offset:+.3f}"
        measured.append(row)
    return measured


def detect(real: Tensor, generated: Tensor) -> float:
    """Return how often a linear function tells latents [N,4,h,w] apart that it was not fitted on.

    It is fitted by least squares to 1 for real ones and -1 for generated ones, on every other one.
    """
    numbers = torch.cat([real, generated]).flatten(1).double()
    label = torch.cat([torch.ones(len(real)), -torch.ones(len(generated))]).double()
    fitted = torch.arange(len(label)) % 2 == 0
    numbers = (numbers - numbers[fitted].mean(0)) / numbers[fitted].std(0)
    x = numbers[fitted]
    covariance = x.T @ x / len(x) + RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(covariance, x.T @ label[fitted] / len(x))
    right = (numbers[~fitted] @ weights > 0) == (label[~fitted] > 0)
    return right.double().mean().item()


if __name__ == "__main__":
    sys.exit(run_script("marks.py", main, "the table is written at the end"))
