"""How fast a step of self-play is, beside the recipe that public trainers use; and how fast images are drawn.

    python tests/bench.py                                the miniature world's networks on the CPU, under two minutes
    python tests/bench.py --device cuda --size sd15      SD-1.5 at 512 px in bfloat16, compiled too

Networks of the real sizes with random weights. Rates are medians of optimiser steps after warm-up; the first call,
which compiles, stands apart. "FLOP" counts the UNets' work that the loss needs, the same for every line.
"""

import argparse
import copy
import math
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import helpers
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from spin.infra import run  # noqa: E402
from spin.toy import world as toy  # noqa: E402
from spin.checkpoint import pipeline as weights  # noqa: E402
from spin.loss import per_image_error, spin_loss  # noqa: E402
from spin.sampler import decode, sample  # noqa: E402
from spin.scheduler import Scheduler, add_noise  # noqa: E402
from spin.step import compiled, spin_step  # noqa: E402
from spin.text import TextEncoder, Tokenizer  # noqa: E402
from spin.unet import UNet  # noqa: E402
from spin.vae import AutoencoderKL  # noqa: E402

SIZES = {
    "toy": {"pairs": 16, "steps": 20, "guidance": 3.0, "images": 64, "repeats": 5, "matmul": 1024},
    "sd15": {"pairs": 16, "steps": 50, "guidance": 7.5, "images": 16, "repeats": 5, "matmul": 8192},
}
PROMPT = "a small red circle at the top left on a blue background"


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=list(SIZES), default="toy")
    parser.add_argument("--compile", action="store_true", help="also compiled; always on CUDA")
    parser.add_argument("--pairs", type=int, help="pairs a forward pass of ours, and a batch of both (default: 16)")
    parser.add_argument("--images", type=int, help="images drawn at once (default: toy 64, sd15 16)")
    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if value is not None}
    args = argparse.Namespace(**SIZES[args.size] | given)
    cuda = args.device.startswith("cuda")
    args.compile = args.compile or cuda
    args.dtype = torch.bfloat16 if cuda else torch.float32

    sd = model(args)
    flop = flop_of_a_pair(sd) / 1e12
    matmul = matmul_rate(args)
    rows = [{"what": f"matrix products, {args.matmul} a side", "TFLOP/s": matmul}]
    exact = {} if not args.compile else {"ours, compiled": compiled(spin_step), "ours, rounding free": fused(spin_step)}
    lines = {"public recipe": public_recipe} | {
        name: lambda *given, step=step: ours(*given, step) for name, step in ({"ours": spin_step} | exact).items()
    }
    for name, line in lines.items():
        first, each, memory = timed(args, sd, line)
        rate = args.pairs / each
        row = {"what": name, "pairs/s": rate, "TFLOP/s": rate * flop, "of matmul": rate * flop / matmul}
        rows.append(row | {"peak GB": memory, "first call s": first})
    players = {"drawn": sd} | (
        {"drawn, compiled": replace(sd, unet=torch.compile(sd.unet, dynamic=False))} if args.compile else {}
    )
    for name, player in players.items():
        for images in (1, args.images):
            rows += sampling(args, player, name, images)
    print(table(rows))
    print(f"\n{args.size}, {hardware(args)}, {args.dtype}, {args.pairs} pairs, commit {run.provenance()['commit'][:9]}")
    return rows


def model(args) -> weights.StableDiffusion:
    """A checkpoint's networks; for sd15 full-size ones with random weights, no file being read."""
    if args.size == "toy":
        sd = weights.load(toy.BASE, device=args.device)
    else:
        config = helpers.MANIFEST["sd15.config"]
        with torch.device(args.device):
            text_encoder = TextEncoder(config["text_encoder"], Tokenizer())
            networks = UNet(config["unet"]), AutoencoderKL(config["vae"]), text_encoder
        sd = weights.StableDiffusion(*networks, Scheduler(helpers.SCHEDULER))
    for network in (sd.unet, sd.vae, sd.text_encoder):
        network.eval().requires_grad_(False)
    return sd


def latents(args, sd, count: int) -> torch.Tensor:
    return torch.randn(count, 4, sd.unet.sample_size, sd.unet.sample_size, device=args.device)


def pixels(args, sd) -> torch.Tensor:
    side = sd.unet.sample_size * sd.vae.downscale
    return torch.rand(1, 3, side, side, device=args.device) * 2 - 1


def flop_of_a_pair(sd) -> int:
    """Policy forward and backward on two images, opponent forward on the same two."""
    meta = copy.deepcopy(sd.unet).to("meta")
    side = meta.sample_size
    x_t, t = torch.empty(2, 4, side, side, device="meta"), torch.empty(2, dtype=torch.long, device="meta")
    context = torch.empty(2, 77, meta.config["cross_attention_dim"], device="meta")
    with FlopCounterMode(display=False) as counter:
        meta.requires_grad_(True)(x_t, t, context).sum().backward()
        meta.requires_grad_(False)(x_t, t, context)
    return counter.get_total_flops()


