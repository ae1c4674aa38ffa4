"""Specification of spin/scheduler.py: the noise schedule and one step of each sampler.

Noise levels and timesteps are random. diffusers' own numbers are in test_networks.py.
"""

import math

import pytest
import torch
from helpers import SCHEDULER, gaussian_eps, gaussian_marginal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spin.scheduler import (
    Scheduler,
    add_noise,
    make_alphas_cumprod,
    ddim_step,
    ddpm_step,
    dpmpp_step,
    error_weight,
    posterior_std,
    training_target,
    velocity,
    x0_and_eps,
)

ALPHAS_CUMPROD = Scheduler(SCHEDULER).alphas_cumprod.double()

ONE = torch.ones(1, dtype=torch.float64)
ZERO = torch.zeros(1, dtype=torch.float64)

seeds = st.integers(0, 2**32 - 1)
etas = st.floats(0, 1)
prediction_types = st.sampled_from(["epsilon", "v_prediction"])
shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))


@st.composite
def level_pairs(draw) -> tuple[Tensor, Tensor]:
    """Draw alpha_bar and a larger alpha_bar_prev from the schedule, 0-d."""
    t = draw(st.integers(1, 999))
    previous = draw(st.integers(0, t - 1))
    return ALPHAS_CUMPROD[t], ALPHAS_CUMPROD[previous]


@st.composite
def level_triples(draw) -> tuple[Tensor, Tensor, Tensor]:
    """Draw alpha_bar_last < alpha_bar < alpha_bar_prev from the schedule: two steps in a row."""
    t = draw(st.integers(1, 998))
    noisier = draw(st.integers(t + 1, 999))
    previous = draw(st.integers(0, t - 1))
    return ALPHAS_CUMPROD[noisier], ALPHAS_CUMPROD[t], ALPHAS_CUMPROD[previous]


def random_normals(seed: int, count: int, shape: tuple[int, ...] = (3, 4, 5, 6)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    normals = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    return list(normals.unbind())


# -----------------------------------------------------------------------------
# the noise schedule


@given(
    st.sampled_from(["linear", "scaled_linear"]),
    st.floats(1e-5, 1e-3),
    st.floats(2e-3, 3e-2),
    st.integers(2, 1000),
)
def test_alphas_cumprod_is_the_product_of_one_minus_beta(schedule, beta_start, beta_end, count):
    expected = []
    product = 1.0
    for i in range(count):
        fraction = i / (count - 1)
        if schedule == "linear":
            beta = beta_start + fraction * (beta_end - beta_start)
        else:
            root = math.sqrt(beta_start) + fraction * (math.sqrt(beta_end) - math.sqrt(beta_start))
            beta = root**2
        product *= 1 - beta
        expected.append(product)
    found = make_alphas_cumprod(schedule, beta_start, beta_end, count)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=0)


def test_the_schedule_of_stable_diffusion_goes_from_almost_clean_to_almost_noise():
    assert ALPHAS_CUMPROD.shape == (1000,)
    assert ALPHAS_CUMPROD[0].item() == pytest.approx(1 - 0.00085, abs=1e-7)
    assert ALPHAS_CUMPROD[-1].item() == pytest.approx(0.00466, abs=1e-5)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="beta_schedule 'cosine'"):
        make_alphas_cumprod("cosine", 1e-4, 2e-2, 1000)
    with pytest.raises(ValueError, match="beta_schedule 'cosine'"):
        Scheduler({"beta_schedule": "cosine"})
    with pytest.raises(ValueError, match="prediction_type 'sample'"):
        Scheduler({"prediction_type": "sample"})
    with pytest.raises(ValueError, match="prediction_type 'sample'"):
        training_target(ONE, ONE, ONE / 2, "sample")
    with pytest.raises(ValueError, match="prediction_type 'sample'"):
        x0_and_eps(ONE, ONE, ONE / 2, "sample")


