"""Identities of the noise schedule and of the samplers' steps, at timesteps and noise levels of no special kind."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from helpers import SCHEDULER

from spin.scheduler import Scheduler, add_noise, ddim_step, ddpm_step, posterior_std, target, x0_and_eps

seeds = st.integers(0, 2**32 - 1)
prediction_types = st.sampled_from(["epsilon", "v_prediction"])
FULL = Scheduler(SCHEDULER | {"steps_offset": 0})


def normals(seed: int, count: int, shape=(3, 4, 5, 6)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


@st.composite
def levels(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha_bar_t < alpha_bar_prev, two levels of the schedule."""
    t = draw(st.integers(1, 999))
    return FULL.alphas_cumprod[t].double(), FULL.alphas_cumprod[draw(st.integers(0, t - 1))].double()


@given(seeds, levels(), prediction_types)
def test_a_perfect_network_gives_back_x0_and_eps(seed, level, prediction_type):
    x0, eps = normals(seed, 2)
    x_t = add_noise(x0, eps, level[0])
    answer = target(x0, eps, level[0], prediction_type)
    torch.testing.assert_close(x0_and_eps(answer, x_t, level[0], prediction_type), (x0, eps), atol=1e-9, rtol=1e-9)


@given(seeds)
def test_alphas_apply_image_by_image(seed):
    x0, eps = normals(seed, 2)
    alpha_bar = FULL.alphas_cumprod[[3, 500, 998]].double()
    together = add_noise(x0, eps, alpha_bar)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], add_noise(x0[i : i + 1], eps[i : i + 1], alpha_bar[i]))


@given(levels())
def test_forward_marginals_compose(level):
    """Noise to level a', then from there to a: in one go to a. Coefficients read off unit inputs."""
    alpha_bar, alpha_bar_prev = level
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)

    def composed(x0, first, second):
        return add_noise(add_noise(x0, first, alpha_bar_prev), second, alpha_bar / alpha_bar_prev)

    torch.testing.assert_close(composed(one, zero, zero), add_noise(one, zero, alpha_bar))
    variance = composed(zero, one, zero) ** 2 + composed(zero, zero, one) ** 2
    torch.testing.assert_close(variance, add_noise(zero, one, alpha_bar) ** 2)


@given(seeds, levels(), st.floats(0, 1))
def test_ddim_step_lands_on_the_forward_marginal(seed, level, eta):
    """(3.1): from x_t ~ q(x_t|x0), with the true x0 and eps, x_{t-1} has mean sqrt(a') x0 and variance 1 - a'."""
    alpha_bar, alpha_bar_prev = level
    x0, eps, noise = normals(seed, 3)
    s = eta * posterior_std(alpha_bar, alpha_bar_prev)
    result = ddim_step(x0, eps, alpha_bar, alpha_bar_prev, eta, noise)
    direction = (1 - alpha_bar_prev - s**2).sqrt()
    torch.testing.assert_close(direction**2 + s**2, 1 - alpha_bar_prev)
    torch.testing.assert_close(result, alpha_bar_prev.sqrt() * x0 + direction * eps + s * noise)


@given(seeds, levels(), prediction_types)
def test_ddim_with_eta_1_is_ddpm(seed, level, prediction_type):
    x_t, answer, noise = normals(seed, 3)
    x0, eps = x0_and_eps(answer, x_t, level[0], prediction_type)
    torch.testing.assert_close(
        ddim_step(x0, eps, *level, 1.0, noise), ddpm_step(x_t, x0, *level, noise), atol=1e-9, rtol=1e-9
    )


@given(seeds, levels())
def test_ddpm_step_is_bayes_rule(seed, level):
    """q(x_{t-1}|x_t,x0) ~ q(x_t|x_{t-1}) q(x_{t-1}|x0): the product of two Gaussians, precisions added."""
    alpha_bar, alpha_bar_prev = level
    x_t, x0, noise = normals(seed, 3)
    alpha = alpha_bar / alpha_bar_prev
    precision = 1 / (1 - alpha_bar_prev) + alpha / (1 - alpha)
    mean = (alpha_bar_prev.sqrt() * x0 / (1 - alpha_bar_prev) + alpha.sqrt() * x_t / (1 - alpha)) / precision
    torch.testing.assert_close(ddpm_step(x_t, x0, *level, noise), mean + noise / precision.sqrt(), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("offset", [0, 1])
def test_on_the_full_schedule_ddim_with_eta_1_is_ddpm_but_for_its_last_step(offset):
    ours = Scheduler(SCHEDULER | {"steps_offset": offset})
    steps = 1000 - offset
    x_t, answer, noise = normals(3, 3, (1, 2, 3))
    for t in ours.timesteps(steps).tolist():
        alphas = {s: [a.double() for a in ours.alphas_of_step(t, steps, s)] for s in ("ddim", "ddpm")}
        x0, eps = x0_and_eps(answer, x_t, alphas["ddim"][0], "epsilon")
        same = torch.allclose(
            ddim_step(x0, eps, *alphas["ddim"], 1.0, noise), ddpm_step(x_t, x0, *alphas["ddpm"], noise), atol=1e-9
        )
        assert same == (t > offset or alphas["ddim"] == alphas["ddpm"]), t
    assert alphas["ddim"][1] == (ours.alphas_cumprod[0] if t == 0 else alphas["ddpm"][1])


def test_the_two_samplers_differ_past_the_end_of_the_schedule():
    ours = Scheduler(SCHEDULER)
    t = ours.timesteps(50)[-1].item()
    assert t == 1
    assert ours.alphas_of_step(t, 50, "ddpm")[1] == 1
    assert ours.alphas_of_step(t, 50, "ddim")[1] == ours.alphas_cumprod[0]  # set_alpha_to_one is false
    assert Scheduler(SCHEDULER | {"set_alpha_to_one": True}).alphas_of_step(t, 50, "ddim")[1] == 1


@given(st.integers(1, 999), st.integers(0, 1))
def test_timesteps_are_inside_the_schedule_and_evenly_spaced(steps, offset):
    ours = Scheduler(SCHEDULER | {"steps_offset": offset})
    timesteps = ours.timesteps(steps)
    assert len(timesteps) == steps and timesteps[-1] == offset and timesteps[0] < 1000
    assert torch.all(timesteps[:-1] - timesteps[1:] == 1000 // steps)


@pytest.mark.parametrize("steps", [0, -1, 1000, 1001])
def test_too_few_or_too_many_steps(steps):
    with pytest.raises(ValueError, match=f"{steps} sampling steps"):
        Scheduler(SCHEDULER).timesteps(steps)
