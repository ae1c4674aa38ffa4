"""Specification of spin/sampler.py: the loop of guided steps, and what an image depends on."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import SCHEDULER, gaussian_eps
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from spin.infra.errors import InputError
from spin.sampler import SAMPLERS, SamplingOptions, decode_latents, sample, sample_images
from spin.scheduler import Scheduler, ddim_step, ddpm_step, dpmpp_step, x0_and_eps
from spin.unet import UNet

SMALL = {"height": 64, "width": 64}  # latents of 8 x 8
ALL_SAMPLERS = ["ddim", "ddim with noise", "ddpm", "dpm++"]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def sampler_arguments(name: str) -> dict:
    if name == "ddim with noise":
        return {"sampler": "ddim", "eta": 0.7}
    return {"sampler": name}


# -----------------------------------------------------------------------------
# what an image depends on


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("name", ALL_SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(pipe, name, guidance):
    prompts = ["a red circle", "a blue square", ""]
    arguments = SMALL | sampler_arguments(name) | {"steps": 5, "guidance": guidance}
    together = sample(pipe, prompts, generators=generators(7, 8, 9), **arguments)
    assert together.shape == (3, 4, 8, 8)
    assert together.dtype == torch.float32
    for i, prompt in enumerate(prompts):
        [single] = sample(pipe, [prompt], generators=generators(7 + i), **arguments)
        torch.testing.assert_close(single, together[i], rtol=1e-3, atol=2e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_without_generators_seeds_are_0_1_2_and_the_size_is_the_unets(pipe):
    latents = sample(pipe, ["a", "b"], steps=1)
    assert latents.shape == (2, 4, 16, 16)  # sample_size of the UNet's config
    seeded = sample(pipe, ["a", "b"], steps=1, generators=generators(0, 1))
    assert torch.equal(latents, seeded)


@pytest.mark.parametrize(
    "sample_size, arguments, shape",
    [
        (3, {}, (3, 3)),
        ([2, 3], {}, (2, 3)),  # height, width
        ([2, 3], {"height": 5}, (5, 3)),  # in diffusers, which replaces both, (2, 3)
        ([2, 3], {"width": 5}, (2, 5)),
    ],
)
def test_the_default_size_is_that_of_the_unets_config(sample_size, arguments, shape):
    pipe = PromptPipe()
    pipe.unet.sample_size = sample_size
    latents = sample(pipe, ["1"], steps=1, **arguments)
    assert latents.shape[2:] == shape


@pytest.mark.parametrize(
    "sample_size, expected",
    [(16, 16), ([8, 12], [8, 12]), (None, 64)],
)
def test_a_sample_size_is_one_number_or_two_and_without_one_64(pipe, sample_size, expected):
    with torch.device("meta"):
        unet = UNet(pipe.unet.config | {"sample_size": sample_size})
    assert unet.sample_size == expected


@pytest.mark.parametrize("sample_size", [-8, [8], [8, 8, 8], [8, 0], [8, None], "8", 8.5])
def test_other_sample_sizes_are_refused(pipe, sample_size):
    with pytest.raises(ValueError, match="sample_size is .*one or two positive integers"):
        UNet(pipe.unet.config | {"sample_size": sample_size})


def test_arguments_are_left_unchanged(pipe):
    prompts = ["a", "b"]
    negative_prompts = ["c", "d"]
    sample(pipe, prompts, steps=1, negative_prompts=negative_prompts, **SMALL)
    assert prompts == ["a", "b"]
    assert negative_prompts == ["c", "d"]


def test_autocast_changes_an_image_by_its_rounding_alone(pipe):
    arguments = SMALL | {"steps": 2, "guidance": 1.0}
    full = sample(pipe, ["a red circle"], **arguments)
    half = sample(pipe, ["a red circle"], dtype=torch.bfloat16, **arguments)
    assert half.dtype == torch.float32
    difference = (half - full).norm() / full.norm()
    assert 0 < difference < 0.1


# -----------------------------------------------------------------------------
# the loop


class RecordingUNet(torch.nn.Module):
    """A UNet that remembers the latents it was given."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet
        self.conv_in = unet.conv_in
        self.sample_size = unet.sample_size
        self.latents: list[Tensor] = []

    def forward(self, latents, timesteps, context):
        self.latents.append(latents.clone())
        return self.unet(latents, timesteps, context)


