"""The look at all rows of the data before a run: what they are, and which cannot be used.

`images` is a `spin.data.CaptionedImages`.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

from spin.infra import distributed
from spin.infra.errors import InputError
from spin.infra.files import atomic_write, hash_content
from spin.infra.images import read_image
from spin.infra.metadata import LEADS_OUT, Row

CHUNK = 4096  # rows whose tasks are in memory at once


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
        write_inspections(images, recorded, listed)
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


# ---- Looking at rows -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Inspection:
    """What a look at a row and its images found.

    fault: what is wrong, on one line; None if nothing is.
    record: SHA-256 of what was read, in 64 hexadecimal digits; a space; and the row's stamp, which
        tells whether it has changed since. "" for a bad row.
    """

    fault: str | None
    record: str


def find_faults(images) -> Iterator[str | None]:
    """Yield for every row what is wrong with it, on one line; None if nothing is."""
    for inspection in inspect(images):
        yield inspection.fault


def inspect(images, records: Iterable[str] = ()) -> Iterator[Inspection]:
    """Look at every row and its images. All cores read images.

    records: those of an earlier look. What has not changed since is not read again.
    """
    records = chain(records, repeat(""))
    with ThreadPool(os.cpu_count()) as pool:
        for start in range(0, len(images), CHUNK):
            rows = range(start, min(start + CHUNK, len(images)))
            unchanged = {}
            for row, record in zip(rows, records):
                if is_unchanged(images, row, record):
                    unchanged[row] = Inspection(None, record)
            tasks = [(images, row) for row in rows if row not in unchanged]
            inspections = pool.imap(inspect_row, tasks, chunksize=16)
            for row in rows:
                yield unchanged[row] if row in unchanged else next(inspections)


def is_unchanged(images, index: int, record: str) -> bool:
    """Return whether a row is as it was when `record` was made of it. "" is of a bad row."""
    if not record:
        return False
    try:
        return record.partition(" ")[2] == stamp(images.read_row(index), images.folder)
    except (InputError, OSError):
        return False


def inspect_row(task: tuple) -> Inspection:
    """Look at a row and its images. task: `images` and the row's index."""
    images, index = task
    try:
        row = images.read_row(index)
        # made before the images are read: a change in the meantime is a change
        row_stamp = stamp(row, images.folder)
        contents = [row.caption]
        for path in row.image_files():
            read_image(path)
            contents.append(hash_content(path))
    except (InputError, OSError) as error:
        location = f"{images.location(index)}: "
        message = str(error).removeprefix(location)
        return Inspection(location + " ".join(message.splitlines()), "")
    sha256 = hashlib.sha256(json.dumps(contents).encode()).hexdigest()
    return Inspection(None, f"{sha256} {row_stamp}")


def stamp(row: Row, folder: Path) -> str:
    """Return the caption, and what changes when an image file is changed or replaced."""
    parts: list = [row.caption]
    for path in row.image_files():
        status = path.stat()
        name = str(path).removeprefix(str(folder))
        parts.append([name, status.st_size, status.st_mtime_ns, status.st_ctime_ns])
    return json.dumps(parts)


# ---- The files of a look -------------------------------------------------------------------------


def write_inspections(images, recorded: Path, listed: Path) -> None:
    """Look at every row; write its record to one file, and its fault, if any, to the other."""
    bar = distributed.progress_bar(total=len(images), desc="looking at the data", delay=1)
    with (
        bar,
        atomic_write(recorded) as new_records,
        atomic_write(listed) as new_list,
        open(new_records, "w") as records,
        open(new_list, "w", encoding="utf-8") as faults,
    ):
        for inspection in inspect(images, read_records(recorded)):
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
