"""Measure how fast self-play trains, beside the recipe of public trainers, and how fast it samples.

    python tests/bench.py                             the miniature world's networks on the CPU
    python tests/bench.py --device cuda --size sd15   SD-1.5 at 512 px in bfloat16, compiled too

The first takes less than two minutes. Networks of SD-1.5's size have random weights. Rates are
medians over some calls after warm-up; the first call, which compiles, has a column of its own.
TFLOP/s counts the work of the UNets that the loss needs, which is the same for every recipe.
"""

import argparse
import copy
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import helpers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from spin import toy  # noqa: E402
from spin.checkpoint import Pipeline, load_pipeline  # noqa: E402
from spin.infra.cli import number, provenance  # noqa: E402
from spin.loss import per_image_error, spin_loss  # noqa: E402
from spin.sampler import SamplingOptions, decode_latents, sample  # noqa: E402
from spin.scheduler import Scheduler, add_noise  # noqa: E402
from spin.step import LossStep, mixed_precision  # noqa: E402
from spin.text import TextEncoder, Tokenizer  # noqa: E402
from spin.unet import UNet  # noqa: E402
from spin.vae import AutoencoderKL  # noqa: E402


@dataclass(frozen=True)
class Size:
    """What is measured of networks of one size."""

    sampling_steps: int
    guidance: float
    images: int  # sampled at once, beside one at a time
    matmul_side: int


SIZES = {
    "toy": Size(sampling_steps=20, guidance=3.0, images=64, matmul_side=1024),
    "sd15": Size(sampling_steps=50, guidance=7.5, images=16, matmul_side=8192),
}
PROMPT = "a small red circle at the top left on a blue background"
BETA = 2000.0

WARM_UP_STEPS = 2  # optimizer steps that are left out of the median
TIMED_STEPS = 5
TIMED_SAMPLES = 3  # after one for warm-up; of decoding, too

COLUMNS = ["what", "pairs/s", "images/s", "TFLOP/s", "of matmul", "peak GB", "first call s"]


@dataclass(frozen=True)
class Setup:
    """What all measurements share."""

    pipe: Pipeline
    pairs: int  # in a batch
    device: str
    dtype: torch.dtype  # that the networks compute in


def main(argv: list[str] | None = None) -> list[dict]:
    """Measure everything, print the table, and return its rows."""
    args = parse_args(argv)
    size = SIZES[args.size]
    dtype = torch.bfloat16 if is_cuda(args.device) else torch.float32
    setup = Setup(make_pipeline(args.size, args.device), args.pairs, args.device, dtype)

    # ---- what the hardware can do
    matmul_rate = measure_matmul(size.matmul_side, args.device, dtype)
    rows = [{"what": f"matrix products, {size.matmul_side} a side", "TFLOP/s": matmul_rate}]

    # ---- training
    recipes = {
        "public recipe": PublicRecipe(setup),
        "ours": OurRecipe(setup),
    }
    if args.compile:
        recipes["ours, compiled"] = OurRecipe(setup, compiled=True)
        recipes["ours, rounding free"] = OurRecipe(setup, compiled=True, exact_rounding=False)
    tflop_of_a_pair = flop_of_a_pair(setup.pipe.unet) / 1e12
    for name, recipe in recipes.items():
        timing = measure_training(recipe, setup)
        pairs_per_second = setup.pairs / timing.seconds
        rate = pairs_per_second * tflop_of_a_pair
        row = {
            "what": name,
            "pairs/s": pairs_per_second,
            "TFLOP/s": rate,
            "of matmul": rate / matmul_rate,
            "peak GB": timing.peak_gigabytes,
            "first call s": timing.first_seconds,
        }
        rows.append(row)

    # ---- sampling
    options = SamplingOptions(steps=size.sampling_steps, guidance=size.guidance, dtype=dtype)
    samplers = {"sampled": setup.pipe}
    if args.compile:
        compiled_unet = torch.compile(setup.pipe.unet, dynamic=False)
        samplers["sampled, compiled"] = replace(setup.pipe, unet=compiled_unet)
    for name, pipe in samplers.items():
        for num_images in (1, args.images):
            rows += measure_sampling(name, pipe, num_images, options, args.device)

    print(format_table(rows))
    hardware = f"{describe_hardware(args.device)}, torch {torch.__version__}"
    commit = provenance()["commit"]
    print(f"\n{args.size}, {hardware}, {dtype}, {args.pairs} pairs, commit {commit}")
    return rows


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", default=default_device, help="where to compute (cuda if there is one, else cpu)"
    )
    parser.add_argument(
        "--size", choices=list(SIZES), default="toy", help="the networks to measure (toy)"
    )
    parser.add_argument("--compile", action="store_true", help="also compiled; always on CUDA")
    parser.add_argument(
        "--pairs",
        type=number(int, 1),
        default=16,
        help="pairs in a batch, which are one forward pass of ours (16)",
    )
    parser.add_argument(
        "--images", type=number(int, 1), help="images sampled at once (toy: 64; sd15: 16)"
    )
    args = parser.parse_args(argv)
    if args.images is None:
        args.images = SIZES[args.size].images
    if is_cuda(args.device):
        args.compile = True
    return args


