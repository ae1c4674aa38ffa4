"""Convert Pick-a-Pic v2, the images that the paper trains on, to a folder for `train.py --data`.

    pip install pyarrow
    python tutorial/pick_a_pic.py PARQUET_FOLDER OUT

PARQUET_FOLDER holds the data set's files train-*.parquet, downloaded from
https://huggingface.co/datasets/yuvalkirstain/pickapic_v2. Each of its rows is a pair of images for
one caption. OUT gets the preferred image of every pair, and the other one as the rejected image of
Diffusion-DPO; ties are left out.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from spin.infra.cli import run_script  # noqa: E402
from spin.infra.errors import InputError  # noqa: E402
from spin.infra.files import atomic_write  # noqa: E402

COLUMNS = ["caption", "label_0", "label_1", "jpg_0", "jpg_1"]
PAIRS_PER_FOLDER = 1000  # file systems are slow with a million files in one folder


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parquet", help="folder with the files train-*.parquet", type=Path)
    parser.add_argument("out", help="folder to write, which must not exist yet", type=Path)
    args = parser.parse_args(argv)
    if args.out.exists():
        raise InputError(f"{args.out}: exists already; choose another folder")
    files = sorted(args.parquet.glob("train-*.parquet"))
    if not files:
        raise InputError(f"{args.parquet}: holds no file train-*.parquet")
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise InputError("pyarrow is not installed: pip install pyarrow") from None

    with atomic_write(args.out) as folder:
        folder.mkdir()
        count = write_pairs(tqdm(read_rows(files), unit=" rows"), folder)
    print(f"{args.out}: {count} pairs of images")


def read_rows(files: Iterable[Path]) -> Iterator[dict]:
    """Yield the rows of parquet files as dictionaries of COLUMNS."""
    import pyarrow.parquet

    for path in files:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(64, columns=COLUMNS):
            yield from batch.to_pylist()


def write_pairs(rows: Iterable[dict], folder: Path) -> int:
    """Write each row's two images and metadata.jsonl to an empty folder. Return how many pairs.

    rows: "caption", the JPEG files "jpg_0" and "jpg_1" as bytes, and how much each is preferred,
        "label_0" and "label_1". Rows with equal labels, ties, are left out.
    """
    count = 0
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as metadata:
        for row in rows:
            if row["label_0"] == row["label_1"]:
                continue
            if row["label_0"] > row["label_1"]:
                preferred, rejected = row["jpg_0"], row["jpg_1"]
            else:
                preferred, rejected = row["jpg_1"], row["jpg_0"]

            subfolder = f"{count // PAIRS_PER_FOLDER:04d}"
            (folder / subfolder).mkdir(exist_ok=True)
            name = f"{subfolder}/{count:07d}.jpg"
            rejected_name = f"{subfolder}/{count:07d}-rejected.jpg"
            (folder / name).write_bytes(preferred)
            (folder / rejected_name).write_bytes(rejected)

            line = {
                "file_name": name,
                "text": row["caption"],
                "rejected_file_name": rejected_name,
            }
            metadata.write(json.dumps(line) + "\n")
            count += 1
    return count


if __name__ == "__main__":
    sys.exit(run_script("pick_a_pic.py", main, "nothing was written"))
