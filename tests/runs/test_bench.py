"""tests/bench.py on the miniature world's networks, and how it counts operations."""

import bench
import helpers
import pytest
import torch

from spin.unet import UNet


def test_bench_measures_both_recipes_and_sampling(capsys):
    with torch.random.fork_rng():  # a measurement may draw from the global generator
        rows = bench.main(["--device", "cpu", "--pairs", "2", "--images", "2"])
    row_of = {row["what"]: row for row in rows}
    ours = row_of["ours"]
    public = row_of["public recipe"]
    assert ours["pairs/s"] > public["pairs/s"] > 0
    assert ours["TFLOP/s"] > 0
    assert row_of["sampled, 20 guided steps, batch 2"]["images/s"] > 0
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) > len(rows)


def test_flop_of_a_pair_is_that_of_two_images_for_both_players():
    """The numbers, of SD-1.5 at 512 px, were counted elsewhere."""
    with torch.device("meta"):
        unet = UNet(helpers.MANIFEST["sd15.config"]["unet"])
    forward_and_backward = 2.407e12  # of one image
    forward = 0.803e12
    expected = 2 * (forward_and_backward + forward)
    assert bench.flop_of_a_pair(unet) == pytest.approx(expected, rel=1e-3)
