"""Sampling on the tiny networks: what an image depends on, and what it does not."""

import math
from types import SimpleNamespace

import pytest
import torch
from gaussian import best_eps, marginal

from spin.sampler import decode, sample
from spin.scheduler import Scheduler, ddim_step, dpmpp_step, x0_and_eps


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


SMALL = {"height": 64, "width": 64}


@pytest.mark.parametrize(
    "settings", [{"eta": 0.0}, {"eta": 0.7}, {"sampler": "ddpm"}, {"sampler": "dpm++"}, {"guidance": 1.0}]
)
def test_an_image_does_not_depend_on_the_batch_it_is_drawn_in(sd, settings):
    prompts = ["a red circle", "a blue square", ""]
    together = sample(sd, prompts, steps=5, generators=generators(7, 8, 9), **SMALL, **settings)
    assert together.shape == (3, 4, 8, 8) and together.dtype == torch.float32
    for i, prompt in enumerate(prompts):
        alone = sample(sd, [prompt], steps=5, generators=generators(7 + i), **SMALL, **settings)
        torch.testing.assert_close(alone[0], together[i], atol=2e-4, rtol=1e-3)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_the_first_latent_is_the_generators_first_draw(sd):
    """As in diffusers, so that the same seed draws the same picture there and here."""
    seen = []

    class Spy(torch.nn.Module):
        conv_in, config = sd.unet.conv_in, sd.unet.config

        def forward(self, latents, timesteps, context):
            seen.append(latents.clone())
            return sd.unet(latents, timesteps, context)

    spied = type(sd)(Spy(), sd.vae, sd.text_encoder, sd.scheduler)
    sample(spied, ["a"], steps=2, generators=generators(5), **SMALL)
    first = torch.randn((1, 4, 8, 8), generator=torch.Generator("cpu").manual_seed(5))
    assert torch.equal(seen[0], torch.cat([first, first]))  # one batch of 2B under guidance


def test_guidance_extrapolates_from_the_empty_prompt(sd):
    def one(prompt, guidance, **kwargs):
        return sample(sd, [prompt], steps=1, guidance=guidance, generators=generators(1), **SMALL, **kwargs)

    empty, prompt = one("", 1.0), one("a red circle", 1.0)
    torch.testing.assert_close(one("a red circle", 3.0), empty + 3 * (prompt - empty), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(one("a red circle", 0.0), empty, atol=1e-4, rtol=1e-4)
    other = one("a blue square", 1.0)
    guided = one("a red circle", 3.0, negative_prompts="a blue square")
    torch.testing.assert_close(guided, other + 3 * (prompt - other), atol=1e-3, rtol=1e-3)


def test_default_size_and_seeds(sd):
    latents = sample(sd, ["a", "b"], steps=1)
    assert latents.shape == (2, 4, 16, 16)  # sample_size of the UNet's config
    assert torch.equal(latents, sample(sd, ["a", "b"], steps=1, generators=generators(0, 1)))


def test_decode_is_a_picture(sd):
    latents = sample(sd, ["a", "b"], steps=1, **SMALL)
    pictures = decode(sd, latents)
    assert pictures.shape == (2, 3, 64, 64) and pictures.min() >= 0 and pictures.max() <= 1
    raw = sd.vae.decode(latents / sd.vae.scaling_factor)
    torch.testing.assert_close(pictures, (raw / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"height": 60, "width": 64}, "multiples of 8"),
        ({"height": -64, "width": 64}, "multiples of 8"),
        ({"sampler": "euler"}, "sampler 'euler'"),
        ({"guidance": 1e38}, "not finite"),
        ({"steps": 1000}, "1000 sampling steps"),
        ({"generators": generators(1)}, "2 prompts, 1 generators"),
        ({"negative_prompts": ["a"]}, "1 negative prompts"),
    ],
)
def test_arguments_out_of_range(sd, settings, message):
    with pytest.raises(ValueError, match=message):
        sample(sd, ["a", "b"], **{"steps": 2} | settings)


@pytest.mark.parametrize("prompts", ["a red circle", []])
def test_prompts_are_a_list(sd, prompts):
    with pytest.raises(ValueError, match="list of at least one prompt"):
        sample(sd, prompts, steps=1)


# ---------------------------------------------------------------------------------------------------------------------
# Gaussian data: each sampler is a linear map of the noises it draws


class GaussianModel:
    """A Stable Diffusion of one pixel that knows N(mean, variance) perfectly (`gaussian.py`)."""

    vae = SimpleNamespace(downscale=1)

    def __init__(self, mean: float, variance: float, prediction_type: str):
        self.mean, self.variance = mean, variance
        config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        self.scheduler = Scheduler(config | {"prediction_type": prediction_type})
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.double()  # 1 - a/b cancels: no rounding here
        model = self

        class Unet:
            sample_size = 1
            conv_in = SimpleNamespace(weight=torch.empty(0, dtype=torch.float64), in_channels=1)

            def __call__(self, x_t, t, context):
                a = model.scheduler.alphas_cumprod[t].double()
                eps = best_eps(x_t, model.mean, model.variance, a)
                if prediction_type == "epsilon":
                    return eps
                return (eps - (1 - a).sqrt() * x_t) / a.sqrt()

        self.unet = Unet()

    def encode_prompts(self, prompts):
        return torch.zeros(len(prompts), 1, 1)


