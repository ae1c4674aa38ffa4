"""The loss step on the tiny networks: what a pair shares, where the gradient flows, what a batch is the sum of."""

import copy
import inspect
import math

import pytest
import helpers
import torch
from torch._inductor.codegen import cpp
from torch.nn.functional import gelu, silu

from spin.toy import world as toy
from spin.checkpoint import pipeline as weights
from spin.loss import per_image_error, spin_loss, spin_trajectory_loss
from spin.scheduler import Scheduler, add_noise, velocity
from spin.step import compiled, sft_step, spin_step, spin_trajectory_step


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


@pytest.mark.parametrize("step", [spin_step, spin_trajectory_step])
def test_no_gradient_reaches_the_opponent_and_no_input_is_changed(step, policy, opponent, pairs, on_path):
    given = (pairs if step is spin_step else on_path) | {"beta": torch.tensor(10.0)}
    opponent = copy.deepcopy(opponent).requires_grad_(True)
    before = {name: value.clone() for name, value in given.items()}
    loss, _ = step(policy, opponent, **given)
    loss.backward()
    assert all(parameter.grad is None for parameter in opponent.parameters())
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in policy.parameters())
    assert all(torch.equal(before[name], given[name]) for name in given)


def test_all_steps_compute_in_the_precision_they_are_told(policy, opponent, pairs, on_path):
    shared = {name: pairs[name] for name in ("x0_data", "eps", "t", "context", "alphas_cumprod")}
    low = {"beta": torch.tensor(1.0)}
    with torch.no_grad():
        for step in (
            lambda dtype: spin_step(policy, opponent, **pairs | low, autocast=dtype),
            lambda dtype: spin_trajectory_step(policy, opponent, **on_path | low, autocast=dtype),
            lambda dtype: sft_step(policy, **shared, autocast=dtype),
        ):
            full, half = step(torch.float32)[0], step(torch.bfloat16)[0]
            assert full.dtype == half.dtype == torch.float32
            assert 0 < (half - full).abs() < 0.1 * full


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


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_sft_is_the_mean_squared_error_on_real_images(policy, pairs, prediction_type):
    x0, eps, t, context = (pairs[name] for name in ("x0_data", "eps", "t", "context"))
    alpha_bar = pairs["alphas_cumprod"][t]
    loss, metrics = sft_step(policy, x0, eps, t, context, pairs["alphas_cumprod"], prediction_type)
    wanted = velocity(x0, eps, alpha_bar) if prediction_type == "v_prediction" else eps
    answer = policy(add_noise(x0, eps, alpha_bar), t, context)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(answer, wanted))
    assert loss.requires_grad and metrics == {}


# ---------------------------------------------------------------------------------------------------------------------
# other noise, other paths


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_independent_noise_is_that_of_the_generated_image(policy, opponent, pairs, prediction_type):
    """A pair with noises of its own is the two halves of two pairs that share theirs."""
    eps_gen = torch.randn(pairs["eps"].shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        _, shared = spin_step(policy, opponent, **pairs, prediction_type=prediction_type)
        _, other = spin_step(policy, opponent, **pairs | {"eps": eps_gen}, prediction_type=prediction_type)
        _, independent = spin_step(policy, opponent, **pairs, prediction_type=prediction_type, eps_gen=eps_gen)
    assert torch.equal(independent["delta_data"], shared["delta_data"])
    assert torch.equal(independent["delta_gen"], other["delta_gen"])
    assert not torch.allclose(independent["delta_gen"], shared["delta_gen"])


@pytest.fixture(scope="module")
def on_path(pairs) -> dict[str, torch.Tensor]:
    """pairs, with places on the opponent's path instead of its images."""
    x_t_gen = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(4))
    return {name: value for name, value in pairs.items() if name != "x0_gen"} | {"x_t_gen": x_t_gen}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_trajectory_step_equals_four_separate_forwards(policy, opponent, on_path, prediction_type):
    on_path = on_path | {"beta": torch.tensor(10.0)}  # the two players being far apart on a path of pure noise
    x0, eps, t, context = (on_path[name] for name in ("x0_data", "eps", "t", "context"))
    alpha_bar = on_path["alphas_cumprod"][t]
    wanted = velocity(x0, eps, alpha_bar) if prediction_type == "v_prediction" else eps
    x_t = add_noise(x0, eps, alpha_bar)
    with torch.no_grad():
        err_data, opp_err_data = (per_image_error(of(x_t, t, context), wanted) for of in (policy, opponent))
        gap_gen = per_image_error(policy(on_path["x_t_gen"], t, context), opponent(on_path["x_t_gen"], t, context))
        losses, expected = spin_trajectory_loss(err_data, gap_gen, opp_err_data, on_path["beta"])
        loss, metrics = spin_trajectory_step(policy, opponent, **on_path, prediction_type=prediction_type)
    torch.testing.assert_close(loss, losses.mean(), atol=1e-4, rtol=1e-4)
    assert losses.std() > 0.01
    for name in expected:
        torch.testing.assert_close(metrics[name], expected[name], atol=1e-5, rtol=1e-4)


