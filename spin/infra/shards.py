"""Latents on disk, in shards of 256 rows each, written atomically."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spin.infra.errors import InputError
from spin.infra.files import atomic_write

SHARD_ROWS = 256
OPEN_FILES = 64  # memory-mapped shards that are kept open


class LatentShards:
    """Named tensors of some data rows, kept in a folder: integers as they are, others as float16.

    folder: holds shard-00000.safetensors, ...; it need not exist yet.
    rows: the data rows that are kept, ascending. Shard i holds the i-th SHARD_ROWS of them.
    """

    def __init__(self, folder: Path, rows: Sequence[int]):
        self.folder = folder
        self.rows = np.asarray(rows)
        self.open_shard = lru_cache(maxsize=OPEN_FILES)(open_safetensors)

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    def missing(self) -> list[tuple[int, list[int]]]:
        """Return (shard, its data rows) for every file that is not there yet."""
        missing = []
        for shard, start in enumerate(range(0, len(self.rows), SHARD_ROWS)):
            if not self.path(shard).exists():
                missing.append((shard, self.rows[start : start + SHARD_ROWS].tolist()))
        return missing

    def count_missing(self) -> int:
        """Return the number of data rows whose files are not there yet."""
        return sum(len(rows) for _, rows in self.missing())

    def write(self, shard: int, batches: list[dict[str, Tensor]]) -> None:
        """Write one file. batches: its rows in order, each a dict of tensors [rows, ...]."""
        tensors = {}
        for name in batches[0]:
            joined = torch.cat([batch[name] for batch in batches])
            if joined.is_floating_point():
                joined = joined.half()
            tensors[name] = joined.cpu().contiguous()
        with atomic_write(self.path(shard)) as temporary:
            save_file(tensors, temporary)

    def read(self, name: str, rows: Sequence[int]) -> Tensor:
        """Return the tensor `name` of these data rows, float32 [len(rows), ...]."""
        tensors = []
        for position in np.searchsorted(self.rows, rows).tolist():
            shard, index = divmod(position, SHARD_ROWS)
            path = self.path(shard)
            try:
                tensors.append(self.open_shard(path).get_slice(name)[index])
            except (SafetensorError, OSError):
                raise InputError(
                    f"{path}: missing or damaged; delete it, and it will be recreated"
                ) from None
        return torch.stack(tensors).float()


def open_safetensors(path: Path):
    """Return a handle that reads single rows of a .safetensors file."""
    return safe_open(path, framework="pt")
