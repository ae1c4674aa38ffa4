"""Captioned images, and reproducible random draws.

Every draw is a stateless function of (seed, iteration, step, position in the batch): a run that was
interrupted, or split into micro-batches or among ranks, draws the same numbers.
"""

import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice, repeat
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spin.infra.bad_rows import LEADS_OUT
from spin.infra.errors import InputError
from spin.infra.files import hash_content, read_text, refuse_lfs_pointer
from spin.infra.images import read_image

# ---- Random draws --------------------------------------------------------------------------------

# independent random streams: first entries of a SeedSequence's spawn_key
ORDER = 0
PAIR = 1
GENERATION = 2


def batch_rows(seed: int, iteration: int, step: int, batch_size: int, num_rows: int) -> list[int]:
    """Return the data rows, out of `num_rows`, of an iteration's optimizer step 1, 2, ...

    Within an iteration, rows come in random order, and none repeats before all have come once.
    """
    rows = []
    for position in range((step - 1) * batch_size, step * batch_size):
        epoch, index = divmod(position, num_rows)
        rows.append(int(epoch_order(seed, iteration, epoch, num_rows)[index]))
    return rows


@lru_cache(maxsize=2)
def epoch_order(seed: int, iteration: int, epoch: int, num_rows: int) -> np.ndarray:
    """Return a random order of all data rows."""
    sequence = np.random.SeedSequence(seed, spawn_key=(ORDER, iteration, epoch))
    return np.random.default_rng(sequence).permutation(num_rows)


def random_draws(
    seed: int,
    iteration: int,
    step: int,
    position: int,
    shape: tuple[int, ...],
    num_timesteps: int,
) -> dict[str, Tensor]:
    """Return everything that is random in one pair of a batch.

    t: int64 in 0..num_timesteps-1.
    flip, drop: uniform in [0,1), to be compared with the probabilities of mirroring the images and
        of dropping the prompt.
    eps, posterior_noise, eps_gen: standard normal, of `shape`. eps noises both latents of the pair
        or, where eps_gen noises the generated one, the real one alone; posterior_noise samples the
        VAE's posterior of the real image (and of DPO's rejected one).
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(PAIR, iteration, step, position))
    rng = np.random.default_rng(sequence)
    # the order of these lines fixes which number is which
    t = int(rng.integers(num_timesteps))
    flip = rng.random()
    eps = rng.standard_normal(shape, dtype=np.float32)
    posterior_noise = rng.standard_normal(shape, dtype=np.float32)
    eps_gen = rng.standard_normal(shape, dtype=np.float32)
    drop = rng.random()
    return {
        "t": torch.tensor(t),
        "flip": torch.tensor(flip),
        "eps": torch.from_numpy(eps),
        "posterior_noise": torch.from_numpy(posterior_noise),
        "eps_gen": torch.from_numpy(eps_gen),
        "drop": torch.tensor(drop),
    }


def noise_generator(seed: int, iteration: int, row: int) -> torch.Generator:
    """Return the source of all noise in the opponent's image for a data row."""
    sequence = np.random.SeedSequence(seed, spawn_key=(GENERATION, iteration, row))
    state = sequence.generate_state(1, np.uint64)[0]
    return torch.Generator("cpu").manual_seed(int(state >> 1))


# ---- Captioned images ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A line of metadata.jsonl."""

    caption: str
    image: Path
    rejected_image: Path | None  # None where no rejected image is asked for

    def image_files(self) -> list[Path]:
        if self.rejected_image is None:
            return [self.image]
        return [self.image, self.rejected_image]


@dataclass(frozen=True)
class Inspection:
    """What a look at a row and its images found.

    fault: what is wrong, on one line; None if nothing is.
    record: SHA-256 of what was read, in 64 hexadecimal digits; a space; and its stamp, which tells
        whether it has changed since. "" for a bad row.
    """

    fault: str | None
    record: str