def matmul_rate(args) -> float:
    """TFLOP/s of square matrix products in the dtype that the networks compute in."""
    a = torch.randn(args.matmul, args.matmul, device=args.device, dtype=args.dtype)
    seconds = [clock(args, lambda: a @ a) for _ in range(13)][3:]
    return 2 * args.matmul**3 / statistics.median(seconds) / 1e12


# ---------------------------------------------------------------------------------------------------------------------
# a batch of pairs, and its optimiser step


def ours(args, sd, policy, optimizer, step) -> None:
    """The loss step as in train.py: from latents, one forward pass a player, nothing read back."""
    with torch.no_grad(), torch.autocast(args.device.split(":")[0], args.dtype, args.dtype != torch.float32):
        context = sd.encode_prompts([PROMPT] * args.pairs)
    loss, _ = step(
        policy, sd.unet, latents(args, sd, args.pairs), latents(args, sd, args.pairs), latents(args, sd, args.pairs),
        torch.randint(1000, (args.pairs,), device=args.device), context, sd.scheduler.alphas_cumprod.to(args.device),
        torch.tensor(2000.0, device=args.device), autocast=args.dtype,
    )  # fmt: skip
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def public_recipe(args, sd, policy, optimizer) -> None:
    """One pair a micro-batch, from pixels and prompts, an image a forward pass, the loss read back each time.

    Diffusion-DPO's own code puts a pair's two images into one forward pass; the rest is as here.
    """
    alphas_cumprod = sd.scheduler.alphas_cumprod.to(args.device)
    for _ in range(args.pairs):
        with torch.autocast(args.device.split(":")[0], args.dtype, args.dtype != torch.float32):
            with torch.no_grad():
                context = sd.encode_prompts([PROMPT])
                x0 = []
                for _ in ("real", "generated"):
                    mean, logvar = sd.vae.encode(pixels(args, sd))
                    x0.append((mean + (0.5 * logvar).exp() * torch.randn_like(mean)) * sd.vae.scaling_factor)
            t, eps = torch.randint(1000, (1,), device=args.device), latents(args, sd, 1)
            x_t = [add_noise(each, eps, alphas_cumprod[t]) for each in x0]
            errors = [per_image_error(policy(each, t, context), eps) for each in x_t]
            with torch.no_grad():
                errors += [per_image_error(sd.unet(each, t, context), eps) for each in x_t]
        loss = spin_loss(*errors, 2000.0)[0].mean()
        (loss / args.pairs).backward()
        assert math.isfinite(loss.item())
    optimizer.step()
    optimizer.zero_grad()


def fused(step):
    """Compiled without `spin.step.compiled`'s option: what exact rounding costs."""
    return torch.compile(step, fullgraph=True, dynamic=False)


def timed(args, sd, line) -> tuple[float, float, float | None]:
    """Seconds of the first step, median seconds of later ones, peak memory of a GPU in GB."""
    policy = copy.deepcopy(sd.unet).requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
    cuda = args.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = [clock(args, lambda: line(args, sd, policy, optimizer)) for _ in range(2 + args.repeats)]
    return seconds[0], statistics.median(seconds[2:]), torch.cuda.max_memory_allocated() / 1e9 if cuda else None


# ---------------------------------------------------------------------------------------------------------------------
# drawing


def sampling(args, sd, name: str, images: int) -> list[dict]:
    """Guided images a second, as latents and as pictures."""
    side = sd.unet.sample_size * sd.vae.downscale
    settings = {"guidance": args.guidance, "autocast": args.dtype, "height": side, "width": side}
    drawn = []

    def draw() -> None:
        drawn.append(sample(sd, [PROMPT] * images, args.steps, **settings))

    first = clock(args, draw)
    seconds = statistics.median([clock(args, draw) for _ in range(3)])
    clock(args, lambda: decode(sd, drawn[0]))
    decoding = statistics.median([clock(args, lambda: decode(sd, drawn[0])) for _ in range(3)])
    what = f"{name}, {args.steps} guided steps, batch {images}"
    return [
        {"what": what, "images/s": images / seconds, "first call s": first},
        {"what": f"{what}, decoded", "images/s": images / (seconds + decoding)},
    ]


# ---------------------------------------------------------------------------------------------------------------------
# measuring


def clock(args, work) -> float:
    began = time.perf_counter()
    work()
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began


def hardware(args) -> str:
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    return f"{name}, torch {torch.__version__}"


def table(rows: list[dict]) -> str:
    columns = ["what", "pairs/s", "images/s", "TFLOP/s", "of matmul", "peak GB", "first call s"]
    lines = [f"| {' | '.join(columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for row in rows:
        cells = [row.get(column) for column in columns]
        shown = ["" if x is None else x if isinstance(x, str) else f"{x:.3g}" for x in cells]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
