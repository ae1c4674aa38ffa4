"""spin/infra/shards.py: latents on disk."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spin.infra import shards
from spin.infra.errors import InputError
from spin.infra.shards import LatentShards

ROWS = [3, 5, 7, 8, 20, 21, 30, 31, 40, 41]  # three files of 4, 4 and 2 rows


@pytest.fixture
def four_rows_a_file(monkeypatch) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", 4)


def latent(row: int) -> Tensor:
    return torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(row))


def write_rows(latents: LatentShards, shard: int, rows: list[int]) -> None:
    batches = [{"x0": latent(row)[None]} for row in rows]
    latents.write(shard, batches)


def test_missing_files_are_named_with_their_rows(tmp_path, four_rows_a_file):
    latents = LatentShards(tmp_path / "latents", ROWS)
    assert latents.missing() == [(0, ROWS[:4]), (1, ROWS[4:8]), (2, ROWS[8:])]
    assert latents.count_missing() == 10
    write_rows(latents, 0, ROWS[:4])
    write_rows(latents, 2, ROWS[8:])
    assert latents.missing() == [(1, ROWS[4:8])]
    assert LatentShards(tmp_path / "latents", ROWS).missing() == [(1, ROWS[4:8])]
    assert latents.count_missing() == 4


def test_rows_are_read_in_the_order_that_is_asked_for(tmp_path, four_rows_a_file):
    """As float32, from the float16 that is stored."""
    latents = LatentShards(tmp_path / "latents", ROWS)
    for shard, rows in latents.missing():
        write_rows(latents, shard, rows)
    found = latents.read("x0", [41, 3, 8, 3])
    expected = torch.stack([latent(41), latent(3), latent(8), latent(3)]).half().float()
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@given(rows=st.sets(st.integers(0, 10**6), min_size=1, max_size=30), batch_size=st.integers(1, 9))
def test_batches_of_any_size_are_stored_alike(rows, batch_size, tmp_path_factory):
    """With the files' real size, and several tensors a row."""
    ascending = sorted(rows)
    latents = LatentShards(tmp_path_factory.mktemp("latents"), ascending)
    batches = []
    for start in range(0, len(ascending), batch_size):
        values = torch.tensor(ascending[start : start + batch_size]) % 1000
        batches.append({"mean": values[:, None].float(), "logvar": -values[:, None].float()})
    latents.write(0, batches)
    expected = torch.tensor(ascending)[:, None] % 1000
    assert torch.equal(latents.read("mean", ascending), expected.float())
    assert torch.equal(latents.read("logvar", ascending), -expected.float())


def test_writing_leaves_its_tensors_unchanged(tmp_path):
    tensor = latent(1)[None]
    before = tensor.clone()
    LatentShards(tmp_path, [1]).write(0, [{"x0": tensor}])
    assert torch.equal(tensor, before)


def test_a_damaged_or_missing_file_is_refused_by_name(tmp_path, four_rows_a_file):
    latents = LatentShards(tmp_path / "latents", ROWS)
    write_rows(latents, 0, ROWS[:4])
    latents.path(0).write_bytes(b"damaged")
    message = "shard-0000{}.safetensors: missing or damaged; delete it"
    with pytest.raises(InputError, match=message.format(0)):
        latents.read("x0", [3])
    with pytest.raises(InputError, match=message.format(1)):
        latents.read("x0", [20])


def test_a_million_rows_are_an_array_and_no_list_of_files(tmp_path):
    latents = LatentShards(tmp_path, range(1_000_000))
    assert latents.rows.nbytes == 8_000_000
    missing = latents.missing()
    assert len(missing) == -(-1_000_000 // 256)
    assert missing[-1][1] == list(range(256 * (len(missing) - 1), 1_000_000))
    assert np.array_equal(latents.rows[:3], [0, 1, 2])
