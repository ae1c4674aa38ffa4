"""Self-play fine-tuning of a Stable Diffusion model (SPIN-Diffusion, arXiv 2402.10210, Algorithm 1).

    python train.py --model FOLDER --data FOLDER

For k = 1..K: generate an image from theta_{k-1} for every prompt the iteration will draw; train theta_k, started
from theta_{k-1}, to tell the real images from those with the SPIN loss (C.6); promote it to the next opponent.
The same command, given again after an interruption, goes on where it stopped; a finished stage is not repeated.
"""

import argparse
import copy
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from spin import data, run, sampler, step, viz, weights
from spin.run import InputError

# The paper's table of hyper-parameters (appendix A), one value an iteration where it has three, taken literally:
# iteration 1's 50 steps end inside the 200 steps of warm-up. Marked (ours): the paper does not say.
PAPER = {
    "iterations": 3,
    "steps": [50, 500, 200],
    "lr": [2e-5, 2e-5, 5e-8],
    "beta": [2000.0, 5000.0, 5000.0],
    "batch_size": 2048,
    "micro_batch": 8,
    "warmup": 200,
    "weight_decay": 1e-2,
    "clip": 1.0,  # (ours, as Diffusion-DPO's public code)
    "resolution": 512,
    "flip": 0.5,  # (ours, as Diffusion-DPO's public code)
    "guidance": 7.5,
    "sampler": "ddim",  # (ours)
    "sampler_steps": 50,
    "seed": 5775709,
}
PRESETS = {"paper": PAPER}

ENCODE_BATCH = 4  # images a forward of the VAE's encoder
GRID_SEED = 0  # of every picture in samples/

# A run that was begun with other values of these may go on all the same: they do not change what is computed.
FREE_TO_CHANGE = ("model", "unet", "data", "out", "save_every")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Self-play fine-tuning of Stable Diffusion (SPIN-Diffusion). Defaults are the paper's.",
        usage=argparse.SUPPRESS,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def add(flag: str, help: str, **kwargs) -> None:
        """A flag whose default is the preset's."""
        name = flag.lstrip("-").replace("-", "_")
        parser.add_argument(flag, default=argparse.SUPPRESS, help=f"{help} (paper: {PAPER[name]})", **kwargs)

    whole, at_least_0 = number(int, 1), number(float, 0)
    parser.add_argument("--model", required=True, help="theta_0: a checkpoint folder in the diffusers layout")
    parser.add_argument("--unet", help="start from this folder's UNet instead of the model's; omit to use the model's")
    parser.add_argument("--data", required=True, help="folder of images with metadata.jsonl (file_name, text)")
    parser.add_argument("--out", help="run folder; omitted: runs/<name of the data folder>")
    parser.add_argument("--preset", choices=list(PRESETS), default="paper", help="where the values not given come from")
    parser.add_argument("--loss", choices=["spin"], default="spin", help="spin: equation (C.6)")
    parser.add_argument("--link", choices=["logistic", "hinge", "correlation"], default="logistic", help="l of the loss; the paper's experiments use logistic")
    add("--iterations", "self-play iterations K; each renews the opponent", type=whole)
    add("--steps", "optimiser steps an iteration: one value, or one an iteration, the last repeated", type=whole, nargs="+")
    add("--lr", "AdamW's learning rate after warm-up: one value, or one an iteration", type=at_least_0, nargs="+")
    add("--beta", "weight of the error difference, in front of the 1/2 and of means over dimensions: one value, or one an iteration", type=at_least_0, nargs="+")
    add("--batch-size", "pairs an optimiser step", type=whole)
    add("--micro-batch", "pairs a forward pass; the rest of a batch is accumulated", type=whole)
    add("--warmup", "steps over which the learning rate rises; it then falls linearly to 0; 0: no warm-up", type=number(int, 0))
    add("--weight-decay", "AdamW's; 0: none", type=at_least_0)
    add("--clip", "largest norm of the gradient; 0: no clipping", type=at_least_0)
    add("--resolution", "pixels a side", type=whole)
    add("--flip", "probability that a real image is mirrored; 0: never, for captions that say left or right", type=at_least_0)
    add("--guidance", "guidance scale of the generated images; 1: none", type=float)
    add("--sampler", "how the opponent draws", choices=["ddim", "ddpm"])
    add("--sampler-steps", "network evaluations a generated image", type=whole)
    parser.add_argument("--num-prompts", type=whole, help="use only the first N rows of the data; omit to use all")
    parser.add_argument("--generated", choices=["latents", "images"], default="latents", help="keep what the opponent draws as latents, or pass it through the VAE and 8 bits as the real images were")
    parser.add_argument("--generation-batch", type=whole, default=16, help="images drawn at once")
    parser.add_argument("--grid-prompts", type=number(int, 0), default=4, help="prompts of the grid in samples/, drawn by every model; 0: no grid")
    add("--seed", "of every random choice", type=number(int, 0))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="what the networks compute in, by autocast; weights stay float32. Omitted: bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--compile", action="store_true", help="compile the loss step: minutes at first, faster afterwards on a GPU")
    parser.add_argument("--save-every", type=number(int, 0), default=50, help="steps between states to resume from; 0: only at an iteration's end")
    parser.add_argument("--checkpoint-activations", action="store_true", help="recompute activations in the backward pass: less memory, about a quarter more work")

    args = parser.parse_args(argv)
    args = argparse.Namespace(**{**PRESETS[args.preset], **vars(args)})
    args.out = args.out or f"runs/{Path(args.data).resolve().name}"
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    for name in ("steps", "lr", "beta"):  # one value each iteration
        values = getattr(args, name)
        setattr(args, name, (values + values[-1:] * args.iterations)[: args.iterations])
    return args


