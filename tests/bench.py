"""Measure how fast self-play trains, beside the recipe of public trainers, and how fast it samples.

    python tests/bench.py                             the miniature world's networks on the CPU
    python tests/bench.py --device cuda --size sd15   SD-1.5 at 512 px in bfloat16, compiled too
    python tests/bench.py eager sampling              these stages alone

The first takes less than two minutes. The stages, each a row of the table that is printed as soon
as it is known:

    matmul            products of square matrices: what the hardware can do
    public            training with the habits of public trainers, see `PixelLoader`
    eager             training as train.py does, not compiled
    checkpointed      the same with --checkpoint-activations
    compiled          the same as eager with --compile
    compiled-loose    compiled without the option that makes both players round alike
    sampling          latents, as train.py generates the opponent's
    compiled-sampling the same with --compile
    decoding          latents -> images

The columns:

    pairs/s, images/s
                  median over some calls after warm-up
    TFLOP/s       of the operations that the loss needs in the UNets: the same number a pair for
                  every recipe. For matmul, of the products
    peak GB       memory of the GPU, with the networks, the optimizer and everything else
    off log 2     how far a micro-batch's loss is from log 2, at most. The learning rate is 0, so
                  that the players stay equal; if they round alike, the loss is log 2 exactly
    first call s  of an optimizer step, sampling or decoding; compiling is part of it

Networks of SD-1.5's size have random weights.
"""

import argparse
import copy
import gc
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import helpers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from spin import toy  # noqa: E402
from spin.checkpoint import Pipeline, load_pipeline  # noqa: E402
from spin.data import CaptionedImages  # noqa: E402
from spin.infra import distributed  # noqa: E402
from spin.infra.cli import number, provenance  # noqa: E402
from spin.infra.devices import is_cuda, prepare_device  # noqa: E402
from spin.infra.shards import SHARD_ROWS, LatentShards  # noqa: E402
from spin.pairs import PairLoader  # noqa: E402
from spin.sampler import decode_latents, sample  # noqa: E402
from spin.scheduler import Scheduler  # noqa: E402
from spin.step import LossStep, cast_weights_, compile_unet, spin_step  # noqa: E402
from spin.text import TextEncoder, Tokenizer  # noqa: E402
from spin.unet import UNet  # noqa: E402
from spin.vae import AutoencoderKL  # noqa: E402

PROMPT = "a small red circle at the top left on a blue background"
BETA = 2000.0  # of the paper's first iteration

MATMUL_SECONDS = 1.0  # of warm-up: a GPU's clock rises at first
TIMED_MATMULS = 30
WARM_UP_STEPS = 2  # optimizer steps that are left out of the median
TIMED_STEPS = 5
TIMED_SAMPLES = 3  # after one for warm-up; of decoding, too

COLUMNS = ["stage", "pairs/s", "images/s", "TFLOP/s", "peak GB", "off log 2", "first call s"]


@dataclass(frozen=True)
class Setup:
    """What all stages share."""

    args: argparse.Namespace  # of train.py: an optimizer step is two micro-batches
    pipe: Pipeline  # theta_k, frozen, in the CPU's memory: every stage copies what it needs
    images: CaptionedImages  # for their captions; the only image file is empty
    real: LatentShards
    generated: LatentShards


def main(argv: list[str] | None = None) -> list[dict]:
    """Measure stage by stage, print the table, and return its rows."""
    args = parse_args(argv)
    prepare_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        setup = make_setup(args, Path(folder))
        print_cells(COLUMNS)
        print_cells(["---"] + ["---:"] * (len(COLUMNS) - 1))
        rows = []
        for stage in args.stages:
            row = run_stage(stage, setup)
            print_cells([format_cell(row.get(column)) for column in COLUMNS])
            rows.append(row)

    hardware = f"{describe_hardware(args.device)}, torch {torch.__version__}"
    pairs = f"{setup.args.micro_batch} pairs a micro-batch"
    commit = provenance()["commit"]
    print(f"\n{args.size}, {hardware}, {setup.args.dtype}, {pairs}, commit {commit}")
    return rows


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("stages", nargs="*", metavar="stage", help="what to measure (all)")
    parser.add_argument(
        "--device", default=default_device, help="where to compute (cuda if there is one, else cpu)"
    )
    parser.add_argument(
        "--size", choices=["toy", "sd15"], default="toy", help="the networks to measure (toy)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="also the compiled stages; always on CUDA"
    )
    parser.add_argument(
        "--pairs", type=number(int, 1), help="pairs in a micro-batch (train.py's default)"
    )
    parser.add_argument(
        "--images", type=number(int, 1), help="images sampled at once (train.py's default)"
    )
    args = parser.parse_args(argv)
    for name in args.stages:
        if name not in STAGES:
            parser.error(f"{name}: no stage; there are {', '.join(STAGES)}")
    if not args.stages:
        compiles = args.compile or is_cuda(args.device)
        args.stages = [name for name in STAGES if compiles or not name.startswith("compiled")]
    return args


