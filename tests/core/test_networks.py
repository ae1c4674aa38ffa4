"""The networks, schedules, tokens and whole images against those of diffusers and transformers.

tests/data/README.md says how their outputs, the goldens, were made.
"""

import copy
import json

import numpy as np
import pytest
import torch
from helpers import DATA, GOLDEN, MANIFEST, SCHEDULER, oracle_input
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import sample
from spin.checkpoint import load_pipeline
from spin.checkpoint.names import (
    TEXT_NAMES,
    add_text_prefix,
    expand_names,
    text_names,
    transpose_projection,
    unfuse,
)
from spin.sampler import sample as sample_latents
from spin.scheduler import Scheduler, add_noise, ddim_step, ddpm_step, velocity, x0_and_eps
from spin.text import TextEncoder, Tokenizer
from spin.unet import UNet
from spin.vae import AutoencoderKL

GOLDEN_SD2 = load_file(DATA / "golden_sd2.safetensors")
GOLDEN_SDXL = load_file(DATA / "golden_sdxl.safetensors")


def assert_close(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected.float(), atol=atol, rtol=0)


# -----------------------------------------------------------------------------
# networks


@torch.no_grad()
def test_unet(pipe):
    latents = oracle_input("tiny.sample", (3, 4, 16, 16))
    context = oracle_input("tiny.context", (3, 77, 32))
    prediction = pipe.unet(latents, GOLDEN["tiny.unet.timesteps"], context)
    assert_close(prediction, GOLDEN["tiny.unet.out"], atol=1e-4)


@torch.no_grad()
def test_vae(pipe):
    images = oracle_input("tiny.image", (1, 3, 64, 64)).clamp(-1, 1)
    mean, logvar = pipe.vae.encode(images)
    assert_close(mean, GOLDEN["tiny.vae.mean"], atol=1e-4)
    assert_close(logvar, GOLDEN["tiny.vae.logvar_clamped"], atol=1e-4)

    decoded = pipe.vae.decode(oracle_input("tiny.latent", (1, 4, 8, 8)))
    assert_close(decoded, GOLDEN["tiny.vae.decoded"], atol=1e-4)


@torch.no_grad()
def test_text_encoder(pipe):
    context = pipe.text_encoder.encode_ids(GOLDEN["text.ids"])
    assert_close(context, GOLDEN["tiny.text.out"], atol=1e-4)


@torch.no_grad()
def test_networks_of_sd_2(tiny2_folder):
    pipe = load_pipeline(tiny2_folder)
    latents = oracle_input("tiny2.sample", (2, 4, 8, 8))
    timesteps = GOLDEN_SD2["tiny2.unet.timesteps"]
    context = oracle_input("tiny2.context", (2, 77, 64))
    prediction = pipe.unet(latents, timesteps, context)
    assert_close(prediction, GOLDEN_SD2["tiny2.unet.out"], atol=1e-4)

    odd_latents = oracle_input("tiny2.odd", (1, 4, 9, 13))  # odd sizes lose rows when halved
    prediction = pipe.unet(odd_latents, timesteps[:1], context[:1])
    assert_close(prediction, GOLDEN_SD2["tiny2.unet.odd"], atol=1e-4)

    encoded = pipe.text_encoder.encode_ids(GOLDEN["text.ids"])
    assert_close(encoded, GOLDEN_SD2["tiny2.text.out"], atol=1e-4)


# -----------------------------------------------------------------------------
# SDXL

PROMPTS_SDXL = ["a red circle, café!", "a tall tower " * 40 + "and a blue square", ""]
SIZES_SDXL = torch.tensor([[1000, 733, 0, 17, 64, 64], [64, 104, 8, 0, 64, 104]])


@pytest.fixture(scope="module")
def pipe_sdxl(tinyxl_folder):
    return load_pipeline(tinyxl_folder).freeze()


