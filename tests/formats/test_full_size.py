"""Stable Diffusion 1.5 at full size: written to a folder, loaded from it, computed exactly."""

import shutil

import pytest
import helpers
import torch
from helpers import GOLDEN, oracle_input

from spin.checkpoint import pipeline as weights


@pytest.mark.slow
@torch.no_grad()
def test_sd15_loads_and_computes_exactly(tmp_path):
    folder = helpers.write_checkpoint(tmp_path / "sd15", "sd15")
    try:
        sd = weights.load(folder)
    finally:
        shutil.rmtree(folder)  # 4 GB
    sizes = [sum(p.numel() for p in network.parameters()) for network in (sd.unet, sd.vae, sd.text_encoder)]
    assert sizes == [859_520_964, 83_653_863, 123_060_480]

    def close(actual, name, atol=1e-3):
        torch.testing.assert_close(actual, GOLDEN[f"sd15.{name}"].float(), atol=atol, rtol=0)

    context = oracle_input("sd15.context", (2, 77, 768))
    close(sd.unet(oracle_input("sd15.sample", (2, 4, 32, 32)), GOLDEN["sd15.unet.timesteps"], context), "unet.out")
    mean, logvar = sd.vae.encode(oracle_input("sd15.image", (1, 3, 256, 256)).clamp(-1, 1))
    close(mean, "vae.mean")
    close(logvar, "vae.logvar_clamped")
    close(sd.vae.decode(oracle_input("sd15.latent", (1, 4, 32, 32))), "vae.decoded", atol=2e-3)  # stored in half
    close(sd.text_encoder.encode_ids(GOLDEN["text.ids"]), "text.out")
