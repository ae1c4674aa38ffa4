"""Specification of spin/loss.py: one section for each loss.

Errors are random and no two are alike, so that no test stands at theta = theta_k unless it says so:
there every sign, every beta and every reduction gives log 2.
"""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from spin.loss import (
    LINKS,
    dpo_loss,
    per_image_error,
    sft_loss,
    spin_exact_loss,
    spin_loss,
    spin_trajectory_loss,
)

B = 5  # images in a batch
T = 7  # timesteps, where a loss takes errors at several

seeds = st.integers(0, 2**32 - 1)
betas = st.floats(1.0, 5000.0)
links = st.sampled_from(sorted(LINKS))

AT_ZERO = {"logistic": math.log(2), "hinge": 1.0, "correlation": 1.0}


def random_errors(seed: int, count: int, shape: tuple[int, ...] = (B,)) -> list[Tensor]:
    """Return `count` float64 tensors of this shape, uniform in [0, 0.05]."""
    generator = torch.Generator().manual_seed(seed)
    errors = 0.05 * torch.rand(count, *shape, generator=generator, dtype=torch.float64)
    return list(errors.unbind())


def trainable_errors(seed: int, count: int, shape: tuple[int, ...] = (B,)) -> list[Tensor]:
    """Return `random_errors` as leaves that collect gradients."""
    return [error.requires_grad_() for error in random_errors(seed, count, shape)]


def link_value(link: str, t: Tensor) -> Tensor:
    """Return l(t), from section 4 of the paper."""
    if link == "logistic":
        return torch.logaddexp(torch.zeros_like(t), -t)  # log(1 + exp(-t))
    if link == "hinge":
        return (1 - t).clamp(min=0)
    return 1 - t


def link_slope(link: str, t: Tensor) -> Tensor:
    """Return -l'(t)."""
    if link == "logistic":
        return 1 / (1 + t.exp())
    if link == "hinge":
        return (t < 1).to(t.dtype)
    return torch.ones_like(t)


def assume_off_the_kink(link: str, logit: Tensor) -> None:
    """Skip draws where the hinge has no derivative."""
    if link == "hinge":
        assume((logit - 1).abs().min() > 1e-3)


def one_row(tensors: list[Tensor], row: int) -> list[Tensor]:
    return [tensor[row : row + 1] for tensor in tensors]


def clones(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def assert_unchanged(tensors: list[Tensor], before: list[Tensor]) -> None:
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)


def assert_equals_row(
    single: tuple[Tensor, dict[str, Tensor]], batch: tuple[Tensor, dict[str, Tensor]], row: int
) -> None:
    """Check that the losses and metrics of a batch of one are those of `row` of a larger batch."""
    single_losses, single_metrics = single
    batch_losses, batch_metrics = batch
    torch.testing.assert_close(single_losses[0], batch_losses[row], rtol=1e-12, atol=1e-12)
    assert single_metrics.keys() == batch_metrics.keys()
    for name, values in batch_metrics.items():
        torch.testing.assert_close(single_metrics[name][0], values[row], rtol=1e-12, atol=1e-15)


# -----------------------------------------------------------------------------
# per_image_error


