"""What the paper proves about self-play, on Gaussian data, where nothing has to be learned.

A player is theta = (mean, log variance) of a Gaussian. Its samples are that Gaussian's, and its
network is the best prediction of the noise for data from it (`helpers.gaussian_eps`). Images
have one pixel, tensors are float64.
"""

import math

import numpy as np
import pytest
import torch
from helpers import SCHEDULER, gaussian_eps, normal_nodes
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from spin.loss import LINKS, per_image_error, sft_loss, spin_loss, spin_trajectory_loss
from spin.scheduler import Scheduler, add_noise, ddim_step, error_weight, posterior_std

ALPHAS_CUMPROD = Scheduler(SCHEDULER).alphas_cumprod.double()
TIMESTEPS = torch.arange(20, 1000, 70)  # where expectations over t are taken

seeds = st.integers(0, 2**32 - 1)
betas = st.floats(1, 5000)
links = st.sampled_from(sorted(LINKS))


def as_theta(mean_and_log_variance: tuple[float, float]) -> Tensor:
    return torch.tensor(mean_and_log_variance, dtype=torch.float64)


thetas = st.tuples(st.floats(-2, 2), st.floats(-1, 1)).map(as_theta)


def samples(theta: Tensor, normals: Tensor) -> Tensor:
    """Turn standard normals [N,1] into samples [N,1] of the player theta [2]."""
    mean, log_variance = theta
    return mean + (log_variance / 2).exp() * normals


def predict_eps(theta: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Return eps_theta(x_t), [N,1]; theta is [2], or [N,2] for one player a sample."""
    mean = theta[..., :1]
    variance = theta[..., 1:].exp()
    return gaussian_eps(x_t, mean, variance, ALPHAS_CUMPROD[t][:, None])


def noise_error(theta: Tensor, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Return |eps_theta(x_t) - eps|^2, [N]; theta as in `predict_eps`."""
    x_t = add_noise(x0, eps, ALPHAS_CUMPROD[t])
    difference = predict_eps(theta, x_t, t) - eps
    return difference.square().squeeze(1)  # `per_image_error` would round to float32


# -----------------------------------------------------------------------------
# Equation (5.1): the gradient at theta = theta_k is made of SFT's


def slope_at_0(link: str) -> float:
    """Return -l'(0)."""
    return 0.5 if link == "logistic" else 1.0


@given(seeds, thetas, betas, links)
def test_with_c6_it_is_sfts_on_real_images_minus_sfts_on_generated_ones(
    seed, theta_k, beta, link
):
    """Times -l'(0) beta/2."""
    generator = torch.Generator().manual_seed(seed)
    x0_data, x0_gen, eps = torch.randn(3, 20, 1, generator=generator, dtype=torch.float64)
    t = torch.randint(1000, (20,), generator=generator)
    theta = theta_k.clone().requires_grad_()
    err_data = noise_error(theta, x0_data, eps, t)
    err_gen = noise_error(theta, x0_gen, eps, t)
    losses, _ = spin_loss(err_data, err_gen, err_data, err_gen, beta, link)

    [gradient] = torch.autograd.grad(losses.sum(), theta, retain_graph=True)
    [matching] = torch.autograd.grad(err_data.sum(), theta)
    [pushing] = torch.autograd.grad(err_gen.sum(), theta)
    expected = slope_at_0(link) * beta / 2 * (matching - pushing)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9 * beta)


@given(seeds, thetas, betas, links)
def test_with_c5_it_is_sfts_alone(seed, theta_k, beta, link):
    """Times -l'(0) beta/2: the gap to the opponent is at its minimum, so nothing is pushed."""
    generator = torch.Generator().manual_seed(seed)
    x0_data, x_t_gen, eps = torch.randn(3, 20, 1, generator=generator, dtype=torch.float64)
    t = torch.randint(1000, (20,), generator=generator)
    theta = theta_k.clone().requires_grad_()
    err_data = noise_error(theta, x0_data, eps, t)
    gap = predict_eps(theta, x_t_gen, t) - predict_eps(theta_k, x_t_gen, t)
    gap_gen = gap.square().squeeze(1)
    losses, _ = spin_trajectory_loss(err_data, gap_gen, err_data, beta, link)

    [gradient] = torch.autograd.grad(losses.sum(), theta, retain_graph=True)
    [matching] = torch.autograd.grad(err_data.sum(), theta)
    expected = slope_at_0(link) * beta / 2 * matching
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9 * beta)


# -----------------------------------------------------------------------------
# Theorem 5.3: self-play stops where the opponent's images cannot be told from the data