def make_pipeline(size: str, device: str) -> Pipeline:
    """Return the networks of this size, frozen. No file is read for those of sd15."""
    if size == "toy":
        return load_pipeline(toy.BASE, device=device).freeze()
    if size != "sd15":
        raise ValueError(f"size {size!r}: only {', '.join(SIZES)} are known")
    config = helpers.MANIFEST["sd15.config"]
    with torch.device(device):
        unet = UNet(config["unet"])
        vae = AutoencoderKL(config["vae"])
        text_encoder = TextEncoder(config["text_encoder"], Tokenizer())
    scheduler = Scheduler(helpers.SCHEDULER)
    return Pipeline(unet.eval(), vae.eval(), text_encoder.eval(), scheduler).freeze()


# ---- Training ------------------------------------------------------------------------------------


class OurRecipe:
    """The loss step of train.py: from latents, all pairs at once, nothing read back.

    compiled: whether to compile the step.
    exact_rounding: whether to compile it with the option of `spin.step.compile_step`. The time
        without it shows what exact rounding costs.
    """

    def __init__(self, setup: Setup, compiled: bool = False, exact_rounding: bool = True):
        self.setup = setup
        self.loss_step = LossStep(
            "spin",
            setup.pipe.unet,
            BETA,
            setup.pipe.scheduler,
            setup.device,
            setup.dtype,
            compiled=compiled and exact_rounding,
        )
        if compiled and not exact_rounding:
            self.loss_step.function = torch.compile(
                self.loss_step.function, fullgraph=True, dynamic=False
            )

    def backward(self, policy: nn.Module) -> None:
        """Add the gradients of one batch to the policy's."""
        pairs = self.setup.pairs
        with torch.no_grad(), mixed_precision(torch.device(self.setup.device), self.setup.dtype):
            context = self.setup.pipe.encode_prompts([PROMPT] * pairs)
        batch = {
            "x0_data": random_latents(self.setup, pairs),
            "x0_gen": random_latents(self.setup, pairs),
            "eps": random_latents(self.setup, pairs),
            "t": torch.randint(1000, (pairs,), device=self.setup.device),
            "context": context,
        }
        loss, _ = self.loss_step(policy, batch)
        loss.backward()


class PublicRecipe:
    """The habits of public trainers: one pair a micro-batch, one image a forward pass, from pixels.

    VAE and text encoder are in the loop, and the loss of each pair is read back. Diffusion-DPO's
    own code puts the two images of a pair into one forward pass; the rest is as here.
    """

    def __init__(self, setup: Setup):
        self.setup = setup
        self.alphas_cumprod = setup.pipe.scheduler.alphas_cumprod.to(setup.device)

    def backward(self, policy: nn.Module) -> None:
        """Add the gradients of one batch to the policy's."""
        for _ in range(self.setup.pairs):
            with mixed_precision(torch.device(self.setup.device), self.setup.dtype):
                loss = self.loss_of_a_pair(policy)
            (loss / self.setup.pairs).backward()
            assert math.isfinite(loss.item())

    def loss_of_a_pair(self, policy: nn.Module) -> Tensor:
        opponent = self.setup.pipe.unet
        with torch.no_grad():
            context = self.setup.pipe.encode_prompts([PROMPT])
            x0_data = self.encode_random_image()
            x0_gen = self.encode_random_image()

        t = torch.randint(1000, (1,), device=self.setup.device)
        eps = random_latents(self.setup, 1)
        x_t_data = add_noise(x0_data, eps, self.alphas_cumprod[t])
        x_t_gen = add_noise(x0_gen, eps, self.alphas_cumprod[t])

        err_data = per_image_error(policy(x_t_data, t, context), eps)
        err_gen = per_image_error(policy(x_t_gen, t, context), eps)
        with torch.no_grad():
            opp_err_data = per_image_error(opponent(x_t_data, t, context), eps)
            opp_err_gen = per_image_error(opponent(x_t_gen, t, context), eps)
        losses, _ = spin_loss(err_data, err_gen, opp_err_data, opp_err_gen, BETA)
        return losses.mean()

    def encode_random_image(self) -> Tensor:
        """Return scaled latents [1,4,h,w] that are drawn from the VAE's posterior."""
        vae = self.setup.pipe.vae
        side = self.setup.pipe.unet.sample_size * vae.downscale
        pixels = torch.rand(1, 3, side, side, device=self.setup.device)
        mean, logvar = vae.encode(pixels * 2 - 1)
        return (mean + (0.5 * logvar).exp() * torch.randn_like(mean)) * vae.scaling_factor


