"""Stable Diffusion 1.5 at full size: loaded from a folder, computed as diffusers does."""

import os
import shutil
from collections.abc import Iterator

import pytest
import torch
from helpers import GOLDEN, oracle_input, write_checkpoint
from torch import Tensor, nn

from spin.checkpoint import load_pipeline


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def assert_golden(actual: Tensor, name: str, atol: float = 1e-3) -> None:
    expected = GOLDEN[f"sd15.{name}"].float()
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.fixture
def all_cores() -> Iterator[None]:
    """Let torch use all cores, while the other tests use one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@torch.no_grad()
def test_sd_15_computes_as_diffusers_does(all_cores, tmp_path):
    folder = write_checkpoint(tmp_path / "sd15", "sd15")
    try:
        pipe = load_pipeline(folder)
    finally:
        shutil.rmtree(folder)  # 4 GB
    assert num_parameters(pipe.unet) == 859_520_964
    assert num_parameters(pipe.vae) == 83_653_863
    assert num_parameters(pipe.text_encoder) == 123_060_480

    latents = oracle_input("sd15.sample", (2, 4, 32, 32))
    context = oracle_input("sd15.context", (2, 77, 768))
    prediction = pipe.unet(latents, GOLDEN["sd15.unet.timesteps"], context)
    assert_golden(prediction, "unet.out")

    images = oracle_input("sd15.image", (1, 3, 256, 256)).clamp(-1, 1)
    mean, logvar = pipe.vae.encode(images)
    assert_golden(mean, "vae.mean")
    assert_golden(logvar, "vae.logvar_clamped")

    decoded = pipe.vae.decode(oracle_input("sd15.latent", (1, 4, 32, 32)))
    assert_golden(decoded, "vae.decoded", atol=2e-3)  # the golden is stored in half precision

    assert_golden(pipe.text_encoder.encode_ids(GOLDEN["text.ids"]), "text.out")