@pytest.mark.parametrize("noise", ["shared", "independent"])
@pytest.mark.parametrize("link", sorted(LINKS))
@pytest.mark.parametrize(
    "theta_k, is_the_data",
    [((0.7, -0.4), True), ((0.9, -0.4), False), ((0.7, 0.2), False)],
    ids=["same as the data", "another mean", "another variance"],
)
def test_the_expected_gradient_at_theta_k_is_zero_only_if_theta_k_is_the_data(
    theta_k, is_the_data, link, noise
):
    """Monte Carlo over 40,000 pairs: both components within 4.5 standard errors of 0, or not."""
    count = 40_000
    data = as_theta((0.7, -0.4))
    opponent = as_theta(theta_k)
    generator = torch.Generator().manual_seed(5)
    normals = torch.randn(4, count, 1, generator=generator, dtype=torch.float64)
    t = torch.randint(1000, (count,), generator=generator)
    x0_data = samples(data, normals[0])
    x0_gen = samples(opponent, normals[1])
    eps = normals[2]
    eps_gen = normals[3] if noise == "independent" else eps

    policy = opponent.repeat(count, 1).requires_grad_()  # a copy a pair, for the gradient of each
    err_data = noise_error(policy, x0_data, eps, t)
    err_gen = noise_error(policy, x0_gen, eps_gen, t)
    opp_err_data = noise_error(opponent, x0_data, eps, t)
    opp_err_gen = noise_error(opponent, x0_gen, eps_gen, t)
    losses, _ = spin_loss(err_data, err_gen, opp_err_data, opp_err_gen, 20.0, link)
    losses.sum().backward()

    standard_error = policy.grad.std(dim=0) / count**0.5
    scores = policy.grad.mean(dim=0) / standard_error
    is_zero = bool((scores.abs() < 4.5).all())
    assert is_zero == is_the_data, scores


# -----------------------------------------------------------------------------
# Theorem 5.2: where SFT can still improve, so can self-play


def expected_sft_loss(theta: Tensor, data: Tensor) -> Tensor:
    """Return SFT's loss, its mean over data, noise and TIMESTEPS computed without sampling."""
    normals, weights = normal_nodes(2)
    x0_data = samples(data, normals[:, :1])
    eps = normals[:, 1:]
    total = 0.0
    for t in TIMESTEPS:
        err_data = noise_error(theta, x0_data, eps, t.repeat(len(normals)))
        losses, _ = sft_loss(err_data)
        total = total + weights @ losses
    return total / len(TIMESTEPS)


def expected_spin_loss(
    theta: Tensor,
    theta_k: Tensor,
    data: Tensor,
    beta: float,
    link: str,
    drawn: Tensor | None = None,
) -> Tensor:
    """Return (C.6), its mean over data, generated images and noise computed without sampling.

    drawn: how the generated images are distributed (None: as theta_k)

    The gradient of that is exact at theta = theta_k, where the link's slope is the same for all
    pairs.
    """
    normals, weights = normal_nodes(3)
    x0_data = samples(data, normals[:, :1])
    x0_gen = samples(theta_k if drawn is None else drawn, normals[:, 1:2])
    eps = normals[:, 2:]
    total = 0.0
    for timestep in TIMESTEPS:
        t = timestep.repeat(len(normals))
        err_data = noise_error(theta, x0_data, eps, t)
        err_gen = noise_error(theta, x0_gen, eps, t)
        opp_err_data = noise_error(theta_k, x0_data, eps, t)
        opp_err_gen = noise_error(theta_k, x0_gen, eps, t)
        losses, _ = spin_loss(err_data, err_gen, opp_err_data, opp_err_gen, beta, link)
        total = total + weights @ losses
    return total / len(TIMESTEPS)


@given(thetas, thetas, betas, links)
def test_a_small_step_of_self_play_lowers_the_sft_loss(data, theta_k, beta, link):
    """The first gradient of self-play is SFT's, times -l'(0) beta/2.

    theta_k is the best denoiser of its own samples, so that pushing has no gradient there.
    """
    theta = theta_k.clone().requires_grad_()
    [sft_gradient] = torch.autograd.grad(expected_sft_loss(theta, data), theta)
    spin = expected_spin_loss(theta, theta_k, data, beta, link)
    [spin_gradient] = torch.autograd.grad(spin, theta)

    expected = slope_at_0(link) * beta / 2 * sft_gradient
    torch.testing.assert_close(spin_gradient, expected, rtol=1e-9, atol=1e-9 * beta)

    assume(sft_gradient.norm() > 1e-3)
    stepped = theta_k - 1e-4 * spin_gradient / spin_gradient.norm()
    assert expected_sft_loss(stepped, data) < expected_sft_loss(theta_k, data)


