"""What the paper proves about self-play, on Gaussian data, where nothing has to be learned (`gaussian.py`).

theta = (mean, log variance) of a Gaussian, whose best guess of the noise is the network.
"""

import numpy as np
import pytest
import torch
from gaussian import best_eps, normal_nodes
from hypothesis import assume, given
from hypothesis import strategies as st
from helpers import SCHEDULER
from torch import Tensor

from spin.loss import LINKS, per_image_error, sft_loss, spin_loss
from spin.scheduler import Scheduler, add_noise, ddim_step, error_weight, posterior_std

ALPHAS = Scheduler(SCHEDULER).alphas_cumprod.double()
TIMESTEPS = torch.arange(20, 1000, 70)
links = st.sampled_from(sorted(LINKS))


def predict(theta: Tensor, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """theta: [2] or [N,2]; x_t [N,1]; alpha_bar [N]."""
    mean, log_variance = theta[..., :1], theta[..., 1:]
    return best_eps(x_t, mean, log_variance.exp(), alpha_bar[:, None])


def draw(theta: Tensor, normal: Tensor) -> Tensor:
    """Standard normal [N,1] -> samples of the model [N,1]."""
    return theta[0] + (theta[1] / 2).exp() * normal


def four_errors(theta: Tensor, opponent: Tensor, x0_data: Tensor, x0_gen: Tensor, eps: Tensor, t: Tensor, eps_gen=None):
    """err_data, err_gen, opp_err_data, opp_err_gen [N], of images of one pixel in float64."""
    alpha_bar, found = ALPHAS[t], []
    for player in (theta, opponent):
        for x0, noise in ((x0_data, eps), (x0_gen, eps if eps_gen is None else eps_gen)):
            found.append((predict(player, add_noise(x0, noise, alpha_bar), alpha_bar) - noise).square()[:, 0])
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Theorem 5.3: who cannot be told from the data is left in peace


@pytest.mark.parametrize("noise", ["shared", "independent"])
@pytest.mark.parametrize("link", sorted(LINKS))
@pytest.mark.parametrize("opponent, at_rest", [((0.7, -0.4), True), ((0.9, -0.4), False), ((0.7, 0.2), False)])
def test_the_expected_gradient_is_zero_only_where_opponent_and_data_agree(opponent, at_rest, link, noise):
    """Monte Carlo, 40,000 pairs: every component within 4.5 of its standard errors of 0, or not."""
    count, data, theta_k = 40_000, torch.tensor([0.7, -0.4]).double(), torch.tensor(opponent).double()
    generator = torch.Generator().manual_seed(5)
    x, x_gen, eps, eps_gen = torch.randn(4, count, 1, generator=generator, dtype=torch.float64)
    t = torch.randint(1000, (count,), generator=generator)
    theta = theta_k.repeat(count, 1).requires_grad_()  # a copy for each pair: the gradient of each
    noises = (eps, t, eps_gen if noise == "independent" else None)
    losses, _ = spin_loss(*four_errors(theta, theta_k, draw(data, x), draw(theta_k, x_gen), *noises), 20.0, link)
    losses.sum().backward()
    scores = theta.grad.mean(0) / (theta.grad.std(0) / count**0.5)
    assert (scores.abs() < 4.5).all() == at_rest, scores


# ---------------------------------------------------------------------------------------------------------------------
# Theorem 5.2: where SFT can still improve, so can self-play


def expected(theta: Tensor, loss) -> Tensor:
    """loss(normals [27,3], t [27]) -> [27]; its mean over three standard normals and TIMESTEPS, without sampling."""
    points, weights = normal_nodes(3)
    return torch.stack([weights @ loss(points, t.repeat(len(points))) for t in TIMESTEPS]).mean()


def expected_sft(theta: Tensor, data: Tensor) -> Tensor:
    def loss(normals: Tensor, t: Tensor) -> Tensor:
        x0, eps = draw(data, normals[:, :1]), normals[:, 1:2]
        return sft_loss(four_errors(theta, theta, x0, x0, eps, t)[0])[0]

    return expected(theta, loss)


def expected_spin(theta: Tensor, theta_k: Tensor, data: Tensor, beta: float, link: str) -> Tensor:
    def loss(normals: Tensor, t: Tensor) -> Tensor:
        x0_data, x0_gen = draw(data, normals[:, :1]), draw(theta_k, normals[:, 1:2])
        return spin_loss(*four_errors(theta, theta_k, x0_data, x0_gen, normals[:, 2:], t), beta, link)[0]

    return expected(theta, loss)


gaussians = st.tuples(st.floats(-2, 2), st.floats(-1, 1)).map(lambda pair: torch.tensor(pair, dtype=torch.float64))


@given(gaussians, gaussians, st.floats(1, 5000), links)
def test_a_small_step_of_self_play_lowers_the_sft_loss(data, theta_k, beta, link):
    """Where SFT's gradient is not zero; theta_k being the best denoiser of its own samples."""
    theta = theta_k.clone().requires_grad_()
    (of_sft,) = torch.autograd.grad(expected_sft(theta, data), theta)
    (of_spin,) = torch.autograd.grad(expected_spin(theta, theta_k, data, beta, link), theta)
    weight = (0.5 if link == "logistic" else 1.0) * beta / 2  # -l'(0) beta/2: what is pushed has no gradient here
    torch.testing.assert_close(of_spin, weight * of_sft, atol=1e-9 * beta, rtol=1e-9)
    assume(of_sft.norm() > 1e-3)
    stepped = theta_k - 1e-4 * of_spin / of_spin.norm()
    assert expected_sft(stepped, data) < expected_sft(theta_k, data)


@given(gaussians, st.floats(1, 5000), links)
def test_at_the_data_neither_moves(data, beta, link):
    theta = data.clone().requires_grad_()
    for loss in (expected_sft(theta, data), expected_spin(theta, data, data, beta, link)):
        (gradient,) = torch.autograd.grad(loss, theta)
        torch.testing.assert_close(gradient, torch.zeros(2).double(), atol=1e-10 * beta, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Appendix C.3: from x_{t-1} to eps


@given(st.integers(0, 2**32 - 1), st.integers(1, 999), st.data(), st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))
def test_an_error_of_eps_moves_the_mean_by_h(seed, t, given_data, eta):
    """x_{t-1} - mu_theta = h_t (e - e_theta) + s_t e^; as s -> 0, |x_{t-1} - mu_theta|^2 = h_t^2 |e - e_theta|^2."""
    previous = given_data.draw(st.integers(0, t - 1))
    alpha_bar, alpha_bar_prev = ALPHAS[t], ALPHAS[previous]
    x0, e, e_theta, noise = torch.randn(
        4, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )  # fmt: skip
    x_t = add_noise(x0, e, alpha_bar)
    x_prev = ddim_step(x0, e, alpha_bar, alpha_bar_prev, eta, noise)
    x0_theta = (x_t - (1 - alpha_bar).sqrt() * e_theta) / alpha_bar.sqrt()
    mu_theta = ddim_step(x0_theta, e_theta, alpha_bar, alpha_bar_prev, eta, torch.zeros_like(noise))
    h, s = error_weight(alpha_bar, alpha_bar_prev, eta), eta * posterior_std(alpha_bar, alpha_bar_prev)
    torch.testing.assert_close(x_prev - mu_theta, h * (e - e_theta) + s * noise, atol=1e-10, rtol=1e-7)
    if eta == 0:
        squares = [per_image_error(x_prev, mu_theta), h.float() ** 2 * per_image_error(e, e_theta)]
        torch.testing.assert_close(*squares, rtol=1e-3, atol=1e-9)


def test_the_misprinted_h_is_another_number():
    """Printed with sqrt(1 - alpha_{t-1}) as last factor; by algebra it is sqrt(1 - alpha_t)."""
    alpha_bar, alpha_bar_prev = ALPHAS, torch.cat([torch.ones(1), ALPHAS[:-1]])  # t = 1..T of the paper
    squares = error_weight(alpha_bar, alpha_bar_prev, 0.0) ** 2
    printed = (1 - alpha_bar_prev) * (1 - (alpha_bar_prev / alpha_bar).sqrt()) ** 2
    assert squares[0] > 8e-4 and printed[0] == 0
    assert squares[100] > 10 * printed[100]
    # far below 2000: the paper's beta cannot be lambda T / (2 s_t^2) times this, it is the constant before the errors
    np.testing.assert_allclose([squares.min(), squares.max(), squares.mean()], [4e-6, 8.5e-4, 1.4e-5], rtol=0.1)