class CaptionedImages:
    """A folder of images with metadata.jsonl, the convention of Hugging Face's imagefolder.

    A line of metadata.jsonl is an object with `file_name` and `text` (or `caption`), and for DPO
    `rejected_file_name`, the less preferred image. Lines are indexed by byte offset, which takes 16
    bytes of memory per row, and parsed on access.

    resolution: height and width of the returned images, in pixels.
    with_rejected: whether every row needs a rejected image.
    limit: how many rows of the file to use; None for all.
    follow_links: whether links may lead out of the folder, as those of a hub's snapshot do.

    Raises InputError if metadata.jsonl is missing or has no rows, and on access to a bad row.
    """

    def __init__(
        self,
        folder: str | Path,
        resolution: int,
        with_rejected: bool = False,
        limit: int | None = None,
        follow_links: bool = False,
    ):
        self.folder = Path(folder).expanduser().resolve()
        self.resolution = resolution
        self.with_rejected = with_rejected
        self.follow_links = follow_links
        self.metadata = self.folder / "metadata.jsonl"
        self.lines = index_lines(self.metadata, limit)  # [rows,2]: line number, byte offset
        if len(self.lines) == 0:
            raise InputError(f"{self.metadata}: no rows")

    def __len__(self) -> int:
        return len(self.lines)

    def select(self, rows: np.ndarray) -> None:
        """Keep only these rows. rows: their indices, or whether to keep each."""
        self.lines = self.lines[rows]

    def caption(self, index: int) -> str:
        return self.read_row(index).caption

    def image(self, index: int) -> Tensor:
        """Return a row's image, [3,resolution,resolution] in [-1,1]."""
        return center_square(read_image(self.read_row(index).image), self.resolution)

    def rejected_image(self, index: int) -> Tensor:
        """Return a row's rejected image, [3,resolution,resolution] in [-1,1]."""
        return center_square(read_image(self.read_row(index).rejected_image), self.resolution)

    def read_row(self, index: int) -> Row:
        """Return a row, whose images exist but have not been opened."""
        _, offset = self.lines[index].tolist()
        with open(self.metadata, "rb") as file:
            file.seek(offset)
            line = file.readline()
        location = self.location(index)
        entry = parse_entry(line, location)
        caption = choose_caption(entry, location)
        image = self.locate(entry, "file_name", location)
        if not self.with_rejected:
            return Row(caption, image, None)
        if not entry.get("rejected_file_name"):
            raise InputError(f"{location}: no rejected_file_name, which DPO needs")
        return Row(caption, image, self.locate(entry, "rejected_file_name", location))

    def locate(self, entry: dict, key: str, location: str) -> Path:
        """Return the path of the image that an entry names under this key."""
        name = check_string(entry[key], key, location)
        return locate_image(self.folder, name, self.follow_links, location)

    def location(self, index: int) -> str:
        """Return where a row stands, for messages."""
        return f"{self.metadata} line {self.lines[index][0]}"

    def find_faults(self) -> Iterator[str | None]:
        """Yield for every row what is wrong with it, on one line; None if nothing is."""
        for inspection in self.inspect():
            yield inspection.fault

    def inspect(self, records: Iterable[str] = ()) -> Iterator[Inspection]:
        """Look at every row and its images. All cores read images.

        records: those of an earlier look. What has not changed since is not read again.
        """
        records = chain(records, repeat(""))
        with ThreadPool(os.cpu_count()) as pool:
            # a pool holds all its tasks in memory: a million rows go in by parts
            for start in range(0, len(self), 4096):
                rows = range(start, min(start + 4096, len(self)))
                unchanged = {}
                for row, record in zip(rows, records):
                    if self.is_unchanged(row, record):
                        unchanged[row] = Inspection(None, record)
                changed = [row for row in rows if row not in unchanged]
                inspections = pool.imap(self.inspect_row, changed, chunksize=16)
                for row in rows:
                    yield unchanged[row] if row in unchanged else next(inspections)

    def is_unchanged(self, index: int, record: str) -> bool:
        """Return whether a row is as it was when `record` was made of it. "" is of a bad row."""
        if not record:
            return False
        try:
            return record.partition(" ")[2] == self.stamp(self.read_row(index))
        except (InputError, OSError):
            return False

    def inspect_row(self, index: int) -> Inspection:
        """Look at a row and its images."""
        try:
            row = self.read_row(index)
            # made before the images are read: a change in the meantime is a change
            stamp = self.stamp(row)
            contents = [row.caption]
            for path in row.image_files():
                read_image(path)
                contents.append(hash_content(path))
        except (InputError, OSError) as error:
            location = f"{self.location(index)}: "
            message = str(error).removeprefix(location)
            return Inspection(location + " ".join(message.splitlines()), "")
        sha256 = hashlib.sha256(json.dumps(contents).encode()).hexdigest()
        return Inspection(None, f"{sha256} {stamp}")

    def stamp(self, row: Row) -> str:
        """Return the caption, and what changes when an image file is changed or replaced."""
        parts: list = [row.caption]
        for path in row.image_files():
            status = path.stat()
            name = str(path).removeprefix(str(self.folder))
            parts.append([name, status.st_size, status.st_mtime_ns, status.st_ctime_ns])
        return json.dumps(parts)