def whole_gradient(loss: torch.Tensor, policy: torch.nn.Module) -> torch.Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(policy.parameters()))])


@pytest.mark.parametrize("link, slope", [("logistic", 0.5), ("hinge", 1.0), ("correlation", 1.0)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_gradient_at_theta_k_is_made_of_sfts(opponent, pairs, on_path, link, slope, prediction_type):
    """(C.6): -l'(0) beta/2 (SFT's on real - SFT's on generated). (C.5): -l'(0) beta/2 times SFT's, nothing pushed."""
    policy = copy.deepcopy(opponent).requires_grad_(True)
    shared = {name: pairs[name] for name in ("eps", "t", "context", "alphas_cumprod")}
    kind = {"prediction_type": prediction_type}
    real, generated = (
        whole_gradient(sft_step(policy, pairs[name], **shared, **kind)[0], policy) for name in ("x0_data", "x0_gen")
    )
    weight = slope * pairs["beta"] / 2
    found = whole_gradient(spin_step(policy, opponent, **pairs, link=link, **kind)[0], policy)
    expected = weight * (real - generated)
    assert (found - expected).norm() < 1e-3 * expected.norm() and generated.norm() > 0.1 * real.norm() > 0
    found = whole_gradient(spin_trajectory_step(policy, opponent, **on_path, link=link, **kind)[0], policy)
    assert (found - weight * real).norm() < 1e-3 * (weight * real).norm()


# ---------------------------------------------------------------------------------------------------------------------
# compiled


@pytest.fixture(scope="module")
def world():
    """The miniature world's UNet, and pairs of its size."""
    unet = weights.load(toy.BASE).unet.requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    side, width = unet.sample_size, unet.config["cross_attention_dim"]
    inputs = {name: torch.randn(2, 4, side, side, generator=generator) for name in ("x0_data", "x0_gen", "eps")}
    context = torch.randn(2, 77, width, generator=generator)
    schedule = Scheduler(helpers.SCHEDULER).alphas_cumprod
    rest = {"t": torch.tensor([100, 700]), "context": context, "alphas_cumprod": schedule, "beta": torch.tensor(300.0)}
    return unet, inputs | rest


class Counting:
    """torch.compile's aot_eager, counting what it is asked to compile."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def test_the_whole_step_is_one_graph_that_no_value_changes(world):
    """fullgraph: no break. Another beta, batch or timestep, and the next iteration's players, compile nothing anew."""
    unet, inputs = world
    torch._dynamo.reset()
    counting = Counting()
    opponent, policy = unet, copy.deepcopy(unet).requires_grad_(True)
    for iteration in range(3):
        step = torch.compile(spin_step, backend=counting, fullgraph=True, dynamic=False)  # as train.py: each iteration
        for beta in (300.0, 5000.0):
            given = inputs | {"beta": torch.tensor(beta), "t": torch.tensor([3 * iteration, 900])}
            given |= {"x0_data": inputs["x0_data"] + iteration}
            loss, _ = step(policy, opponent, **given)
            expected, _ = spin_step(policy, opponent, **given)
            torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
            loss.backward()
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter -= 1e-3 * parameter.grad.sign()
        opponent, policy = policy.requires_grad_(False), copy.deepcopy(policy).requires_grad_(True)
        policy.zero_grad()
    assert counting.graphs == 1


@pytest.mark.parametrize("kind", ["trajectory", "sft", "independent noise, hinge, v, bfloat16"])
def test_every_step_is_one_graph(kind, world):
    unet, inputs = world
    torch._dynamo.reset()
    policy, players = copy.deepcopy(unet).requires_grad_(True), 2
    step, given = spin_step, dict(inputs)
    if kind == "trajectory":
        step, given["x_t_gen"] = spin_trajectory_step, given.pop("x0_gen")
    elif kind == "sft":
        step, players = sft_step, 1
        given = {name: inputs[name] for name in ("x0_data", "eps", "t", "context", "alphas_cumprod")}
    else:
        given |= {"eps_gen": inputs["x0_gen"], "link": "hinge", "prediction_type": "v_prediction"}
        given |= {"autocast": torch.bfloat16, "beta": torch.tensor(1.0)}
    counting = Counting()
    loss, _ = torch.compile(step, backend=counting, fullgraph=True)(*(policy, unet)[:players], **given)
    expected, _ = step(*(policy, unet)[:players], **given)
    torch.testing.assert_close(loss, expected, atol=1e-3, rtol=1e-3)
    assert counting.graphs == 1


def test_how_train_compiles(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda step, **settings: (step, settings))
    step, settings = compiled(spin_step)
    assert step is spin_step and settings.pop("options") == {"emulate_precision_casts": True}
    assert settings == {"fullgraph": True, "dynamic": False}  # no mode: CUDA graphs and accumulation do not go together


class Small(torch.nn.Module):
    """A network that inductor compiles in seconds, with what it likes to fuse: norms, gates, sums, activations."""

    def __init__(self):
        super().__init__()
        self.conv_in, self.conv_out = torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.Conv2d(8, 4, 3, padding=1)
        self.of_t, self.of_context = torch.nn.Linear(1, 8), torch.nn.Linear(32, 8)
        self.norm, self.wide, self.back = torch.nn.GroupNorm(2, 8), torch.nn.Conv2d(8, 32, 1), torch.nn.Conv2d(16, 8, 1)

    def forward(self, x, t, context):
        told = self.of_t(t[:, None] / 1000) * self.of_context(context).mean(1)
        x = self.conv_in(x) + told[:, :, None, None]
        value, gate = self.wide(silu(self.norm(x))).chunk(2, dim=1)
        x = x + self.back(value * gelu(gate))
        return self.conv_out(silu(self.norm(x)))


@pytest.fixture(scope="module")
def small():
    """Two players with weights from a seed, the policy a little off the opponent, and the compiled step."""
    torch._dynamo.reset()
    opponent, generator = Small(), torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in opponent.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5)
        policy = copy.deepcopy(opponent)
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return policy, opponent.requires_grad_(False), compiled(spin_step)


def test_inductors_step_is_the_eager_step(small, pairs):
    """Loss to 1e-5 and gradients to 1e-4 of the largest, in float32."""
    policy, opponent, step = small
    pairs = pairs | {"beta": torch.tensor(10.0)}  # a larger one multiplies the rounding of both
    loss, metrics = step(policy, opponent, **pairs)
    expected, of_eager = spin_step(policy, opponent, **pairs)
    assert abs(expected.item() - math.log(2)) > 0.01
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(metrics["delta_gen"], of_eager["delta_gen"], atol=1e-6, rtol=1e-4)
    gradients = [whole_gradient(each, policy) for each in (loss, expected)]
    torch.testing.assert_close(*gradients, atol=1e-4 * gradients[1].abs().max().item(), rtol=0)


@pytest.mark.skipif(
    "emulate_precision_casts" not in inspect.getsource(cpp), reason="torch's C++ code generator must heed the option"
)
def test_compiled_in_half_precision_it_is_log_2_at_theta_k(small, pairs):
    """Without `compiled`'s option this network's loss is 1.0 off: the two forwards are fused, hence rounded, apart."""
    _, opponent, step = small
    policy = copy.deepcopy(opponent).requires_grad_(True)
    at_theta_k = pairs | {"beta": torch.tensor(5000.0)}
    loss, metrics = step(policy, opponent, **at_theta_k, autocast=torch.bfloat16)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert not metrics["delta_data"].any() and not metrics["delta_gen"].any()
