"""Specification of spin/infra/devices.py, and of what networks need to be right and fast on a GPU.

These tests need no GPU. The "meta" device stands for one: its tensors have no values, so that code
which waits for a value fails.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import helpers
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import train
from spin import pairs, sampler, step, text, toy
from spin.checkpoint import Pipeline, load_pipeline
from spin.data import CaptionedImages
from spin.infra import distributed
from spin.infra.devices import (
    copy_to_device,
    default_dtype,
    prepare_device,
    repeat_to_the_bit,
    tf32,
)
from spin.infra.errors import InputError
from spin.infra.shards import LatentShards
from spin.layers import Attention, Conv2d
from spin.pairs import PairLoader
from spin.sampler import SAMPLERS, sample
from spin.step import LossStep, cast_weights_, mixed_precision, spin_step

# -----------------------------------------------------------------------------
# both players run the same kernels


class OperatorLog(TorchDispatchMode):
    """Notes the operators that run within its `with` block, with their tensors' shapes.

    Views are left out, which compute nothing, and casts: the opponent's weights are stored as
    autocast casts the policy's.
    """

    def __init__(self):
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if not operator.is_view and operator is not torch.ops.aten._to_copy.default:
            tensors = [describe(arg) for arg in args if isinstance(arg, Tensor)]
            self.operators.append(f"{operator} {' '.join(tensors)}")
        return result


def describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} {tensor.stride()}"


@pytest.fixture(scope="module")
def pipelines(tiny_folder, tiny2_folder) -> dict[str, Pipeline]:
    sources = {"SD-1": tiny_folder, "SD-2": tiny2_folder, "miniature world": toy.BASE}
    return {name: load_pipeline(source).freeze() for name, source in sources.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["SD-1", "SD-2", "miniature world"])
def test_policy_and_opponent_run_the_same_operators(pipelines, name, dtype):
    """On tensors of the same dtypes, shapes and strides: else a GPU may round them differently."""
    opponent = copy.deepcopy(pipelines[name].unet)
    policy = copy.deepcopy(opponent).requires_grad_(True)
    cast_weights_(opponent, dtype)
    side = opponent.sample_size
    latents = torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(1))
    context = torch.ones(2, 77, opponent.config["cross_attention_dim"])
    logs = {}
    for player in (policy, opponent):
        gradients = nullcontext() if player is policy else torch.no_grad()
        with OperatorLog() as log, mixed_precision(latents.device, dtype), gradients:
            player(latents, torch.tensor([3, 900]), context)
        logs[player] = log.operators
    assert len(logs[policy]) > 100
    assert logs[policy] == logs[opponent]


@pytest.mark.parametrize("head_size, first", [(40, "CUDNN"), (128, "CUDNN"), (160, "FLASH")])
def test_the_kernels_of_attention_depend_on_the_size_of_heads_alone(monkeypatch, head_size, first):
    """PyTorch's own choice also depends on whether a gradient is wanted."""
    preferred = []
    attention = F.scaled_dot_product_attention

    def record_preferred(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        preferred.append(_cur_sdpa_kernel_backends(with_priority=True))
        return attention(q, k, v)

    before = _cur_sdpa_kernel_backends(with_priority=True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", record_preferred)
    with torch.random.fork_rng():
        layer = Attention(channels=2 * head_size, heads=2)
    layer(torch.ones(1, 3, 2 * head_size))
    with torch.no_grad():
        layer(torch.ones(1, 3, 2 * head_size))
    assert preferred[0] == preferred[1]
    assert preferred[0][0].name == f"{first}_ATTENTION"
    assert (SDPBackend.CUDNN_ATTENTION in preferred[0]) == (first == "CUDNN")
    assert _cur_sdpa_kernel_backends(with_priority=True) == before


# -----------------------------------------------------------------------------
# no waits


@pytest.fixture
def meta_pipe(tiny_folder, monkeypatch) -> Pipeline:
    """A pipeline on the device without values."""
    pipe = load_pipeline(tiny_folder).freeze()
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        network.to("meta")
    for module in (pairs, sampler, step):  # autocast does not know the device
        monkeypatch.setattr(module, "mixed_precision", lambda device, dtype: nullcontext())
    return pipe


class NoOtherCopies(TorchDispatchMode):
    """Fails if values are copied from the CPU to the device by anything but `copy_to_device`."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if "copy" in str(operator) and isinstance(result, Tensor) and result.is_meta:
            sources = [arg for arg in args if isinstance(arg, Tensor)]
            assert all(source.is_meta for source in sources), f"{operator} is a copy to wait for"
        return result


def tensor_of_the_cpu(*args, device=None, torch_tensor=torch.tensor, **kwargs) -> Tensor:
    """Stands for torch.tensor, which on a GPU copies and waits unseen by `NoOtherCopies`."""
    assert device is None, "torch.tensor on a GPU is a copy to wait for"
    return torch_tensor(*args, **kwargs)


@contextmanager
def counted_copies(monkeypatch) -> Iterator[list[tuple[int, ...]]]:
    """Yield a list that gets the shape of every tensor which `copy_to_device` copies."""
    shapes = []

    def note_shape(tensor: Tensor, device) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return torch.empty_like(tensor, device=device)

    for module in (pairs, sampler, text):
        monkeypatch.setattr(module, "copy_to_device", note_shape)
    monkeypatch.setattr(torch, "tensor", tensor_of_the_cpu)
    with NoOtherCopies():
        yield shapes


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_sampling_waits_for_nothing_and_copies_only_noise_after_the_prompts(
    meta_pipe, monkeypatch, name, steps
):
    monkeypatch.setattr(sampler, "check_finite", lambda latent, description: None)
    with counted_copies(monkeypatch) as copied:
        sample(meta_pipe, ["a", "b"], steps, sampler=name)
    noise = (2, 4, 16, 16)
    before_the_first_step = [(3, 77), (4,), noise]  # token ids, which rows, the first latent
    noise_of_steps = [noise] * steps if name == "ddpm" else []
    assert copied == [*before_the_first_step, *noise_of_steps]


@pytest.mark.parametrize("loss", ["spin", "dpo", "sft"])
def test_micro_batches_wait_for_nothing(meta_pipe, image_folder, tmp_path, monkeypatch, loss):
    """Five copies each: three latents or noises, timesteps and token ids; four for SFT."""
    latents = LatentShards(tmp_path, range(12))
    names = ["x0"]
    for prefix in ("", "rejected_"):
        names += [f"{prefix}mean", f"{prefix}logvar"]
        names += [f"{prefix}mean_flipped", f"{prefix}logvar_flipped"]
    latents.write(0, [{name: torch.zeros(12, 4, 16, 16) for name in names}])
    loader = PairLoader(
        loss=loss,
        pipe=meta_pipe,
        images=CaptionedImages(image_folder, 64),
        real=latents,
        generated=latents,
        preferences=None,
        seed=0,
        batch_size=6,
        flip=0.5,
        prompt_dropout=0.5,
        independent_noise=False,
        dtype=torch.float32,
        device="meta",
    )
    policy = copy.deepcopy(meta_pipe.unet).requires_grad_(True)
    loss_step = LossStep(loss, meta_pipe.unet, 100.0, meta_pipe.scheduler, "meta")
    args = SimpleNamespace(batch_size=6, micro_batch=2)
    with counted_copies(monkeypatch) as copied:
        numbers = train.accumulate_gradients(
            args, policy, loss_step, loader, iteration=1, step=1, bar=tqdm(disable=True)
        )
    assert all(number.is_meta and number.shape == () for number in numbers.values())
    assert all(parameter.grad.is_meta for parameter in policy.parameters())
    assert len(copied) == 3 * (4 if loss == "sft" else 5)


def test_a_copy_to_a_gpu_comes_from_pinned_memory_and_is_not_waited_for(monkeypatch):
    calls = []

    class RecordedTensor(Tensor):
        def pin_memory(self):
            calls.append("pin_memory")
            return self

        def to(self, device, non_blocking=False):
            calls.append((device, non_blocking))
            return self

    tensor = torch.ones(2).as_subclass(RecordedTensor)
    copy_to_device(tensor, "cuda:1")
    assert calls == ["pin_memory", ("cuda:1", True)]


def test_compiled_for_a_gpu_a_convolution_reads_channels_last(monkeypatch):
    """Not on a CPU, and not uncompiled."""
    layouts = []

    class GpuTensor(Tensor):
        is_cuda = True

    def note_layout(convolution, x: Tensor) -> Tensor:
        layouts.append(x.is_contiguous(memory_format=torch.channels_last))
        return x

    monkeypatch.setattr(nn.Conv2d, "forward", note_layout)
    with torch.random.fork_rng():
        convolution = Conv2d(4, 4, 3)
    images = torch.ones(2, 4, 8, 8)
    convolution(images.as_subclass(GpuTensor))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    convolution(images)
    convolution(images.as_subclass(GpuTensor))
    assert layouts == [False, False, True]


def test_a_rank_tells_nccl_which_gpu_is_its_own(monkeypatch):
    """Else NCCL guesses, and may put two ranks on one GPU."""
    calls = []
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: calls.append(kwargs))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with distributed.process_group("cuda:1"):
        pass
    assert calls[0] == "cuda:1"
    assert calls[1]["device_id"] == torch.device("cuda:1")


def test_on_the_cpu_a_copy_is_the_tensor_itself():
    tensor = torch.ones(2)
    assert copy_to_device(tensor, "cpu") is tensor


# -----------------------------------------------------------------------------
# one graph


@pytest.fixture
def backend(monkeypatch) -> helpers.CountingBackend:
    """The backend by which everything is compiled."""
    torch._dynamo.reset()
    backend = helpers.CountingBackend()
    torch_compile = torch.compile

    def compile_with_backend(function, fullgraph, dynamic, options=None):
        return torch_compile(function, backend=backend, fullgraph=fullgraph, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", compile_with_backend)
    return backend


def toy_batch(seed: int, unet: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0_data, x0_gen, eps = torch.randn(3, 2, 4, 8, 8, generator=generator)
    width = unet.config["cross_attention_dim"]
    return {
        "x0_data": x0_data,
        "x0_gen": x0_gen,
        "eps": eps,
        "t": torch.tensor([100 * seed, 700]),
        "context": torch.randn(2, 77, width, generator=generator),
    }


def test_three_iterations_and_dpo_share_one_graph(backend):
    """No new player, batch, timestep or beta is compiled anew."""
    pipe = load_pipeline(toy.BASE)
    args = SimpleNamespace(
        device="cpu", dtype="float32", checkpoint_activations=False, compile=True
    )
    for kind, beta in [("spin", 2000.0), ("spin", 5000.0), ("spin", 5000.0), ("dpo", 100.0)]:
        stage = train.Stage("a model", kind, steps=[(1, 1)], lr=1e-5, beta=beta)
        policy, loss_step = train.load_players(args, stage, toy.BASE, pipe)
        with torch.no_grad():
            policy.conv_out.bias += 0.1  # away from theta_k
        for seed in (1, 2):
            batch = toy_batch(seed, policy)
            loss, _ = loss_step(policy, batch)
            loss.backward()
            expected, _ = spin_step(policy, **batch, **loss_step.constants)
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert backend.graphs == 1


def test_the_opponents_of_three_iterations_sample_by_one_graph(backend, image_folder, tmp_path):
    """Whole batches do. The four images that are left over are not worth a graph of their own."""
    images = CaptionedImages(image_folder, 32)
    for iteration in (1, 2, 3):
        pairs.generate_images(
            load_pipeline(toy.BASE).freeze(),
            images,
            LatentShards(tmp_path / "real", range(9)),
            LatentShards(tmp_path / str(iteration), range(9)),
            seed=0,
            iteration=iteration,
            options=sampler.SamplingOptions(steps=2, height=32, width=32),
            batch_size=5,
            compiled=True,
        )
    assert backend.graphs == 1


# -----------------------------------------------------------------------------
# precision


@pytest.fixture(autouse=True)
def restored_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32 = before


def test_a_prepared_device_does_not_round_float32_to_tf32():
    torch.backends.cudnn.allow_tf32 = True
    assert prepare_device("cpu") == "cpu"
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("device", ["cuda:99", "meta", "abacus"])
def test_a_device_that_cannot_compute_is_refused(device):
    with pytest.raises(InputError, match=f"--device {device}: cannot be used here"):
        prepare_device(device)


def test_a_run_that_repeats_to_the_bit_leaves_no_kernel_a_choice(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        repeat_to_the_bit()
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")  # as CUDA asks for
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("flag, deterministic", [("", True), ("--no-deterministic", False)])
def test_the_miniature_world_repeats_to_the_bit_on_a_gpu(monkeypatch, flag, deterministic):
    calls = []
    monkeypatch.setattr(train, "prepare_device", lambda device: device)
    monkeypatch.setattr(train, "repeat_to_the_bit", lambda: calls.append("repeat"))
    monkeypatch.setattr(train, "self_play", lambda args, run: {})
    monkeypatch.setattr(train.Run, "lock", lambda run: nullcontext())
    monkeypatch.setattr(distributed, "process_group", lambda device: nullcontext())
    for device in ("cuda", "cpu"):
        train.main(["--device", device, *flag.split()])
    assert calls == ["repeat"] * deterministic
    assert not torch.backends.cudnn.benchmark


def test_the_vae_alone_computes_in_tf32(pipelines):
    pipe = copy.deepcopy(pipelines["SD-1"])
    flags_in_part = {}
    for name in ("unet", "vae", "text_encoder"):
        flags = flags_in_part[name] = set()

        def note_flags(module, inputs, flags=flags):
            flags.add(torch.backends.cudnn.allow_tf32)

        for module in getattr(pipe, name).modules():
            module.register_forward_pre_hook(note_flags)

    prepare_device("cpu")
    latents = sample(pipe, ["a"], steps=1)
    images = sampler.decode_latents(pipe, latents)
    pipe.vae.encode(2 * images - 1)
    assert flags_in_part["vae"] == {True}
    assert flags_in_part["unet"] == {False}
    assert flags_in_part["text_encoder"] == {False}
    assert not torch.backends.cudnn.allow_tf32


def test_tf32_is_restored_after_an_error():
    torch.backends.cudnn.allow_tf32 = False
    with pytest.raises(ZeroDivisionError), tf32():
        raise ZeroDivisionError
    assert not torch.backends.cudnn.allow_tf32


def test_a_precision_set_by_torchs_newer_interface_is_left_alone(pipelines):
    torch.backends.cudnn.allow_tf32 = True  # torch's default, which other tests change
    precision = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        pipelines["SD-1"].vae.decode(torch.zeros(1, 4, 2, 2))
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    finally:
        torch.backends.cudnn.conv.fp32_precision = precision


def test_half_precision_is_for_gpus():
    assert default_dtype("cuda:1") == "bfloat16"
    assert default_dtype("cpu") == "float32"
