"""Specification of spin_bounded_loss, and what self-play with it converges to.

Predictions and errors are random and float64, away from theta = theta_k unless a test says so. What
the game converges to is computed in one dimension, on a grid, where nothing has to be learned.
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import SCHEDULER, gaussian_eps, gaussian_marginal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.autograd.functional import hessian, jacobian

from spin.loss import spin_bounded_loss, spin_loss
from spin.scheduler import Scheduler

B = 5  # pairs in a batch
D = 6  # dimensions of an image

seeds = st.integers(0, 2**32 - 1)
betas = st.floats(1.0, 5000.0)


def random_predictions(seed: int, batch: int = B) -> list[Tensor]:
    """Return policy, opponent and eps: two predictions of a noise and the noise, [2,batch,3,2].

    As everywhere here, the first of the two is about real images, the second about generated ones.
    """
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(3, 2, batch, 3, 2, generator=generator, dtype=torch.float64))


def random_errors(seed: int) -> list[Tensor]:
    """Return the five errors of the loss, [B] each, unrelated, as leaves that collect gradients."""
    generator = torch.Generator().manual_seed(seed)
    errors = 0.05 * torch.rand(5, B, generator=generator, dtype=torch.float64)
    return [error.requires_grad_() for error in errors.unbind()]


def mean_square(difference: Tensor) -> Tensor:
    """Return means over an image, [2,B,...] -> [2,B]; `per_image_error` would round to float32."""
    return difference.square().flatten(2).mean(2)


def errors_of(policy: Tensor, opponent: Tensor, eps: Tensor) -> list[Tensor]:
    """Return the five errors of the loss, [B] each."""
    err_data, err_gen = mean_square(policy - eps)
    opp_err_data, opp_err_gen = mean_square(opponent - eps)
    _, gap_gen = mean_square(policy - opponent)
    return [err_data, err_gen, opp_err_data, opp_err_gen, gap_gen]


def bounded(policy: Tensor, opponent: Tensor, eps: Tensor, beta: float) -> Tensor:
    """Return the losses of these predictions, [B]."""
    losses, _ = spin_bounded_loss(*errors_of(policy, opponent, eps), beta)
    return losses


# -----------------------------------------------------------------------------
# The formula


@given(seeds, betas)
def test_it_is_the_error_on_the_real_image_plus_the_error_against_the_mirrored_noise(seed, beta):
    """Less the same of the opponent, which is constant; and times beta/4."""
    policy, opponent, eps = random_predictions(seed)
    err_data, against_mirror = mean_square(policy - torch.stack([eps[0], 2 * opponent[1] - eps[1]]))
    opp_err_data, opp_err_gen = mean_square(opponent - eps)
    expected = beta / 4 * (err_data + against_mirror - opp_err_data - opp_err_gen)
    losses = bounded(policy, opponent, eps, beta)
    assert losses.shape == (B,)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12 * beta)


@given(seeds, betas)
def test_at_theta_k_it_is_zero(seed, beta):
    _, opponent, eps = random_predictions(seed)
    assert bounded(opponent, opponent, eps, beta).tolist() == [0.0] * B


@given(seeds, betas)
def test_its_metrics_are_those_of_spin_loss_and_carry_no_gradient(seed, beta):
    errors = random_errors(seed)
    _, metrics = spin_bounded_loss(*errors, beta)
    _, expected = spin_loss(*errors[:4], beta)
    assert metrics.keys() == expected.keys()
    for name, values in metrics.items():
        assert torch.equal(values, expected[name])
        assert not values.requires_grad


@given(seeds, betas, st.integers(0, B - 1))
def test_each_row_depends_on_its_own_errors_alone(seed, beta, row):
    errors = random_errors(seed)
    losses, _ = spin_bounded_loss(*errors, beta)
    one_row = [error[row : row + 1] for error in errors]
    [single_loss], _ = spin_bounded_loss(*one_row, beta)
    assert torch.equal(single_loss, losses[row])


@given(seeds, betas)
def test_beta_is_a_float_or_a_0d_tensor_and_inputs_stay_unchanged(seed, beta):
    errors = random_errors(seed)
    before = [error.clone() for error in errors]
    losses, _ = spin_bounded_loss(*errors, beta)
    same_losses, _ = spin_bounded_loss(*errors, torch.tensor(beta, dtype=torch.float64))
    assert torch.equal(same_losses, losses)
    for error, copy in zip(errors, before, strict=True):
        assert torch.equal(error, copy)


@given(seeds, betas)
def test_its_gradient_in_the_errors_is_constant_and_spares_the_opponents(seed, beta):
    errors = random_errors(seed)
    losses, _ = spin_bounded_loss(*errors, beta)
    losses.sum().backward()
    err_data, err_gen, opp_err_data, opp_err_gen, gap_gen = errors
    quarter = torch.full((B,), beta / 4, dtype=torch.float64)
    torch.testing.assert_close(err_data.grad, quarter, rtol=1e-12, atol=0)
    torch.testing.assert_close(err_gen.grad, -quarter, rtol=1e-12, atol=0)
    torch.testing.assert_close(gap_gen.grad, 2 * quarter, rtol=1e-12, atol=0)
    assert opp_err_data.grad is None
    assert opp_err_gen.grad is None


@given(seeds, betas)
def test_its_gradient_in_the_predictions_is_the_finite_difference(seed, beta):
    policy, opponent, eps = random_predictions(seed, batch=2)
    assert gradcheck(
        lambda prediction: bounded(prediction, opponent, eps, beta),
        policy.requires_grad_(),
        eps=1e-4,
        rtol=1e-6,
        atol=1e-6 * beta,
    )


@given(seeds, betas)
def test_at_theta_k_its_gradient_in_the_predictions_is_that_of_c6(seed, beta):
    """With the logistic link and the same beta: training starts in the same direction and pace."""
    _, opponent, eps = random_predictions(seed)
    policy = opponent.clone().requires_grad_()
    errors = errors_of(policy, opponent, eps)
    losses, _ = spin_bounded_loss(*errors, beta)
    spin_losses, _ = spin_loss(*errors[:4], beta)
    [gradient] = torch.autograd.grad(losses.sum(), policy, retain_graph=True)
    [spin_gradient] = torch.autograd.grad(spin_losses.sum(), policy)
    torch.testing.assert_close(gradient, spin_gradient, rtol=1e-12, atol=0)


# -----------------------------------------------------------------------------
# It has a minimum, and (C.6) has none


@given(seeds, betas)
def test_its_hessian_in_the_predictions_is_a_positive_multiple_of_the_identity(seed, beta):
    """beta / (2 D) everywhere, since errors are means over D dimensions.

    On generated images the error alone would give -beta / (2 D); the gap gives twice as much.
    """
    policy, opponent, eps = random_predictions(seed, batch=1)
    curvature = hessian(lambda prediction: bounded(prediction, opponent, eps, beta).sum(), policy)
    expected = beta / (2 * D) * torch.eye(2 * D, dtype=torch.float64)
    torch.testing.assert_close(
        curvature.reshape(2 * D, 2 * D), expected, rtol=1e-12, atol=1e-12 * beta
    )


@pytest.mark.parametrize("link", ["logistic", "correlation"])
def test_pushed_away_from_the_noise_it_stops_at_the_mirrored_noise_and_c6_never_stops(link):
    """On the generated image: from the opponent's prediction, step 0, past the mirror, step 1."""
    steps = torch.linspace(0, 10, 1001, dtype=torch.float64)
    _, opponent, eps = random_predictions(7, batch=1)
    away = opponent - eps
    away[0] = 0  # on the real image the policy stays where it is
    errors = errors_of(opponent + steps[:, None, None] * away, opponent, eps)

    spin_losses, _ = spin_loss(*errors[:4], 2.0, link)
    assert (spin_losses.diff() < 0).all()

    losses, _ = spin_bounded_loss(*errors, 2.0)
    lowest = losses.argmin()
    assert steps[lowest].item() == pytest.approx(1.0)
    assert (losses[: lowest + 1].diff() < 0).all()
    assert (losses[lowest:].diff() > 0).all()


