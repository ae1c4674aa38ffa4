"""The objectives' mathematics, at points away from theta = theta_k, where every sign, beta and reduction gives log 2.

What networks and noise schedules add to it is in test_theorems.py.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from spin.loss import LINKS, dpo_loss, per_image_error, sft_loss, spin_exact_loss, spin_loss, spin_trajectory_loss

seeds = st.integers(0, 2**32 - 1)
betas = st.floats(1.0, 5000.0)
links = st.sampled_from(sorted(LINKS))
AT_ZERO = {"logistic": math.log(2), "hinge": 1.0, "correlation": 1.0}
GAMES = {"spin": (spin_loss, 4), "trajectory": (spin_trajectory_loss, 3), "exact": (spin_exact_loss, 4)}
games = st.sampled_from(sorted(GAMES))


def errors(seed: int, *shape: int, count: int = 4) -> list[torch.Tensor]:
    """err_data, err_gen, opp_err_data, opp_err_gen [5], or count others: some hundredths, and no two alike."""
    generator = torch.Generator().manual_seed(seed)
    return list(0.05 * torch.rand(count, *(shape or (5,)), generator=generator, dtype=torch.float64))


def inputs(game: str, seed: int) -> list[torch.Tensor]:
    """Errors of the shape that a loss takes: [5], or [5,7] with timesteps."""
    return errors(seed, *((5, 7) if game == "exact" else (5,)), count=GAMES[game][1])


def numpy_link(link: str, t: np.ndarray) -> np.ndarray:
    return {"logistic": np.logaddexp(0, -t), "hinge": np.maximum(0, 1 - t), "correlation": 1 - t}[link]


def slope(link: str, t: torch.Tensor) -> torch.Tensor:
    """-l'(t)."""
    return {"logistic": torch.sigmoid(-t), "hinge": (t < 1).to(t.dtype), "correlation": torch.ones_like(t)}[link]


# ---------------------------------------------------------------------------------------------------------------------
# what they are


@given(seeds, betas, links)
def test_equals_the_formula_written_out_in_numpy(seed, beta, link):
    """(C.6): l(-beta/2 [(|e-e_theta(x_t)|^2 - |e-e_k(x_t)|^2) - (|e-e_theta(x'_t)|^2 - |e-e_k(x'_t)|^2)])."""
    err_data, err_gen, opp_data, opp_gen = (e.numpy() for e in errors(seed))
    expected = numpy_link(link, -(beta / 2) * ((err_data - opp_data) - (err_gen - opp_gen)))
    losses, metrics = spin_loss(*errors(seed), beta, link)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(metrics["delta_data"].numpy(), err_data - opp_data, rtol=1e-12)
    np.testing.assert_allclose(metrics["delta_gen"].numpy(), err_gen - opp_gen, rtol=1e-12)
    margin = (err_gen - opp_gen) - (err_data - opp_data)
    np.testing.assert_allclose(metrics["margin"].numpy(), margin, rtol=1e-9)
    assert metrics["implicit_accuracy"].tolist() == (margin > 0).astype(float).tolist()


@given(seeds, betas, links)
def test_the_trajectory_loss_is_the_formula(seed, beta, link):
    """(C.5): l(-beta/2 [|e-e_theta(x_t)|^2 - |e-e_k(x_t)|^2 - |e_k(x'_t)-e_theta(x'_t)|^2])."""
    err_data, gap_gen, opp_data = (e.numpy() for e in errors(seed, count=3))
    expected = numpy_link(link, -(beta / 2) * (err_data - opp_data - gap_gen))
    losses, metrics = spin_trajectory_loss(*errors(seed, count=3), beta, link)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(metrics["delta_gen"].numpy(), gap_gen)
    np.testing.assert_allclose(metrics["margin"].numpy(), gap_gen - err_data + opp_data, rtol=1e-9)


@given(seeds, betas, links)
def test_the_exact_loss_is_the_formula(seed, beta, link):
    """(4.8): l(-sum over t of beta/(2T) [...]), all timesteps of an image inside one link."""
    err_data, err_gen, opp_data, opp_gen = (e.numpy() for e in errors(seed, 5, 7))
    expected = [
        numpy_link(link, -sum(beta / (2 * 7) * (a - b - c + d) for a, b, c, d in zip(*rows)))
        for rows in zip(err_data, opp_data, err_gen, opp_gen)
    ]
    losses, metrics = spin_exact_loss(*errors(seed, 5, 7), beta, link)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-10, atol=1e-12)
    assert losses.shape == metrics["margin"].shape == (5,)
    np.testing.assert_allclose(metrics["delta_data"].numpy(), (err_data - opp_data).mean(1), rtol=1e-9)


@given(seeds, betas)
def test_dpo_is_the_published_formula(seed, beta):
    win, lose, ref_win, ref_lose = (e.numpy() for e in errors(seed))
    expected = np.logaddexp(0, 0.5 * beta * ((win - lose) - (ref_win - ref_lose)))  # -log s(-0.5 beta (D_w - D_l))
    losses, metrics = dpo_loss(*errors(seed), beta)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(metrics["delta_data"].numpy(), win - ref_win, rtol=1e-12)


