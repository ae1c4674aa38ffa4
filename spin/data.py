"""Captioned images, latents on disk, and which sample is drawn when.

Nothing here keeps a random state: every draw is a function of (seed, iteration, step, place in the batch), so a run
that was interrupted, or split into other micro-batches, draws the same samples.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spin.run import InputError, whole

SHARD = 256  # rows a file of latents holds


# ---------------------------------------------------------------------------------------------------------------------
# Captioned images


class CaptionedImages:
    """A folder of images with metadata.jsonl: one object a line, `file_name` and `text` (or `caption`).

    `captions[i]` and `image(i)` are row i. With `pairs`, each line also has a `rejected_file_name`, the image that DPO
    is to like less: `rejected_image(i)`. Raises InputError for a row that names no file in the folder or no caption.
    """

    def __init__(self, folder: str | Path, resolution: int, pairs: bool = False):
        self.folder, self.resolution, self.pairs = Path(folder), resolution, pairs
        self.root = self.folder.resolve()
        self.metadata = self.folder / "metadata.jsonl"
        self.files: list[Path] = []
        self.rejected: list[Path] = []
        self.captions: list[str] = []
        try:
            lines = self.metadata.read_text(encoding="utf-8-sig").split("\n")
        except OSError:
            raise InputError(f"{self.metadata}: no such file; it has a line for each image: file_name, text") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{self.metadata}: not UTF-8 text ({error})") from None
        for number, line in enumerate(lines, start=1):
            if line.strip():
                self.add_row(line, f"{self.metadata} line {number}")
        if not self.files:
            raise InputError(f"{self.metadata}: no rows")

    def add_row(self, line: str, where: str) -> None:
        try:
            row = json.loads(line)
            name, caption = row["file_name"], row["text"] if "text" in row else row["caption"]
            f"{name}{caption}".encode()  # a lone surrogate is no text
        except (ValueError, TypeError, KeyError, RecursionError):
            raise InputError(f"{where}: not a JSON object with file_name and text (or caption)") from None
        if not isinstance(caption, str) or not caption.strip():
            raise InputError(f"{where}: an empty caption")
        if self.pairs and not row.get("rejected_file_name"):
            raise InputError(f"{where}: no rejected_file_name, which DPO needs")
        self.files.append(self.locate(name, where))
        self.captions.append(caption)
        if self.pairs:
            self.rejected.append(self.locate(row["rejected_file_name"], where))

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

    def __len__(self) -> int:
        return len(self.files)

    def image(self, row: int) -> Tensor:
        """[3,resolution,resolution] in [-1,1]: the square in the middle of the picture, resized (bilinear)."""
        return self.read(self.files[row])

    def rejected_image(self, row: int) -> Tensor:
        return self.read(self.rejected[row])

    def read(self, path: Path) -> Tensor:
        try:
            with Image.open(path) as file:
                picture = to_rgb(file)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{path}: not a readable image ({error})") from None
        (width, height), short = picture.size, min(picture.size)
        centre = ((width - short) / 2, (height - short) / 2, (width + short) / 2, (height + short) / 2)
        square = picture.resize((self.resolution, self.resolution), Image.Resampling.BILINEAR, box=centre)
        return torch.from_numpy(np.asarray(square, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)

    def hash(self) -> str:
        """16 hexadecimal digits over metadata.jsonl and the sizes of the image files; their content is not read."""
        digest = hashlib.sha256(self.metadata.read_bytes())
        digest.update(repr([path.stat().st_size for path in self.files + self.rejected]).encode())
        return digest.hexdigest()[:16]


def to_rgb(picture: Image.Image) -> Image.Image:
    """8 and 16 bit modes to RGB, turned as EXIF says, what is transparent on white. ValueError for another mode."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("I", "F"):
        raise ValueError(f"32 bits a pixel, mode {picture.mode}: what is white in it? Make it 8 or 16 bits")
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture, dtype=np.float32) / 257).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a .txt file (one a line), or of the strings or objects of a .json list or the lines of a .jsonl.

    Objects say `prompt`, `text` or `caption`. Raises InputError where the file holds no prompt or something else.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            entries = json.loads(text)
            if not isinstance(entries, list):
                raise ValueError("the file's outermost value is no list")
        elif path.suffix == ".jsonl":
            entries = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            entries = [line.strip() for line in text.split("\n") if line.strip()]
        keys = ("prompt", "text", "caption")
        entries = [next(e[key] for key in keys if key in e) if isinstance(e, dict) else e for e in entries]
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror})") from None
    except (ValueError, TypeError, StopIteration) as error:
        raise InputError(f"{path}: not a list of prompts ({error or 'no prompt, text or caption'})") from None
    if not entries or not all(isinstance(entry, str) for entry in entries):
        raise InputError(f"{path}: holds {'no prompts' if not entries else 'something that is not a prompt'}")
    return entries


