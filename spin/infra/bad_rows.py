"""The look at all rows of the data before a run: what they are, and which cannot be used."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spin.infra import distributed
from spin.infra.errors import InputError
from spin.infra.files import atomic_write

#: What is wrong with an image outside the folder that a link in the folder leads to.
LEADS_OUT = "leads out of the folder through a link; --follow-links allows it"


def check_rows(images, folder: Path, skip: bool) -> str:
    """Look at every row of the data, and return 16 hexadecimal digits that identify it.

    They are of SHA-256 over what is read, in order: captions and the contents of image files. It
    is recorded in folder/rows.txt, so that the next look only reads what has changed. The bad rows
    are listed in folder/bad_rows.txt.

    With `skip`, drop them from `images`. Raises InputError if there are any and `skip` is off, or
    if all rows are bad.
    """
    recorded = folder / "rows.txt"
    listed = folder / "bad_rows.txt"
    if distributed.is_main():
        inspect_rows(images, recorded, listed)
    distributed.barrier()

    digest = hashlib.sha256()
    usable = np.zeros(len(images), dtype=bool)
    for row, record in enumerate(read_records(recorded)):
        sha256 = record.partition(" ")[0]
        digest.update(sha256.encode())
        usable[row] = sha256 != ""
    num_bad = len(images) - int(usable.sum())
    if num_bad > 0:
        report_bad_rows(listed, num_bad, len(images), skip)
        images.select(usable)
    return digest.hexdigest()[:16]


def inspect_rows(images, recorded: Path, listed: Path) -> None:
    """Look at every row, and write its record to one file and its fault to the other, if any."""
    bar = distributed.progress_bar(total=len(images), desc="looking at the data", delay=1)
    with (
        bar,
        atomic_write(recorded) as new_records,
        atomic_write(listed) as new_list,
        open(new_records, "w") as records,
        open(new_list, "w", encoding="utf-8") as faults,
    ):
        for inspection in images.inspect(read_records(recorded)):
            records.write(inspection.record + "\n")
            if inspection.fault is not None:
                faults.write(inspection.fault + "\n")
            bar.update()


def read_records(path: Path) -> Iterator[str]:
    """Yield the record of every row; nothing if there is no file yet."""
    if path.exists():
        with open(path, errors="replace") as file:
            for line in file:
                yield line.removesuffix("\n")


def report_bad_rows(listed: Path, num_bad: int, num_rows: int, skip: bool) -> None:
    """Print how many rows are bad, and the first of them. Raises InputError if they end the run."""
    first = []
    num_links = 0
    with open(listed, encoding="utf-8") as file:
        for fault in file:
            if len(first) < 5:
                first.append(f"  {fault.strip()}")
            if fault.strip().endswith(LEADS_OUT):
                num_links += 1
    summary = f"{num_bad} of {num_rows} rows cannot be used; all are listed in {listed}"
    distributed.print0("\n".join([f"{summary}. The first are:", *first]))

    if num_links > 0:
        summary += f". {num_links} lead out of the folder through a link; --follow-links allows it"
    if num_bad == num_rows:
        raise InputError(f"{summary}. Fix them")
    if not skip:
        raise InputError(f"{summary}. Fix them, or skip them with --skip-bad")