def test_the_first_latent_is_the_first_draw_of_the_generator(pipe):
    """As in diffusers, so that a seed gives the same image there and here."""
    unet = RecordingUNet(pipe.unet)
    recording = type(pipe)(unet, pipe.vae, pipe.text_encoder, pipe.scheduler)
    sample(recording, ["a"], steps=2, generators=generators(5), **SMALL)
    first = torch.randn((1, 4, 8, 8), generator=torch.Generator("cpu").manual_seed(5))
    assert torch.equal(unet.latents[0], torch.cat([first, first]))  # guidance: a batch of 2B


@torch.no_grad()
@pytest.mark.parametrize("name", ALL_SAMPLERS)
def test_sample_takes_one_guided_step_after_another(pipe, name):
    """The loop, written out for one prompt, four steps and a guidance of 3."""
    generator = torch.Generator("cpu").manual_seed(6)
    x_t = torch.randn((1, 4, 8, 8), generator=generator)
    empty = pipe.encode_prompts([""])
    prompt = pipe.encode_prompts(["a red circle"])
    timesteps = pipe.scheduler.timesteps(4)
    if name.startswith("ddim"):
        end = pipe.scheduler.final_alpha_cumprod
    else:
        end = torch.tensor(1.0)
    levels = [*pipe.scheduler.alphas_cumprod[timesteps], end]

    last = None
    for t, alpha_bar, alpha_bar_prev in zip(timesteps, levels, levels[1:]):
        empty_eps = pipe.unet(x_t, t, empty)
        prompt_eps = pipe.unet(x_t, t, prompt)
        guided_eps = empty_eps + 3.0 * (prompt_eps - empty_eps)
        x0, eps = x0_and_eps(guided_eps, x_t, alpha_bar, "epsilon")
        if name == "ddim":
            x_t = ddim_step(x0, eps, alpha_bar, alpha_bar_prev, 0.0, x_t)
        elif name == "ddim with noise":
            noise = torch.randn((1, 4, 8, 8), generator=generator)
            x_t = ddim_step(x0, eps, alpha_bar, alpha_bar_prev, 0.7, noise)
        elif name == "ddpm":
            noise = torch.randn((1, 4, 8, 8), generator=generator)
            x_t = ddpm_step(x_t, x0, alpha_bar, alpha_bar_prev, noise)
        else:
            x_t = dpmpp_step(x_t, x0, alpha_bar, alpha_bar_prev, last)
            last = (x0, alpha_bar)

    arguments = SMALL | sampler_arguments(name) | {"steps": 4, "guidance": 3.0}
    found = sample(pipe, ["a red circle"], generators=generators(6), **arguments)
    torch.testing.assert_close(found, x_t, rtol=1e-4, atol=1e-4)


class PromptUNet:
    """A network that predicts, in every pixel, the number that the prompt is."""

    sample_size = 2
    conv_in = torch.nn.Conv2d(4, 1, 1)

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return context[:, :1, :1, None].expand_as(x_t)


class PromptPipe:
    """A pipeline around that network; the empty prompt is 0."""

    def __init__(self):
        self.scheduler = Scheduler(SCHEDULER | {"set_alpha_to_one": True})
        self.unet = PromptUNet()
        self.vae = SimpleNamespace(downscale=1)

    def encode_prompts(self, prompts: list[str], sizes: Tensor | None = None) -> Tensor:
        numbers = [float(prompt or 0) for prompt in prompts]
        return torch.tensor(numbers)[:, None, None]