# -----------------------------------------------------------------------------
# One dimension: densities and best responses on a grid of x_t

GRID = torch.linspace(-8, 8, 801, dtype=torch.float64)
ALPHA_BARS = [0.9, 0.5, 0.1]  # little noise to much

Mixture = list[tuple[float, float, float]]  # of Gaussians: weight, mean and variance of each
Noised = tuple[Tensor, Tensor]  # on GRID: the density of x_t, the best prediction of the noise

DATA = [(0.7, -1.0, 0.1), (0.3, 1.5, 0.3)]
DATA_VARIANCE = 1.4725  # of the whole mixture
OPPONENT = [(0.4, -0.5, 0.4), (0.6, 2.0, 0.2)]


def noised(mixture: Mixture, alpha_bar: float) -> Noised:
    density = torch.zeros_like(GRID)
    weighted_eps = torch.zeros_like(GRID)
    for weight, mean, variance in mixture:
        mean_t, variance_t = gaussian_marginal(mean, variance, alpha_bar)
        exponent = -((GRID - mean_t) ** 2) / (2 * variance_t)
        component = weight * exponent.exp() / (2 * math.pi * variance_t) ** 0.5
        density += component
        weighted_eps += component * gaussian_eps(GRID, mean, variance, alpha_bar)
    return density, weighted_eps / density


