"""Captioned images, and reproducible random draws.

Every draw is a stateless function of (seed, iteration, step, position in the batch): a run that was
interrupted, or split into micro-batches or among ranks, draws the same numbers.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spin.infra.errors import InputError
from spin.infra.images import read_image
from spin.infra.metadata import Row, index_lines, parse_row

# ---- Random draws --------------------------------------------------------------------------------

# independent random streams: first entries of a SeedSequence's spawn_key
ORDER = 0
PAIR = 1
GENERATION = 2
DROP = 3


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
    return random_stream(seed, ORDER, iteration, epoch).permutation(num_rows)


def random_draws(
    seed: int,
    iteration: int,
    step: int,
    position: int,
    shape: tuple[int, ...],
    num_timesteps: int,
    independent_noise: bool = False,
) -> dict[str, Tensor]:
    """Return everything that is random in one pair of a batch.

    t: int64 in 0..num_timesteps-1.
    flip, drop: uniform in [0,1), to be compared with the probabilities of mirroring the images and
        of dropping the prompt.
    eps, posterior_noise: standard normal, of `shape`. eps noises the latents of the pair;
        posterior_noise samples the VAE's posterior of the real image (and of DPO's rejected one).
    eps_gen: standard normal, of `shape`, with `independent_noise` alone. It noises the second
        latent; then eps noises only the first.
    """
    rng = random_stream(seed, PAIR, iteration, step, position)
    # the order of these lines fixes which number is which
    t = int(rng.integers(num_timesteps))
    flip = rng.random()
    eps = rng.standard_normal(shape, dtype=np.float32)
    posterior_noise = rng.standard_normal(shape, dtype=np.float32)
    # "drop" has a stream of its own, so that it does not depend on what else is drawn
    draws = {
        "t": torch.tensor(t),
        "flip": torch.tensor(flip),
        "eps": torch.from_numpy(eps),
        "posterior_noise": torch.from_numpy(posterior_noise),
        "drop": torch.tensor(random_stream(seed, DROP, iteration, step, position).random()),
    }
    if independent_noise:
        draws["eps_gen"] = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    return draws


def random_stream(seed: int, *key: int) -> np.random.Generator:
    """Return a source of random numbers that is a function of the seed and the key alone."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def noise_generator(seed: int, iteration: int, row: int) -> torch.Generator:
    """Return the source of all noise in the opponent's image for a data row."""
    sequence = np.random.SeedSequence(seed, spawn_key=(GENERATION, iteration, row))
    state = sequence.generate_state(1, np.uint64)[0]
    return torch.Generator("cpu").manual_seed(int(state >> 1))


# ---- Captioned images ----------------------------------------------------------------------------


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
        self.indexed_at = self.metadata.stat().st_mtime_ns
        self.inspected: np.ndarray | None = None  # [rows,2]: hashes, see spin.infra.inspection

    def __len__(self) -> int:
        return len(self.lines)

    def select(self, rows: np.ndarray) -> None:
        """Keep only these rows. rows: their indices, or whether to keep each."""
        self.lines = self.lines[rows]
        if self.inspected is not None:
            self.inspected = self.inspected[rows]

    def caption(self, index: int) -> str:
        return self.read_row(index).caption

    def image(self, index: int) -> Tensor:
        """Return a row's image, [3,resolution,resolution] in [-1,1]."""
        return center_square(self.whole_image(index), self.resolution)

    def whole_image(self, index: int) -> Image.Image:
        """Return a row's image as it is in its file."""
        return read_image(self.read_row(index).image)

    def rejected_image(self, index: int) -> Tensor:
        """Return a row's rejected image, [3,resolution,resolution] in [-1,1]."""
        return center_square(read_image(self.read_row(index).rejected_image), self.resolution)

    def read_row(self, index: int) -> Row:
        """Return a row, whose images exist but have not been opened."""
        if self.metadata.stat().st_mtime_ns != self.indexed_at:
            raise InputError(f"{self.metadata}: has changed since it was read; start again")
        _, offset = self.lines[index].tolist()
        with open(self.metadata, "rb") as file:
            file.seek(offset)
            line = file.readline()
        return parse_row(
            line, self.folder, self.with_rejected, self.follow_links, self.location(index)
        )

    def location(self, index: int) -> str:
        """Return where a row stands, for messages."""
        return f"{self.metadata} line {self.lines[index][0]}"


def center_square(image: Image.Image, resolution: int) -> Tensor:
    """Cut the square in the middle and resize it: -> [3,resolution,resolution] in [-1,1]."""
    width, height = image.size
    side = min(width, height)
    box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    square = image.resize((resolution, resolution), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(square, dtype=np.float32) / 127.5 - 1  # [H,W,3]
    return torch.from_numpy(pixels).permute(2, 0, 1)


def sizes_of_square(image: Image.Image, resolution: int) -> list[int]:
    """Return what SDXL is told of an image that `center_square` cuts: six sizes in pixels.

    They are height and width of the image; how much is cut off at the top and at the left once its
    square is resized; height and width of the result. Since the square is in the middle, they are
    those of the mirrored image, too.
    """
    width, height = image.size
    scale = resolution / min(width, height)
    top = round((height * scale - resolution) / 2)
    left = round((width * scale - resolution) / 2)
    return [height, width, top, left, resolution, resolution]
