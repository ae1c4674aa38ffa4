import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait busily are very slow on a loaded machine

import pytest
import helpers
import torch
from hypothesis import settings

from spin.eval import scorers as rewards
from spin.checkpoint import pipeline as weights

settings.register_profile("spin", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("spin")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """SD-1.x in miniature. Shared by all tests: copy it before you change it."""
    return helpers.write_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny2_folder(tmp_path_factory) -> Path:
    """SD-2.x in miniature: v-prediction, linear projections, padding id 0."""
    return helpers.write_checkpoint(tmp_path_factory.mktemp("tiny2") / "model", "tiny2")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    return helpers.write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="session")
def sd(tiny_folder) -> weights.StableDiffusion:
    """The tiny checkpoint, loaded and frozen."""
    loaded = weights.load(tiny_folder)
    for network in (loaded.unet, loaded.vae, loaded.text_encoder):
        network.requires_grad_(False)
    return loaded


@pytest.fixture(scope="session")
def scorers(tmp_path_factory) -> Path:
    """A folder for --scorers, every network in miniature; `small_scorers` makes the code expect their sizes."""
    return helpers.write_scorers(tmp_path_factory.mktemp("scorers"))


@pytest.fixture
def small_scorers(monkeypatch) -> None:
    import open_clip

    vision, text = (helpers.REWARDS["imagereward.tiny.config"][part] for part in ("vision", "text"))
    config = helpers.clip_config(helpers.REWARDS["pickscore.tiny.config"])
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config)
    monkeypatch.setattr(rewards, "SIDE", 56)
    monkeypatch.setattr(rewards, "VISION", vision | {"image_size": 56, "patch_size": 14})
    monkeypatch.setattr(rewards, "TEXT", text)


@pytest.fixture(autouse=True)
def _global_generator_untouched():
    """Nothing in the project draws from torch's global generator."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())
