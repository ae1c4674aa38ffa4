"""What the tests of checkpoints share."""

import shutil
from pathlib import Path

import pytest
import torch

from spin.checkpoint import Pipeline


@pytest.fixture
def model_copy(tiny_folder, tmp_path) -> Path:
    """A tiny checkpoint of the test's own, to be damaged."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture
def assert_same_weights():
    return check_same_weights


@pytest.fixture
def assert_same_pipelines():
    return check_same_pipelines


def check_same_weights(a: Pipeline, b: Pipeline) -> None:
    """Assert that all weights have the same names, dtypes and bits."""
    parts = ["unet", "vae", "text_encoder"]
    if a.text_encoder_2 is not None:
        parts.append("text_encoder_2")
    for part in parts:
        state_a = getattr(a, part).state_dict()
        state_b = getattr(b, part).state_dict()
        assert state_a.keys() == state_b.keys()
        for name in state_a:
            assert state_a[name].dtype == state_b[name].dtype, name
            assert torch.equal(state_a[name], state_b[name]), name


@torch.no_grad()
def check_same_pipelines(a: Pipeline, b: Pipeline) -> None:
    """Assert the same weights, contexts and schedule, to the bit."""
    check_same_weights(a, b)
    # torch computes frozen attention along a faster path, which rounds differently
    a.freeze()
    b.freeze()
    prompts = ["a red circle!", ""]
    assert torch.equal(a.encode_prompts(prompts), b.encode_prompts(prompts))
    assert torch.equal(a.scheduler.alphas_cumprod, b.scheduler.alphas_cumprod)
    assert a.scheduler.prediction_type == b.scheduler.prediction_type