def test_context_of_sdxl(pipe_sdxl):
    sizes = SIZES_SDXL[[0, 1, 0, 1]]
    context = pipe_sdxl.encode_prompts([*PROMPTS_SDXL, None], sizes)
    assert context.shape == (4, 78, 80)
    assert_close(context[:3, :77], GOLDEN_SDXL["tinyxl.text.tokens"], atol=1e-4)
    assert_close(context[:3, 77, :40], GOLDEN_SDXL["tinyxl.text.pooled"], atol=1e-4)
    assert torch.equal(context[:, 77, 40:46], sizes.float())
    assert not context[:, 77, 46:].any()
    assert not context[3, :77].any() and not context[3, 77, :40].any()  # a missing prompt


def test_sizes_of_sdxl_default_to_whole_images_of_the_unets_size(pipe_sdxl):
    side = 8 * pipe_sdxl.unet.sample_size
    sizes = torch.tensor([[side, side, 0, 0, side, side]])
    context = pipe_sdxl.encode_prompts(["a red circle"], sizes)
    assert torch.equal(pipe_sdxl.encode_prompts(["a red circle"]), context)


def test_sizes_of_sdxl_are_six_for_each_prompt(pipe_sdxl):
    for sizes in (SIZES_SDXL[:1], SIZES_SDXL[:, :2], torch.cat([SIZES_SDXL, SIZES_SDXL], dim=1)):
        with pytest.raises(ValueError, match=r"must be \[2,6\]"):
            pipe_sdxl.encode_prompts(["a", "b"], sizes)


def test_the_unet_of_sdxl_refuses_a_context_without_its_last_row(pipe_sdxl):
    context = pipe_sdxl.encode_prompts(["a red circle"])
    for rows in (77, 2):
        with pytest.raises(ValueError, match=f"context of {rows} rows"):
            pipe_sdxl.unet(torch.zeros(1, 4, 8, 8), torch.tensor(5), context[:, :rows])


@pytest.mark.parametrize("name, shape", [("out", (2, 4, 8, 8)), ("odd", (2, 4, 9, 13))])
def test_unet_of_sdxl(pipe_sdxl, name, shape):
    tokens = oracle_input("tinyxl.context", (2, 77, 80))
    row = torch.zeros(2, 80)
    row[:, :40] = oracle_input("tinyxl.pooled", (2, 40))
    row[:, 40:46] = SIZES_SDXL
    context = torch.cat([tokens, row[:, None]], dim=1)
    latents = oracle_input(f"tinyxl.{name}", shape)
    prediction = pipe_sdxl.unet(latents, torch.tensor([999, 20]), context)
    assert_close(prediction, GOLDEN_SDXL[f"tinyxl.unet.{name}"], atol=1e-4)


def test_vae_of_sdxl(pipe_sdxl):
    assert pipe_sdxl.vae.scaling_factor == 0.13025
    images = oracle_input("tinyxl.image", (1, 3, 64, 64)).clamp(-1, 1)
    mean, logvar = pipe_sdxl.vae.encode(images)
    assert_close(mean, GOLDEN_SDXL["tinyxl.vae.mean"], atol=1e-4)
    assert_close(logvar, GOLDEN_SDXL["tinyxl.vae.logvar"], atol=1e-4)
    decoded = pipe_sdxl.vae.decode(oracle_input("tinyxl.latent", (1, 4, 8, 8)))
    assert_close(decoded, GOLDEN_SDXL["tinyxl.vae.decoded"], atol=1e-4)


def test_float16_weights_of_sdxls_vae_compute_in_float32(pipe_sdxl):
    vae = copy.deepcopy(pipe_sdxl.vae).half()
    mean, _ = vae.encode(oracle_input("tinyxl.image", (1, 3, 64, 64)).clamp(-1, 1))
    assert mean.dtype == torch.float32


@pytest.mark.parametrize(
    "name, negative", [("missing", None), ("empty", ""), ("blurry", "blurry, a blue square")]
)
def test_guided_steps_of_sdxl(pipe_sdxl, name, negative):
    """A missing negative prompt is zeros, and no empty prompt."""
    latents = sample_latents(
        pipe_sdxl,
        ["a red circle"],
        steps=3,
        guidance=5.0,
        generators=[torch.Generator().manual_seed(3)],
        negative_prompts=negative,
        height=72,
        width=104,
    )
    assert_close(latents, GOLDEN_SDXL[f"tinyxl.sample.{name}"], atol=1e-4)


