"""Specification of spin/step.py: one training step's loss on networks, eager and compiled."""

import copy
import inspect
import json
import math

import helpers
import pytest
import torch
from torch import Tensor, nn
from torch._inductor.codegen import cpp
from torch.nn.functional import mse_loss, silu

import train
from spin.loss import dpo_loss, per_image_error, spin_bounded_loss, spin_loss
from spin.scheduler import Scheduler, add_noise, velocity
from spin.step import LossStep, cast_weights_, compile_step, sft_step, spin_step

prediction_types = pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])

B = 4  # pairs in a batch
PER_PAIR = ["x0_data", "x0_gen", "eps", "t", "context"]  # arguments of a step that are [B,...]
OF_SFT = ["x0_data", "eps", "t", "context", "alphas_cumprod"]


def moved(network: nn.Module, distance: float, seed: int) -> nn.Module:
    """Return a trainable copy of a network with noise on its weights."""
    policy = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(distance * torch.randn(parameter.shape, generator=generator))
    return policy.requires_grad_(True)


@pytest.fixture(scope="module")
def opponent(pipe) -> nn.Module:
    return pipe.unet


@pytest.fixture
def policy(opponent) -> nn.Module:
    """A player some way from its opponent."""
    return moved(opponent, distance=0.01, seed=1)


@pytest.fixture(scope="module")
def pairs(pipe) -> dict[str, Tensor]:
    """The arguments of `spin_step` after the networks."""
    generator = torch.Generator().manual_seed(2)
    x0_data, x0_gen, eps = torch.randn(3, B, 4, 16, 16, generator=generator)
    return {
        "x0_data": x0_data,
        "x0_gen": x0_gen,
        "eps": eps,
        "t": torch.tensor([10, 300, 650, 990]),
        "context": torch.randn(B, 77, 32, generator=generator),
        "alphas_cumprod": pipe.scheduler.alphas_cumprod,
        "beta": torch.tensor(300.0),
    }


def some_rows(pairs: dict[str, Tensor], start: int, end: int) -> dict[str, Tensor]:
    rows = dict(pairs)
    for name in PER_PAIR:
        rows[name] = pairs[name][start:end]
    return rows