# ---------------------------------------------------------------------------------------------------------------------
# Latents on disk


class LatentShards:
    """Tensors of many rows in a folder, SHARD rows a file; a file appears whole or not at all.

    rows: the data rows held, in order. Stored as float16: 32 KB for a latent of 4x64x64.
    """

    def __init__(self, folder: Path, rows: Sequence[int]):
        self.folder, self.rows = folder, list(rows)
        self.place = {row: place for place, row in enumerate(self.rows)}
        self.open = lru_cache(maxsize=64)(lambda path: safe_open(path, framework="pt"))

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    def missing(self) -> list[tuple[int, list[int]]]:
        """(shard, its rows) of every file that is not there yet."""
        shards = range(0, len(self.rows), SHARD)
        return [(i, self.rows[at : at + SHARD]) for i, at in enumerate(shards) if not self.path(i).exists()]

    def write(self, shard: int, tensors: dict[str, Tensor]) -> None:
        """tensors: [rows of the shard, ...] each."""
        with whole(self.path(shard)) as part:
            save_file({name: tensor.half().cpu().contiguous() for name, tensor in tensors.items()}, part)

    def read(self, name: str, rows: Sequence[int], entries: Sequence[int] | None = None) -> Tensor:
        """float32 [len(rows), ...]; the files are mapped into memory, only these rows are read.

        entries: of each row [S, ...] only this one of its S.
        """
        found = []
        for n, (shard, i) in enumerate(divmod(self.place[row], SHARD) for row in rows):
            where = i if entries is None else (i, entries[n])
            try:
                found.append(self.open(self.path(shard)).get_slice(name)[where])
            except (SafetensorError, OSError):
                raise InputError(f"{self.path(shard)}: damaged; delete it, and it is made anew") from None
        return torch.stack(found).float()


# ---------------------------------------------------------------------------------------------------------------------
# Which sample is drawn when

ORDER, DRAW, GENERATE = range(3)  # streams of random numbers that never meet


def entropy(seed: int, *key: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=key)


@lru_cache(maxsize=2)
def epoch_order(seed: int, iteration: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng(entropy(seed, ORDER, iteration, epoch)).permutation(count)


def batch_rows(seed: int, iteration: int, step: int, batch_size: int, count: int) -> list[int]:
    """The data rows, out of `count`, of an iteration's optimiser step 1, 2, ...: every row once, then all again."""
    places = range((step - 1) * batch_size, step * batch_size)
    return [int(epoch_order(seed, iteration, place // count, count)[place % count]) for place in places]


def draw(seed: int, iteration: int, step: int, place: int, shape: tuple[int, ...], timesteps: int) -> dict[str, Tensor]:
    """What is random in a pair of a batch: t in 0..timesteps-1, flip in [0,1), and three normals [*shape]: eps,
    posterior, and eps_gen for the generated image where that is not to share eps.
    """
    rng = np.random.default_rng(entropy(seed, DRAW, iteration, step, place))
    return {
        "t": torch.tensor(int(rng.integers(timesteps))),
        "flip": torch.tensor(rng.random()),
        "eps": torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)),
        "posterior": torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)),
        "eps_gen": torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)),
    }


def generator(seed: int, iteration: int, row: int) -> torch.Generator:
    """The noise that the opponent's image for a data row begins with."""
    state = entropy(seed, GENERATE, iteration, row).generate_state(1, np.uint64)[0]
    return torch.Generator("cpu").manual_seed(int(state >> 1))