def test_each_image_is_sampled_with_its_own_sizes(pipe_sdxl):
    def sample_sizes(sizes: Tensor) -> Tensor:
        generators = [torch.Generator().manual_seed(3) for _ in sizes]
        prompts = ["a red circle"] * len(sizes)
        options = {"steps": 2, "guidance": 2.0, "height": 32, "width": 32}
        return sample_latents(pipe_sdxl, prompts, generators=generators, sizes=sizes, **options)

    both = sample_sizes(SIZES_SDXL)
    assert (both[0] - both[1]).abs().max() > 1e-2
    for i in (0, 1):
        assert_close(both[i : i + 1], sample_sizes(SIZES_SDXL[i : i + 1]), atol=1e-4)


def test_a_missing_prompt_is_the_empty_one_in_sd_1(pipe):
    assert torch.equal(pipe.encode_prompts([None]), pipe.encode_prompts([""]))


def test_every_name_and_shape_of_sdxl():
    config = MANIFEST["sdxl.config"]
    with torch.device("meta"):
        unet = UNet(config["unet"])
        vae = AutoencoderKL(config["vae"])
        first = TextEncoder(config["text_encoder"], Tokenizer())
        second = TextEncoder(config["text_encoder_2"], Tokenizer(), projects=True)
    states = {"unet": unet.state_dict(), "vae": vae.state_dict()}
    for part, text_encoder in (("text_encoder", first), ("text_encoder_2", second)):
        names = text_names(config[part], projects=part == "text_encoder_2")
        state = transpose_projection(unfuse(text_encoder.tower.state_dict(), names))
        states[part] = {add_text_prefix(name): tensor for name, tensor in state.items()}

    # the VAE and the first text encoder have the tensors of SD-1.5's
    expected = {**MANIFEST["sd15"], **MANIFEST["sdxl"]}
    for part, state in states.items():
        shapes = {name: list(tensor.shape) for name, tensor in state.items()}
        assert shapes == expected[part], part
    assert len(states["unet"]) == 1680
    assert sum(tensor.numel() for tensor in states["unet"].values()) == 2_567_463_684


# -----------------------------------------------------------------------------
# settings


def group_norm_epsilons(network: nn.Module, part_of_name: str = "") -> set[float]:
    epsilons = set()
    for name, module in network.named_modules():
        if isinstance(module, nn.GroupNorm) and part_of_name in name:
            epsilons.add(module.eps)
    return epsilons


def test_epsilon_of_every_group_norm(pipe):
    """It is too small to be seen in an output of unit variance, and wrong in many ports."""
    assert group_norm_epsilons(pipe.vae) == {1e-6}
    assert group_norm_epsilons(pipe.unet, "attentions") == {1e-6}
    assert group_norm_epsilons(pipe.unet, "resnets") == {1e-5}
    assert group_norm_epsilons(pipe.unet, "conv_norm_out") == {1e-5}


@pytest.mark.parametrize("tag", ["tiny", "tiny2", "sd15"])
def test_every_name_and_shape(tag):
    config = MANIFEST[f"{tag}.config"]
    with torch.device("meta"):  # no memory, whatever the size
        unet = UNet(config["unet"])
        vae = AutoencoderKL(config["vae"])
        text_encoder = TextEncoder(config["text_encoder"], Tokenizer())
    names = expand_names(TEXT_NAMES, i=config["text_encoder"]["num_hidden_layers"])
    text_state = unfuse(text_encoder.tower.state_dict(), names)
    text_state = {f"text_model.{name}": tensor for name, tensor in text_state.items()}

    states = {"unet": unet.state_dict(), "vae": vae.state_dict(), "text_encoder": text_state}
    for part, state in states.items():
        shapes = {name: list(tensor.shape) for name, tensor in state.items()}
        assert shapes == MANIFEST[tag][part], part
    if tag == "sd15":
        sizes = {}
        for part, state in states.items():
            sizes[part] = sum(tensor.numel() for tensor in state.values())
        assert sizes == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}


