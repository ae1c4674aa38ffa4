"""bench.py runs, and says what it measured."""

from types import SimpleNamespace

import bench
import pytest
import helpers
import torch

from spin.unet import UNet


def test_the_bench_on_the_miniature_world(capsys):
    with torch.random.fork_rng():  # a measurement may draw from the global generator
        rows = {row["what"]: row for row in bench.main(["--device", "cpu", "--pairs", "2", "--images", "2"])}
    ours, recipe = rows["ours"], rows["public recipe"]
    assert ours["pairs/s"] > recipe["pairs/s"] > 0 and ours["TFLOP/s"] > 0
    assert rows["drawn, 20 guided steps, batch 2"]["images/s"] > 0
    assert len(capsys.readouterr().out.split("\n")) > len(rows)


def test_the_flop_of_a_pair():
    """SD-1.5 at 512 px: 2.407 T forward and backward for each of two images, 0.803 T forward (counted elsewhere)."""
    with torch.device("meta"):
        unet = UNet(helpers.MANIFEST["sd15.config"]["unet"])
    assert bench.flop_of_a_pair(SimpleNamespace(unet=unet)) == pytest.approx(2 * (2.407e12 + 0.803e12), rel=1e-3)
