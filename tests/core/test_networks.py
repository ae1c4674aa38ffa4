"""Our networks, schedulers, tokenizer and sampler against diffusers and transformers: tests/data/README.md."""

import json

import numpy as np
import pytest
import helpers
import torch
from PIL import Image
from safetensors.torch import load_file
from helpers import DATA, GOLDEN, MANIFEST, oracle_input

import sample
from spin.checkpoint import pipeline as weights
from spin.scheduler import Scheduler, add_noise, ddim_step, ddpm_step, velocity, x0_and_eps
from spin.text import TextEncoder, Tokenizer, names, unstack
from spin.unet import UNet
from spin.vae import AutoencoderKL

GOLDEN_SD2 = load_file(DATA / "golden_sd2.safetensors")


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected.float(), atol=atol, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# networks


@torch.no_grad()
def test_tiny_unet(sd):
    out = sd.unet(
        oracle_input("helpers.sample", (3, 4, 16, 16)),
        GOLDEN["helpers.unet.timesteps"],
        oracle_input("helpers.context", (3, 77, 32)),
    )
    close(out, GOLDEN["helpers.unet.out"], 1e-4)


@torch.no_grad()
def test_tiny_vae(sd):
    mean, logvar = sd.vae.encode(oracle_input("helpers.image", (1, 3, 64, 64)).clamp(-1, 1))
    close(mean, GOLDEN["helpers.vae.mean"], 1e-4)
    close(logvar, GOLDEN["helpers.vae.logvar_clamped"], 1e-4)
    close(sd.vae.decode(oracle_input("helpers.latent", (1, 4, 8, 8))), GOLDEN["helpers.vae.decoded"], 1e-4)


@torch.no_grad()
def test_tiny_text(sd):
    close(sd.text_encoder.encode_ids(GOLDEN["text.ids"]), GOLDEN["helpers.text.out"], 1e-4)


@torch.no_grad()
def test_sd2(tiny2_folder):
    sd2 = weights.load(tiny2_folder)
    timesteps, context = GOLDEN_SD2["tiny2.unet.timesteps"], oracle_input("tiny2.context", (2, 77, 64))
    close(sd2.unet(oracle_input("tiny2.sample", (2, 4, 8, 8)), timesteps, context), GOLDEN_SD2["tiny2.unet.out"], 1e-4)
    odd = oracle_input("tiny2.odd", (1, 4, 9, 13))
    close(sd2.unet(odd, timesteps[:1], context[:1]), GOLDEN_SD2["tiny2.unet.odd"], 1e-4)
    close(sd2.text_encoder.encode_ids(GOLDEN["text.ids"]), GOLDEN_SD2["tiny2.text.out"], 1e-4)


def test_epsilon_of_every_group_norm(sd):
    """Too small to be seen in an output of unit variance, and wrong in many ports."""

    def epsilons(network, names=""):
        return {m.eps for name, m in network.named_modules() if isinstance(m, torch.nn.GroupNorm) and names in name}

    assert epsilons(sd.vae) == epsilons(sd.unet, "attentions") == {1e-6}
    assert epsilons(sd.unet, "resnets") == epsilons(sd.unet, "conv_norm_out") == {1e-5}


@pytest.mark.parametrize("tag", ["tiny", "tiny2", "sd15"])
def test_every_name_and_shape(tag):
    """On the meta device: no memory, whatever the size."""
    config = MANIFEST[f"{tag}.config"]
    with torch.device("meta"):
        text = TextEncoder(config["text_encoder"], Tokenizer())
        states = {"unet": UNet(config["unet"]).state_dict(), "vae": AutoencoderKL(config["vae"]).state_dict()}
    text_state = unstack(text.tower.state_dict(), names("text", i=config["text_encoder"]["num_hidden_layers"]))
    states["text_encoder"] = {f"text_model.{name}": tensor for name, tensor in text_state.items()}
    for part, state in states.items():
        assert {name: list(tensor.shape) for name, tensor in state.items()} == MANIFEST[tag][part]
    if tag == "sd15":
        sizes = {part: sum(tensor.numel() for tensor in state.values()) for part, state in states.items()}
        assert sizes == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}


# ---------------------------------------------------------------------------------------------------------------------
# schedulers