def moments(model: GaussianModel, monkeypatch, steps: int, start: tuple[float, float], **settings):
    """Mean and variance of what `sample` draws, begun with noise of mean and variance `start`; no random number.

    Row 0 gets the mean of every draw, row j one standard deviation more in draw j: the sampler being linear, row 0 is
    the result's mean, and the differences are the weights of independent noises.
    """
    rows = steps + 2
    drawn = iter(range(rows * rows))

    def randn(shape, generator):
        draw, row = divmod(next(drawn), rows)
        mean, variance = start if draw == 0 else (0.0, 1.0)
        return torch.full(shape, mean + variance**0.5 * (row == draw + 1), dtype=torch.float64)

    monkeypatch.setattr(torch, "randn", randn)
    x0 = sample(model, [""] * rows, steps, guidance=1.0, generators=[None] * rows, **settings).flatten().double()
    monkeypatch.undo()
    return x0[0].item(), (x0[1:] - x0[0]).square().sum().item()


def recursion(model: GaussianModel, steps: int, eta: float, start: tuple[float, float]) -> tuple[float, float]:
    """The same by equations (3.1) and (3.2), a scalar at a time: the mean and variance of x_{t-1} from those of x_t."""
    mean, variance = start
    a_of = model.scheduler.alphas_cumprod.double().tolist()
    for t in range((steps - 1) * (1000 // steps), -1, -(1000 // steps)):
        a, b = a_of[t], a_of[t - 1000 // steps] if t >= 1000 // steps else 1.0
        s2 = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
        total = a * model.variance + 1 - a
        of_x0, of_eps = math.sqrt(a) * model.variance / total, math.sqrt(1 - a) / total
        gain = math.sqrt(b) * of_x0 + math.sqrt(1 - b - s2) * of_eps
        mean = math.sqrt(b) * model.mean + gain * (mean - math.sqrt(a) * model.mean)
        variance = gain**2 * variance + s2
    return mean, variance


SETTINGS = [{"eta": 0.0}, {"eta": 0.3}, {"eta": 0.8}, {"eta": 1.0}, {"sampler": "ddpm"}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_mean_and_variance_follow_the_recursion(monkeypatch, settings, steps, prediction_type):
    model = GaussianModel(0.8, 0.4, prediction_type)
    found = moments(model, monkeypatch, steps, (0.0, 1.0), **settings)
    assert found == pytest.approx(recursion(model, steps, settings.get("eta", 1.0), (0.0, 1.0)), abs=1e-6)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_converges_to_the_data_at_first_order(monkeypatch, settings):
    """Begun at the true marginal, twice the steps leave half the error."""
    model, errors = GaussianModel(0.8, 0.4, "epsilon"), []
    for steps in (50, 100, 200):
        a = model.scheduler.alphas_cumprod[(steps - 1) * (1000 // steps)].item()
        mean, variance = moments(model, monkeypatch, steps, marginal(0.8, 0.4, a), **settings)
        assert mean == pytest.approx(0.8, abs=1e-5)  # a right mean stays right
        errors.append(variance - 0.4)
    for coarse, fine in zip(errors, errors[1:]):
        assert 1.6 < coarse / fine < 2.5 and abs(fine) > 1e-4


def test_dpmpp_converges_at_second_order_and_ddim_at_first():
    """Along the path of a Gaussian, which is known: x_t is as many standard deviations off its mean as at the start."""
    mean, variance, start = 0.8, 0.4, torch.tensor([1.7], dtype=torch.float64)

    def error(steps: int, sampler: str) -> float:
        levels = torch.sigmoid(torch.linspace(-5, 4, steps + 1, dtype=torch.float64))  # even in the log of signal/noise
        x_t, before = start, None
        for a, b in zip(levels, levels[1:]):
            x0, eps = x0_and_eps(best_eps(x_t, mean, variance, a), x_t, a, "epsilon")
            if sampler == "ddim":
                x_t = ddim_step(x0, eps, a, b, 0.0, x_t)
            else:
                x_t, before = dpmpp_step(x_t, x0, a, b, before), (x0, a)
        (m0, v0), (m1, v1) = marginal(mean, variance, levels[0]), marginal(mean, variance, levels[-1])
        return abs(x_t - (m1 + (v1 / v0) ** 0.5 * (start - m0))).item()

    for sampler, order in (("ddim", 1), ("dpm++", 2)):
        errors = [error(steps, sampler) for steps in (40, 80, 160)]
        orders = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:])]
        assert orders == pytest.approx([order] * 2, abs=0.15), sampler
    assert error(20, "dpm++") < error(100, "ddim")


def test_the_trajectory_is_the_path_of_the_latents(sd):
    path: list[torch.Tensor] = []
    x0 = sample(sd, ["a", "b"], 4, generators=generators(1, 2), trajectory=path, **SMALL)
    first = torch.cat([torch.randn((1, 4, 8, 8), generator=generator) for generator in generators(1, 2)])
    assert len(path) == 4 and torch.equal(path[0], first)
    t = sd.scheduler.timesteps(4)[-1]  # one more step from the last place is the image
    with torch.no_grad():
        output = [sd.unet(path[-1], t, sd.encode_prompts(prompts)) for prompts in (["", ""], ["a", "b"])]
    output = output[0] + 7.5 * (output[1] - output[0])
    alphas = sd.scheduler.alphas_of_step(t.item(), 4, "ddim")
    last = ddim_step(*x0_and_eps(output, path[-1], alphas[0], "epsilon"), *alphas, 0.0, path[-1])
    torch.testing.assert_close(last, x0, atol=1e-3, rtol=1e-3)