@given(st.integers(1, 999), st.integers(0, 1))
def test_timesteps_are_evenly_spaced_from_the_clean_end(steps, offset):
    scheduler = Scheduler(SCHEDULER | {"steps_offset": offset})
    timesteps = scheduler.timesteps(steps)
    assert timesteps.shape == (steps,)
    assert timesteps[0] < 1000
    assert timesteps[-1] == offset
    assert (timesteps[:-1] - timesteps[1:] == 1000 // steps).all()


@pytest.mark.parametrize("steps", [0, -1, 1000, 1001])
def test_too_few_or_too_many_sampling_steps_are_refused(steps):
    """With steps_offset 1, the schedule has room for 999."""
    with pytest.raises(ValueError, match=f"{steps} sampling steps"):
        Scheduler(SCHEDULER).timesteps(steps)


# -----------------------------------------------------------------------------
# noising, and the training target


@given(level_pairs())
def test_noising_twice_is_noising_once(levels):
    """Noise to alpha_bar_prev, then on to alpha_bar: in one go to alpha_bar."""
    alpha_bar, alpha_bar_prev = levels
    rest = alpha_bar / alpha_bar_prev
    weight_of_x0 = add_noise(add_noise(ONE, ZERO, alpha_bar_prev), ZERO, rest)
    weight_of_first_noise = add_noise(add_noise(ZERO, ONE, alpha_bar_prev), ZERO, rest)
    weight_of_second_noise = add_noise(ZERO, ONE, rest)
    torch.testing.assert_close(weight_of_x0, add_noise(ONE, ZERO, alpha_bar))
    variance = weight_of_first_noise**2 + weight_of_second_noise**2
    torch.testing.assert_close(variance, add_noise(ZERO, ONE, alpha_bar) ** 2)


@given(seeds, st.lists(st.integers(0, 999), min_size=3, max_size=3))
def test_each_image_is_noised_to_its_own_level(seed, timesteps):
    x0, eps = random_normals(seed, 2)
    alpha_bar = ALPHAS_CUMPROD[timesteps]
    together = add_noise(x0, eps, alpha_bar)
    together_velocity = velocity(x0, eps, alpha_bar)
    for i in range(3):
        single = add_noise(x0[i], eps[i], alpha_bar[i])
        single_velocity = velocity(x0[i], eps[i], alpha_bar[i])
        torch.testing.assert_close(together[i], single, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(together_velocity[i], single_velocity, rtol=1e-12, atol=1e-12)


@given(seeds, shapes, st.integers(0, 999))
def test_velocity_is_the_change_of_x_along_the_angle_of_noise(seed, shape, t):
    """v = dx_t / dphi, where cos(phi) = sqrt(alpha_bar): arXiv 2202.00512, appendix D."""
    x0, eps = random_normals(seed, 2, shape)
    phi = torch.acos(ALPHAS_CUMPROD[t].sqrt())
    step = 1e-5
    behind = add_noise(x0, eps, torch.cos(phi - step) ** 2)
    ahead = add_noise(x0, eps, torch.cos(phi + step) ** 2)
    slope = (ahead - behind) / (2 * step)
    torch.testing.assert_close(velocity(x0, eps, ALPHAS_CUMPROD[t]), slope, rtol=1e-6, atol=1e-6)


@given(seeds, shapes, st.integers(0, 999))
def test_the_target_is_eps_or_velocity(seed, shape, t):
    x0, eps = random_normals(seed, 2, shape)
    alpha_bar = ALPHAS_CUMPROD[t]
    assert torch.equal(training_target(x0, eps, alpha_bar, "epsilon"), eps)
    v_target = training_target(x0, eps, alpha_bar, "v_prediction")
    assert torch.equal(v_target, velocity(x0, eps, alpha_bar))


@given(seeds, shapes, st.integers(0, 999), prediction_types)
def test_a_perfect_prediction_gives_back_x0_and_eps(seed, shape, t, prediction_type):
    x0, eps = random_normals(seed, 2, shape)
    alpha_bar = ALPHAS_CUMPROD[t]
    x_t = add_noise(x0, eps, alpha_bar)
    target = training_target(x0, eps, alpha_bar, prediction_type)
    found_x0, found_eps = x0_and_eps(target, x_t, alpha_bar, prediction_type)
    torch.testing.assert_close(found_x0, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found_eps, eps, rtol=1e-9, atol=1e-9)


# -----------------------------------------------------------------------------
# DDIM and DDPM


@given(level_pairs(), etas)
def test_a_ddim_step_lands_on_the_forward_marginal(levels, eta):
    """With the true x0 and eps, x_{t-1} is sqrt(a') x0 plus noise of variance 1 - a', (3.1).

    The weights are read off unit inputs.
    """
    alpha_bar, alpha_bar_prev = levels
    weight_of_x0 = ddim_step(ONE, ZERO, alpha_bar, alpha_bar_prev, eta, ZERO)
    weight_of_eps = ddim_step(ZERO, ONE, alpha_bar, alpha_bar_prev, eta, ZERO)
    weight_of_noise = ddim_step(ZERO, ZERO, alpha_bar, alpha_bar_prev, eta, ONE)
    x0_expected = add_noise(ONE, ZERO, alpha_bar_prev)
    variance = weight_of_eps**2 + weight_of_noise**2
    torch.testing.assert_close(weight_of_x0, x0_expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(variance, 1 - alpha_bar_prev.expand(1), rtol=1e-10, atol=0)


@given(seeds, shapes, level_pairs(), etas)
def test_a_ddim_step_is_equation_3_1(seed, shape, levels, eta):
    """N(sqrt(a') x0 + sqrt(1 - a' - s^2) (x_t - sqrt(a) x0) / sqrt(1 - a), s^2)"""
    alpha_bar, alpha_bar_prev = levels
    x0, eps, noise = random_normals(seed, 3, shape)
    x_t = add_noise(x0, eps, alpha_bar)
    found = ddim_step(x0, eps, alpha_bar, alpha_bar_prev, eta, noise)

    a = alpha_bar.item()
    a_prev = alpha_bar_prev.item()
    s = eta * math.sqrt((1 - a_prev) / (1 - a)) * math.sqrt(1 - a / a_prev)
    direction = (x_t - math.sqrt(a) * x0) / math.sqrt(1 - a)
    expected = math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev - s**2) * direction + s * noise
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@given(seeds, level_pairs(), prediction_types)
def test_ddim_with_eta_1_is_ddpm(seed, levels, prediction_type):
    alpha_bar, alpha_bar_prev = levels
    x_t, prediction, noise = random_normals(seed, 3)
    x0, eps = x0_and_eps(prediction, x_t, alpha_bar, prediction_type)
    ddim = ddim_step(x0, eps, alpha_bar, alpha_bar_prev, 1.0, noise)
    ddpm = ddpm_step(x_t, x0, alpha_bar, alpha_bar_prev, noise)
    torch.testing.assert_close(ddim, ddpm, rtol=1e-9, atol=1e-9)


@given(seeds, shapes, level_pairs())
def test_a_ddpm_step_is_bayes_rule(seed, shape, levels):
    """q(x_{t-1} | x_t, x0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x0): two Gaussians, precisions added."""
    alpha_bar, alpha_bar_prev = levels
    x_t, x0, noise = random_normals(seed, 3, shape)
    alpha = alpha_bar / alpha_bar_prev
    prior_precision = 1 / (1 - alpha_bar_prev)
    likelihood_precision = alpha / (1 - alpha)
    precision = prior_precision + likelihood_precision
    prior_mean = alpha_bar_prev.sqrt() * x0
    likelihood_mean = x_t / alpha.sqrt()
    weighted = prior_precision * prior_mean + likelihood_precision * likelihood_mean
    expected = weighted / precision + noise / precision.sqrt()
    found = ddpm_step(x_t, x0, alpha_bar, alpha_bar_prev, noise)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@given(seeds, etas)
def test_each_image_takes_a_step_between_its_own_levels(seed, eta):
    x_t, x0, eps, noise = random_normals(seed, 4)
    alpha_bar = ALPHAS_CUMPROD[[20, 500, 990]]
    alpha_bar_prev = ALPHAS_CUMPROD[[0, 300, 989]]
    ddim = ddim_step(x0, eps, alpha_bar, alpha_bar_prev, eta, noise)
    ddpm = ddpm_step(x_t, x0, alpha_bar, alpha_bar_prev, noise)
    for i in range(3):
        levels = (alpha_bar[i], alpha_bar_prev[i])
        single_ddim = ddim_step(x0[i], eps[i], *levels, eta, noise[i])
        single_ddpm = ddpm_step(x_t[i], x0[i], *levels, noise[i])
        torch.testing.assert_close(ddim[i], single_ddim, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ddpm[i], single_ddpm, rtol=1e-12, atol=1e-12)


def moments_after_sampling(steps: int, eta: float) -> tuple[float, float]:
    """Return mean and variance of the images that DDIM samples from Gaussian data.

    It begins at the true marginal. A step is linear in x_t and in its noise, so that its three
    coefficients can be read off the inputs 0 and 1.
    """
    scheduler = Scheduler(SCHEDULER | {"steps_offset": 0})
    timesteps = scheduler.timesteps(steps)
    levels = torch.cat([scheduler.alphas_cumprod[timesteps].double(), ONE])

    def step(x_t: Tensor, noise: Tensor) -> Tensor:
        prediction = gaussian_eps(x_t, 0.8, 0.4, alpha_bar)
        x0, eps = x0_and_eps(prediction, x_t, alpha_bar, "epsilon")
        return ddim_step(x0, eps, alpha_bar, alpha_bar_prev, eta, noise)

    mean, variance = gaussian_marginal(0.8, 0.4, levels[0])
    for alpha_bar, alpha_bar_prev in zip(levels, levels[1:]):
        offset = step(ZERO, ZERO)
        gain = step(ONE, ZERO) - offset
        spread = step(ZERO, ONE) - offset
        mean = offset + gain * mean
        variance = gain**2 * variance + spread**2
    return mean.item(), variance.item()


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.8, 1.0])
def test_ddim_with_any_noise_converges_to_the_data_at_first_order(eta):
    """The mean stays right, and twice the steps leave half the error of the variance."""
    coarse_mean, coarse = moments_after_sampling(100, eta)
    fine_mean, fine = moments_after_sampling(200, eta)
    assert coarse_mean == pytest.approx(0.8, abs=1e-5)
    assert fine_mean == pytest.approx(0.8, abs=1e-5)
    assert 1.6 < (coarse - 0.4) / (fine - 0.4) < 2.5
    assert abs(fine - 0.4) > 1e-4