@given(seeds, st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
def test_per_image_error_is_the_mean_over_all_dimensions_of_an_image(seed, batch, height, width):
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randn(batch, 4, height, width, generator=generator)
    target = torch.randn(batch, 4, height, width, generator=generator)
    squares = (prediction.double() - target.double()) ** 2
    expected = squares.mean(dim=(1, 2, 3)).float()
    torch.testing.assert_close(per_image_error(prediction, target), expected, rtol=1e-5, atol=1e-6)


@given(seeds, st.integers(2, 3))
def test_per_image_error_is_a_mean_and_not_a_sum(seed, times):
    """An image tiled twice has the error of one tile."""
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randn(B, 3, 4, 6, generator=generator)
    target = torch.randn(B, 3, 4, 6, generator=generator)
    tiled_prediction = prediction.repeat(1, 1, times, times)
    tiled_target = target.repeat(1, 1, times, times)
    tiled_error = per_image_error(tiled_prediction, tiled_target)
    torch.testing.assert_close(
        tiled_error, per_image_error(prediction, target), rtol=1e-5, atol=1e-6
    )


def test_per_image_error_casts_before_it_subtracts():
    """In bfloat16, 1 - 2^-10 rounds to 1. The loss multiplies such roundings by thousands."""
    prediction = torch.full((1, 8), 1.0, dtype=torch.bfloat16)
    target = torch.full((1, 8), 2.0**-10, dtype=torch.bfloat16)
    error = per_image_error(prediction, target)
    assert error.dtype == torch.float32
    assert error.item() == (1 - 2.0**-10) ** 2


@given(seeds)
def test_rounded_predictions_move_errors_and_losses_by_no_more_than_their_rounding(seed):
    """bfloat16 rounds a prediction p to p (1 + d), |d| <= 2^-8; all else stays float32.

    So an error moves by at most b = mean(2 |p - target| |p d| + (p d)^2), and the logistic loss,
    whose slope is at most 1, by at most beta/2 b.
    """
    beta = 20.0
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randn(B, 4, 8, 8, generator=generator)
    target = torch.randn(B, 4, 8, 8, generator=generator)
    rounding = prediction.abs() * 2**-8
    shift = 2 * (prediction - target).abs() * rounding + rounding**2
    bound = shift.mean(dim=(1, 2, 3)) + 1e-6

    error = per_image_error(prediction, target)
    rounded_error = per_image_error(prediction.bfloat16(), target)
    change = (rounded_error - error).abs()
    assert (change <= bound).all()
    assert (change < 2e-3).all()  # of errors of about 2
    assert (change > 0).any()

    err_gen, opp_err_data, opp_err_gen = [e.float() for e in random_errors(seed, 3)]
    losses, _ = spin_loss(error, err_gen, opp_err_data, opp_err_gen, beta)
    rounded_losses, _ = spin_loss(rounded_error, err_gen, opp_err_data, opp_err_gen, beta)
    assert ((rounded_losses - losses).abs() <= beta / 2 * bound + 1e-5).all()


@given(seeds)
def test_per_image_error_leaves_its_inputs_unchanged(seed):
    prediction, target = random_errors(seed, 2, (B, 4, 2, 2))
    before = clones([prediction, target])
    per_image_error(prediction, target)
    assert_unchanged([prediction, target], before)


# -----------------------------------------------------------------------------
# spin_loss, equation (C.6)


@given(seeds, betas, links)
def test_spin_loss_is_equation_c6(seed, beta, link):
    """l(-beta/2 [(|e - e_theta(x_t)|^2 - |e - e_k(x_t)|^2)
                 - (|e - e_theta(x'_t)|^2 - |e - e_k(x'_t)|^2)])
    """
    err_data, err_gen, opp_err_data, opp_err_gen = random_errors(seed, 4)
    losses, metrics = spin_loss(err_data, err_gen, opp_err_data, opp_err_gen, beta, link)

    bracket = (err_data - opp_err_data) - (err_gen - opp_err_gen)
    expected = link_value(link, -(beta / 2) * bracket)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(metrics["delta_data"], err_data - opp_err_data, rtol=1e-12, atol=0)
    torch.testing.assert_close(metrics["delta_gen"], err_gen - opp_err_gen, rtol=1e-12, atol=0)
    torch.testing.assert_close(metrics["margin"], -bracket, rtol=1e-9, atol=1e-15)
    assert torch.equal(metrics["implicit_accuracy"], (bracket < 0).double())


@given(seeds, betas, links)
def test_at_theta_k_spin_loss_is_l_of_0(seed, beta, link):
    err_data, err_gen = random_errors(seed, 2)
    losses, metrics = spin_loss(err_data, err_gen, err_data, err_gen, beta, link)
    expected = torch.full((B,), AT_ZERO[link], dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-15)
    assert metrics["margin"].tolist() == [0.0] * B
    assert metrics["implicit_accuracy"].tolist() == [0.5] * B


@given(seeds, betas, links)
def test_swapping_real_and_generated_negates_the_margin(seed, beta, link):
    err_data, err_gen, opp_err_data, opp_err_gen = random_errors(seed, 4)
    _, metrics = spin_loss(err_data, err_gen, opp_err_data, opp_err_gen, beta, link)
    _, swapped = spin_loss(err_gen, err_data, opp_err_gen, opp_err_data, beta, link)
    torch.testing.assert_close(swapped["margin"], -metrics["margin"], rtol=1e-12, atol=1e-15)
    assert torch.equal(swapped["implicit_accuracy"], 1 - metrics["implicit_accuracy"])


@given(seeds, betas)
def test_swapping_real_and_generated_adds_the_logit_to_the_logistic_loss(seed, beta):
    """log(1 + exp(t)) - log(1 + exp(-t)) = t."""
    err_data, err_gen, opp_err_data, opp_err_gen = random_errors(seed, 4)
    losses, metrics = spin_loss(err_data, err_gen, opp_err_data, opp_err_gen, beta)
    swapped_losses, _ = spin_loss(err_gen, err_data, opp_err_gen, opp_err_data, beta)
    logit = 0.5 * beta * metrics["margin"]
    torch.testing.assert_close(swapped_losses - losses, logit, rtol=1e-9, atol=1e-10)


@given(seeds, betas, links, st.floats(0.01, 100))
def test_only_the_product_of_beta_and_errors_counts_in_spin_loss(seed, beta, link, scale):
    """Errors summed over D dimensions, with beta / D, give the loss of their means with beta."""
    errors = random_errors(seed, 4)
    scaled_errors = [scale * error for error in errors]
    losses, _ = spin_loss(*errors, beta, link)
    scaled_losses, _ = spin_loss(*scaled_errors, beta / scale, link)
    torch.testing.assert_close(scaled_losses, losses, rtol=1e-9, atol=1e-9)


@given(seeds, betas, links)
def test_beta_is_a_float_or_a_0d_tensor(seed, beta, link):
    errors = random_errors(seed, 4)
    losses, _ = spin_loss(*errors, beta, link)
    same_losses, _ = spin_loss(*errors, torch.tensor(beta, dtype=torch.float64), link)
    assert torch.equal(same_losses, losses)


@given(seeds, betas, links, st.integers(0, B - 1))
def test_each_row_of_spin_loss_depends_on_its_own_errors_alone(seed, beta, link, row):
    errors = random_errors(seed, 4)
    batch = spin_loss(*errors, beta, link)
    single = spin_loss(*one_row(errors, row), beta, link)
    assert_equals_row(single, batch, row)


@given(seeds, betas, links)
def test_the_gradient_of_spin_loss_is_its_closed_form(seed, beta, link):
    """-l'(logit) beta/2 pulls the error on real images down and pushes the other up."""
    err_data, err_gen, opp_err_data, opp_err_gen = trainable_errors(seed, 4)
    losses, metrics = spin_loss(err_data, err_gen, opp_err_data, opp_err_gen, beta, link)
    logit = 0.5 * beta * metrics["margin"]
    assume_off_the_kink(link, logit)
    losses.sum().backward()
    expected = 0.5 * beta * link_slope(link, logit)
    torch.testing.assert_close(err_data.grad, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(err_gen.grad, -expected, rtol=1e-7, atol=1e-9)
    assert opp_err_data.grad is None
    assert opp_err_gen.grad is None


@given(seeds, betas, links)
def test_the_gradient_of_spin_loss_is_the_finite_difference(seed, beta, link):
    err_data, err_gen, opp_err_data, opp_err_gen = random_errors(seed, 4)
    _, metrics = spin_loss(err_data, err_gen, opp_err_data, opp_err_gen, beta, link)
    assume_off_the_kink(link, 0.5 * beta * metrics["margin"])

    def losses(err_data: Tensor, err_gen: Tensor) -> Tensor:
        return spin_loss(err_data, err_gen, opp_err_data, opp_err_gen, beta, link)[0]

    policy_errors = (err_data.requires_grad_(), err_gen.requires_grad_())
    assert gradcheck(losses, policy_errors, eps=1e-4 / beta, rtol=1e-5, atol=1e-5 * beta)


@given(seeds, betas, links)
def test_spin_loss_leaves_its_inputs_unchanged_and_its_metrics_carry_no_gradient(seed, beta, link):
    errors = trainable_errors(seed, 4)
    before = clones(errors)
    _, metrics = spin_loss(*errors, beta, link)
    assert_unchanged(errors, before)
    for metric in metrics.values():
        assert not metric.requires_grad


@given(links, st.floats(-1e6, 1e6, width=32))
def test_spin_loss_is_finite_for_huge_margins(link, margin):
    """In float32, and its gradient too. With beta = 2 the logit is the margin."""
    zero = torch.zeros(1)
    err_data = torch.zeros(1, requires_grad=True)
    losses, _ = spin_loss(err_data, torch.tensor([margin]), zero, zero, 2.0, link)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert err_data.grad.isfinite().all()
    expected = link_value(link, torch.tensor([margin], dtype=torch.float64)).float()
    torch.testing.assert_close(losses.detach(), expected, rtol=1e-6, atol=1e-6)


def test_an_unknown_link_is_refused():
    with pytest.raises((KeyError, ValueError), match="exponential"):
        spin_loss(*random_errors(0, 4), 1.0, "exponential")


# -----------------------------------------------------------------------------
# spin_trajectory_loss, equation (C.5)


@given(seeds, betas, links)
def test_spin_trajectory_loss_is_equation_c5(seed, beta, link):
    """l(-beta/2 [|e-e_theta(x_t)|^2 - |e-e_k(x_t)|^2 - |e_k(x'_t)-e_theta(x'_t)|^2])"""
    err_data, gap_gen, opp_err_data = random_errors(seed, 3)
    losses, metrics = spin_trajectory_loss(err_data, gap_gen, opp_err_data, beta, link)

    bracket = err_data - opp_err_data - gap_gen
    expected = link_value(link, -(beta / 2) * bracket)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(metrics["delta_data"], err_data - opp_err_data, rtol=1e-12, atol=0)
    torch.testing.assert_close(metrics["delta_gen"], gap_gen, rtol=1e-12, atol=0)
    torch.testing.assert_close(metrics["margin"], -bracket, rtol=1e-9, atol=1e-15)
    assert torch.equal(metrics["implicit_accuracy"], (bracket < 0).double())


@given(seeds, betas, links)
def test_at_theta_k_spin_trajectory_loss_is_l_of_0(seed, beta, link):
    """There the policy predicts what the opponent predicts: the gap is zero."""
    [err_data] = random_errors(seed, 1)
    no_gap = torch.zeros(B, dtype=torch.float64)
    losses, metrics = spin_trajectory_loss(err_data, no_gap, err_data, beta, link)
    expected = torch.full((B,), AT_ZERO[link], dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-15)
    assert metrics["margin"].tolist() == [0.0] * B
    assert metrics["implicit_accuracy"].tolist() == [0.5] * B


@given(seeds, betas, links, st.floats(0.01, 100))
def test_only_the_product_of_beta_and_errors_counts_in_spin_trajectory_loss(
    seed, beta, link, scale
):
    errors = random_errors(seed, 3)
    scaled_errors = [scale * error for error in errors]
    losses, _ = spin_trajectory_loss(*errors, beta, link)
    scaled_losses, _ = spin_trajectory_loss(*scaled_errors, beta / scale, link)
    torch.testing.assert_close(scaled_losses, losses, rtol=1e-9, atol=1e-9)
    same_losses, _ = spin_trajectory_loss(*errors, torch.tensor(beta, dtype=torch.float64), link)
    assert torch.equal(same_losses, losses)


@given(seeds, betas, links, st.integers(0, B - 1))
def test_each_row_of_spin_trajectory_loss_depends_on_its_own_errors_alone(seed, beta, link, row):
    errors = random_errors(seed, 3)
    batch = spin_trajectory_loss(*errors, beta, link)
    single = spin_trajectory_loss(*one_row(errors, row), beta, link)
    assert_equals_row(single, batch, row)


@given(seeds, betas, links)
def test_the_gradient_of_spin_trajectory_loss_is_its_closed_form(seed, beta, link):
    """It lowers the error on real images and widens the gap on generated ones."""
    err_data, gap_gen, opp_err_data = trainable_errors(seed, 3)
    losses, metrics = spin_trajectory_loss(err_data, gap_gen, opp_err_data, beta, link)
    logit = 0.5 * beta * metrics["margin"]
    assume_off_the_kink(link, logit)
    losses.sum().backward()
    expected = 0.5 * beta * link_slope(link, logit)
    torch.testing.assert_close(err_data.grad, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(gap_gen.grad, -expected, rtol=1e-7, atol=1e-9)
    assert opp_err_data.grad is None


@given(seeds, betas, links)
def test_the_gradient_of_spin_trajectory_loss_is_the_finite_difference(seed, beta, link):
    err_data, gap_gen, opp_err_data = random_errors(seed, 3)
    _, metrics = spin_trajectory_loss(err_data, gap_gen, opp_err_data, beta, link)
    assume_off_the_kink(link, 0.5 * beta * metrics["margin"])

    def losses(err_data: Tensor, gap_gen: Tensor) -> Tensor:
        return spin_trajectory_loss(err_data, gap_gen, opp_err_data, beta, link)[0]

    policy_errors = (err_data.requires_grad_(), gap_gen.requires_grad_())
    assert gradcheck(losses, policy_errors, eps=1e-4 / beta, rtol=1e-5, atol=1e-5 * beta)


@given(seeds, betas, links)
def test_spin_trajectory_loss_leaves_its_inputs_unchanged_and_its_metrics_carry_no_gradient(
    seed, beta, link
):
    errors = trainable_errors(seed, 3)
    before = clones(errors)
    _, metrics = spin_trajectory_loss(*errors, beta, link)
    assert_unchanged(errors, before)
    for metric in metrics.values():
        assert not metric.requires_grad


# -----------------------------------------------------------------------------
# spin_exact_loss, equation (4.8), and Lemma 4.1


@given(seeds, betas, links)
def test_spin_exact_loss_is_equation_4_8(seed, beta, link):
    """l(- sum over t of beta/(2T) [...]): all timesteps of an image inside one link."""
    err_data, err_gen, opp_err_data, opp_err_gen = random_errors(seed, 4, (B, T))
    losses, metrics = spin_exact_loss(err_data, err_gen, opp_err_data, opp_err_gen, beta, link)

    logit = torch.zeros(B, dtype=torch.float64)
    for t in range(T):
        bracket = err_data[:, t] - opp_err_data[:, t] - err_gen[:, t] + opp_err_gen[:, t]
        logit = logit - beta / (2 * T) * bracket
    torch.testing.assert_close(losses, link_value(link, logit), rtol=1e-10, atol=1e-11)

    delta_data = (err_data - opp_err_data).mean(dim=1)
    delta_gen = (err_gen - opp_err_gen).mean(dim=1)
    torch.testing.assert_close(metrics["delta_data"], delta_data, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(metrics["delta_gen"], delta_gen, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(metrics["margin"], delta_gen - delta_data, rtol=1e-9, atol=1e-15)
    assert torch.equal(metrics["implicit_accuracy"], (delta_gen > delta_data).double())


@given(seeds, betas, links)
def test_at_theta_k_spin_exact_loss_is_l_of_0(seed, beta, link):
    err_data, err_gen = random_errors(seed, 2, (B, T))
    losses, metrics = spin_exact_loss(err_data, err_gen, err_data, err_gen, beta, link)
    expected = torch.full((B,), AT_ZERO[link], dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-15)
    assert metrics["margin"].tolist() == [0.0] * B
    assert metrics["implicit_accuracy"].tolist() == [0.5] * B


@given(seeds, betas)
def test_swapping_real_and_generated_in_spin_exact_loss_negates_the_logit(seed, beta):
    err_data, err_gen, opp_err_data, opp_err_gen = random_errors(seed, 4, (B, T))
    losses, metrics = spin_exact_loss(err_data, err_gen, opp_err_data, opp_err_gen, beta)
    swapped_losses, swapped = spin_exact_loss(err_gen, err_data, opp_err_gen, opp_err_data, beta)
    torch.testing.assert_close(swapped["margin"], -metrics["margin"], rtol=1e-9, atol=1e-15)
    assert torch.equal(swapped["implicit_accuracy"], 1 - metrics["implicit_accuracy"])
    logit = 0.5 * beta * metrics["margin"]
    torch.testing.assert_close(swapped_losses - losses, logit, rtol=1e-9, atol=1e-10)


@given(seeds, betas, links, st.floats(0.01, 100))
def test_only_the_product_of_beta_and_errors_counts_in_spin_exact_loss(seed, beta, link, scale):
    errors = random_errors(seed, 4, (B, T))
    scaled_errors = [scale * error for error in errors]
    losses, _ = spin_exact_loss(*errors, beta, link)
    scaled_losses, _ = spin_exact_loss(*scaled_errors, beta / scale, link)
    torch.testing.assert_close(scaled_losses, losses, rtol=1e-9, atol=1e-9)
    same_losses, _ = spin_exact_loss(*errors, torch.tensor(beta, dtype=torch.float64), link)
    assert torch.equal(same_losses, losses)


@given(seeds, betas, links, st.integers(0, B - 1))
def test_each_row_of_spin_exact_loss_depends_on_its_own_errors_alone(seed, beta, link, row):
    errors = random_errors(seed, 4, (B, T))
    batch = spin_exact_loss(*errors, beta, link)
    single = spin_exact_loss(*one_row(errors, row), beta, link)
    assert_equals_row(single, batch, row)


@given(seeds, betas, links)
def test_the_gradient_of_spin_exact_loss_is_shared_by_all_timesteps(seed, beta, link):
    err_data, err_gen, opp_err_data, opp_err_gen = trainable_errors(seed, 4, (B, T))
    losses, metrics = spin_exact_loss(err_data, err_gen, opp_err_data, opp_err_gen, beta, link)
    logit = 0.5 * beta * metrics["margin"]
    assume_off_the_kink(link, logit)
    losses.sum().backward()
    per_timestep = 0.5 * beta * link_slope(link, logit) / T
    expected = per_timestep[:, None].expand(B, T)
    torch.testing.assert_close(err_data.grad, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(err_gen.grad, -expected, rtol=1e-7, atol=1e-9)
    assert opp_err_data.grad is None
    assert opp_err_gen.grad is None


@given(seeds, betas, links)
def test_the_gradient_of_spin_exact_loss_is_the_finite_difference(seed, beta, link):
    err_data, err_gen, opp_err_data, opp_err_gen = random_errors(seed, 4, (2, 3))
    _, metrics = spin_exact_loss(err_data, err_gen, opp_err_data, opp_err_gen, beta, link)
    assume_off_the_kink(link, 0.5 * beta * metrics["margin"])

    def losses(err_data: Tensor, err_gen: Tensor) -> Tensor:
        return spin_exact_loss(err_data, err_gen, opp_err_data, opp_err_gen, beta, link)[0]

    policy_errors = (err_data.requires_grad_(), err_gen.requires_grad_())
    assert gradcheck(losses, policy_errors, eps=1e-4 / beta, rtol=1e-5, atol=1e-5 * beta)


@given(seeds, betas, links)
def test_spin_exact_loss_leaves_its_inputs_unchanged_and_its_metrics_carry_no_gradient(
    seed, beta, link
):
    errors = trainable_errors(seed, 4, (B, T))
    before = clones(errors)
    _, metrics = spin_exact_loss(*errors, beta, link)
    assert_unchanged(errors, before)
    for metric in metrics.values():
        assert not metric.requires_grad


@given(seeds, betas, links, st.integers(1, 20))
def test_lemma_4_1_the_exact_loss_is_at_most_the_mean_over_timesteps(seed, beta, link, timesteps):
    """Jensen's inequality; with the linear link, an equality."""
    errors = random_errors(seed, 4, (B, timesteps))
    flat_errors = [error.flatten() for error in errors]
    exact, _ = spin_exact_loss(*errors, beta, link)
    each_timestep, _ = spin_loss(*flat_errors, beta, link)
    approximate = each_timestep.reshape(B, timesteps).mean(dim=1)
    assert (exact <= approximate + 1e-9).all()
    if link == "correlation":
        torch.testing.assert_close(exact, approximate, rtol=1e-9, atol=1e-9)


def test_exact_and_approximate_loss_differ_where_timesteps_disagree():
    """Logits of 10 and -10 cancel inside the link, and outside cost (0 + 10) / 2."""
    zero = torch.zeros(1, 2)
    err_gen = torch.tensor([[0.01, -0.01]])
    exact, _ = spin_exact_loss(zero, err_gen, zero, zero, beta=2000.0)
    each_timestep, _ = spin_loss(zero[0], err_gen[0], zero[0], zero[0], beta=2000.0)
    assert exact.item() == pytest.approx(math.log(2), abs=1e-6)
    assert each_timestep.mean().item() == pytest.approx(5.0, abs=1e-3)


# -----------------------------------------------------------------------------
# dpo_loss, arXiv 2311.12908


@given(seeds, betas)
def test_dpo_loss_is_the_published_formula(seed, beta):
    """-log sigmoid(-beta/2 [(win - reference win) - (lose - reference lose)])"""
    err_win, err_lose, ref_err_win, ref_err_lose = random_errors(seed, 4)
    losses, metrics = dpo_loss(err_win, err_lose, ref_err_win, ref_err_lose, beta)

    win_difference = err_win - ref_err_win
    lose_difference = err_lose - ref_err_lose
    logit = -0.5 * beta * (win_difference - lose_difference)
    expected = -torch.log(1 / (1 + torch.exp(-logit)))
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(metrics["delta_data"], win_difference, rtol=1e-12, atol=0)
    torch.testing.assert_close(metrics["delta_gen"], lose_difference, rtol=1e-12, atol=0)


@given(seeds, betas)
def test_the_gradient_of_dpo_loss_prefers_the_winner_and_spares_the_reference(seed, beta):
    err_win, err_lose, ref_err_win, ref_err_lose = trainable_errors(seed, 4)
    before = clones([err_win, err_lose, ref_err_win, ref_err_lose])
    losses, _ = dpo_loss(err_win, err_lose, ref_err_win, ref_err_lose, beta)
    losses.sum().backward()
    assert (err_win.grad >= 0).all()  # a descent step lowers the winner's error
    torch.testing.assert_close(err_lose.grad, -err_win.grad, rtol=1e-12, atol=0)
    assert ref_err_win.grad is None
    assert ref_err_lose.grad is None
    assert_unchanged([err_win, err_lose, ref_err_win, ref_err_lose], before)


# -----------------------------------------------------------------------------
# sft_loss, equation (3.3) with gamma_t = 1


@given(seeds)
def test_sft_loss_is_the_error_on_the_real_image(seed):
    [err_data] = random_errors(seed, 1)
    before = err_data.clone()
    losses, metrics = sft_loss(err_data)
    assert torch.equal(losses, before)
    assert torch.equal(err_data, before)
    assert metrics == {}