def random_latents(setup: Setup, count: int) -> Tensor:
    """Return standard normal noise [count,4,h,w]."""
    side = setup.pipe.unet.sample_size
    return torch.randn(count, 4, side, side, device=setup.device)


@dataclass
class Timing:
    """How long an optimizer step takes."""

    first_seconds: float
    seconds: float  # median after warm-up
    peak_gigabytes: float | None  # of a GPU's memory


def measure_training(recipe: OurRecipe | PublicRecipe, setup: Setup) -> Timing:
    """Time optimizer steps of a batch each, with the policy starting as the opponent."""
    policy = copy.deepcopy(setup.pipe.unet).requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
    if is_cuda(setup.device):
        torch.cuda.reset_peak_memory_stats(setup.device)

    seconds = []
    for _ in range(WARM_UP_STEPS + TIMED_STEPS):
        started = now(setup.device)
        recipe.backward(policy)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(now(setup.device) - started)

    peak = None
    if is_cuda(setup.device):
        peak = torch.cuda.max_memory_allocated(setup.device) / 1e9
    return Timing(seconds[0], statistics.median(seconds[WARM_UP_STEPS:]), peak)


def flop_of_a_pair(unet: nn.Module) -> int:
    """Count the operations of the policy, forward and backward, and of the opponent, forward.

    Both see the two images of a pair. Nothing is computed: the count is made on the meta device.
    """
    network = copy.deepcopy(unet).to("meta")
    with torch.device("meta"):
        x_t = torch.empty(2, 4, network.sample_size, network.sample_size)
        t = torch.empty(2, dtype=torch.long)
        context = torch.empty(2, 77, network.config["cross_attention_dim"])
    with FlopCounterMode(display=False) as counter:
        network.requires_grad_(True)
        network(x_t, t, context).sum().backward()
        network.requires_grad_(False)
        network(x_t, t, context)
    return counter.get_total_flops()


# ---- Sampling ------------------------------------------------------------------------------------


def measure_sampling(
    name: str, pipe: Pipeline, num_images: int, options: SamplingOptions, device: str
) -> list[dict]:
    """Return two rows of the table, for latents and for decoded images.

    num_images: images sampled at once.
    """
    sampling_seconds = []
    for _ in range(1 + TIMED_SAMPLES):
        started = now(device)
        latents = sample(pipe, [PROMPT] * num_images, **vars(options))
        sampling_seconds.append(now(device) - started)

    decoding_seconds = []
    for _ in range(1 + TIMED_SAMPLES):
        started = now(device)
        decode_latents(pipe, latents)
        decoding_seconds.append(now(device) - started)

    sampling = statistics.median(sampling_seconds[1:])
    decoding = statistics.median(decoding_seconds[1:])
    what = f"{name}, {options.steps} guided steps, batch {num_images}"
    latents_row = {
        "what": what,
        "images/s": num_images / sampling,
        "first call s": sampling_seconds[0],
    }
    images_row = {"what": f"{what}, decoded", "images/s": num_images / (sampling + decoding)}
    return [latents_row, images_row]


# ---- Measuring -----------------------------------------------------------------------------------


def measure_matmul(side: int, device: str, dtype: torch.dtype) -> float:
    """Return TFLOP/s of products of square matrices."""
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(13):
        started = now(device)
        matrix @ matrix
        seconds.append(now(device) - started)
    return 2 * side**3 / statistics.median(seconds[3:]) / 1e12


def now(device: str) -> float:
    """Return the time in seconds, once the device has done all that it was asked for."""
    if is_cuda(device):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def describe_hardware(device: str) -> str:
    if is_cuda(device):
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def format_table(rows: list[dict]) -> str:
    """Return the rows as a table in Markdown."""
    header = " | ".join(COLUMNS)
    alignment = "|---:" * (len(COLUMNS) - 1)
    lines = [f"| {header} |", f"|---{alignment}|"]
    for row in rows:
        cells = [format_cell(row.get(column)) for column in COLUMNS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def format_cell(value: str | float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:.3g}"


if __name__ == "__main__":
    main()