@given(thetas, betas, links)
def test_at_the_data_neither_sft_nor_self_play_moves(data, beta, link):
    theta = data.clone().requires_grad_()
    [sft_gradient] = torch.autograd.grad(expected_sft_loss(theta, data), theta)
    [spin_gradient] = torch.autograd.grad(expected_spin_loss(theta, data, data, beta, link), theta)
    zero = torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(sft_gradient, zero, rtol=0, atol=1e-10)
    torch.testing.assert_close(spin_gradient, zero, rtol=0, atol=1e-10 * beta)


# -----------------------------------------------------------------------------
# Theorems 5.2 and 5.3 ask that an opponent draws what it denoises best. With guidance it does not.

GUIDED_DATA = as_theta((1.0, math.log(1 / 4)))
RESTING = as_theta((0.4545, 2 * math.log(0.8196)))  # draws GUIDED_DATA at guidance 3


def drawn_by(theta: Tensor, guidance: float, steps: int) -> Tensor:
    """Return what the player draws by DDIM, as (mean, log variance).

    Images of the empty prompt are N(0, 1). A step is linear in x_t, so that images are normal, and
    where 0 and 1 end up says all.
    """
    scheduler = Scheduler(SCHEDULER)
    x_t = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for t in scheduler.timesteps(steps):
        alpha_bar = ALPHAS_CUMPROD[t]
        before = t - scheduler.stride(steps)
        alpha_bar_prev = ALPHAS_CUMPROD[before.clamp(min=0)]
        unprompted = gaussian_eps(x_t, 0.0, 1.0, alpha_bar)
        prompted = gaussian_eps(x_t, theta[0], theta[1].exp(), alpha_bar)
        eps = unprompted + guidance * (prompted - unprompted)
        x0 = (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
        x_t = ddim_step(x0, eps, alpha_bar, alpha_bar_prev)
    mean, one_sigma = x_t.squeeze(1)
    return torch.stack([mean, 2 * (one_sigma - mean).abs().log()])


def spin_gradient(theta_k: Tensor, data: Tensor, drawn: Tensor) -> Tensor:
    """Return the expected gradient of (C.6) at theta_k, [2], with beta 4 and the logistic link."""
    theta = theta_k.clone().requires_grad_()
    loss = expected_spin_loss(theta, theta_k, data, 4.0, "logistic", drawn)
    [gradient] = torch.autograd.grad(loss, theta)
    return gradient


@pytest.mark.parametrize("theta_k", [GUIDED_DATA, RESTING, as_theta((-0.5, 0.7))])
def test_the_push_at_theta_k_is_minus_sfts_gradient_on_what_was_drawn(theta_k):
    """And the pull is SFT's gradient on the data. The factor, -l'(0) beta/2, is 1 here."""
    drawn = drawn_by(theta_k, 3.0, steps=20)
    theta = theta_k.clone().requires_grad_()
    pull, push = expected_sft_loss(theta, GUIDED_DATA), -expected_sft_loss(theta, drawn)
    [expected] = torch.autograd.grad(pull + push, theta)
    found = spin_gradient(theta_k, GUIDED_DATA, drawn)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("theta", [GUIDED_DATA, RESTING, as_theta((-0.5, 0.7))])
def test_without_guidance_and_in_many_steps_a_player_draws_what_it_denoises(theta):
    """Nearly: drawing begins at N(0, 1), but the most noised data still has 7% of its mean."""
    drawn = drawn_by(theta, 1.0, steps=500)
    torch.testing.assert_close(drawn[0], theta[0], atol=0.05, rtol=0)
    torch.testing.assert_close(drawn[1], theta[1], atol=0.02, rtol=0)


def test_with_guidance_self_play_does_not_rest_at_the_data():
    """The player that is the data draws images too far out and too much alike, and is moved on."""
    drawn = drawn_by(GUIDED_DATA, 3.0, steps=20)
    mean, sd = drawn[0].item(), (drawn[1] / 2).exp().item()
    assert (mean, sd) == (pytest.approx(1.433, abs=5e-4), pytest.approx(0.088, abs=5e-4))
    gradient = spin_gradient(GUIDED_DATA, GUIDED_DATA, drawn)
    assert gradient[0] > 0.01, "the player's mean is lowered"
    assert gradient[1] < -0.01, "its variance is raised"


def test_it_rests_where_the_data_is_drawn_and_is_not_what_is_denoised():
    """At mean 0.454 and standard deviation 0.820, where the data has 1 and 0.5."""
    drawn = drawn_by(RESTING, 3.0, steps=20)
    torch.testing.assert_close(drawn, GUIDED_DATA, atol=1e-3, rtol=0)
    at_rest = spin_gradient(RESTING, GUIDED_DATA, drawn)
    at_data = spin_gradient(GUIDED_DATA, GUIDED_DATA, drawn_by(GUIDED_DATA, 3.0, steps=20))
    assert at_rest.norm() < 0.002 * at_data.norm()
    for moved in ((0.1, 0.0), (-0.1, 0.0), (0.0, 0.2), (0.0, -0.2)):  # and from near, back to it
        theta = RESTING + as_theta(moved)
        gradient = spin_gradient(theta, GUIDED_DATA, drawn_by(theta, 3.0, steps=20))
        assert gradient @ as_theta(moved) > 0


# -----------------------------------------------------------------------------
# Appendix C.3: from errors of x_{t-1} to errors of eps


@given(seeds, st.integers(1, 999), st.data(), st.floats(0, 1))
def test_an_error_of_eps_moves_the_mean_of_a_step_by_h(seed, t, random, eta):
    """x_{t-1} - mu_theta(x_t) = h_t (eps - eps_theta) + s_t noise."""
    alpha_bar = ALPHAS_CUMPROD[t]
    alpha_bar_prev = ALPHAS_CUMPROD[random.draw(st.integers(0, t - 1))]
    generator = torch.Generator().manual_seed(seed)
    x0, eps, eps_theta, noise = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    no_noise = torch.zeros_like(noise)

    x_t = add_noise(x0, eps, alpha_bar)
    x0_theta = (x_t - (1 - alpha_bar).sqrt() * eps_theta) / alpha_bar.sqrt()
    x_prev = ddim_step(x0, eps, alpha_bar, alpha_bar_prev, eta, noise)
    mu_theta = ddim_step(x0_theta, eps_theta, alpha_bar, alpha_bar_prev, eta, no_noise)

    h = error_weight(alpha_bar, alpha_bar_prev, eta)
    s = eta * posterior_std(alpha_bar, alpha_bar_prev)
    expected = h * (eps - eps_theta) + s * noise
    torch.testing.assert_close(x_prev - mu_theta, expected, rtol=1e-7, atol=1e-10)


@given(seeds, st.integers(1, 999), st.data())
def test_without_noise_the_squared_error_of_a_step_is_h_squared_times_that_of_eps(seed, t, random):
    """|x_{t-1} - mu_theta|^2 = h_t^2 |eps - eps_theta|^2: how (4.9) becomes (C.6)."""
    alpha_bar = ALPHAS_CUMPROD[t]
    alpha_bar_prev = ALPHAS_CUMPROD[random.draw(st.integers(0, t - 1))]
    generator = torch.Generator().manual_seed(seed)
    x0, eps, eps_theta = torch.randn(3, 3, 5, generator=generator, dtype=torch.float64)

    x_t = add_noise(x0, eps, alpha_bar)
    x0_theta = (x_t - (1 - alpha_bar).sqrt() * eps_theta) / alpha_bar.sqrt()
    x_prev = ddim_step(x0, eps, alpha_bar, alpha_bar_prev, 0.0, eps)
    mu_theta = ddim_step(x0_theta, eps_theta, alpha_bar, alpha_bar_prev, 0.0, eps)

    h = error_weight(alpha_bar, alpha_bar_prev, 0.0).float()
    expected = h**2 * per_image_error(eps, eps_theta)
    torch.testing.assert_close(per_image_error(x_prev, mu_theta), expected, rtol=1e-3, atol=1e-9)


def test_the_misprinted_h_is_another_number():
    """The paper prints sqrt(1 - alpha_{t-1}) as last factor; by algebra it is sqrt(1 - alpha_t)."""
    alpha_bar = ALPHAS_CUMPROD
    alpha_bar_prev = torch.cat([torch.ones(1), ALPHAS_CUMPROD[:-1]])  # the paper's t = 1..T
    h_squared = error_weight(alpha_bar, alpha_bar_prev, 0.0) ** 2
    printed = (1 - alpha_bar_prev) * (1 - (alpha_bar_prev / alpha_bar).sqrt()) ** 2
    assert h_squared[0] > 8e-4
    assert printed[0] == 0
    assert h_squared[100] > 10 * printed[100]


def test_h_is_far_too_small_to_be_part_of_the_papers_beta():
    """So beta = 2000 is not lambda T / (2 s_t^2) times h^2, but the constant before the errors."""
    alpha_bar_prev = torch.cat([torch.ones(1), ALPHAS_CUMPROD[:-1]])
    h_squared = error_weight(ALPHAS_CUMPROD, alpha_bar_prev, 0.0) ** 2
    found = [h_squared.min(), h_squared.max(), h_squared.mean()]
    np.testing.assert_allclose(found, [4e-6, 8.5e-4, 1.4e-5], rtol=0.1)