def number(kind: type, low: float):
    """An argparse type: a finite number, not below `low`."""

    def parse_number(text: str):
        value = kind(text)
        if not low <= value < math.inf:
            raise ValueError
        return value

    parse_number.__name__ = f"{kind.__name__} from {low} on"  # how argparse names what it wanted
    return parse_number


def learning_rate(peak: float, step: int, steps: int, warmup: int) -> float:
    """Of optimiser step 1..steps: rises to `peak` at step `warmup`, falls linearly towards 0 after it."""
    rise = step / warmup if warmup else 1.0
    fall = (steps - step + 1) / (steps - warmup) if steps > warmup else 1.0
    return peak * min(1.0, rise, fall)


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    this_run = run.Run(args.out)
    with this_run.lock():
        # -------------------------------------------------------------------------------------------------------------
        # The model and the data
        images = data.CaptionedImages(args.data, args.resolution)
        sd = weights.load(args.model, device=args.device, unet=args.unet)
        if args.resolution % sd.vae.downscale:
            raise InputError(f"--resolution {args.resolution}: must be a multiple of {sd.vae.downscale} for this checkpoint")
        for network in (sd.unet, sd.vae, sd.text_encoder):
            network.requires_grad_(False)
        model_hash = weights.checkpoint_hash(args.model) + (weights.checkpoint_hash(args.unet) if args.unet else "")
        config = {**vars(args), "model_hash": model_hash, "data_hash": weights.fingerprint([images.metadata])}
        this_run.settle(config | run.provenance(), same=[key for key in config if key not in FREE_TO_CHANGE])

        # -------------------------------------------------------------------------------------------------------------
        # Real images -> latents, once
        count = min(len(images), args.num_prompts or len(images))
        real = data.LatentShards(this_run.folder / "cache", range(count))
        encode_images(args, sd, images, real)

        # -------------------------------------------------------------------------------------------------------------
        # Algorithm 1: for k = 1..K, the player theta_k against its past theta_{k-1}
        done = [k for k in range(1, args.iterations + 1) if (this_run.iteration(k) / "checkpoint").exists()]
        if done:
            sd.unet = weights.load_unet(this_run.iteration(max(done)) / "checkpoint", device=args.device).requires_grad_(False)
        for k in range(max(done, default=0) + 1, args.iterations + 1):
            draw_samples(args, this_run, sd, images.captions, f"spin-{k - 1}" if k > 1 else "base")

            # generate x'_0 ~ p_theta_{k-1}(. | c) for the prompts this iteration will draw
            steps = range(1, args.steps[k - 1] + 1)
            drawn = {row for s in steps for row in data.batch_rows(args.seed, k, s, args.batch_size, count)}
            generated = data.LatentShards(this_run.iteration(k) / "generated", sorted(drawn))
            generate(args, sd, images.captions, generated, k)

            # train theta_k, started from theta_{k-1}
            opponent = sd.unet
            policy = copy.deepcopy(opponent).requires_grad_(True)
            train(args, this_run, sd, policy, opponent, images.captions, real, generated, k)

            # promote theta_k: the next opponent
            sd = replace(sd, unet=policy.requires_grad_(False))
            with run.whole_folder(this_run.iteration(k) / "checkpoint") as part:
                weights.save(sd, part)
            this_run.save_state(k, {"step": args.steps[k - 1]})  # the checkpoint has taken the place of the rest
            draw_curves(this_run)
        draw_samples(args, this_run, sd, images.captions, f"spin-{args.iterations}")
        iterations = this_run.summary()
    for line in iterations:
        print("  ".join(f"{name} {value:.4g}" for name, value in line.items()))
    print(f"{args.out}: iter{args.iterations}/checkpoint is the result; samples/grid.png and curves.png show the run")
    return {"out": args.out, "iterations": iterations}


