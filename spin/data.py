"""Captioned images, and reproducible random draws.

Every draw is a stateless function of (seed, iteration, step, position in the batch): a run that was
interrupted, or split into micro-batches or among ranks, draws the same numbers.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spin.infra.errors import InputError
from spin.infra.files import hash_files, read_text
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


class CaptionedImages:
    """A folder of images with metadata.jsonl, the convention of Hugging Face's imagefolder.

    A line of metadata.jsonl is an object with `file_name` and `text` (or `caption`), and for DPO
    `rejected_file_name`, the less preferred image. Lines are indexed by byte offset, which takes 16
    bytes of memory per row, and parsed on access.

    resolution: height and width of the returned images, in pixels.
    with_rejected: whether every row needs a rejected image.
    limit: how many rows of the file to use; None for all.

    Raises InputError if metadata.jsonl is missing or has no rows, and on access to a bad row.
    """

    def __init__(
        self,
        folder: str | Path,
        resolution: int,
        with_rejected: bool = False,
        limit: int | None = None,
    ):
        self.folder = Path(folder).resolve()
        self.resolution = resolution
        self.with_rejected = with_rejected
        self.metadata = self.folder / "metadata.jsonl"
        self.lines = index_lines(self.metadata, limit)  # [rows,2]: line number, byte offset
        if len(self.lines) == 0:
            raise InputError(f"{self.metadata}: no rows")

    def __len__(self) -> int:
        return len(self.lines)

    def select(self, rows: np.ndarray) -> None:
        """Keep only these rows."""
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
        return parse_row(line, self.folder, self.with_rejected, self.location(index))

    def location(self, index: int) -> str:
        """Return where a row stands, for messages."""
        return f"{self.metadata} line {self.lines[index][0]}"

    def find_faults(self) -> Iterator[str | None]:
        """Yield for every row what is wrong with it, see `find_fault`. All cores read images."""
        with ThreadPool(os.cpu_count()) as pool:
            # a pool holds all its tasks in memory: a million rows go in by parts
            for start in range(0, len(self), 4096):
                rows = range(start, min(start + 4096, len(self)))
                yield from pool.imap(self.find_fault, rows, chunksize=16)

    def find_fault(self, index: int) -> str | None:
        """Return what is wrong with a row or its images, on one line; None if nothing is."""
        location = f"{self.location(index)}: "
        try:
            row = self.read_row(index)
            read_image(row.image)
            if row.rejected_image is not None:
                read_image(row.rejected_image)
        except InputError as error:
            message = str(error).removeprefix(location)
            return location + " ".join(message.splitlines())
        return None

    def hash(self) -> str:
        """Return 16 hexadecimal digits over metadata.jsonl and the sizes of its rows' images."""
        return hash_files([self.metadata], map(self.describe_sizes, range(len(self))))

    def describe_sizes(self, index: int) -> str:
        """Return the sizes of a row's image files in bytes; "unusable" for a bad row."""
        try:
            row = self.read_row(index)
        except InputError:
            return "unusable"
        paths = [row.image]
        if row.rejected_image is not None:
            paths.append(row.rejected_image)
        return repr([path.stat().st_size for path in paths])


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
    try:
        with open(path, "rb") as file:
            return np.fromiter(islice(numbered_lines(file), limit), dtype=np.dtype((np.int64, 2)))
    except OSError:
        raise InputError(
            f"{path}: no such file; it must have a line with file_name and text for each image"
        ) from None


def numbered_lines(file) -> Iterator[tuple[int, int]]:
    """Yield (line number, byte offset) of every line of a binary file that is not empty."""
    offset = 0
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, offset
        offset += len(line)


def parse_row(line: bytes, folder: Path, with_rejected: bool, location: str) -> Row:
    """Return the row that a line of metadata.jsonl holds.

    location: of the line, for error messages. Raises InputError if the line is not a row.
    """
    try:
        entry = json.loads(line.decode("utf-8-sig"))
        name = entry["file_name"]
        caption = entry["text"] if "text" in entry else entry["caption"]
        f"{name}{caption}".encode()  # fails for a lone surrogate, which is not text
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError(
            f"{location}: not a JSON object with file_name and text (or caption)"
        ) from None
    if not isinstance(caption, str) or not caption.strip():
        raise InputError(f"{location}: an empty caption")

    image = locate_image(folder, name, location)
    if not with_rejected:
        return Row(caption, image, None)
    rejected_name = entry.get("rejected_file_name")
    if not rejected_name:
        raise InputError(f"{location}: no rejected_file_name, which DPO needs")
    return Row(caption, image, locate_image(folder, rejected_name, location))


def locate_image(folder: Path, name, location: str) -> Path:
    """Return an image's path. Raises InputError if it is outside the folder or does not exist.

    folder: without symbolic links in its path, as Path.resolve() returns it.
    """
    path = folder / str(name)
    try:
        inside = path.resolve().is_relative_to(folder)
        exists = path.is_file()
    except (OSError, ValueError):  # the name is too long, or has a character that no name can have
        inside = True
        exists = False
    if not inside:
        raise InputError(f"{location}: {name!r} is outside the folder; move the image into it")
    if not exists:
        raise InputError(f"{location}: no image {name!r} in {folder}")
    return path


# ---- Prompts -------------------------------------------------------------------------------------


def read_prompts(path: str | Path) -> list[str]:
    """Return the prompts in a file.

    .txt: one per line. .jsonl: one per line, a string or an object with `prompt`, `text` or
    `caption`. .json: a list of such strings or objects.
    Raises InputError if the file holds anything else, or no prompt.
    """
    path = Path(path)
    text = read_text(path)
    try:
        prompts = [parse_prompt(entry) for entry in parse_entries(text, path.suffix)]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = error.args[0] if error.args else type(error).__name__
        raise InputError(f"{path}: not a list of prompts ({reason})") from None
    if not prompts:
        raise InputError(f"{path}: holds no prompts")
    return prompts


def parse_entries(text: str, suffix: str) -> list:
    """Return the entries of a file of prompts. Raises ValueError for another kind of file."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if suffix in ("", ".txt"):
        return lines
    if suffix == ".jsonl":
        return [json.loads(line) for line in lines]
    if suffix == ".json":
        entries = json.loads(text)
        if not isinstance(entries, list):
            raise ValueError("the top-level value is not a list")
        return entries
    raise ValueError("the file name must end in .txt, .json or .jsonl")


def parse_prompt(entry) -> str:
    """Return the prompt that an entry is or holds. Raises ValueError for anything else."""
    prompt = entry
    if isinstance(entry, dict):
        keys = [key for key in ("prompt", "text", "caption") if key in entry]
        if not keys:
            raise ValueError("no prompt, text or caption")
        prompt = entry[keys[0]]
    if not isinstance(prompt, str):
        raise ValueError(f"{prompt!r} is not a prompt")
    if prompt.encode(errors="ignore").decode() != prompt:
        raise ValueError("a lone surrogate is not text")
    return prompt