STEP_INPUTS = [oracle_input(f"sched.{name}", (2, 4, 8, 8)) for name in ("x", "eps", "noise")]


def scheduler(**changes) -> Scheduler:
    return Scheduler(helpers.SCHEDULER | changes)


def test_noise_schedule():
    ours = scheduler()
    x0, _, noise = STEP_INPUTS
    alpha_bar = ours.alphas_cumprod[[10, 900]]
    close(ours.alphas_cumprod, GOLDEN["sched.alphas_cumprod"], 1e-5)
    close(add_noise(x0, noise, alpha_bar), GOLDEN["sched.add_noise"], 1e-5)
    close(velocity(x0, noise, alpha_bar), GOLDEN["sched.velocity"], 1e-5)


@pytest.mark.parametrize("name", sorted(name for name in GOLDEN if ".timesteps." in name))
def test_timesteps(name):
    steps = int(name.split(".")[-1])
    assert torch.equal(scheduler(steps_offset=0 if steps == 1000 else 1).timesteps(steps), GOLDEN[name])


@pytest.mark.parametrize("steps, i", [(steps, i) for steps in (1000, 50) for i in (0, steps // 2, steps - 1)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddpm_step(prediction_type, steps, i):
    x, output, noise = STEP_INPUTS
    ours = scheduler(prediction_type=prediction_type, steps_offset=0 if steps == 1000 else 1)
    alpha_bar, alpha_bar_prev = ours.alphas_of_step(ours.timesteps(steps)[i].item(), steps, "ddpm")
    x0, _ = x0_and_eps(output, x, alpha_bar, prediction_type)
    expected = GOLDEN[f"sched.ddpm.{prediction_type}.{steps}.{i}"]
    close(ddpm_step(x, x0, alpha_bar, alpha_bar_prev, noise), expected, 1e-5)


@pytest.mark.parametrize("i", [0, 25, 49])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddim_step(prediction_type, eta, i):
    x, output, noise = STEP_INPUTS
    ours = scheduler(prediction_type=prediction_type)
    alpha_bar, alpha_bar_prev = ours.alphas_of_step(ours.timesteps(50)[i].item(), 50, "ddim")
    x0, eps = x0_and_eps(output, x, alpha_bar, prediction_type)
    expected = GOLDEN[f"sched.ddim.{prediction_type}.eta{eta}.{i}"]
    close(ddim_step(x0, eps, alpha_bar, alpha_bar_prev, eta, noise), expected, 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# tokens


@pytest.mark.parametrize("pad_token, column", [("<|endoftext|>", "sd1_ids"), ("!", "sd2_ids")])
def test_token_ids(pad_token, column):
    tokenizer = Tokenizer(pad_token=pad_token)
    rows = json.loads((DATA / "tokens.json").read_text())
    assert tokenizer([row["prompt"] for row in rows]).tolist() == [row[column] for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# whole pictures: sample.py against StableDiffusionPipeline


PICTURES = {  # prompt, other flags
    "tiny_ddim": ("a red circle, café!", "--negative-prompt blurry --steps 12 --seed 3 --height 128 --width 128"),
    "tiny_ddim_eta": ("a red circle", "--eta 0.6 --guidance 3 --steps 7 --seed 11 --height 72 --width 104"),
    "tiny_ddpm": ("a blue square", "--sampler ddpm --guidance 1 --steps 10 --seed 5 --height 64 --width 64"),
    "tiny_dpmpp": ("a red circle, two blue squares", "--sampler dpm++ --seed 4 --height 64 --width 96"),
    "tiny2_v_dpmpp": (
        "a tall tower",
        "--sampler dpm++ --steps 16 --guidance 4 --seed 6 --height 64 --width 64",
    ),
    "tiny2_v": ("wow!! a tall tower!", "--guidance 5 --steps 10 --seed 2 --height 64 --width 64"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_sample_draws_the_pipelines_picture(name, tiny_folder, tiny2_folder, tmp_path):
    model = tiny2_folder if name.startswith("tiny2") else tiny_folder
    prompt, others = PICTURES[name]
    common = ["--model", str(model), "--out", str(tmp_path), "--device", "cpu", "--prompt", prompt]
    [path] = sample.main([*common, *others.split()])
    ours, theirs = (np.asarray(Image.open(p)).astype(int) for p in (path, DATA / f"{name}.png"))
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 2