# -----------------------------------------------------------------------------
# DPM-Solver++(2M)


def log_snr(alpha_bar: float) -> float:
    """Return lambda = log(signal / noise)."""
    return math.log(math.sqrt(alpha_bar) / math.sqrt(1 - alpha_bar))


@given(seeds, shapes, level_triples())
def test_a_dpmpp_step_is_algorithm_2(seed, shape, levels):
    """arXiv 2211.01095 in its own variables: h, r, D and exp(-h), in plain floats."""
    alpha_bar_last, alpha_bar, alpha_bar_prev = levels
    x_t, x0, x0_last = random_normals(seed, 3, shape)
    found = dpmpp_step(x_t, x0, alpha_bar, alpha_bar_prev, (x0_last, alpha_bar_last))

    lambda_last = log_snr(alpha_bar_last.item())
    lambda_now = log_snr(alpha_bar.item())
    lambda_next = log_snr(alpha_bar_prev.item())
    h = lambda_next - lambda_now
    r = (lambda_now - lambda_last) / h
    d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_last
    sigma_now = math.sqrt(1 - alpha_bar.item())
    sigma_next = math.sqrt(1 - alpha_bar_prev.item())
    signal_next = math.sqrt(alpha_bar_prev.item())
    expected = sigma_next / sigma_now * x_t - signal_next * math.expm1(-h) * d
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@given(seeds, shapes, level_pairs())
def test_the_first_dpmpp_step_is_ddims(seed, shape, levels):
    alpha_bar, alpha_bar_prev = levels
    x_t, prediction = random_normals(seed, 2, shape)
    x0, eps = x0_and_eps(prediction, x_t, alpha_bar, "epsilon")
    found = dpmpp_step(x_t, x0, alpha_bar, alpha_bar_prev, None)
    expected = ddim_step(x0, eps, alpha_bar, alpha_bar_prev, 0.0, x_t)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@given(seeds, shapes, level_pairs())
