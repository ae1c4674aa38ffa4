"""Captioned images, latents on disk, and which sample is drawn when: a function of (seed, iteration, step, place in the
batch), without state, so a run that was interrupted, or split among micro-batches or ranks, draws the same samples."""

import json
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from spin.infra.run import InputError, hash_files, read_text, whole

SHARD = 256  # rows a file of latents holds
ORDER, DRAW, GENERATE = range(3)  # streams of random numbers that never meet


class CaptionedImages:
    """A folder of images with metadata.jsonl: one object a line, `file_name` and `text` (or `caption`), with `pairs`
    also `rejected_file_name`, the image that DPO is to like less. first: only the first N rows. InputError for a folder
    without metadata.jsonl or a row in it; for a row that is wrong, when it is asked for. In memory: 16 bytes a row."""

    def __init__(self, folder: str | Path, resolution: int, pairs: bool = False, first: int | None = None):
        self.folder, self.resolution, self.pairs = Path(folder), resolution, pairs
        self.root, self.metadata = self.folder.resolve(), self.folder / "metadata.jsonl"
        try:
            with open(self.metadata, "rb") as file:  # of each line that is not empty: its number, from 1 on, and place
                rows = ((n, file.tell() - len(line)) for n, line in enumerate(file, start=1) if line.strip())
                self.rows = np.fromiter(islice(rows, first), dtype=np.dtype((np.int64, 2)))
        except OSError:
            raise InputError(f"{self.metadata}: no such file; it has a line for each image: file_name, text") from None
        if not len(self.rows):
            raise InputError(f"{self.metadata}: no rows")

    def __len__(self) -> int:
        return len(self.rows)

    def keep(self, rows: np.ndarray) -> None:
        self.rows = self.rows[rows]

    def row(self, i: int) -> tuple[str, list[Path]]:
        """Row i's caption and its image, with `pairs` its two."""
        number, place = self.rows[i].tolist()
        where = f"{self.metadata} line {number}"
        with open(self.metadata, "rb") as file:
            file.seek(place)
            line = file.readline()
        try:
            row = json.loads(line.decode("utf-8-sig"))
            name, caption = row["file_name"], row["text"] if "text" in row else row["caption"]
            f"{name}{caption}".encode()  # a lone surrogate is no text
        except (ValueError, TypeError, KeyError, RecursionError):
            raise InputError(f"{where}: not a JSON object with file_name and text (or caption)") from None
        if not isinstance(caption, str) or not caption.strip():
            raise InputError(f"{where}: an empty caption")
        if self.pairs and not row.get("rejected_file_name"):
            raise InputError(f"{where}: no rejected_file_name, which DPO needs")
        return caption, [self.locate(each, where) for each in [name, row.get("rejected_file_name")][: 1 + self.pairs]]

    def locate(self, name, where: str) -> Path:
        path = self.folder / str(name)
        try:
            inside, there = path.resolve().is_relative_to(self.root), path.is_file()
        except (OSError, ValueError):  # too long, or with a character that no name can have
            inside, there = True, False
        if not inside:
            raise InputError(f"{where}: {name!r} leaves the folder; images must lie inside it")
        if not there:
            raise InputError(f"{where}: no image {name!r} in {self.folder}")
        return path

    def caption(self, i: int) -> str:
        return self.row(i)[0]

    def image(self, i: int, rejected: bool = False) -> Tensor:
        """[3,resolution,resolution] in [-1,1]: the square in the middle of the picture, resized (bilinear)."""
        picture = read_picture(self.row(i)[1][rejected])
        (width, height), short = picture.size, min(picture.size)
        centre = ((width - short) / 2, (height - short) / 2, (width + short) / 2, (height + short) / 2)
        square = picture.resize((self.resolution, self.resolution), Image.Resampling.BILINEAR, box=centre)
        return torch.from_numpy(np.asarray(square, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)

    def problem(self, i: int) -> str | None:
        """What is wrong with row i, its images included, which are read for it."""
        where = f"{self.metadata} line {self.rows[i][0]}: "
        try:
            for path in self.row(i)[1]:
                read_picture(path)
        except InputError as error:
            return where + " ".join(str(error).removeprefix(where).splitlines())

    def inspect(self, bar: tqdm) -> Iterator[tuple[int, str]]:
        """(row, what is wrong with it) of every row that cannot be used; images are read on all cores."""
        with ThreadPool(os.cpu_count()) as pool:
            for at in range(0, len(self), 4096):
                rows = range(at, min(at + 4096, len(self)))
                for row, problem in zip(rows, pool.imap(self.problem, rows, 16)):
                    bar.update()
                    if problem:
                        yield row, problem

    def hash(self) -> str:
        """16 hexadecimal digits over metadata.jsonl and the sizes of the images of its rows; they are not read."""

        def size(i: int) -> str:
            try:
                return repr([path.stat().st_size for path in self.row(i)[1]])
            except InputError:
                return "unusable"

        return hash_files([self.metadata], map(size, range(len(self))))


def read_picture(path: Path) -> Image.Image:
    """In RGB. InputError where the file is no whole image, or one of more than 179 million pixels: Pillow's limit."""
    try:
        with Image.open(path) as file:
            return to_rgb(file)
    except Exception as error:  # whatever a broken file makes one of Pillow's many readers do
        raise InputError(f"{path}: not a readable image ({error or type(error).__name__})") from None


def to_rgb(picture: Image.Image) -> Image.Image:
    """8 and 16 bit modes to RGB, turned as EXIF says, what is transparent on white. ValueError for another mode."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("I", "F"):
        raise ValueError(f"32 bits a pixel, mode {picture.mode}: what is white in it? Make it 8 or 16 bits")
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture, dtype=np.float32) / 257).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    return picture.convert("RGB")


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a .txt; or strings or objects (`prompt`, `text` or `caption`): a .json list or a .jsonl's lines.
    InputError where the file holds no prompt or something else."""
    text = read_text(path := Path(path))
    lines = [line for line in text.split("\n") if line.strip()]
    try:
        if path.suffix not in ("", ".txt", ".json", ".jsonl"):
            raise ValueError("its name ends in none of .txt, .json, .jsonl")
        if path.suffix != ".json":
            entries = [json.loads(line) if path.suffix == ".jsonl" else line.strip() for line in lines]
        elif not isinstance(entries := json.loads(text), list):
            raise ValueError("the file's outermost value is no list")
        keys = ("prompt", "text", "caption")
        entries = [next(e[key] for key in keys if key in e) if isinstance(e, dict) else e for e in entries]
    except (ValueError, TypeError, StopIteration, RecursionError) as error:
        raise InputError(f"{path}: not a list of prompts ({str(error) or 'no prompt, text or caption'})") from None
    if not entries or not all(isinstance(e, str) and e.encode(errors="ignore").decode() == e for e in entries):
        raise InputError(f"{path}: holds {'no prompts' if not entries else 'something that is not a prompt'}")
    return entries


class LatentShards:
    """Tensors of these data rows, ascending, in a folder, as float16, SHARD rows a file: each is whole or not there."""

    def __init__(self, folder: Path, rows: Sequence[int]):
        self.folder, self.rows = folder, np.asarray(rows)
        self.open = lru_cache(maxsize=64)(lambda path: safe_open(path, framework="pt"))

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    def missing(self) -> list[tuple[int, list[int]]]:
        """(shard, its rows) of every file that is not there yet."""
        shards = range(0, len(self.rows), SHARD)
        return [(i, self.rows[at : at + SHARD].tolist()) for i, at in enumerate(shards) if not self.path(i).exists()]

    def count_missing(self) -> int:
        return sum(len(rows) for _, rows in self.missing())

    def write(self, shard: int, tensors: dict[str, Tensor]) -> None:
        """tensors: [rows of the shard, ...] each."""
        with whole(self.path(shard)) as part:
            save_file({name: tensor.half().cpu().contiguous() for name, tensor in tensors.items()}, part)

    def read(self, name: str, rows: Sequence[int], entries: Sequence[int] | None = None) -> Tensor:
        """float32 [len(rows), ...], of mapped files; entries: of each row [S, ...] only this one of its S."""
        found = []
        for n, (shard, i) in enumerate(divmod(int(place), SHARD) for place in np.searchsorted(self.rows, rows)):
            where = i if entries is None else (i, entries[n])
            try:
                found.append(self.open(self.path(shard)).get_slice(name)[where])
            except (SafetensorError, OSError):
                raise InputError(f"{self.path(shard)}: missing or damaged; delete it, and it is made anew") from None
        return torch.stack(found).float()


@lru_cache(maxsize=2)
def epoch_order(seed: int, iteration: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(ORDER, iteration, epoch))).permutation(count)