def integral(values: Tensor) -> Tensor:
    return torch.trapezoid(values, GRID)


def drawn_with(prediction: Tensor, alpha_bar: float) -> Noised:
    """Return what an exact sampler draws with this prediction: what it is the best prediction of.

    The best prediction of the noise is -sqrt(1 - alpha_bar) times the log density's derivative.
    """
    log_density = -torch.cumulative_trapezoid(prediction, GRID) / (1 - alpha_bar) ** 0.5
    log_density = F.pad(log_density, (1, 0))
    density = (log_density - log_density.max()).exp()
    return density / integral(density), prediction


def best_response(
    player: Callable[[Tensor], Tensor],
    start: Tensor,
    data: Noised,
    opponent: Tensor,
    drawn: Noised,
) -> Tensor:
    """Return the parameters at which the expected loss is lowest.

    player: its predictions on GRID, an affine function of its parameters.
    start: any parameters.
    opponent: its prediction. drawn: what it draws.

    Given x_t, an error's mean is the squared distance from the best prediction of the noise, plus
    the noise's variance, which is the same for both players and cancels. The loss is linear in its
    errors, so its mean is the loss of their means. In the parameters it is quadratic: one step of
    Newton's method ends at the minimum.
    """
    data_density, data_eps = data
    drawn_density, drawn_eps = drawn

    def expected_loss(parameters: Tensor) -> Tensor:
        policy = player(parameters)
        losses, _ = spin_bounded_loss(
            data_density * (policy - data_eps) ** 2,
            drawn_density * (policy - drawn_eps) ** 2,
            data_density * (opponent - data_eps) ** 2,
            drawn_density * (opponent - drawn_eps) ** 2,
            drawn_density * (policy - opponent) ** 2,
            beta=2.0,
        )
        return integral(losses)

    gradient = jacobian(expected_loss, start)
    curvature = hessian(expected_loss, start, vectorize=True)
    return start - torch.linalg.solve(curvature, gradient)


def any_function(values: Tensor) -> Tensor:
    """The player that predicts a free number at each x_t."""
    return values


def affine_function(parameters: Tensor) -> Tensor:
    """The player whose images are Gaussian."""
    return parameters[0] + parameters[1] * GRID


def distance(density: Tensor, other: Tensor) -> float:
    """Return the L1 distance, which is 2 where the densities do not overlap."""
    return integral((density - other).abs()).item()


def moments(density: Tensor) -> tuple[float, float]:
    """Return mean and variance."""
    mean = integral(density * GRID)
    variance = integral(density * (GRID - mean) ** 2)
    return mean.item(), variance.item()


# -----------------------------------------------------------------------------
# Without guidance: the opponent is the best denoiser of what it draws


@pytest.mark.parametrize("alpha_bar", ALPHA_BARS)
def test_the_best_response_denoises_the_even_mixture_so_the_distance_to_the_data_halves(alpha_bar):
    data = noised(DATA, alpha_bar)
    _, prediction = noised(OPPONENT, alpha_bar)
    drawn = drawn_with(prediction, alpha_bar)
    before = distance(drawn[0], data[0])
    for iteration in range(1, 5):
        prediction = best_response(any_function, prediction, data, prediction, drawn)
        drawn = drawn_with(prediction, alpha_bar)

        left = 0.5**iteration  # the first opponent's weight
        mixture = [((1 - left) * weight, *component) for weight, *component in DATA]
        mixture += [(left * weight, *component) for weight, *component in OPPONENT]
        expected = noised(mixture, alpha_bar)
        torch.testing.assert_close(drawn, expected, rtol=0, atol=5e-4)
        after = distance(drawn[0], data[0])
        assert after / before == pytest.approx(0.5, abs=5e-4)
        before = after