@given(seeds)
def test_sft_is_the_error_itself(seed):
    err_data = errors(seed)[0]
    losses, metrics = sft_loss(err_data)
    assert torch.equal(losses, err_data) and metrics == {}


def test_an_unknown_link():
    with pytest.raises(KeyError):
        spin_loss(*errors(0), 1.0, "exponential")


# ---------------------------------------------------------------------------------------------------------------------
# symmetries


@given(games, seeds, betas, links)
def test_at_theta_k_the_loss_is_l_of_0(game, seed, beta, link):
    loss, count = GAMES[game]
    err_data, err_gen = inputs(game, seed)[:2]
    at_theta_k = (err_data, err_gen, err_data, err_gen) if count == 4 else (err_data, 0 * err_gen, err_data)
    losses, metrics = loss(*at_theta_k, beta, link)
    assert losses.tolist() == pytest.approx([AT_ZERO[link]] * 5, abs=1e-15)
    assert metrics["margin"].tolist() == [0] * 5 and metrics["implicit_accuracy"].tolist() == [0.5] * 5


@given(seeds, betas, st.sampled_from([spin_loss, spin_exact_loss]))
def test_swapping_real_and_generated_flips_the_margin(seed, beta, loss):
    err_data, err_gen, opp_data, opp_gen = errors(seed, 5, 7) if loss is spin_exact_loss else errors(seed)
    forth, there = loss(err_data, err_gen, opp_data, opp_gen, beta)
    back, again = loss(err_gen, err_data, opp_gen, opp_data, beta)
    torch.testing.assert_close(again["margin"], -there["margin"])
    torch.testing.assert_close(forth - back, -0.5 * beta * there["margin"], atol=1e-10, rtol=1e-9)  # logistic
    assert torch.equal(again["implicit_accuracy"], 1 - there["implicit_accuracy"])


@given(games, seeds, betas, links, st.floats(0.01, 100))
def test_beta_and_errors_enter_through_their_product(game, seed, beta, link, scale):
    """So errors summed over D dimensions with beta / D are the same loss as their means with beta."""
    loss, _ = GAMES[game]
    losses, _ = loss(*inputs(game, seed), beta, link)
    scaled, _ = loss(*(scale * e for e in inputs(game, seed)), beta / scale, link)
    torch.testing.assert_close(scaled, losses, atol=1e-9, rtol=1e-9)
    tensor, _ = loss(*inputs(game, seed), torch.tensor(beta, dtype=torch.float64), link)
    assert torch.equal(tensor, losses)


