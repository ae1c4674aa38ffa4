"""The SPIN loss at points away from theta = theta_k, where every sign, beta and reduction would give log 2."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spin.loss import LINKS, dpo_loss, per_image_error, sft_loss, spin_loss

seeds = st.integers(0, 2**32 - 1)
betas = st.floats(1.0, 5000.0)
links = st.sampled_from(sorted(LINKS))
AT_ZERO = {"logistic": math.log(2), "hinge": 1.0, "correlation": 1.0}


def errors(seed: int, batch: int = 5) -> list[torch.Tensor]:
    """err_data, err_gen, opp_err_data, opp_err_gen: some hundredths, and no two alike."""
    return list(0.05 * torch.rand(4, batch, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


@given(seeds, betas, links)
def test_equals_the_formula_written_out_in_numpy(seed, beta, link):
    err_data, err_gen, opp_data, opp_gen = (e.numpy() for e in errors(seed))
    t = -(beta / 2) * ((err_data - opp_data) - (err_gen - opp_gen))
    expected = {"logistic": np.logaddexp(0, -t), "hinge": np.maximum(0, 1 - t), "correlation": 1 - t}[link]
    losses, metrics = spin_loss(*errors(seed), beta, link)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(metrics["delta_data"].numpy(), err_data - opp_data, rtol=1e-12)
    np.testing.assert_allclose(metrics["delta_gen"].numpy(), err_gen - opp_gen, rtol=1e-12)
    margin = (err_gen - opp_gen) - (err_data - opp_data)
    np.testing.assert_allclose(metrics["margin"].numpy(), margin, rtol=1e-9)
    assert metrics["implicit_accuracy"].tolist() == (margin > 0).astype(float).tolist()


@given(seeds, betas, links)
def test_at_theta_k_the_loss_is_l_of_0(seed, beta, link):
    err_data, err_gen, _, _ = errors(seed)
    losses, metrics = spin_loss(err_data, err_gen, err_data, err_gen, beta, link)
    assert losses.tolist() == pytest.approx([AT_ZERO[link]] * 5, abs=1e-15)
    assert metrics["margin"].tolist() == [0] * 5 and metrics["implicit_accuracy"].tolist() == [0.5] * 5


@given(seeds, betas)
def test_the_gradient_lowers_the_error_on_data_and_raises_it_on_generated(seed, beta):
    err_data, err_gen, opp_data, opp_gen = (e.requires_grad_() for e in errors(seed))
    losses, metrics = spin_loss(err_data, err_gen, opp_data, opp_gen, beta)
    losses.sum().backward()
    weight = torch.sigmoid(-0.5 * beta * metrics["margin"])  # -l'(logit)
    torch.testing.assert_close(err_data.grad, 0.5 * beta * weight)
    torch.testing.assert_close(err_gen.grad, -0.5 * beta * weight)
    assert opp_data.grad is None and opp_gen.grad is None


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