def batch_rows(seed: int, iteration: int, step: int, batch_size: int, count: int) -> list[int]:
    """The data rows, out of `count`, of an iteration's optimiser step 1, 2, ...: every row once, then all again."""
    places = range((step - 1) * batch_size, step * batch_size)
    return [int(epoch_order(seed, iteration, place // count, count)[place % count]) for place in places]


def draw(seed: int, iteration: int, step: int, place: int, shape: tuple[int, ...], timesteps: int) -> dict[str, Tensor]:
    """What is random in a pair of a batch: t in 0..timesteps-1, flip and drop in [0,1), and three normals [*shape]:
    eps, posterior, and eps_gen for the generated image where that is not to share eps."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(DRAW, iteration, step, place)))
    drawn = {"t": torch.tensor(int(rng.integers(timesteps))), "flip": torch.tensor(rng.random())}
    for name in ("eps", "posterior", "eps_gen"):
        drawn[name] = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    return drawn | {"drop": torch.tensor(rng.random())}


def generator(seed: int, iteration: int, row: int) -> torch.Generator:
    """The noise that the opponent's image for a data row begins with."""
    state = np.random.SeedSequence(seed, spawn_key=(GENERATE, iteration, row)).generate_state(1, np.uint64)[0]
    return torch.Generator("cpu").manual_seed(int(state >> 1))
