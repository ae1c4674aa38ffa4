"""Rows of the data that cannot be used: found before anything else, listed, and left out."""

from itertools import islice
from pathlib import Path

import numpy as np

from spin.infra import distributed
from spin.infra.errors import InputError
from spin.infra.files import atomic_write


def drop_bad_rows(images, cache: Path, skip: bool) -> None:
    """Check every row of the data, once, and list the bad ones in cache/bad_rows.txt.

    With `skip`, drop them from `images`. Raises InputError if there are any and `skip` is off, or
    if all rows are bad.
    """
    usable = cache / "usable_rows.npy"
    listed = cache / "bad_rows.txt"
    if distributed.is_main() and not usable.exists():
        rows = list_bad_rows(images, listed)
        if skip or len(rows) == len(images):
            with atomic_write(usable) as temporary, open(temporary, "wb") as file:
                np.save(file, rows)
    distributed.barrier()

    with open(listed, encoding="utf-8") as file:
        shown = [f"  {line.strip()}" for line in islice(file, 5)]
        num_bad = len(shown) + sum(1 for _ in file)
    if num_bad == 0:
        return
    summary = f"{num_bad} of {len(images)} rows cannot be used; all are listed in {listed}"
    distributed.print0("\n".join([f"{summary}. The first are:", *shown]))
    if num_bad == len(images):
        raise InputError(f"{summary}. Fix them")
    if not skip:
        raise InputError(f"{summary}. Fix them, or skip them with --skip-bad")
    images.select(np.load(usable))


def list_bad_rows(images, path: Path) -> np.ndarray:
    """Write what is wrong with each bad row to a file, a line each; return the other rows."""
    usable_rows = []
    bar = distributed.progress_bar(total=len(images), desc="looking at the data", delay=1)
    with bar, atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row, fault in enumerate(images.find_faults()):
            if fault is None:
                usable_rows.append(row)
            else:
                file.write(fault + "\n")
            bar.update()
    return np.array(usable_rows, dtype=np.int64)