def run_stage(name: str, setup: Setup) -> dict:
    """Return a stage's row of the table, which says so if the GPU's memory is too small."""
    on_gpu = is_cuda(setup.args.device)
    gc.collect()  # reference cycles keep the optimizer of the stage before alive
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setup.args.device)
    try:
        row = STAGES[name](setup)
    except torch.OutOfMemoryError:
        return {"stage": f"{name}: out of memory"}
    if on_gpu:
        row["peak GB"] = torch.cuda.max_memory_allocated(setup.args.device) / 1e9
    return {"stage": name, **row}


# ---- What is measured ----------------------------------------------------------------------------


def make_setup(args: argparse.Namespace, folder: Path) -> Setup:
    """Return the networks, and random data that is written to `folder`."""
    flags = ["--device", args.device]
    if args.size == "sd15":
        flags += ["--model", "sd15", "--data", str(folder)]  # the paper's settings
    train_args = train.parse_args(flags)
    train_args.micro_batch = args.pairs or train_args.micro_batch
    train_args.batch_size = 2 * train_args.micro_batch
    train_args.generation_batch = args.images or train_args.generation_batch

    (folder / "empty.png").touch()
    rows = [{"file_name": "empty.png", "text": f"{PROMPT}, {i}"} for i in range(SHARD_ROWS)]
    helpers.write_metadata(folder, rows)
    images = CaptionedImages(folder, train_args.resolution)

    pipe = make_pipeline(args.size, args.device)
    side = pipe.unet.sample_size
    names = ["mean", "logvar", "mean_flipped", "logvar_flipped"]
    real = write_random_latents(folder / "real", names, side)
    generated = write_random_latents(folder / "generated", ["x0"], side)
    return Setup(train_args, pipe, images, real, generated)


def make_pipeline(size: str, device: str) -> Pipeline:
    """Return the networks of this size, frozen, in the CPU's memory.

    Those of sd15 are initialized on `device`, which is faster; no file is read for them.
    """
    if size == "toy":
        return load_pipeline(toy.BASE).freeze()
    config = helpers.MANIFEST["sd15.config"]
    with torch.device(device):
        unet = UNet(config["unet"])
        vae = AutoencoderKL(config["vae"])
        text_encoder = TextEncoder(config["text_encoder"], Tokenizer())
    for network in (unet, vae, text_encoder):
        network.cpu().eval()
    return Pipeline(unet, vae, text_encoder, Scheduler(helpers.SCHEDULER)).freeze()


def write_random_latents(folder: Path, names: list[str], side: int) -> LatentShards:
    """Write a file of standard normal latents [4,side,side] under these names."""
    shards = LatentShards(folder, range(SHARD_ROWS))
    shards.write(0, [{name: torch.randn(SHARD_ROWS, 4, side, side) for name in names}])
    return shards


