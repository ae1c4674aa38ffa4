"""The report of tests/real_weights.py, on random weights and without diffusers."""

import sys
from types import SimpleNamespace

import pytest
import real_weights
import torch
from PIL import Image
from torch import Tensor

from spin.checkpoint import load_pipeline
from spin.infra.errors import InputError
from spin.sampler import decode_latents, sample


def test_the_report_says_what_is_in_the_files_and_what_was_made_of_them(
    tiny2_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # importing it fails
    verdict = real_weights.main([str(tiny2_folder), "--steps", "1", "--out", str(tmp_path)])
    report = capsys.readouterr().out.splitlines()
    assert "unet: 684 tensors, 3,277,988 parameters, float32" in report
    assert "vae: 244 tensors, 1,399,879 parameters, float32" in report
    assert "text_encoder: 52 tensors, 3,267,584 parameters, float32" in report
    assert "prediction type: v_prediction" in report
    assert "betas: scaled_linear, 0.00085 to 0.012, 1000 timesteps" in report
    assert "last signal-to-noise ratio: not zero (alpha_bar 0.004660)" in report
    assert "pad token: '!', id 0; 77 tokens a prompt" in report
    assert "size: 64 x 64 pixels, VAE's scaling factor 0.18215" in report
    assert report[-1] == verdict
    assert verdict.startswith("NOT COMPARED")
    assert Image.open(tmp_path / "ours.png").size == (64, 64)


def test_the_report_on_sdxl_has_both_text_encoders(tinyxl_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    real_weights.main([str(tinyxl_folder), "--steps", "1", "--out", str(tmp_path)])
    report = capsys.readouterr().out
    assert "\ntext_encoder: 52 tensors" in report
    assert "\ntext_encoder_2: 53 tensors" in report


def test_a_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such"):
        real_weights.main([str(tmp_path / "missing")])


class StandIn:
    """Has the interface of diffusers' pipeline. Its images are ours, `offset` gray levels off."""

    vae_scale_factor = 8

    def __init__(self, pipe, offset: float):
        self.pipe = pipe
        self.offset = offset
        self.scheduler = SimpleNamespace(set_timesteps=self.set_timesteps)

    def set_timesteps(self, steps: int) -> None:
        self.scheduler.timesteps = self.pipe.scheduler.timesteps(steps)

    def encode_prompt(self, prompt, negative_prompt, **others):
        negative, positive = self.pipe.encode_prompts([negative_prompt, prompt]).chunk(2)
        return positive, negative

    def unet(self, latents: Tensor, t: Tensor, context: Tensor, **others) -> SimpleNamespace:
        return SimpleNamespace(sample=self.pipe.unet(latents, t, context))

    def __call__(self, prompt, num_inference_steps, guidance_scale, **others) -> SimpleNamespace:
        generator = torch.Generator("cpu").manual_seed(0)
        latents = sample(
            self.pipe, [prompt], num_inference_steps, guidance_scale, generators=[generator]
        )
        images = dimmed(self.pipe, latents) + self.offset / 255
        return SimpleNamespace(images=images)


def dimmed(pipe, latents: Tensor) -> Tensor:
    """Decode latents, and keep away from white, where an offset would be clamped."""
    return decode_latents(pipe, latents) * 0.9


@pytest.mark.parametrize(
    "offset, verdict",
    [(0.0, "PASS"), (1.0, "PASS"), (2.0, "DIFFERS")],
)
def test_images_pass_that_differ_by_at_most_one_level(
    offset, verdict, tiny2_folder, tmp_path, capsys, monkeypatch
):
    theirs = StandIn(load_pipeline(tiny2_folder).freeze(), offset)
    monkeypatch.setattr(real_weights, "load_theirs", lambda *args: theirs)
    monkeypatch.setattr(real_weights, "decode_latents", dimmed)
    flags = ["--steps", "1", "--out", str(tmp_path)]
    assert real_weights.main([str(tiny2_folder), *flags]).startswith(verdict)
    report = capsys.readouterr().out
    assert "context: largest difference 0, mean 0, " in report
    assert "UNet's prediction: largest difference 0, mean 0, " in report
    assert f"image: largest difference {offset:.0f}, mean " in report