def test_a_dpmpp_step_to_the_clean_image_is_the_predicted_x0(seed, shape, levels):
    """lambda is infinite there: nothing can be extrapolated."""
    alpha_bar_last, alpha_bar = levels
    x_t, x0, x0_last = random_normals(seed, 3, shape)
    clean = torch.tensor(1.0, dtype=torch.float64)
    found = dpmpp_step(x_t, x0, alpha_bar, clean, (x0_last, alpha_bar_last))
    torch.testing.assert_close(found, x0, rtol=1e-12, atol=1e-12)


def sampling_error(sampler: str, steps: int) -> float:
    """Return the distance of a sampler's last x from the exact one, on Gaussian data.

    The exact path is known: x_t stays as many standard deviations off its mean as it began. Steps
    in lambda are long and short by turns, so that no two in a row are equal.
    """
    mean = 0.8
    variance = 0.4
    lengths = torch.tensor([2.0, 1.0], dtype=torch.float64).repeat(steps // 2)
    fractions = torch.cat([ZERO, lengths.cumsum(0) / lengths.sum()])
    levels = torch.sigmoid(-5 + 9 * fractions)  # lambda from -2.5 to 2

    start = torch.tensor([1.7], dtype=torch.float64)
    x_t = start
    last = None
    for alpha_bar, alpha_bar_prev in zip(levels, levels[1:]):
        prediction = gaussian_eps(x_t, mean, variance, alpha_bar)
        x0, eps = x0_and_eps(prediction, x_t, alpha_bar, "epsilon")
        if sampler == "ddim":
            x_t = ddim_step(x0, eps, alpha_bar, alpha_bar_prev, 0.0, x_t)
        else:
            x_t = dpmpp_step(x_t, x0, alpha_bar, alpha_bar_prev, last)
            last = (x0, alpha_bar)

    first_mean, first_variance = gaussian_marginal(mean, variance, levels[0])
    last_mean, last_variance = gaussian_marginal(mean, variance, levels[-1])
    exact = last_mean + (last_variance / first_variance).sqrt() * (start - first_mean)
    return (x_t - exact).abs().item()


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("dpm++", 2)])
def test_the_order_of_convergence(sampler, order):
    """Twice the steps leave half of DDIM's error and a quarter of DPM-Solver++(2M)'s."""
    coarse = sampling_error(sampler, 40)
    middle = sampling_error(sampler, 80)
    fine = sampling_error(sampler, 160)
    assert math.log2(coarse / middle) == pytest.approx(order, abs=0.2)
    assert math.log2(middle / fine) == pytest.approx(order, abs=0.15)


