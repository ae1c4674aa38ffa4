"""The loss step on the tiny networks: what a pair shares, where the gradient flows, what a batch is the sum of."""

import copy
import math

import pytest
import torch

from spin.loss import per_image_error, spin_loss
from spin.scheduler import add_noise, velocity
from spin.step import sft_step, spin_step


@pytest.fixture(scope="module")
def opponent(sd):
    return sd.unet


@pytest.fixture
def policy(opponent):
    """A player some way from its opponent."""
    policy = copy.deepcopy(opponent)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return policy.requires_grad_(True)


@pytest.fixture(scope="module")
def pairs(sd) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x0_data, x0_gen, eps = (torch.randn(4, 4, 16, 16, generator=generator) for _ in range(3))
    return {
        "x0_data": x0_data,
        "x0_gen": x0_gen,
        "eps": eps,
        "t": torch.tensor([10, 300, 650, 990]),
        "context": torch.randn(4, 77, 32, generator=generator),
        "alphas_cumprod": sd.scheduler.alphas_cumprod,
        "beta": torch.tensor(300.0),
    }


def rows(pairs: dict, chosen: slice) -> dict:
    return {name: value if name in ("alphas_cumprod", "beta") else value[chosen] for name, value in pairs.items()}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_equals_four_separate_forwards(policy, opponent, pairs, prediction_type):
    alpha_bar = pairs["alphas_cumprod"][pairs["t"]]
    errors = {}
    with torch.no_grad():
        for player, network in (("policy", policy), ("opponent", opponent)):
            for kind in ("data", "gen"):
                x0, eps = pairs[f"x0_{kind}"], pairs["eps"]
                answer = network(add_noise(x0, eps, alpha_bar), pairs["t"], pairs["context"])
                wanted = velocity(x0, eps, alpha_bar) if prediction_type == "v_prediction" else eps
                errors[player, kind] = per_image_error(answer, wanted)
    four = [errors[player, kind] for player in ("policy", "opponent") for kind in ("data", "gen")]
    losses, expected = spin_loss(*four, pairs["beta"])
    loss, metrics = spin_step(policy, opponent, **pairs, prediction_type=prediction_type)
    torch.testing.assert_close(loss.detach(), losses.mean(), atol=1e-4, rtol=1e-4)
    assert losses.std() > 0.01  # far from log 2
    for name in expected:
        torch.testing.assert_close(metrics[name], expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_theta_k_it_is_log_2_and_both_deltas_are_0(opponent, pairs, dtype):
    policy = copy.deepcopy(opponent).requires_grad_(True)
    loss, metrics = spin_step(policy, opponent, **pairs | {"beta": torch.tensor(5000.0)}, autocast=dtype)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert not metrics["delta_data"].any() and not metrics["delta_gen"].any()


def test_no_gradient_reaches_the_opponent_and_no_input_is_changed(policy, opponent, pairs):
    opponent = copy.deepcopy(opponent).requires_grad_(True)
    before = {name: value.clone() for name, value in pairs.items()}
    loss, _ = spin_step(policy, opponent, **pairs)
    loss.backward()
    assert all(parameter.grad is None for parameter in opponent.parameters())
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in policy.parameters())
    assert all(torch.equal(before[name], pairs[name]) for name in pairs)


def gradient(policy, opponent, batches: list[dict]) -> torch.Tensor:
    policy.zero_grad()
    for batch in batches:
        loss, _ = spin_step(policy, opponent, **batch)
        (loss / len(batches)).backward()
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])


def test_micro_batches_add_up_to_the_batch(policy, opponent, pairs):
    # a beta as in training would multiply the networks' rounding, too, which differs between batch sizes
    pairs = pairs | {"beta": torch.tensor(10.0)}
    whole = gradient(policy, opponent, [pairs])
    parts = gradient(policy, opponent, [rows(pairs, slice(i, i + 1)) for i in range(4)])
    assert torch.linalg.vector_norm(whole) > 0.1
    torch.testing.assert_close(parts, whole, atol=1e-4 * whole.abs().max().item(), rtol=0)


def test_recomputed_activations_give_the_same_gradient(policy, opponent, pairs):
    stored = gradient(policy, opponent, [pairs])
    policy.checkpoint_activations = True
    assert torch.equal(gradient(policy, opponent, [pairs]), stored)


def test_one_graph_without_breaks(policy, opponent, pairs):
    compiled = torch.compile(spin_step, backend="aot_eager", fullgraph=True, dynamic=False)
    loss, _ = compiled(policy, opponent, **pairs)
    expected, _ = spin_step(policy, opponent, **pairs)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_sft_is_the_mean_squared_error_on_real_images(policy, pairs, prediction_type):
    x0, eps, t, context = (pairs[name] for name in ("x0_data", "eps", "t", "context"))
    alpha_bar = pairs["alphas_cumprod"][t]
    loss, metrics = sft_step(policy, x0, eps, t, context, pairs["alphas_cumprod"], prediction_type)
    wanted = velocity(x0, eps, alpha_bar) if prediction_type == "v_prediction" else eps
    answer = policy(add_noise(x0, eps, alpha_bar), t, context)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(answer, wanted))
    assert loss.requires_grad and metrics == {}
