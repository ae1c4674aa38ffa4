"""Check all rows of the data before a run: hash their contents, and list those that are bad.

`images` is a `spin.data.CaptionedImages`, whose module infra must not import.
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
    """Check every row of the data, and return 16 hexadecimal digits that identify its contents.

    These begin a SHA-256 over the captions and image files of all good rows, in order.
    folder/rows.txt records what each row was, so that the next start reads only what has changed.
    folder/bad_rows.txt lists the bad rows.

    skip: whether to drop bad rows from `images`.

    images.inspected is set, for `check_unchanged`.

    Raises InputError if there are bad rows and `skip` is off, or if all rows are bad.
    """
    recorded = folder / "rows.txt"
    listed = folder / "bad_rows.txt"
    if distributed.is_main():
        write_inspections(images, recorded, listed)
    distributed.barrier()

    digest = hashlib.sha256()
    usable = np.zeros(len(images), dtype=bool)
    inspected = np.zeros((len(images), 2), dtype=np.uint64)
    num_small = 0
    for index, record in enumerate(read_records(recorded)):
        sha256, short_side, row_stamp = split_record(record)
        digest.update(sha256.encode())
        usable[index] = sha256 != ""
        inspected[index] = hash64(row_stamp), hash64(sha256)
        if usable[index] and int(short_side) < images.resolution:
            num_small += 1
    images.inspected = inspected
    num_bad = len(images) - int(usable.sum())
    if num_bad > 0:
        report_bad_rows(listed, num_bad, len(images), skip)
        images.select(usable)
    report_small_images(num_small, images)
    return digest.hexdigest()[:16]


def check_unchanged(images, rows: Iterable[int]) -> None:
    """Raise InputError if one of these rows is not what it was when `check_rows` read it.

    Latents of its new contents would be kept under the name of its old ones.
    """
    if images.inspected is None:  # not data of the user's
        return
    for index in rows:
        old_stamp, old_sha256 = images.inspected[index].tolist()
        if hash64(stamp(images.read_row(index), images.folder)) == old_stamp:
            continue
        # Backups change a file's times, and on some network drives each machine has its own.
        sha256, _, _ = split_record(inspect_row((images, index)).record)
        if hash64(sha256) != old_sha256:
            raise InputError(
                f"{images.location(index)}: an image has changed since the data were checked; "
                "start again"
            )


def hash64(text: str) -> int:
    """Return the first 64 bits of a string's SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# ---- Inspecting rows -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Inspection:
    """What was found when a row and its images were read.

    fault: what is wrong, on one line; None if nothing is.
    record: SHA-256 of caption and image files, in 64 hexadecimal digits; the short side of the
        smallest image, in pixels; and the row's `stamp`, by which a later start knows whether the
        row has changed; with a space between them. "" for a bad row.
    """

    fault: str | None
    record: str


def split_record(record: str) -> tuple[str, str, str]:
    """Return the SHA-256, the short side and the stamp of a record: all "" for a bad row's."""
    sha256, _, rest = record.partition(" ")
    short_side, _, row_stamp = rest.partition(" ")
    return sha256, short_side, row_stamp


def find_faults(images) -> Iterator[str | None]:
    """Yield for every row what is wrong with it, on one line; None if nothing is."""
    for inspection in inspect(images):
        yield inspection.fault


def inspect(images, records: Iterable[str] = ()) -> Iterator[Inspection]:
    """Yield an Inspection of every row, in order. All cores read images.

    records: those of the last start, row by row. Rows that have not changed are not read again.
    """
    old_records = chain(records, repeat(""))
    with ThreadPool(os.cpu_count()) as pool:
        for start in range(0, len(images), CHUNK):
            indices = range(start, min(start + CHUNK, len(images)))
            unchanged = {}
            for index in indices:
                record = next(old_records)
                if is_unchanged(images, index, record):
                    unchanged[index] = Inspection(None, record)
            tasks = [(images, index) for index in indices if index not in unchanged]
            inspections = pool.imap(inspect_row, tasks, chunksize=16)
            for index in indices:
                yield unchanged[index] if index in unchanged else next(inspections)


def is_unchanged(images, index: int, record: str) -> bool:
    """Return whether a row is as it was when `record` was made: never for a bad row."""
    if not record:
        return False
    _, _, old_stamp = split_record(record)
    try:
        return old_stamp == stamp(images.read_row(index), images.folder)
    except (InputError, OSError):
        return False


def inspect_row(task: tuple) -> Inspection:
    """Read a row and its images. task: `images` and the row's index."""
    images, index = task
    try:
        row = images.read_row(index)
        # before the images are read, so that a change during the reading is seen at the next start
        row_stamp = stamp(row, images.folder)
        contents = [row.caption]
        short_sides = []
        for path in row.image_files():
            short_sides.append(min(read_image(path).size))
            contents.append(hash_content(path))
    except (InputError, OSError) as error:
        location = f"{images.location(index)}: "
        message = str(error).removeprefix(location)
        return Inspection(location + " ".join(message.splitlines()), "")
    sha256 = hashlib.sha256(json.dumps(contents).encode()).hexdigest()
    return Inspection(None, f"{sha256} {min(short_sides)} {row_stamp}")


def stamp(row: Row, folder: Path) -> str:
    """Return the caption, and what changes when an image file is changed or replaced."""
    parts: list = [row.caption]
    for path in row.image_files():
        status = path.stat()
        name = os.path.relpath(path, folder)  # Path.relative_to refuses absolute names behind links
        parts.append([name, status.st_size, status.st_mtime_ns, status.st_ctime_ns])
    return json.dumps(parts)


# ---- rows.txt and bad_rows.txt -------------------------------------------------------------------


def write_inspections(images, recorded: Path, listed: Path) -> None:
    """Inspect every row. Write its record to `recorded`, and its fault, if any, to `listed`."""
    bar = distributed.progress_bar(total=len(images), desc="checking the data", delay=1)
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
    if num_links < num_bad:
        summary += ". Fix them" if num_links == 0 else ". Fix the others"
    if num_bad == num_rows:
        raise InputError(summary)
    if not skip:
        raise InputError(f"{summary}, or skip them with --skip-bad")


def report_small_images(num_small: int, images) -> None:
    """Print how many rows have an image that must be enlarged, which makes it blurred."""
    if num_small > 0:
        distributed.print0(
            f"note: {num_small} of {len(images)} rows have an image smaller than "
            f"{images.resolution} pixels on its short side, which is enlarged"
        )
