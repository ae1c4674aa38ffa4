"""What is not finite becomes no image, no stored latent and no score: one line says so instead."""

import copy
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import write_images
from safetensors.torch import load_file, save_file

import evaluate
import sample
import train
from spin import toy
from spin.checkpoint import load_pipeline, save_pipeline
from spin.infra.cli import run_script
from spin.infra.errors import InputError
from spin.infra.files import read_json, write_json
from spin.infra.images import to_pil
from spin.sampler import SamplingOptions, decode_latents, sample_images

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"

#: Near float32's largest number, and loaded as a weight; sums of its products are infinite.
HUGE = 3e38

MAIN = {"sample.py": sample.main, "train.py": train.main, "evaluate.py": evaluate.main}
SMALL = SamplingOptions(steps=1, guidance=1.0, height=64, width=64)


def set_tensor(path: Path, name: str, value: float) -> None:
    """Fill a tensor of a .safetensors file with a value."""
    tensors = load_file(path)
    tensors[name] = torch.full_like(tensors[name], value)
    save_file(tensors, path, {"format": "pt"})


def scale_tensor(path: Path, name: str, factor: float) -> None:
    tensors = load_file(path)
    tensors[name] = tensors[name] * factor
    save_file(tensors, path, {"format": "pt"})


def refusal(script: str, arguments: str, capsys) -> str:
    """Run a script, assert that it ends with exit status 2, and return the line it says."""
    capsys.readouterr()
    assert run_script(script, partial(MAIN[script], arguments.split()), advice="") == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{script}: error: ")
    return line


def files(folder: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in folder.rglob(pattern))


# ---- Images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_image_with_a_single_value_that_is_not_finite_is_refused(value):
    image = torch.full((3, 4, 4), 0.5)
    to_pil(image)
    image[1, 2, 3] = value
    with pytest.raises(InputError, match="not finite"):
        to_pil(image)


@pytest.mark.parametrize(
    "file, name, where",
    [
        (VAE, "decoder.conv_in.weight", "the image for 'a', seed 0,"),
        (VAE, "decoder.conv_out.weight", "the image for 'a', seed 0,"),
        (UNET, "conv_in.weight", "the latent sampled for 'a'"),
        (UNET, "conv_out.weight", "the latent sampled for 'a'"),
        (TEXT_ENCODER, "text_model.final_layer_norm.weight", "the latent sampled for 'a'"),
    ],
)
def test_a_network_whose_output_is_not_finite_makes_no_image(
    file, name, where, model_copy, tmp_path, capsys
):
    set_tensor(model_copy / file, name, HUGE)
    out = tmp_path / "out"
    flags = "--prompt a --steps 1 --guidance 1 --height 64 --width 64 --device cpu"
    line = refusal("sample.py", f"--model {model_copy} --out {out} {flags}", capsys)
    assert f"{where} is not finite" in line
    assert "use bfloat16 or float32" in line
    assert not files(out, "*.png")


@torch.no_grad()
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_an_infinite_pixel_is_not_clamped_to_white_or_black(value, pipe):
    damaged = copy.deepcopy(pipe)
    damaged.vae.decoder.conv_out.bias[1] = value
    image = decode_latents(damaged, torch.zeros(1, 4, 2, 2))
    assert image[:, 1].isnan().all()
    assert image[:, [0, 2]].isfinite().all()


def test_images_before_the_one_that_is_not_finite_are_kept(
    tiny_folder, tmp_path, monkeypatch, capsys
):
    """Also those of its batch."""
    finite_image = torch.full((3, 64, 64), 0.5)
    decoded = torch.stack([finite_image, finite_image, finite_image * torch.nan])
    monkeypatch.setattr("spin.sampler.decode_latents", lambda pipe, latents: decoded)
    flags = "--prompt a --num-images 3 --batch-size 3 --steps 1 --height 64 --width 64"
    files_and_device = f"--model {tiny_folder} --out {tmp_path} --device cpu"
    line = refusal("sample.py", f"{files_and_device} {flags}", capsys)
    assert "the image for 'a', seed 2," in line
    assert files(tmp_path, "*.png") == ["00000.png", "00001.png"]


def test_a_large_finite_value_is_clamped(pipe):
    """It cannot be told from a wrong one."""
    latents = torch.full((1, 4, 8, 8), 1e6)
    image = decode_latents(pipe, latents)
    assert image.isfinite().all()
    assert image.min() >= 0 and image.max() <= 1


def test_evaluate_names_the_damaged_model_and_keeps_the_images_of_the_others(tmp_path, capsys):
    damaged = Path(shutil.copytree(toy.BASE, tmp_path / "damaged"))
    set_tensor(damaged / VAE, "decoder.conv_out.weight", HUGE)
    out = tmp_path / "out"
    flags = "--num-prompts 2 --num-images 1 --steps 1 --metrics toy --device cpu"
    models = f"good={toy.BASE} bad={damaged}"
    line = refusal("evaluate.py", f"--models {models} --out {out} {flags}", capsys)
    assert "bad: the image for 'a " in line
    assert len(files(out / "images" / "good", "*.png")) == 2
    assert not files(out / "images" / "bad", "*.png")
    assert not files(out, "*.json")


# ---- Training ------------------------------------------------------------------------------------

TRAIN = (
    "--resolution 64 --iterations 1 --steps 1 --batch-size 2 --micro-batch 2 --sampler-steps 1 "
    "--guidance 1 --num-prompts 3 --grid-prompts {grid_prompts} --device cpu"
)