@given(games, seeds, betas, links)
def test_a_row_is_a_loss_of_its_own_wherever_it_stands(game, seed, beta, link):
    """So a batch's loss is the mean over its rows, in any order."""
    loss, _ = GAMES[game]
    together, metrics = loss(*inputs(game, seed), beta, link)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    for place, row in enumerate(order.tolist()):
        alone, of_row = loss(*(e[row : row + 1] for e in inputs(game, seed)), beta, link)
        shuffled, of_all = loss(*(e[order] for e in inputs(game, seed)), beta, link)
        torch.testing.assert_close(alone[0], together[row], atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(shuffled[place], together[row], atol=1e-12, rtol=1e-12)
        for name in metrics:
            torch.testing.assert_close(of_row[name][0], metrics[name][row], atol=1e-15, rtol=1e-12)
            torch.testing.assert_close(of_all[name][place], metrics[name][row], atol=1e-15, rtol=1e-12)


@given(seeds, betas, links, st.integers(2, 3))
def test_tiling_an_image_changes_no_error_and_no_loss(seed, beta, link, times):
    """Errors are means, not sums: the same picture twice as wide is as wrong."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(5, 3, 4, 2, 6, generator=generator)  # the two players' predictions on two images, the target

    def game(images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        four = [per_image_error(prediction, images[4]) for prediction in images[:4]]
        return four, spin_loss(*four, beta / 1000, link)[0]

    (plain, plain_losses), (tiled, tiled_losses) = game(images), game(images.repeat(1, 1, 1, times, times))
    torch.testing.assert_close(tiled, plain)
    torch.testing.assert_close(tiled_losses, plain_losses, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# gradients


@given(games, seeds, betas, links)
def test_the_gradient_is_the_closed_form_and_the_finite_difference(game, seed, beta, link):
    """-l'(logit) beta/2 on real, lowering that error; minus the same on generated, raising it; nothing elsewhere."""
    loss, _ = GAMES[game]
    given_errors = [e.requires_grad_() for e in inputs(game, seed)]
    losses, metrics = loss(*given_errors, beta, link)
    logit = 0.5 * beta * metrics["margin"]
    if link == "hinge":
        assume(bool(((logit - 1).abs() > 1e-3).all()))  # its kink
    losses.sum().backward()
    policy, opponent = given_errors[:2], given_errors[2:]
    timesteps = policy[0][0].numel()
    expected = 0.5 * beta * slope(link, logit) / timesteps
    for sign, error in zip((1, -1), policy):
        torch.testing.assert_close(error.grad, sign * expected.reshape(5, *[1] * (error.ndim - 1)).expand_as(error))
    assert all(error.grad is None for error in opponent)

    step = 1e-4 / beta
    for i, error in enumerate(policy):
        moved = []
        for side in (-step, step):
            changed = [e.detach() for e in given_errors]
            changed[i] = changed[i].clone()
            changed[i][2, ...] += side  # every timestep of row 2
            moved.append(loss(*changed, beta, link)[0].sum())
        torch.testing.assert_close((moved[1] - moved[0]) / (2 * step), error.grad[2].sum(), rtol=1e-5, atol=1e-5 * beta)


@given(games, seeds, betas, links)
def test_no_input_is_changed_and_metrics_carry_no_gradient(game, seed, beta, link):
    loss, _ = GAMES[game]
    given_errors = [e.requires_grad_() for e in inputs(game, seed)]
    _, metrics = loss(*given_errors, beta, link)
    assert not any(metric.requires_grad for metric in metrics.values())
    assert all(torch.equal(a, b) for a, b in zip(given_errors, inputs(game, seed)))


# ---------------------------------------------------------------------------------------------------------------------
# Lemma 4.1


@given(seeds, betas, links, st.integers(1, 20))
def test_the_exact_loss_is_at_most_the_mean_over_timesteps(seed, beta, link, timesteps):
    four = errors(seed, 5, timesteps)
    exact, _ = spin_exact_loss(*four, beta, link)
    approximate = spin_loss(*(e.flatten() for e in four), beta, link)[0].reshape(5, timesteps).mean(1)
    assert (exact <= approximate + 1e-9).all()
    if link == "correlation":
        torch.testing.assert_close(exact, approximate, atol=1e-9, rtol=1e-9)


def test_the_two_losses_differ_where_timesteps_disagree():
    """One timestep says yes, another no, equally loudly: inside the link they cancel, outside they do not."""
    zero, err_gen = torch.zeros(1, 2), torch.tensor([[0.01, -0.01]])
    exact, _ = spin_exact_loss(zero, err_gen, zero, zero, 2000.0)
    approximate, _ = spin_loss(zero[0], err_gen[0], zero[0], zero[0], 2000.0)
    assert exact.item() == pytest.approx(math.log(2))
    assert approximate.mean().item() == pytest.approx(5.0, abs=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# floating point


@given(links, st.floats(-1e6, 1e6, width=32))
def test_finite_for_huge_margins(link, margin):
    zero = torch.zeros(1)
    err_data = torch.zeros(1, requires_grad=True)
    losses, _ = spin_loss(err_data, torch.tensor([margin]), zero, zero, 2.0, link)
    losses.sum().backward()
    assert losses.isfinite().all() and err_data.grad.isfinite().all()
    expected = numpy_link(link, np.float64(margin))
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=1e-6, atol=1e-6)


@given(seeds, st.integers(1, 4))
def test_per_image_error_is_the_mean_over_an_image(seed, batch):
    generator = torch.Generator().manual_seed(seed)
    prediction, target = (torch.randn(batch, 4, 3, 5, generator=generator) for _ in range(2))
    expected = ((prediction.double() - target.double()) ** 2).mean((1, 2, 3)).float()
    torch.testing.assert_close(per_image_error(prediction, target), expected)


def test_per_image_error_casts_before_it_subtracts():
    """In bfloat16, 1 - 2^-10 would round to 1; the loss multiplies by thousands what such roundings leave."""
    prediction, target = torch.full((1, 8), 1.0).bfloat16(), torch.full((1, 8), 2.0**-10).bfloat16()
    error = per_image_error(prediction, target)
    assert error.dtype == torch.float32
    assert error.item() == (1 - 2.0**-10) ** 2


@given(seeds)
def test_half_precision_predictions_cost_no_more_than_their_rounding(seed):
    """Predictions rounded to bfloat16, by at most 2^-8 of themselves, and all else in float32.

    With r = p(1 + d), |d| <= 2^-8, an error moves by at most b = mean(2 |p - q| |p d| + (p d)^2), and the logistic
    loss, whose slope is at most 1, by at most beta/2 b for each error that moved.
    """
    generator = torch.Generator().manual_seed(seed)
    prediction, target = (torch.randn(5, 4, 8, 8, generator=generator) for _ in range(2))
    moved = (per_image_error(prediction.bfloat16(), target) - per_image_error(prediction, target)).abs()
    shift = prediction.abs() * 2**-8
    bound = (2 * (prediction - target).abs() * shift + shift**2).mean((1, 2, 3)) + 1e-6
    assert (moved <= bound).all()
    assert (moved < 2e-3).all() and (moved > 0).any()  # as it happens: of errors of 2
    rest = [e.float() for e in errors(seed)[1:]]
    half, full = (spin_loss(per_image_error(p, target), *rest, 20.0)[0] for p in (prediction.bfloat16(), prediction))
    assert ((half - full).abs() <= 10.0 * bound + 1e-5).all()