def center_square(image: Image.Image, resolution: int) -> Tensor:
    """Cut the square in the middle and resize it: -> [3,resolution,resolution] in [-1,1]."""
    width, height = image.size
    side = min(width, height)
    box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    square = image.resize((resolution, resolution), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(square, dtype=np.float32) / 127.5 - 1  # [H,W,3]
    return torch.from_numpy(pixels).permute(2, 0, 1)


def index_lines(path: Path, limit: int | None) -> np.ndarray:
    """Return the line number, from 1 on, and byte offset of every line that is not empty: [N,2]."""
    refuse_lfs_pointer(path)
    try:
        with open(path, "rb") as file:
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise InputError(f"{path}: it begins as UTF-16 does; save it as UTF-8")
            file.seek(0)
            return np.fromiter(islice(numbered_lines(file), limit), dtype=np.dtype((np.int64, 2)))
    except FileNotFoundError:
        raise InputError(f"{path}: {describe_missing(path.parent)}") from None
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror})") from None


def describe_missing(folder: Path) -> str:
    """Return what to say of a folder without metadata.jsonl."""
    needed = "it must have a line with file_name and text for each image"
    for name in ("metadata.csv", "metadata.parquet"):
        if (folder / name).exists():
            return f"no such file; convert {name} to it: {needed}"
    return f"no such file; {needed}"


def numbered_lines(file) -> Iterator[tuple[int, int]]:
    """Yield (line number, byte offset) of every line of a binary file that is not empty."""
    offset = 0
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, offset
        offset += len(line)


NOT_A_ROW = "not a JSON object with file_name and text (or caption)"


def parse_entry(line: bytes, location: str) -> dict:
    """Return the JSON object that a line of metadata.jsonl holds, with its `file_name`.

    location: of the line, for error messages. Raises InputError if the line is anything else.
    """
    try:
        entry = json.loads(line.decode("utf-8-sig"), object_pairs_hook=dict_of_pairs)
    except UnicodeDecodeError:
        raise InputError(f"{location}: not UTF-8 text; save the file as UTF-8") from None
    except (json.JSONDecodeError, RecursionError):
        raise InputError(f"{location}: {NOT_A_ROW}") from None
    except ValueError as error:
        raise InputError(f"{location}: {error}") from None
    if not isinstance(entry, dict) or "file_name" not in entry:
        raise InputError(f"{location}: {NOT_A_ROW}")
    return entry


def dict_of_pairs(pairs: list[tuple]) -> dict:
    """Return a JSON object as a dict. Raises ValueError if a key comes twice."""
    values = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key!r} comes twice")
        values[key] = value
    return values