def refused_training(model: Path, tmp_path: Path, capsys, grid_prompts: int = 0) -> str:
    """Train on three images, and return the line that it ends with."""
    images = write_images(tmp_path / "images", count=3)
    flags = TRAIN.format(grid_prompts=grid_prompts)
    return refusal(
        "train.py", f"--model {model} --data {images} --out {tmp_path / 'run'} {flags}", capsys
    )


@pytest.mark.parametrize(
    "name, value",
    [
        ("encoder.conv_in.weight", HUGE),
        ("quant_conv.weight", HUGE),
        ("quant_conv.bias", 1e5),  # finite, but not in float16
    ],
)
def test_a_latent_of_a_real_image_that_is_not_finite_is_not_stored(
    name, value, model_copy, tmp_path, capsys
):
    set_tensor(model_copy / VAE, name, value)
    line = refused_training(model_copy, tmp_path, capsys)
    assert "metadata.jsonl line 1: its latent (mean) is not finite, or too large" in line
    assert not files(tmp_path / "run", "shard-*")


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("conv_out.weight", HUGE, "the latent sampled for 'a red"),
        ("conv_out.bias", 1e7, "its latent (x0) is not finite, or too large for float16"),
    ],
)
def test_a_latent_of_the_opponent_that_is_not_finite_is_not_stored(
    name, value, message, model_copy, tmp_path, capsys
):
    set_tensor(model_copy / UNET, name, value)
    line = refused_training(model_copy, tmp_path, capsys)
    assert message in line
    # those of the real images, which are whole, are kept
    assert files(tmp_path / "run", "shard-*") == ["shard-00000.safetensors"]
    assert not files(tmp_path / "run" / "iter1", "*")


def test_an_image_of_the_grid_that_is_not_finite_is_not_written(model_copy, tmp_path, capsys):
    set_tensor(model_copy / VAE, "decoder.conv_out.weight", HUGE)
    line = refused_training(model_copy, tmp_path, capsys, grid_prompts=1)
    assert "base: the image for 'a red" in line
    assert not files(tmp_path / "run" / "samples", "*.png")


@torch.no_grad()
def test_an_infinite_log_variance_is_not_clamped_to_a_finite_one(pipe):
    vae = copy.deepcopy(pipe.vae)
    vae.quant_conv.bias[7] = torch.inf
    mean, logvar = vae.encode(torch.zeros(1, 3, 16, 16))
    assert logvar[:, 3].isnan().all()
    assert mean.isfinite().all() and logvar[:, :3].isfinite().all()


# ---- float16 -------------------------------------------------------------------------------------


@pytest.fixture
def overflowing_folder(model_copy) -> Path:
    """A checkpoint whose VAE has activations beyond 65504, float16's largest number, as SDXL's."""
    scale_tensor(model_copy / VAE, "encoder.conv_in.weight", 5e4)
    scale_tensor(model_copy / VAE, "decoder.conv_in.weight", 1e4)
    return model_copy


def set_force_upcast(folder: Path, value: bool | None) -> None:
    config = read_json(folder / "vae/config.json")
    config.pop("force_upcast", None)
    if value is not None:
        config["force_upcast"] = value
    write_json(folder / "vae/config.json", config)


@torch.no_grad()
@pytest.mark.parametrize("force_upcast", [True, None])
def test_a_vae_in_float16_computes_in_float32(force_upcast, overflowing_folder):
    """A config without force_upcast means true, which is the default of diffusers."""
    set_force_upcast(overflowing_folder, force_upcast)
    pipe = load_pipeline(overflowing_folder, torch.float16)
    latents = torch.linspace(-2, 2, 256).reshape(1, 4, 8, 8)
    image = decode_latents(pipe, latents)
    mean, logvar = pipe.vae.encode(2 * image - 1)
    assert {parameter.dtype for parameter in pipe.vae.parameters()} == {torch.float16}

    exact = pipe.vae.float()
    decoded = exact.decode(latents / exact.scaling_factor)
    torch.testing.assert_close(image, (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)
    exact_mean, exact_logvar = exact.encode(2 * image - 1)
    torch.testing.assert_close(mean, exact_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logvar, exact_logvar, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_vae_that_forbids_it_stays_in_float16_and_its_overflow_is_refused(overflowing_folder):
    set_force_upcast(overflowing_folder, False)
    pipe = load_pipeline(overflowing_folder, torch.float16)
    mean, _ = pipe.vae.encode(torch.ones(1, 3, 16, 16))
    assert not mean.isfinite().all()
    with pytest.raises(InputError, match="the image for 'a', seed 0, is not finite: float16"):
        list(sample_images(pipe, ["a"], [0], SMALL))


@torch.no_grad()
def test_a_vae_in_bfloat16_stays_in_it(tiny_folder):
    """Its range is float32's."""
    pipe = load_pipeline(tiny_folder, torch.bfloat16)
    assert pipe.vae.decode(torch.zeros(1, 4, 2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize("force_upcast", [True, False])
def test_a_saved_config_keeps_force_upcast(force_upcast, model_copy, tmp_path):
    set_force_upcast(model_copy, force_upcast)
    save_pipeline(load_pipeline(model_copy), tmp_path / "saved")
    assert read_json(tmp_path / "saved/vae/config.json")["force_upcast"] == force_upcast
    assert load_pipeline(tmp_path / "saved").vae.force_upcast == force_upcast