@pytest.mark.parametrize("key", ["down_block_types", "up_block_types"])
def test_unknown_block_types_are_refused(key):
    unet_config = dict(MANIFEST["tiny.config"]["unet"])
    unet_config[key] = ["AttnDownBlock2D"] * 4
    with torch.device("meta"), pytest.raises(ValueError, match="AttnDownBlock2D"):
        UNet(unet_config)

    vae_config = dict(MANIFEST["tiny.config"]["vae"])
    vae_config[key] = ["AttnDownEncoderBlock2D"] * 4
    with torch.device("meta"), pytest.raises(ValueError, match="AttnDownEncoderBlock2D"):
        AutoencoderKL(vae_config)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("transformer_layers_per_block", [1, 2], "has 2 entries for 3 blocks"),
        ("transformer_layers_per_block", [0, 2, 4], "has 0"),  # SSD-1B
        ("transformer_layers_per_block", [1, [2, 2], 4], r"has \[2, 2\]"),
        ("addition_embed_type", "text_image", "text_time"),
        ("projection_class_embeddings_input_dim", 200, "must fit"),
        ("projection_class_embeddings_input_dim", 48, "must fit"),
    ],
)
def test_other_inputs_and_depths_than_sdxls_are_refused(key, value, message):
    config = {**MANIFEST["tinyxl.config"]["unet"], key: value}
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        UNet(config)


@pytest.mark.parametrize("key", ["down_block_types", "up_block_types", "attention_head_dim"])
def test_lists_of_another_length_than_the_blocks_are_refused(key):
    config = dict(MANIFEST["tiny2.config"]["unet"])
    right = config[key]
    for wrong in (right[:3], right + right[:1]):
        config[key] = wrong
        with torch.device("meta"), pytest.raises(ValueError, match=f"{key} has {len(wrong)}"):
            UNet(config)


# -----------------------------------------------------------------------------
# schedules and steps of samplers

X_T = oracle_input("sched.x", (2, 4, 8, 8))
PREDICTION = oracle_input("sched.eps", (2, 4, 8, 8))
NOISE = oracle_input("sched.noise", (2, 4, 8, 8))


def make_scheduler(**changes) -> Scheduler:
    return Scheduler({**SCHEDULER, **changes})


def noise_levels(
    scheduler: Scheduler, t: int, steps: int, end: Tensor
) -> tuple[Tensor, Tensor]:
    """Return alpha_bar at t and a sampling step later. The last step leads to `end`."""
    alpha_bar = scheduler.alphas_cumprod[t]
    t_prev = t - scheduler.stride(steps)
    if t_prev < 0:
        return alpha_bar, end
    return alpha_bar, scheduler.alphas_cumprod[t_prev]


def test_noise_schedule():
    scheduler = make_scheduler()
    assert_close(scheduler.alphas_cumprod, GOLDEN["sched.alphas_cumprod"], atol=1e-5)
    alpha_bar = scheduler.alphas_cumprod[[10, 900]]
    assert_close(add_noise(X_T, NOISE, alpha_bar), GOLDEN["sched.add_noise"], atol=1e-5)
    assert_close(velocity(X_T, NOISE, alpha_bar), GOLDEN["sched.velocity"], atol=1e-5)


def offset_for(steps: int) -> int:
    """Return the steps_offset of the goldens. With an offset there is no room for 1000 steps."""
    return 0 if steps == 1000 else 1


@pytest.mark.parametrize("name", sorted(name for name in GOLDEN if ".timesteps." in name))
def test_timesteps(name):
    steps = int(name.split(".")[-1])
    scheduler = make_scheduler(steps_offset=offset_for(steps))
    assert torch.equal(scheduler.timesteps(steps), GOLDEN[name])


