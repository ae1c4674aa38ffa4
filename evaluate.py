"""Tables what a run of train.py logged: how each model's training began and ended.

    python evaluate.py runs/NAME

Prints the table and writes it to NAME/evaluation/log.md and log.json. What the columns mean is in the README.
"""

import argparse
import sys
from pathlib import Path

from spin import run
from spin.run import InputError


def main(argv: list[str] | None = None) -> list[dict]:
    """Returns the rows of the table."""
    parser = argparse.ArgumentParser(description="Table what a run logged.", usage=argparse.SUPPRESS)
    parser.add_argument("run", help="run folder, as train.py's --out")
    parser.add_argument("--out", help="folder for log.md and log.json; omitted: RUN/evaluation")
    args = parser.parse_args(argv)
    rows = run.Run(args.run).summary()
    if not rows:
        raise InputError(f"{args.run}: no log.jsonl with a whole line in it; is it the --out of a train.py run?")

    columns = list(max(rows, key=len))  # SFT has no opponent, and fewer
    lines = [columns, ["---:"] * len(columns)]
    cells = [[row.get(name, "") for name in columns] for row in rows]
    lines += [[f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in line] for line in cells]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    folder = Path(args.out or Path(args.run, "evaluation"))
    with run.whole(folder / "log.md") as part:
        part.write_text(table + "\n")
    run.write_json(folder / "log.json", rows)
    print(table)
    print("loss and what stands to its right: means over the last tenth of a model's steps")
    return rows


if __name__ == "__main__":
    sys.exit(run.script("evaluate.py", main))