def test_twenty_steps_of_dpmpp_beat_a_hundred_of_ddim():
    assert sampling_error("dpm++", 20) < sampling_error("ddim", 100)


# -----------------------------------------------------------------------------
# purity


@given(seeds, level_triples(), etas, prediction_types)
def test_no_function_changes_its_inputs(seed, levels, eta, prediction_type):
    x_t, x0, eps, noise, x0_last = random_normals(seed, 5)
    alpha_bar_last, alpha_bar, alpha_bar_prev = levels
    inputs = [x_t, x0, eps, noise, x0_last, alpha_bar_last, alpha_bar, alpha_bar_prev]
    before = [tensor.clone() for tensor in inputs]

    add_noise(x0, eps, alpha_bar)
    velocity(x0, eps, alpha_bar)
    training_target(x0, eps, alpha_bar, prediction_type)
    x0_and_eps(eps, x_t, alpha_bar, prediction_type)
    posterior_std(alpha_bar, alpha_bar_prev)
    error_weight(alpha_bar, alpha_bar_prev, eta)
    ddim_step(x0, eps, alpha_bar, alpha_bar_prev, eta, noise)
    ddpm_step(x_t, x0, alpha_bar, alpha_bar_prev, noise)
    dpmpp_step(x_t, x0, alpha_bar, alpha_bar_prev, (x0_last, alpha_bar_last))

    for tensor, copy in zip(inputs, before):
        assert torch.equal(tensor, copy)
