"""Fixtures that all tests share.

They import the project's code where they use it, so that a test of the loss needs nothing else to
work.
"""

import os
from pathlib import Path

# Tiny networks are fastest on one thread, and threads that wait busily are very slow on a loaded
# machine. OpenMP reads this when torch starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import helpers
import pytest
import torch
from hypothesis import settings

settings.register_profile("spin", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("spin")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A checkpoint like SD-1.x in miniature. All tests share it: copy it before you change it."""
    return helpers.write_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny2_folder(tmp_path_factory) -> Path:
    """A checkpoint like SD-2.x in miniature: v-prediction, linear projections, padding id 0."""
    return helpers.write_checkpoint(tmp_path_factory.mktemp("tiny2") / "model", "tiny2")


@pytest.fixture(scope="session")
def tinyxl_folder(tmp_path_factory) -> Path:
    """A checkpoint like SDXL in miniature: two text encoders, sizes and pooled text as inputs."""
    return helpers.write_checkpoint(tmp_path_factory.mktemp("tinyxl") / "model", "tinyxl")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Twelve captioned images. All tests share them: copy the folder before you change it."""
    return helpers.write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="session")
def pipe(tiny_folder):
    """The tiny checkpoint, loaded and frozen."""
    from spin.checkpoint import load_pipeline

    return load_pipeline(tiny_folder).freeze()


@pytest.fixture(scope="session")
def scorers(tmp_path_factory) -> Path:
    """A folder for --scorers with every network in miniature; see `small_scorers`."""
    return helpers.write_scorers(tmp_path_factory.mktemp("scorers"))


@pytest.fixture
def small_scorers(monkeypatch) -> None:
    """Make the scorers expect the miniatures' sizes."""
    import open_clip

    from spin.eval import scorers

    clip = helpers.clip_config(helpers.REWARDS["pickscore.tiny.config"])
    imagereward = helpers.REWARDS["imagereward.tiny.config"]
    vision = imagereward["vision"] | {"image_size": 56, "patch_size": 14}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: clip)
    monkeypatch.setattr(scorers, "SIDE", 56)
    monkeypatch.setattr(scorers, "VISION", vision)
    monkeypatch.setattr(scorers, "TEXT", imagereward["text"])


@pytest.fixture(autouse=True)
def global_generator_untouched():
    """Check that nothing draws from torch's global generator."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())