def only(pairs: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    return {name: pairs[name] for name in names}


def gradient(loss: Tensor, policy: nn.Module) -> Tensor:
    """Return the gradient of all weights as one vector."""
    gradients = torch.autograd.grad(loss, list(policy.parameters()))
    return torch.cat([tensor.flatten() for tensor in gradients])


def error(network: nn.Module, x0: Tensor, pairs: dict[str, Tensor], prediction_type: str) -> Tensor:
    """Return a network's error [B] on images noised with eps, from a forward pass of its own."""
    alpha_bar = pairs["alphas_cumprod"][pairs["t"]]
    eps = pairs["eps"]
    target = velocity(x0, eps, alpha_bar) if prediction_type == "v_prediction" else eps
    prediction = network(add_noise(x0, eps, alpha_bar), pairs["t"], pairs["context"])
    return per_image_error(prediction, target)


# -----------------------------------------------------------------------------
# spin_step


@torch.no_grad()
@prediction_types
def test_spin_step_is_spin_loss_of_four_forward_passes(policy, opponent, pairs, prediction_type):
    err_data = error(policy, pairs["x0_data"], pairs, prediction_type)
    err_gen = error(policy, pairs["x0_gen"], pairs, prediction_type)
    opp_err_data = error(opponent, pairs["x0_data"], pairs, prediction_type)
    opp_err_gen = error(opponent, pairs["x0_gen"], pairs, prediction_type)
    losses, expected = spin_loss(err_data, err_gen, opp_err_data, opp_err_gen, pairs["beta"])
    assert losses.std() > 0.01  # far from log 2

    loss, metrics = spin_step(policy, opponent, **pairs, prediction_type=prediction_type)
    torch.testing.assert_close(loss, losses.mean(), rtol=1e-4, atol=1e-4)
    assert metrics.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(metrics[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_theta_k_the_loss_is_log_2_and_both_deltas_are_0(opponent, pairs, dtype):
    """To the last bit, so that no beta multiplies a difference in rounding."""
    policy = copy.deepcopy(opponent).requires_grad_(True)
    arguments = pairs | {"beta": torch.tensor(5000.0)}
    loss, metrics = spin_step(policy, opponent, **arguments, autocast=dtype)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert not metrics["delta_data"].any()
    assert not metrics["delta_gen"].any()


def test_gradients_reach_every_weight_of_the_policy_and_none_of_the_opponent(
    policy, opponent, pairs
):
    trainable_opponent = copy.deepcopy(opponent).requires_grad_(True)
    loss, _ = spin_step(policy, trainable_opponent, **pairs | {"beta": torch.tensor(10.0)})
    loss.backward()
    for parameter in trainable_opponent.parameters():
        assert parameter.grad is None
    for parameter in policy.parameters():
        assert parameter.grad.any()


@prediction_types
def test_at_theta_k_the_gradient_is_made_of_sfts(opponent, pairs, prediction_type):
    """-l'(0) beta/2 (SFT's on the real images - SFT's on the generated ones), equation (5.1)."""
    policy = copy.deepcopy(opponent).requires_grad_(True)
    on_real = only(pairs, OF_SFT)
    on_generated = on_real | {"x0_data": pairs["x0_gen"]}
    real_loss, _ = sft_step(policy, **on_real, prediction_type=prediction_type)
    generated_loss, _ = sft_step(policy, **on_generated, prediction_type=prediction_type)
    loss, _ = spin_step(policy, opponent, **pairs, prediction_type=prediction_type)

    real = gradient(real_loss, policy)
    generated = gradient(generated_loss, policy)
    expected = 0.5 * pairs["beta"] / 2 * (real - generated)
    assert (gradient(loss, policy) - expected).norm() < 1e-3 * expected.norm()
    assert generated.norm() > 0.1 * real.norm()


@torch.no_grad()
@prediction_types
def test_independent_noise_is_that_of_the_generated_image(policy, opponent, pairs, prediction_type):
    """A pair with two noises is one half of each of two pairs that share theirs."""
    eps_gen = torch.randn(pairs["eps"].shape, generator=torch.Generator().manual_seed(3))
    kind = {"prediction_type": prediction_type}
    _, with_eps = spin_step(policy, opponent, **pairs, **kind)
    _, with_eps_gen = spin_step(policy, opponent, **pairs | {"eps": eps_gen}, **kind)
    _, independent = spin_step(policy, opponent, **pairs, **kind, eps_gen=eps_gen)
    assert torch.equal(independent["delta_data"], with_eps["delta_data"])
    assert torch.equal(independent["delta_gen"], with_eps_gen["delta_gen"])
    assert not torch.allclose(independent["delta_gen"], with_eps["delta_gen"])


# -----------------------------------------------------------------------------
# spin_step with the bounded loss


@torch.no_grad()
@prediction_types
def test_the_bounded_step_adds_the_distance_of_two_forward_passes(
    policy, opponent, pairs, prediction_type
):
    err_data = error(policy, pairs["x0_data"], pairs, prediction_type)
    err_gen = error(policy, pairs["x0_gen"], pairs, prediction_type)
    opp_err_data = error(opponent, pairs["x0_data"], pairs, prediction_type)
    opp_err_gen = error(opponent, pairs["x0_gen"], pairs, prediction_type)
    alpha_bar = pairs["alphas_cumprod"][pairs["t"]]
    x_t = add_noise(pairs["x0_gen"], pairs["eps"], alpha_bar)
    gap_gen = per_image_error(
        policy(x_t, pairs["t"], pairs["context"]), opponent(x_t, pairs["t"], pairs["context"])
    )
    losses, expected = spin_bounded_loss(
        err_data, err_gen, opp_err_data, opp_err_gen, gap_gen, pairs["beta"]
    )
    kind = {"prediction_type": prediction_type, "bounded": True}
    loss, metrics = spin_step(policy, opponent, **pairs, **kind)
    torch.testing.assert_close(loss, losses.mean(), rtol=1e-4, atol=1e-3)
    assert losses.mean().abs() > 0.1
    for name in expected:
        torch.testing.assert_close(metrics[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_theta_k_the_bounded_loss_is_0(opponent, pairs, dtype):
    policy = copy.deepcopy(opponent).requires_grad_(True)
    arguments = pairs | {"beta": torch.tensor(5000.0)}
    loss, metrics = spin_step(policy, opponent, **arguments, autocast=dtype, bounded=True)
    assert loss.item() == 0
    assert not metrics["delta_data"].any()
    assert not metrics["delta_gen"].any()


@prediction_types
def test_at_theta_k_the_gradient_of_the_bounded_step_is_that_of_c6(
    opponent, pairs, prediction_type
):
    """Of the same length, so that clipping treats both alike. Farther away they differ."""
    policy = copy.deepcopy(opponent).requires_grad_(True)
    kind = {"prediction_type": prediction_type}
    loss, _ = spin_step(policy, opponent, **pairs, **kind)
    bounded, _ = spin_step(policy, opponent, **pairs, **kind, bounded=True)
    expected = gradient(loss, policy)
    assert (gradient(bounded, policy) - expected).norm() < 1e-4 * expected.norm()

    away = moved(opponent, distance=0.01, seed=1)
    loss, _ = spin_step(away, opponent, **pairs, **kind)
    bounded, _ = spin_step(away, opponent, **pairs, **kind, bounded=True)
    expected = gradient(loss, away)
    assert (gradient(bounded, away) - expected).norm() > 0.1 * expected.norm()


def test_no_gradient_of_the_bounded_step_reaches_the_opponent(policy, opponent, pairs):
    trainable_opponent = copy.deepcopy(opponent).requires_grad_(True)
    loss, _ = spin_step(policy, trainable_opponent, **pairs, bounded=True)
    loss.backward()
    for parameter in trainable_opponent.parameters():
        assert parameter.grad is None
    for parameter in policy.parameters():
        assert parameter.grad.any()


@torch.no_grad()
@prediction_types
def test_with_independent_noise_the_distance_is_on_the_generated_images_own(
    policy, opponent, pairs, prediction_type
):
    """Both players' predictions of it, so that the loss differs from that of shared noise.

    A pair with two noises is one half of each of two pairs that share theirs; so is its loss.
    """
    eps_gen = torch.randn(pairs["eps"].shape, generator=torch.Generator().manual_seed(3))
    kind = {"prediction_type": prediction_type, "bounded": True}
    same = pairs | {"x0_data": pairs["x0_gen"]}  # x0_gen as the real image: its delta is known
    _, metrics = spin_step(policy, opponent, **pairs, **kind)
    shared, other = spin_step(policy, opponent, **same | {"eps": eps_gen}, **kind)
    independent, _ = spin_step(policy, opponent, **pairs, **kind, eps_gen=eps_gen)
    # of `same`, delta_data is delta_gen: what is left of its loss is the distance
    quarter = pairs["beta"] / 4
    expected = quarter * (metrics["delta_data"] - other["delta_gen"]).mean() + shared
    torch.testing.assert_close(independent, expected, rtol=1e-4, atol=1e-3)


# -----------------------------------------------------------------------------
# sft_step


@prediction_types
def test_sft_step_is_the_mean_squared_error_on_real_images(policy, pairs, prediction_type):
    alpha_bar = pairs["alphas_cumprod"][pairs["t"]]
    x0 = pairs["x0_data"]
    eps = pairs["eps"]
    target = velocity(x0, eps, alpha_bar) if prediction_type == "v_prediction" else eps
    prediction = policy(add_noise(x0, eps, alpha_bar), pairs["t"], pairs["context"])
    loss, metrics = sft_step(policy, **only(pairs, OF_SFT), prediction_type=prediction_type)
    torch.testing.assert_close(loss, mse_loss(prediction, target), rtol=1e-5, atol=1e-6)
    assert loss.requires_grad
    assert metrics == {}


# -----------------------------------------------------------------------------
# both


@torch.no_grad()
def test_networks_compute_in_the_precision_that_is_asked_for(policy, opponent, pairs):
    spin = pairs | {"beta": torch.tensor(1.0)}
    sft = only(pairs, OF_SFT)
    full_spin, _ = spin_step(policy, opponent, **spin)
    half_spin, _ = spin_step(policy, opponent, **spin, autocast=torch.bfloat16)
    full_bounded, _ = spin_step(policy, opponent, **spin, bounded=True)
    half_bounded, _ = spin_step(policy, opponent, **spin, autocast=torch.bfloat16, bounded=True)
    full_sft, _ = sft_step(policy, **sft)
    half_sft, _ = sft_step(policy, **sft, autocast=torch.bfloat16)
    losses = [(full_spin, half_spin), (full_bounded, half_bounded), (full_sft, half_sft)]
    for full, half in losses:
        assert full.dtype == half.dtype == torch.float32
        assert 0 < (half - full).abs() < 0.1 * full.abs()


def test_no_input_is_changed(policy, opponent, pairs):
    arguments = pairs | {"eps_gen": pairs["eps"] + 1}
    before = {name: tensor.clone() for name, tensor in arguments.items()}
    spin_step(policy, opponent, **arguments)
    sft_step(policy, **only(arguments, OF_SFT))
    for name, tensor in arguments.items():
        assert torch.equal(tensor, before[name])


def test_recomputed_activations_give_the_same_gradient(policy, opponent, pairs):
    stored_loss, _ = spin_step(policy, opponent, **pairs)
    stored = gradient(stored_loss, policy)
    policy.checkpoint_activations = True
    recomputed_loss, _ = spin_step(policy, opponent, **pairs)
    recomputed_loss.backward()
    recomputed = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    assert torch.equal(recomputed, stored)


# -----------------------------------------------------------------------------
# micro-batches


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 1)])
def test_micro_batches_add_up_to_the_batch_if_they_weigh_what_they_hold(
    policy, opponent, pairs, sizes, bounded
):
    # a beta as in training would multiply rounding, too, which depends on the size of a batch
    arguments = pairs | {"beta": torch.tensor(10.0), "bounded": bounded}
    loss, _ = spin_step(policy, opponent, **arguments)
    expected = gradient(loss, policy)
    total = torch.zeros_like(expected)
    start = 0
    for size in sizes:
        part, _ = spin_step(policy, opponent, **some_rows(arguments, start, start + size))
        total += size / B * gradient(part, policy)
        start += size
    assert expected.norm() > 0.1
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_train_weighs_micro_batches_by_what_they_hold(tiny_folder, image_folder, tmp_path):
    """A batch of 4 as 3 + 1: the loss and the gradient of the first steps are those of all 4."""

    def train_sft(micro_batch: int) -> list[dict]:
        out = tmp_path / f"{micro_batch}"
        flags = f"--model {tiny_folder} --data {image_folder} --out {out} --loss sft"
        flags += f" --batch-size 4 --micro-batch {micro_batch} --iterations 1 --steps 2"
        flags += " --resolution 64 --warmup 0 --sft-lr 1e-5 --grid-prompts 0 --device cpu"
        train.main(flags.split())
        lines = (out / "log.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    for uneven, batch in zip(train_sft(3), train_sft(4), strict=True):
        assert uneven["loss"] == pytest.approx(batch["loss"], rel=1e-4)
        assert uneven["grad_norm"] == pytest.approx(batch["grad_norm"], rel=1e-3)


# -----------------------------------------------------------------------------
# LossStep: a loss by its name


@pytest.fixture(scope="module")
def scheduler() -> Scheduler:
    return Scheduler(helpers.SCHEDULER | {"prediction_type": "v_prediction"})


@torch.no_grad()
def test_the_loss_called_spin_is_spin_step(policy, opponent, pairs, scheduler):
    loss_step = LossStep("spin", opponent, 300.0, scheduler, "cpu")
    batch = only(pairs, PER_PAIR) | {"eps_gen": pairs["eps"] + 1}
    loss, metrics = loss_step(policy, batch)
    expected, _ = spin_step(
        policy,
        opponent,
        **batch,
        alphas_cumprod=scheduler.alphas_cumprod,
        beta=torch.tensor(300.0),
        prediction_type="v_prediction",
    )
    assert torch.equal(loss, expected)
    assert metrics.keys() == {"delta_data", "delta_gen", "margin", "implicit_accuracy"}


@torch.no_grad()
def test_the_loss_called_spin_bounded_is_the_bounded_step(policy, opponent, pairs, scheduler):
    loss_step = LossStep("spin-bounded", opponent, 300.0, scheduler, "cpu")
    batch = only(pairs, PER_PAIR)
    loss, metrics = loss_step(policy, batch)
    expected, _ = spin_step(
        policy,
        opponent,
        **batch,
        alphas_cumprod=scheduler.alphas_cumprod,
        beta=torch.tensor(300.0),
        prediction_type="v_prediction",
        bounded=True,
    )
    assert torch.equal(loss, expected)
    assert metrics.keys() == {"delta_data", "delta_gen", "margin", "implicit_accuracy"}


@torch.no_grad()
def test_the_loss_called_dpo_is_dpo_loss_of_preferred_and_rejected(
    policy, opponent, pairs, scheduler
):
    loss_step = LossStep("dpo", opponent, 20.0, scheduler, "cpu")
    loss, _ = loss_step(policy, only(pairs, PER_PAIR))
    losses, _ = dpo_loss(
        error(policy, pairs["x0_data"], pairs, "v_prediction"),
        error(policy, pairs["x0_gen"], pairs, "v_prediction"),
        error(opponent, pairs["x0_data"], pairs, "v_prediction"),
        error(opponent, pairs["x0_gen"], pairs, "v_prediction"),
        20.0,
    )
    torch.testing.assert_close(loss, losses.mean(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_loss_called_sft_is_sft_step(policy, pairs, scheduler):
    loss_step = LossStep("sft", None, 0.0, scheduler, "cpu", autocast=torch.bfloat16)
    batch = only(pairs, ["x0_data", "eps", "t", "context"])
    loss, metrics = loss_step(policy, batch)
    arguments = only(pairs, OF_SFT)
    expected, _ = sft_step(
        policy, **arguments, prediction_type="v_prediction", autocast=torch.bfloat16
    )
    assert torch.equal(loss, expected)
    assert metrics == {}


def test_an_unknown_loss_is_refused(opponent, scheduler):
    with pytest.raises(ValueError, match="loss 'ipo'"):
        LossStep("ipo", opponent, 1.0, scheduler, "cpu")


# -----------------------------------------------------------------------------
# cast_weights_


@torch.no_grad()
def test_a_cast_network_predicts_what_autocast_predicts_to_the_bit(opponent, pairs):
    cast = copy.deepcopy(opponent)
    cast_weights_(cast, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = cast(pairs["x0_data"], pairs["t"], pairs["context"])
        expected = opponent(pairs["x0_data"], pairs["t"], pairs["context"])
    assert torch.equal(prediction, expected)


def test_all_weights_but_those_of_norms_are_cast(opponent):
    cast = copy.deepcopy(opponent)
    cast_weights_(cast, torch.bfloat16)
    for name, parameter in cast.named_parameters():
        is_norm = "norm" in name
        assert parameter.dtype == (torch.float32 if is_norm else torch.bfloat16), name


# -----------------------------------------------------------------------------
# compiled: one graph


class SmallNetwork(nn.Module):
    """A network that inductor compiles in seconds, with a norm and sums that it fuses."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.prompt = nn.Linear(32, 8)
        self.norm = nn.GroupNorm(2, 8)
        self.conv_out = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x, t, context):
        embedding = self.prompt(context).mean(1) * (t[:, None] / 1000)
        hidden = self.conv_in(x) + embedding[:, :, None, None]
        return self.conv_out(silu(self.norm(hidden)))


@pytest.fixture(scope="module")
def small_opponent() -> nn.Module:
    """Weights are N(0, 1 / fan_in), from a seed."""
    network = SmallNetwork()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = max(1, parameter[0].numel())
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values / fan_in**0.5)
    return network.requires_grad_(False)


@pytest.mark.parametrize("bounded", [False, True])
def test_every_choice_of_spin_step_is_one_graph(small_opponent, pairs, bounded):
    torch._dynamo.reset()
    backend = helpers.CountingBackend()
    policy = moved(small_opponent, distance=0.02, seed=1)
    arguments = pairs | {
        "eps_gen": pairs["eps"] + 1,
        "prediction_type": "v_prediction",
        "autocast": torch.bfloat16,
        "beta": torch.tensor(1.0),
        "bounded": bounded,
    }
    step = torch.compile(spin_step, backend=backend, fullgraph=True)
    loss, _ = step(policy, small_opponent, **arguments)
    expected, _ = spin_step(policy, small_opponent, **arguments)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    assert backend.graphs == 1


def test_sft_step_is_one_graph(small_opponent, pairs):
    torch._dynamo.reset()
    backend = helpers.CountingBackend()
    policy = moved(small_opponent, distance=0.02, seed=1)
    arguments = only(pairs, OF_SFT)
    loss, _ = torch.compile(sft_step, backend=backend, fullgraph=True)(policy, **arguments)
    expected, _ = sft_step(policy, **arguments)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert backend.graphs == 1


# -----------------------------------------------------------------------------
# compiled: the same numbers


def test_compile_step_asks_for_one_graph_and_for_eager_rounding(monkeypatch):
    """Without a mode: CUDA graphs do not go together with accumulated gradients."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda step, **settings: calls.append((step, settings)))
    compile_step(spin_step)
    options = {"emulate_precision_casts": True}
    assert calls == [(spin_step, {"fullgraph": True, "dynamic": False, "options": options})]


@pytest.fixture(scope="module")
def compiled_step():
    torch._dynamo.reset()
    return compile_step(spin_step)


def test_the_compiled_step_is_the_eager_step(compiled_step, small_opponent, pairs):
    """In float32: the loss to 1e-5, metrics to 1e-6 of the errors that they are differences of,
    gradients to 1e-4 of the largest.
    """
    policy = moved(small_opponent, distance=0.1, seed=7)
    arguments = pairs | {"beta": torch.tensor(10.0)}  # a larger one would multiply the rounding
    loss, metrics = compiled_step(policy, small_opponent, **arguments)
    eager_loss, eager_metrics = spin_step(policy, small_opponent, **arguments)
    sft_arguments = only(pairs, OF_SFT)
    error, _ = sft_step(policy, **sft_arguments)  # 3.6: the mean of the errors on real images
    assert abs(eager_loss.item() - math.log(2)) > 0.01
    torch.testing.assert_close(loss, eager_loss, rtol=1e-5, atol=1e-5)
    rounding = 1e-6 * error.item()
    for name in eager_metrics:
        torch.testing.assert_close(metrics[name], eager_metrics[name], rtol=0, atol=rounding)
    expected = gradient(eager_loss, policy)
    tolerance = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(gradient(loss, policy), expected, rtol=0, atol=tolerance)


@pytest.mark.skipif(
    "emulate_precision_casts" not in inspect.getsource(cpp),
    reason="torch's C++ code generator must heed the option",
)
def test_compiled_in_half_precision_the_loss_at_theta_k_is_log_2(
    compiled_step, small_opponent, pairs
):
    """Without the option it is 0.09 off: the two forwards are fused, hence rounded, differently."""
    policy = copy.deepcopy(small_opponent).requires_grad_(True)
    arguments = pairs | {"beta": torch.tensor(5000.0)}
    loss, metrics = compiled_step(policy, small_opponent, **arguments, autocast=torch.bfloat16)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert not metrics["delta_data"].any()
    assert not metrics["delta_gen"].any()