@torch.no_grad()
def encode_images(args: argparse.Namespace, sd, images: data.CaptionedImages, real: data.LatentShards) -> None:
    """Stores mean and log-variance of every real image's latent, and of its mirror image where those may be drawn."""
    orientations = {"": False, "_flipped": True} if args.flip else {"": False}
    for shard, rows in tqdm(real.missing(), "encoding real images", unit="shard", disable=not real.missing()):
        tensors = {f"{name}{suffix}": [] for suffix in orientations for name in ("mean", "logvar")}
        batches = [rows[at : at + ENCODE_BATCH] for at in range(0, len(rows), ENCODE_BATCH)]
        for batch in tqdm(batches, "shard", unit="batch", leave=False):
            pixels = torch.stack([images.image(row) for row in batch]).to(args.device)
            for suffix, flipped in orientations.items():
                mean, logvar = sd.vae.encode(pixels.flip(3) if flipped else pixels)
                tensors[f"mean{suffix}"].append(mean)
                tensors[f"logvar{suffix}"].append(logvar)
        real.write(shard, {name: torch.cat(parts) for name, parts in tensors.items()})


def generate(args: argparse.Namespace, sd, captions: list[str], generated: data.LatentShards, k: int) -> None:
    """Draws and stores the opponent's latent for every row of `generated`; an image's noise depends on its row alone."""
    todo = [
        (shard, [rows[at : at + args.generation_batch] for at in range(0, len(rows), args.generation_batch)])
        for shard, rows in generated.missing()
    ]
    evaluations = args.sampler_steps * sum(len(batches) for _, batches in todo)
    bar = tqdm(total=evaluations, desc=f"iteration {k}: generating", unit="step", disable=not todo)
    for shard, batches in todo:
        latents = []
        for rows in batches:
            generators = [data.generator(args.seed, k, row) for row in rows]
            x0 = draw_latents(args, sd, [captions[row] for row in rows], generators, bar)
            if args.generated == "images":
                x0 = through_pixels(sd, x0, generators)
            latents.append(x0)
        generated.write(shard, {"x0": torch.cat(latents)})
    bar.close()


def draw_latents(args: argparse.Namespace, sd, prompts: list[str], generators: list[torch.Generator], bar: tqdm) -> torch.Tensor:
    """Latents [B,4,h,w] as this run draws them, for training and for the grid alike."""

    def progress(timesteps):
        for t in timesteps:
            yield t
            bar.update()

    size = {"height": args.resolution, "width": args.resolution}
    autocast = getattr(torch, args.dtype)
    return sampler.sample(sd, prompts, args.sampler_steps, args.guidance, generators=generators, sampler=args.sampler, autocast=autocast, progress=progress, **size)


@torch.no_grad()
def through_pixels(sd, x0: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
    """Decodes scaled latents, rounds to 8 bits, encodes again: what happens to an image that is stored as a file."""
    pictures = (sampler.decode(sd, x0) * 255).round() / 255
    encoded = []
    for picture, generator in zip(pictures.split(1), generators):
        mean, logvar = sd.vae.encode(picture * 2 - 1)
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        encoded.append((mean + (0.5 * logvar).exp() * noise) * sd.vae.scaling_factor)
    return torch.cat(encoded)


def train(args, this_run: run.Run, sd, policy, opponent, captions, real, generated, k: int) -> None:
    """Iteration k's optimiser steps on `policy`, from the last saved state if there is one; logs a line a step."""
    steps, device, dtype = args.steps[k - 1], args.device, getattr(torch, args.dtype)
    policy.checkpoint_activations = args.checkpoint_activations
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=args.weight_decay, fused=True)
    state = this_run.load_state(k)
    if state:
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
    first = state.get("step", 0) + 1
    this_run.rewind_log(k, first - 1)

    loss_step = step.spin_step
    if args.compile:
        # without this, rounding differs between the compiled policy and opponent and the loss at theta_k is not log 2
        loss_step = torch.compile(loss_step, fullgraph=True, dynamic=False, options={"emulate_precision_casts": True})
    alphas_cumprod = sd.scheduler.alphas_cumprod.to(device)
    beta = torch.tensor(args.beta[k - 1], device=device)

    bar = tqdm(range(first, steps + 1), f"iteration {k}: training", unit="step", initial=first - 1, total=steps)
    for s in bar:
        began = time.perf_counter()
        lr = learning_rate(args.lr[k - 1], s, steps, args.warmup)
        rows = data.batch_rows(args.seed, k, s, args.batch_size, len(real.rows))
        sums: dict[str, torch.Tensor] = {}
        for at in range(0, args.batch_size, args.micro_batch):
            micro = rows[at : at + args.micro_batch]
            pairs = load_pairs(args, sd, real, generated, k, s, at, micro)
            with torch.no_grad(), torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
                context = sd.encode_prompts([captions[row] for row in micro])
            loss, metrics = loss_step(
                policy, opponent, **pairs, context=context, alphas_cumprod=alphas_cumprod, beta=beta,
                prediction_type=sd.scheduler.prediction_type, link=args.link, autocast=dtype,
            )  # fmt: skip
            share = len(micro) / args.batch_size
            (loss * share).backward()
            for name, value in (metrics | {"loss": loss.detach()}).items():
                sums[name] = sums.get(name, 0.0) + value.mean() * share

        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.clip or math.inf)
        if not torch.isfinite(sums["loss"] + grad_norm):
            raise InputError(f"iteration {k}, step {s}: loss {sums['loss']:.4g}, gradient norm {grad_norm:.4g}; lower --lr, and the same command goes on from the last state in {this_run.iteration(k)}")
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        line = {"iteration": k, "step": s, "loss": sums["loss"].item(), "lr": lr}
        line |= {name: sums[name].item() for name in ("margin", "implicit_accuracy", "delta_data", "delta_gen")}
        this_run.log(line | {"grad_norm": grad_norm.item(), "seconds": time.perf_counter() - began})
        bar.set_postfix(loss=f"{line['loss']:.4f}", accuracy=f"{line['implicit_accuracy']:.2f}")
        if s == steps or (args.save_every and s % args.save_every == 0):
            # all that is random is a function of the step, so the step is all that resuming needs of it
            this_run.save_state(k, {"step": s, "policy": policy.state_dict(), "optimizer": optimizer.state_dict()})