def on_device(network: nn.Module, setup: Setup, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a copy of a network on the device, with weights of `dtype` (None: float32)."""
    return copy.deepcopy(network).to(setup.args.device, dtype)


def shared_parts(setup: Setup, dtype: torch.dtype | None = None) -> Pipeline:
    """Return what all players share, on the device: all of the pipeline but the UNet."""
    vae = on_device(setup.pipe.vae, setup, dtype)
    text_encoder = on_device(setup.pipe.text_encoder, setup, dtype)
    return replace(setup.pipe, unet=None, vae=vae, text_encoder=text_encoder)


# ---- Training ------------------------------------------------------------------------------------


def measure_training(
    setup: Setup, compiled: bool = False, exact_rounding: bool = True, checkpointed: bool = False
) -> dict:
    """Measure train.py's optimizer steps, and return their row.

    compiled: whether to compile the step.
    exact_rounding: whether to compile it with the option of `spin.step.compile_step`.
    checkpointed: whether to recompute activations.
    """
    torch.backends.cudnn.benchmark = compiled
    policy, loss_step = make_players(setup, compiled)
    policy.checkpoint_activations = checkpointed
    if not exact_rounding:
        loss_step.function = torch.compile(spin_step, fullgraph=True, dynamic=False)
    loader = train.pair_loader(
        setup.args, "spin", shared_parts(setup), setup.images, setup.real, setup.generated
    )
    return measure_steps(setup.args, policy, loss_step, loader)


def measure_public(setup: Setup) -> dict:
    """Measure optimizer steps of the same batch as public trainers make them. Return their row."""
    torch.backends.cudnn.benchmark = False
    policy, loss_step = make_players(setup)

    def loss_step_with_reading(policy: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = loss_step(policy, batch)
        loss.item()  # which waits for the GPU
        return loss, metrics

    args = copy.copy(setup.args)
    args.micro_batch = 1
    shared = shared_parts(setup, getattr(torch, args.dtype))
    loader = PixelLoader(shared, args.resolution, args.device)
    return measure_steps(args, policy, loss_step_with_reading, loader)


@dataclass
class PixelLoader:
    """Loads pairs as public trainers do: VAE and text encoder run in the training loop.

    After Diffusion-DPO's code (github.com/SalesforceAIResearch/DiffusionDPO, train.py): both images
    of a pair in one forward pass, one pair a micro-batch, VAE and text encoder in half precision,
    the loss read back every time. Reading and resizing the images costs nothing here.
    """

    pipe: Pipeline
    resolution: int
    device: str

    @torch.no_grad()
    def load(self, iteration: int, step: int, start: int, end: int) -> dict[str, Tensor]:
        """Return pairs start..end-1 of a batch, as `spin.pairs.PairLoader.load` does."""
        vae = self.pipe.vae
        pairs = end - start
        side = self.resolution
        pixels = 2 * torch.rand(2 * pairs, 3, side, side, device=self.device) - 1
        mean, logvar = vae.encode(pixels)
        x0 = (mean + (0.5 * logvar).exp() * torch.randn_like(mean)) * vae.scaling_factor
        x0_data, x0_gen = x0.float().chunk(2)
        captions = [f"{PROMPT}, {i}" for i in range(start, end)]
        return {
            "x0_data": x0_data,
            "x0_gen": x0_gen,
            "eps": torch.randn_like(x0_data),
            "t": torch.randint(1000, (pairs,), device=self.device),
            "context": self.pipe.encode_prompts(captions),
        }


def make_players(setup: Setup, compiled: bool = False) -> tuple[UNet, LossStep]:
    """Return policy and loss as train.load_players does, but from memory and not from a file."""
    args = setup.args
    dtype = getattr(torch, args.dtype)
    policy = on_device(setup.pipe.unet, setup).requires_grad_(True)
    opponent = on_device(setup.pipe.unet, setup)
    cast_weights_(opponent, dtype)
    loss_step = LossStep("spin", opponent, BETA, setup.pipe.scheduler, args.device, dtype, compiled)
    return policy, loss_step


def measure_steps(
    args: argparse.Namespace, policy: UNet, loss_step: Callable, loader: PairLoader | PixelLoader
) -> dict:
    """Time optimizer steps like train.train's, at a learning rate of 0. Return their row."""
    optimizer = train.make_optimizer(args, policy)
    bar = distributed.progress_bar(disable=True)
    steps = itertools.count(1)
    distances = []

    def recorded_loss_step(policy: UNet, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = loss_step(policy, batch)
        distances.append((loss.detach() - math.log(2)).abs())
        return loss, metrics

    def optimizer_step() -> None:
        numbers = train.accumulate_gradients(
            args, policy, recorded_loss_step, loader, 1, next(steps), bar
        )
        torch.stack(list(numbers.values())).tolist()  # for the log, as the gradient's norm is
        nn.utils.clip_grad_norm_(policy.parameters(), args.clip).item()
        optimizer.step()
        policy.zero_grad()

    first, seconds = time_calls(optimizer_step, args.device, WARM_UP_STEPS, TIMED_STEPS)
    pairs_per_second = args.batch_size / seconds
    return {
        "pairs/s": pairs_per_second,
        "TFLOP/s": pairs_per_second * flop_of_a_pair(policy) / 1e12,
        "off log 2": torch.stack(distances).max().item(),
        "first call s": first,
    }


def flop_of_a_pair(unet: UNet) -> int:
    """Count the operations of the policy, forward and backward, and of the opponent, forward.

    Both see the two images of a pair. Nothing is computed: the count is made on the meta device.
    """
    with torch.device("meta"):
        network = UNet(unet.config)
        x_t = torch.empty(2, 4, network.sample_size, network.sample_size)
        t = torch.empty(2, dtype=torch.long)
        context = torch.empty(2, 77, network.config["cross_attention_dim"])
    with FlopCounterMode(display=False) as counter:
        network(x_t, t, context).sum().backward()
        network.requires_grad_(False)
        network(x_t, t, context)
    return counter.get_total_flops()


# ---- Sampling ------------------------------------------------------------------------------------


def measure_sampling(setup: Setup, compiled: bool = False) -> dict:
    """Measure how fast train.py generates latents, and return their row."""
    args = setup.args
    torch.backends.cudnn.benchmark = compiled
    unet = on_device(setup.pipe.unet, setup)
    cast_weights_(unet, getattr(torch, args.dtype))
    if compiled:
        unet = compile_unet(unet)
    pipe = replace(shared_parts(setup), unet=unet)
    prompts = [f"{PROMPT}, {i}" for i in range(args.generation_batch)]
    options = train.sampling_options(args)

    def generate() -> None:
        sample(pipe, prompts, **vars(options))

    first, seconds = time_calls(generate, args.device, 1, TIMED_SAMPLES)
    return {"images/s": len(prompts) / seconds, "first call s": first}


def measure_decoding(setup: Setup) -> dict:
    """Measure how fast latents are decoded, and return their row."""
    args = setup.args
    torch.backends.cudnn.benchmark = False
    pipe = shared_parts(setup)
    side = setup.pipe.unet.sample_size
    latents = torch.randn(args.generation_batch, 4, side, side, device=args.device)

    def decode() -> None:
        decode_latents(pipe, latents)

    first, seconds = time_calls(decode, args.device, 1, TIMED_SAMPLES)
    return {"images/s": len(latents) / seconds, "first call s": first}


# ---- Measuring -----------------------------------------------------------------------------------


def measure_matmul(setup: Setup) -> dict:
    """Measure products of square matrices, and return their row."""
    device = setup.args.device
    side = 8192 if is_cuda(device) else 1024
    matrix = torch.randn(side, side, device=device, dtype=getattr(torch, setup.args.dtype))

    def multiply() -> None:
        matrix @ matrix

    until = time.perf_counter() + MATMUL_SECONDS
    while time.perf_counter() < until:
        time_calls(multiply, device, 0, 1)
    _, seconds = time_calls(multiply, device, 0, TIMED_MATMULS)
    return {"TFLOP/s": 2 * side**3 / seconds / 1e12}


def time_calls(
    work: Callable[[], None], device: str, num_warm_up: int, num_timed: int
) -> tuple[float, float]:
    """Return the seconds of the first call, and the median of those after the warm-up."""
    seconds = []
    for _ in range(num_warm_up + num_timed):
        started = now(device)
        work()
        seconds.append(now(device) - started)
    return seconds[0], statistics.median(seconds[num_warm_up:])


def now(device: str) -> float:
    """Return the time in seconds, once the device has done all that it was asked for."""
    if is_cuda(device):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def describe_hardware(device: str) -> str:
    if is_cuda(device):
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def print_cells(cells: list[str]) -> None:
    """Print a row of a table in Markdown, at once: what follows may be cut off."""
    longest = max(len(name) for name in STAGES)
    padded = [cells[0].ljust(longest)]
    for cell, column in zip(cells[1:], COLUMNS[1:]):
        padded.append(cell.rjust(len(column)))
    print(f"| {' | '.join(padded)} |", flush=True)


def format_cell(value: str | float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:.3g}"


STAGES = {
    "matmul": measure_matmul,
    "public": measure_public,
    "eager": measure_training,
    "checkpointed": partial(measure_training, checkpointed=True),
    "compiled": partial(measure_training, compiled=True),
    "compiled-loose": partial(measure_training, compiled=True, exact_rounding=False),
    "sampling": measure_sampling,
    "compiled-sampling": partial(measure_sampling, compiled=True),
    "decoding": measure_decoding,
}


if __name__ == "__main__":
    main()