@pytest.mark.parametrize("alpha_bar", ALPHA_BARS)
def test_a_gaussian_player_halves_the_distance_of_the_mean_alone(alpha_bar):
    """Its best response has the mean and the variance of the even mixture.

    The distance between the means adds to that variance. So the variance, right at first, becomes
    too large. The density's distance ends above 0, since the data are no Gaussian.
    """
    data = noised(DATA, alpha_bar)
    data_mean, data_variance = moments(data[0])
    start = torch.zeros(2, dtype=torch.float64)
    _, prediction = noised([(1.0, 2.0, DATA_VARIANCE)], alpha_bar)
    mean_gaps = []
    variance_gaps = []
    distances = []
    for _ in range(8):
        drawn = drawn_with(prediction, alpha_bar)
        mean, variance = moments(drawn[0])
        mean_gaps.append(mean - data_mean)
        variance_gaps.append(variance - data_variance)
        distances.append(distance(drawn[0], data[0]))

        parameters = best_response(affine_function, start, data, prediction, drawn)
        prediction = affine_function(parameters)
        response = moments(drawn_with(prediction, alpha_bar)[0])
        assert response == pytest.approx(moments((data[0] + drawn[0]) / 2), rel=1e-4)

    halves = [gap / 2 for gap in mean_gaps[:-1]]
    assert mean_gaps[1:] == pytest.approx(halves, rel=1e-3)
    assert abs(variance_gaps[0]) < 1e-4
    assert variance_gaps[1] > 0.1
    assert distances[-1] > 2 * distances[0] / 2**7


# -----------------------------------------------------------------------------
# With guidance: what is drawn is not what the opponent denoises best
#
# Real images of a prompt are N(1, VARIANCE), all images N(0, VARIANCE). With the prompt, the player
# is the best denoiser of N(mean, VARIANCE), and without it always that of N(0, VARIANCE). As the
# variances agree, the guided prediction is exactly the best denoiser of N(guidance mean, VARIANCE),
# and an exact sampler draws that.

VARIANCE = 0.3


def normal_player(mean: float | Tensor, alpha_bar: float) -> Tensor:
    return gaussian_eps(GRID, mean, VARIANCE, alpha_bar)


def drawn_with_guidance(prediction: Tensor, guidance: float, alpha_bar: float) -> Noised:
    unconditional = normal_player(0.0, alpha_bar)
    guided = unconditional + guidance * (prediction - unconditional)
    return drawn_with(guided, alpha_bar)


def best_mean(mean: Tensor, guidance: float, alpha_bar: float) -> Tensor:
    """Return the best response [1] to the opponent `mean` [1] of a player that is a mean, too."""
    opponent = normal_player(mean, alpha_bar)
    drawn = drawn_with_guidance(opponent, guidance, alpha_bar)
    data = noised([(1.0, 1.0, VARIANCE)], alpha_bar)
    return best_response(lambda m: normal_player(m, alpha_bar), mean, data, opponent, drawn)


@pytest.mark.parametrize("alpha_bar", ALPHA_BARS)
@pytest.mark.parametrize("guidance", [1.0, 3.0, 7.5])
@pytest.mark.parametrize("drawn_mean", [-0.5, 0.5, 1.0, 1.5])
def test_it_stops_where_the_guided_images_are_the_data_and_nowhere_else(
    drawn_mean, guidance, alpha_bar
):
    """That is at mean = 1 / guidance, which no function of x_t improves on.

    There the player's own mean is not the data's, unless guidance is 1. From anywhere else, the
    best response lies in its direction.
    """
    data = noised([(1.0, 1.0, VARIANCE)], alpha_bar)
    mean = torch.tensor([drawn_mean / guidance], dtype=torch.float64)
    opponent = normal_player(mean, alpha_bar)
    drawn = drawn_with_guidance(opponent, guidance, alpha_bar)
    response = best_response(any_function, opponent, data, opponent, drawn)
    change = integral(data[0] * (response - opponent).abs()).item()
    shift = (best_mean(mean, guidance, alpha_bar) - mean).item()
    if drawn_mean == 1:
        assert change < 1e-9
        assert abs(shift) < 1e-9
    else:
        assert change > 1e-2
        assert shift > 1e-2 if drawn_mean < 1 else shift < -1e-2