def choose_caption(entry: dict, location: str) -> str:
    """Return an entry's `text` or, where that is missing or null, its `caption`."""
    key = "caption" if entry.get("text") is None else "text"
    if key not in entry:
        raise InputError(f"{location}: {NOT_A_ROW}")
    caption = check_string(entry[key], key, location)
    if not caption.strip():
        raise InputError(f"{location}: an empty caption")
    return caption


def check_string(value, key: str, location: str) -> str:
    """Return a string of an entry. Raises InputError for another value."""
    try:
        return as_text(value)
    except ValueError as error:
        raise InputError(f"{location}: {key} is {error}") from None


def as_text(value) -> str:
    """Return a string as it is. Raises ValueError for a value of JSON that is no text."""
    if isinstance(value, list):
        raise ValueError("a list; choose one of them")
    if not isinstance(value, str):
        raise ValueError(f"{json.dumps(value)[:40]}, not a string")
    if value.encode(errors="ignore").decode() != value:
        raise ValueError("malformed: it has a lone surrogate")
    if "\0" in value:
        raise ValueError("malformed: it has a NUL character")
    return value


def locate_image(folder: Path, name: str, follow_links: bool, location: str) -> Path:
    """Return an image's path. Raises InputError if it is outside the folder or does not exist.

    folder: without symbolic links in its path, as Path.resolve() returns it.
    follow_links: whether links in the folder may lead out of it. The name itself may not.
    """
    path = folder / name
    try:
        inside = path.resolve().is_relative_to(folder)
        exists = path.is_file()
        is_link = path.is_symlink()
    except (OSError, ValueError, RuntimeError):  # no file can have this name, or links in a circle
        inside = True
        exists = False
        is_link = False
    if not inside and not Path(os.path.normpath(path)).is_relative_to(folder):
        raise InputError(f"{location}: {name!r} is outside the folder; move the image into it")
    if not exists:
        link = ", only a broken link" if is_link else ""
        raise InputError(f"{location}: no image {name!r} in {folder}{link}")
    if not inside and not follow_links:
        raise InputError(f"{location}: {name!r} {LEADS_OUT}")
    return path


# ---- Prompts -------------------------------------------------------------------------------------


def read_prompts(path: str | Path) -> list[str]:
    """Return the prompts in a file.

    .txt: one per line. .jsonl: one per line, a string or an object with `prompt`, `text` or
    `caption`. .json: a list of such strings or objects.
    Raises InputError if the file holds anything else, or no prompt.
    """
    path = Path(path).expanduser()
    text = read_text(path)
    prompts = []
    try:
        for position, entry in parse_entries(text, path.suffix):
            prompts.append(parse_prompt(entry, position))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a list of prompts ({error})") from None
    if not prompts:
        raise InputError(f"{path}: holds no prompts")
    return prompts


def parse_entries(text: str, suffix: str) -> list[tuple[str, object]]:
    """Return where each entry of a file of prompts stands, and the entry.

    Raises ValueError for another kind of file.
    """
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            lines.append((f"line {number}", line.strip()))
    if suffix in ("", ".txt"):
        return lines
    if suffix == ".jsonl":
        return [(position, parse_json_line(line, position)) for position, line in lines]
    if suffix == ".json":
        entries = json.loads(text)
        if not isinstance(entries, list):
            raise ValueError("the top-level value is not a list")
        return [(f"entry {number}", entry) for number, entry in enumerate(entries, start=1)]
    raise ValueError("the file name must end in .txt, .json or .jsonl")


def parse_json_line(line: str, position: str):
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{position} is not JSON: {error.msg}") from None


def parse_prompt(entry, position: str) -> str:
    """Return the prompt that an entry is or holds. Raises ValueError for anything else.

    Of an object it is the first of `prompt`, `text` and `caption` that is there and not null.
    """
    prompt = entry
    if isinstance(entry, dict):
        given = [entry[key] for key in ("prompt", "text", "caption") if entry.get(key) is not None]
        if not given:
            raise ValueError(f"no prompt, text or caption in {position}")
        prompt = given[0]
    try:
        return as_text(prompt)
    except ValueError as error:
        raise ValueError(f"the prompt in {position} is {error}") from None