@pytest.mark.parametrize(
    "steps, i", [(1000, 0), (1000, 500), (1000, 999), (50, 0), (50, 25), (50, 49)]
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddpm_step(prediction_type, steps, i):
    scheduler = make_scheduler(prediction_type=prediction_type, steps_offset=offset_for(steps))
    t = scheduler.timesteps(steps)[i].item()
    alpha_bar, alpha_bar_prev = noise_levels(scheduler, t, steps, end=torch.tensor(1.0))
    x0, _ = x0_and_eps(PREDICTION, X_T, alpha_bar, prediction_type)
    expected = GOLDEN[f"sched.ddpm.{prediction_type}.{steps}.{i}"]
    assert_close(ddpm_step(X_T, x0, alpha_bar, alpha_bar_prev, NOISE), expected, atol=1e-5)


@pytest.mark.parametrize("i", [0, 25, 49])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddim_step(prediction_type, eta, i):
    scheduler = make_scheduler(prediction_type=prediction_type)
    t = scheduler.timesteps(50)[i].item()
    end = scheduler.final_alpha_cumprod
    alpha_bar, alpha_bar_prev = noise_levels(scheduler, t, 50, end)
    x0, eps = x0_and_eps(PREDICTION, X_T, alpha_bar, prediction_type)
    expected = GOLDEN[f"sched.ddim.{prediction_type}.eta{eta}.{i}"]
    assert_close(ddim_step(x0, eps, alpha_bar, alpha_bar_prev, eta, NOISE), expected, atol=1e-5)


# -----------------------------------------------------------------------------
# tokens


@pytest.mark.parametrize("pad_token, column", [("<|endoftext|>", "sd1_ids"), ("!", "sd2_ids")])
def test_token_ids(pad_token, column):
    tokenizer = Tokenizer(pad_token=pad_token)
    rows = json.loads((DATA / "tokens.json").read_text())
    prompts = [row["prompt"] for row in rows]
    assert tokenizer(prompts).tolist() == [row[column] for row in rows]


# -----------------------------------------------------------------------------
# whole images: sample.py against StableDiffusionPipeline

IMAGES = {  # name of the golden, which begins with the checkpoint's -> prompt, other flags
    "tiny_ddim": (
        "a red circle, café!",
        "--negative-prompt blurry --steps 12 --seed 3 --height 128 --width 128",
    ),
    "tiny_ddim_eta": (
        "a red circle",
        "--eta 0.6 --guidance 3 --steps 7 --seed 11 --height 72 --width 104",
    ),
    "tiny_ddpm": (
        "a blue square",
        "--sampler ddpm --guidance 1 --steps 10 --seed 5 --height 64 --width 64",
    ),
    "tiny_dpmpp": (
        "a red circle, two blue squares",
        "--sampler dpm++ --seed 4 --height 64 --width 96",
    ),
    "tinyxl_ddim": (
        "a red circle",
        "--guidance 5 --steps 3 --seed 3 --height 72 --width 104",
    ),
    "tiny2_v_dpmpp": (
        "a tall tower",
        "--sampler dpm++ --steps 16 --guidance 4 --seed 6 --height 64 --width 64",
    ),
    "tiny2_v": (
        "wow!! a tall tower!",
        "--guidance 5 --steps 10 --seed 2 --height 64 --width 64",
    ),
}


@pytest.mark.parametrize("name", IMAGES)
def test_sample_makes_the_image_of_diffusers(name, request, tmp_path):
    model = request.getfixturevalue(f"{name.split('_')[0]}_folder")
    prompt, flags = IMAGES[name]
    common = ["--model", str(model), "--out", str(tmp_path), "--device", "cpu", "--prompt", prompt]
    [path] = sample.main([*common, *flags.split()])
    image = np.asarray(Image.open(path)).astype(int)
    expected = np.asarray(Image.open(DATA / f"{name}.png")).astype(int)
    assert image.shape == expected.shape
    assert np.abs(image - expected).max() <= 1  # of 255