def load_pairs(args, sd, real: data.LatentShards, generated: data.LatentShards, k: int, s: int, at: int, rows: list[int]) -> dict:
    """The real and generated latents of some rows of a batch, starting at its place `at`, with their t and eps."""
    shape = real.read("mean", rows[:1]).shape[1:]
    draws = [data.draw(args.seed, k, s, at + i, shape, sd.scheduler.num_train_timesteps) for i in range(len(rows))]
    random = {name: torch.stack([d[name] for d in draws]) for name in draws[0]}
    mean, logvar = real.read("mean", rows), real.read("logvar", rows)
    if args.flip:
        flipped = (random["flip"] < args.flip)[:, None, None, None]
        mean = torch.where(flipped, real.read("mean_flipped", rows), mean)
        logvar = torch.where(flipped, real.read("logvar_flipped", rows), logvar)
    pairs = {
        "x0_data": (mean + (0.5 * logvar).exp() * random["posterior"]) * sd.vae.scaling_factor,
        "x0_gen": generated.read("x0", rows),
        "eps": random["eps"],
        "t": random["t"],
    }
    return {name: tensor.to(args.device) for name, tensor in pairs.items()}


def draw_samples(args: argparse.Namespace, this_run: run.Run, sd, captions: list[str], name: str) -> None:
    """samples/<name>/: the data's first prompts at fixed seeds; samples/grid.png: these, one column a model so far."""
    prompts = list(dict.fromkeys(captions))[: args.grid_prompts]
    folder = this_run.folder / "samples"
    todo = [i for i in range(len(prompts)) if not (folder / name / f"{i}.png").exists()]
    with tqdm(total=args.sampler_steps * len(todo), desc=f"samples of {name}", unit="step", disable=not todo) as bar:
        for i in todo:
            generator = torch.Generator("cpu").manual_seed(GRID_SEED + i)
            picture = sampler.decode(sd, draw_latents(args, sd, [prompts[i]], [generator], bar))[0]
            text = viz.parameters(prompts[i], "", GRID_SEED + i, args.sampler_steps, args.sampler, args.guidance, picture.shape, name)
            with run.whole_file(folder / name / f"{i}.png") as part:
                viz.save_png(viz.to_pil(picture), part, text)
    if prompts:
        models = ["base", *(f"spin-{k}" for k in range(1, args.iterations + 1))]
        models = [model for model in models if (folder / model / f"{len(prompts) - 1}.png").exists()]
        rows = [[Image.open(folder / model / f"{i}.png") for model in models] for i in range(len(prompts))]
        with run.whole_file(folder / "grid.png") as part:
            viz.save_png(viz.grid(rows, models, prompts), part)


def draw_curves(this_run: run.Run) -> None:
    """curves.png: what the log says, step by step through all iterations."""
    log = this_run.read_log()
    names = {"loss": ["loss"], "margin": ["margin"], "implicit accuracy": ["implicit_accuracy"], "policy error - opponent error": ["delta_data", "delta_gen"]}
    panels = {title: {name: [line[name] for line in log] for name in lines} for title, lines in names.items()}
    ends = [i for i, (line, after) in enumerate(zip(log, log[1:]), start=1) if after["iteration"] > line["iteration"]]
    with run.whole_file(this_run.folder / "curves.png") as part:
        viz.save_png(viz.line_charts(panels, ends), part)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)