@pytest.mark.parametrize("alpha_bar", ALPHA_BARS)
@pytest.mark.parametrize("guidance", [None, 7.5], ids=["full steps", "guidance 7.5"])
@pytest.mark.parametrize("product", [1.9, 2.1, 3.9, 4.1])
def test_it_overshoots_where_share_times_guidance_exceeds_2_and_diverges_beyond_4(
    product, guidance, alpha_bar
):
    """share: how far of the way to its best response the player goes in one iteration.

    That multiplies its distance to the fixed point by 1 - share guidance / 2, exactly: here a mean
    is all that a player has. One with a variance, too, obeys this only near the fixed point, and in
    the long run.
    """
    if guidance is None:
        guidance = product
    share = product / guidance
    mean = torch.tensor([0.5 / guidance], dtype=torch.float64)
    gaps = [mean - 1 / guidance]
    for _ in range(4):
        mean = mean + share * (best_mean(mean, guidance, alpha_bar) - mean)
        gaps.append(mean - 1 / guidance)
    gaps = torch.cat(gaps)
    factors = gaps[1:] / gaps[:-1]
    assert (factors < 0).tolist() == [product > 2] * 4
    assert (factors.abs() > 1).tolist() == [product > 4] * 4
    expected = torch.full_like(factors, 1 - product / 2)
    torch.testing.assert_close(factors, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("share, settles", [(1.0, False), (0.4, False), (0.2, True)])
def test_a_player_that_is_any_function_may_need_smaller_steps(share, settles):
    """Share 0.4 of guidance 7.5 is a product of 3, and yet from here the images do not settle.

    Where drawn images far outnumber real ones, the best response is the mirrored prediction. There
    an iteration multiplies what the prompt adds to the prediction by 1 - share (guidance - 1):
    -1.6 for this share.
    """
    alpha_bar = 0.9
    guidance = 7.5
    data = noised([(1.0, 1.0, VARIANCE)], alpha_bar)
    prediction = normal_player(1.3 / guidance, alpha_bar)
    distances = []
    for _ in range(14):
        drawn = drawn_with_guidance(prediction, guidance, alpha_bar)
        distances.append(distance(drawn[0], data[0]))
        response = best_response(any_function, prediction, data, prediction, drawn)
        prediction = prediction + share * (response - prediction)
    if settles:
        assert distances[-1] < 0.01 * distances[0]
    else:
        assert min(distances[-4:]) > distances[0]


# -----------------------------------------------------------------------------
# Theorem 5.3: self-play stops where the opponent's images cannot be told from the data

ALPHAS_CUMPROD = Scheduler(SCHEDULER).alphas_cumprod.double()

# mean and variance
REAL = (0.7, 0.67)
OTHER_MEAN = (0.9, 0.67)
OTHER_VARIANCE = (0.7, 1.22)


@pytest.mark.parametrize("noise", ["shared", "independent"])
@pytest.mark.parametrize(
    "theta_k, images, are_the_data",
    [
        (REAL, REAL, True),
        (OTHER_MEAN, REAL, True),
        (OTHER_MEAN, OTHER_MEAN, False),
        (OTHER_VARIANCE, OTHER_VARIANCE, False),
        (REAL, OTHER_MEAN, False),
    ],
    ids=["the data", "bent to the data", "another mean", "another variance", "bent from the data"],
)
def test_the_expected_gradient_at_theta_k_is_zero_only_if_its_images_are_the_data(
    theta_k, images, are_the_data, noise
):
    """Monte Carlo over 40,000 pairs: both components within 4.5 standard errors of 0, or not.

    theta_k: the Gaussian that the opponent denoises best. Its images are others where the sampler
    bends them, and the images decide.
    """
    count = 40_000
    generator = torch.Generator().manual_seed(5)
    normals = torch.randn(4, count, 1, generator=generator, dtype=torch.float64)
    t = torch.randint(1000, (count, 1), generator=generator)
    alpha_bar = ALPHAS_CUMPROD[t]
    x0_data = REAL[0] + REAL[1] ** 0.5 * normals[0]
    x0_gen = images[0] + images[1] ** 0.5 * normals[1]
    eps_gen = normals[3] if noise == "independent" else normals[2]
    eps = torch.stack([normals[2], eps_gen])
    x_t = alpha_bar.sqrt() * torch.stack([x0_data, x0_gen]) + (1 - alpha_bar).sqrt() * eps

    opponent = gaussian_eps(x_t, *theta_k, alpha_bar)
    theta = torch.tensor(theta_k, dtype=torch.float64).repeat(count, 1)
    theta.requires_grad_()  # a copy a pair, for the gradient of each
    policy = gaussian_eps(x_t, theta[:, :1], theta[:, 1:], alpha_bar)
    bounded(policy, opponent, eps, beta=20.0).sum().backward()

    standard_error = theta.grad.std(dim=0) / count**0.5
    scores = theta.grad.mean(dim=0) / standard_error
    is_zero = bool((scores.abs() < 4.5).all())
    assert is_zero == are_the_data, scores