def guided_prediction(
    prompts: list[str], guidance: float, negative_prompts: str | list[str] = ""
) -> list[float]:
    """Return the noise that `sample` removes from each prompt's latent in a single step."""
    pipe = PromptPipe()
    seeds = range(len(prompts))
    x0 = sample(
        pipe,
        prompts,
        steps=1,
        guidance=guidance,
        generators=generators(*seeds),
        negative_prompts=negative_prompts,
    )
    x_t = torch.cat([torch.randn((1, 4, 2, 2), generator=g) for g in generators(*seeds)])
    alpha_bar = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps(1)]
    eps = (x_t - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
    assert (eps.amax((1, 2, 3)) - eps.amin((1, 2, 3))).max() < 1e-3
    return eps.mean((1, 2, 3)).tolist()


numbers = st.floats(-5, 5)


@given(numbers, numbers, st.floats(0, 10))
def test_guidance_extrapolates_from_the_empty_prompt_through_the_prompt(a, b, guidance):
    found = guided_prediction([str(a), str(b)], guidance)
    assert found == pytest.approx([guidance * a, guidance * b], abs=1e-3)


@given(numbers, numbers, numbers, numbers, st.floats(0, 10))
def test_each_prompt_is_led_away_from_its_own_negative_prompt(a, b, not_a, not_b, guidance):
    found = guided_prediction([str(a), str(b)], guidance, [str(not_a), str(not_b)])
    expected = [not_a + guidance * (a - not_a), not_b + guidance * (b - not_b)]
    assert found == pytest.approx(expected, abs=1e-3)


@given(numbers, numbers, numbers, st.floats(0, 10))
def test_one_negative_prompt_is_for_all_prompts(a, b, negative, guidance):
    found = guided_prediction([str(a), str(b)], guidance, str(negative))
    expected = [negative + guidance * (a - negative), negative + guidance * (b - negative)]
    assert found == pytest.approx(expected, abs=1e-3)


def test_a_guidance_of_1_is_the_prompt_alone_and_of_0_the_negative_prompt_alone():
    assert guided_prediction(["2"], 1.0, "-3") == pytest.approx([2.0], abs=1e-3)
    assert guided_prediction(["2"], 0.0, "-3") == pytest.approx([-3.0], abs=1e-3)


def test_without_guidance_the_network_sees_each_latent_once(pipe):
    unet = RecordingUNet(pipe.unet)
    recording = type(pipe)(unet, pipe.vae, pipe.text_encoder, pipe.scheduler)
    sample(recording, ["a"], steps=3, guidance=1.0, generators=generators(5), **SMALL)
    assert [latents.shape[0] for latents in unet.latents] == [1, 1, 1]


# -----------------------------------------------------------------------------
# Gaussian data: every step is known in closed form

MEAN = 0.8
VARIANCE = 0.4


class GaussianUNet:
    """The best network for one-pixel images from N(MEAN, VARIANCE)."""

    sample_size = 1
    conv_in = torch.nn.Conv2d(1, 1, 1)

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        alpha_bar = self.scheduler.alphas_cumprod[t]
        eps = gaussian_eps(x_t, MEAN, VARIANCE, alpha_bar)
        if self.scheduler.prediction_type == "epsilon":
            return eps
        x0 = (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
        return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0


class GaussianPipe:
    """A pipeline around that network, whose latents are the images."""

    def __init__(self, **scheduler_config):
        self.scheduler = Scheduler(SCHEDULER | scheduler_config)
        # 1 - a / a_prev cancels: in float32, its rounding would be seen
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.double()
        self.unet = GaussianUNet(self.scheduler)
        self.vae = SimpleNamespace(downscale=1)

    def encode_prompts(self, prompts: list[str], sizes: Tensor | None = None) -> Tensor:
        return torch.zeros(len(prompts), 1, 1)


def closed_form(scheduler: Scheduler, steps: int, eta: float, end: float, seed: int) -> float:
    """Return the image of a seed by equations (3.1) and (3.2), one float at a time.

    end: alpha_bar after the last step.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    alphas_cumprod = scheduler.alphas_cumprod.tolist()
    stride = 1000 // steps
    x = torch.randn((1, 1, 1, 1), generator=generator).item()
    for step in reversed(range(steps)):
        t = step * stride + scheduler.steps_offset
        a = alphas_cumprod[t]
        a_prev = alphas_cumprod[t - stride] if t >= stride else end
        s = eta * math.sqrt((1 - a_prev) / (1 - a)) * math.sqrt(1 - a / a_prev)
        # E[x0 | x_t] by the rule for conditioning one Gaussian on another
        covariance = math.sqrt(a) * VARIANCE
        x0 = MEAN + covariance / (a * VARIANCE + 1 - a) * (x - math.sqrt(a) * MEAN)
        eps = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
        x = math.sqrt(a_prev) * x0 + math.sqrt(max(0, 1 - a_prev - s**2)) * eps
        if eta > 0:
            x += s * torch.randn((1, 1, 1, 1), generator=generator).item()
    return x


@given(
    seed=st.integers(0, 2**63 - 2),
    steps=st.integers(1, 60),
    eta=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    prediction_type=st.sampled_from(["epsilon", "v_prediction"]),
    steps_offset=st.integers(0, 1),
    set_alpha_to_one=st.booleans(),
)
@example(0, 999, 1.0, "epsilon", 1, True)  # the full schedule
@example(0, 1000, 1.0, "v_prediction", 0, False)
def test_ddim_follows_the_closed_form(
    seed, steps, eta, prediction_type, steps_offset, set_alpha_to_one
):
    """It ends at the clean image or at the schedule's least noisy level, as the config says."""
    pipe = GaussianPipe(
        prediction_type=prediction_type,
        steps_offset=steps_offset,
        set_alpha_to_one=set_alpha_to_one,
    )
    end = 1.0 if set_alpha_to_one else pipe.scheduler.alphas_cumprod[0].item()
    found = sample(
        pipe, ["", ""], steps, guidance=1.0, eta=eta, generators=generators(seed, seed + 1)
    )
    first = closed_form(pipe.scheduler, steps, eta, end, seed)
    second = closed_form(pipe.scheduler, steps, eta, end, seed + 1)
    assert found.flatten().tolist() == pytest.approx([first, second], abs=2e-4)


@given(
    seed=st.integers(0, 2**63 - 1),
    steps=st.integers(1, 60),
    prediction_type=st.sampled_from(["epsilon", "v_prediction"]),
    steps_offset=st.integers(0, 1),
)
@example(0, 999, "epsilon", 1)  # the full schedule
@example(0, 1000, "v_prediction", 0)
def test_ddpm_follows_the_closed_form_to_the_clean_image(
    seed, steps, prediction_type, steps_offset
):
    """It is DDIM with eta = 1 but for its last step, which ends at alpha_bar = 1."""
    pipe = GaussianPipe(prediction_type=prediction_type, steps_offset=steps_offset)
    [found] = sample(
        pipe, [""], steps, guidance=1.0, generators=generators(seed), sampler="ddpm"
    )
    expected = closed_form(pipe.scheduler, steps, eta=1.0, end=1.0, seed=seed)
    assert found.item() == pytest.approx(expected, abs=2e-4)


# -----------------------------------------------------------------------------
# images


def test_decoded_latents_are_images_between_0_and_1(pipe):
    latents = sample(pipe, ["a", "b"], steps=1, **SMALL)
    before = latents.clone()
    images = decode_latents(pipe, latents)
    assert images.shape == (2, 3, 64, 64)
    assert images.min() >= 0
    assert images.max() <= 1
    raw = pipe.vae.decode(latents / pipe.vae.scaling_factor)  # in [-1,1], and a little beyond
    torch.testing.assert_close(images, (raw / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
    assert torch.equal(latents, before)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_sample_images_yields_the_image_of_each_prompt_and_seed_in_order(pipe, batch_size):
    prompts = ["a red circle", "a blue square", "a"]
    seeds = [4, 9, 2]
    options = SamplingOptions(steps=2, guidance=2.0, sampler="dpm++", **SMALL)
    images = list(sample_images(pipe, prompts, seeds, options, batch_size, negative_prompt="b"))
    assert len(images) == 3
    for image, prompt, seed in zip(images, prompts, seeds):
        latent = sample(
            pipe,
            [prompt],
            steps=2,
            guidance=2.0,
            generators=generators(seed),
            sampler="dpm++",
            negative_prompts="b",
            **SMALL,
        )
        [expected] = decode_latents(pipe, latent)
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-3)


def test_every_sampler_has_a_usual_number_of_steps():
    usual = {name: sampler.steps for name, sampler in SAMPLERS.items()}
    assert usual == {"ddim": 50, "ddpm": 50, "dpm++": 20}


# -----------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"height": 60, "width": 64}, "multiples of 8"),
        ({"height": -64, "width": 64}, "multiples of 8"),
        ({"sampler": "euler"}, "sampler 'euler'"),
        ({"guidance": 1e38}, "not finite"),
        ({"generators": generators(1)}, "2 prompts, 1 generators"),
        ({"negative_prompts": ["a"]}, "1 negative prompts"),
        ({"steps": 1000}, "1000 sampling steps"),
        ({"steps": 0}, "0 sampling steps"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(pipe, arguments, message):
    with pytest.raises(InputError, match=message):
        sample(pipe, ["a", "b"], **{"steps": 2} | arguments)


@pytest.mark.parametrize("prompts", ["a red circle", []])
def test_prompts_must_be_a_list(pipe, prompts):
    with pytest.raises(InputError, match="list of at least one prompt"):
        sample(pipe, prompts, steps=1)
