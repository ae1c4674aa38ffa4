"""Self-play fine-tuning of a Stable Diffusion model: SPIN-Diffusion (arXiv 2402.10210), Algorithm 1.

    python train.py --model FOLDER --data FOLDER

For k = 1..K: generate an image from theta_{k-1} for every prompt that the iteration will draw; train theta_k, started
from theta_{k-1}, to tell the real images from those, with the SPIN loss (C.6); promote it to be the next opponent.
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

from spin import data, run, sampler, viz, weights
from spin.loss import LINKS
from spin.run import InputError
from spin.step import spin_step

# The paper's hyper-parameters (appendix A), taken literally: iteration 1's 50 steps end inside the 200 of warm-up.
# Lists have one value an iteration.
PAPER = {
    "iterations": 3,
    "steps": [50, 500, 200],
    "lr": [2e-5, 2e-5, 5e-8],
    "beta": [2000.0, 5000.0, 5000.0],
    "batch_size": 2048,
    "micro_batch": 8,
    "warmup": 200,
    "weight_decay": 1e-2,
    "clip": 1.0,
    "resolution": 512,
    "flip": 0.5,
    "guidance": 7.5,
    "sampler": "ddim",
    "sampler_steps": 50,
    "seed": 5775709,
}
# The paper does not say these. Clipping and mirroring are as in Diffusion-DPO's public code, 50 sampling steps as in
# the authors' demonstration.
ASSUMED = ("clip", "flip", "sampler", "sampler_steps")
PRESETS = {"paper": PAPER}

ENCODE_BATCH = 4  # images a forward pass of the VAE's encoder
GRID_SEED = 0  # of the first picture of every model in samples/
# Flags that a run may be continued with other values of: of the first three there are hashes, the others change where
# and how a step is computed, which can change rounding, but not what is computed.
MAY_CHANGE = ("model", "unet", "data", "out", "save_every", "device", "compile", "micro_batch", "generation_batch")
MAY_CHANGE += ("checkpoint_activations",)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=argparse.SUPPRESS)
    whole, from_0, share = run.number(int, 1), run.number(float, 0), run.number(float, 0, 1)

    def add(flag: str, help: str, **kwargs) -> None:
        """A flag whose default is the preset's, where it has one."""
        name = flag.strip("-").replace("-", "_")
        default = PAPER.get(name, kwargs.get("default"))
        shown = " ".join(f"{x:g}" for x in default) if isinstance(default, list) else default
        source = "assumed" if name in ASSUMED else "paper" if name in PAPER else "default"
        help += "" if default is None else f" ({source}: {shown})"
        parser.add_argument(flag, help=help, **({"default": argparse.SUPPRESS} if name in PAPER else {}), **kwargs)

    add("--model", "theta_0: a checkpoint folder in the diffusers layout", required=True)
    add("--unet", "a folder whose UNet to start from instead of the model's own")
    add("--data", "folder of images with metadata.jsonl (file_name, text)", required=True)
    add("--out", "run folder (default: runs/<name of the data folder>)")
    add("--preset", "where flags that are not given get their values", choices=list(PRESETS), default="paper")
    add("--loss", "spin: equation (C.6)", choices=["spin"], default="spin")
    add("--link", "the convex function l around the margin", choices=list(LINKS), default="logistic")
    add("--iterations", "self-play iterations K; each renews the opponent", type=whole)
    add("--steps", "optimiser steps: one value, or one an iteration, the last repeated", type=whole, nargs="+")
    add("--lr", "AdamW's learning rate after warm-up: one value, or one an iteration", type=from_0, nargs="+")
    add("--beta", "weight of half the margin, errors being means: one, or one an iteration", type=from_0, nargs="+")
    add("--batch-size", "pairs an optimiser step", type=whole)
    add("--micro-batch", "pairs a forward pass; the gradients of a batch are accumulated", type=whole)
    add("--warmup", "steps in which the learning rate rises; then it falls linearly to 0", type=run.number(int, 0))
    add("--weight-decay", "AdamW's; 0: none", type=from_0)
    add("--clip", "norm that longer gradients are cut to; 0: never", type=from_0)
    add("--resolution", "pixels a side", type=whole)
    add("--flip", "probability of mirroring a real image; 0: never, if captions say left and right", type=share)
    add("--guidance", "guidance scale of the generated images; 1: none", type=from_0)
    add("--sampler", "how the opponent draws", choices=["ddim", "ddpm"])
    add("--sampler-steps", "network evaluations a generated image", type=whole)
    add("--num-prompts", "use only the first N rows of the data (default: all)", type=whole)
    generated = {"choices": ["latents", "images"], "default": "latents"}
    add("--generated", "keep latents as drawn, or decode, round to 8 bits and encode them", **generated)
    add("--generation-batch", "images drawn at once", type=whole, default=16)
    add("--grid-prompts", "prompts that every model draws for samples/; 0: none", type=run.number(int, 0), default=4)
    add("--seed", "of every random choice in training and generation", type=run.SEED)
    add("--device", "cpu, cuda, cuda:1, ...", default="cuda" if torch.cuda.is_available() else "cpu")
    dtypes = ["float32", "bfloat16"]
    add("--dtype", "what networks compute in; weights stay float32 (default: bfloat16 on CUDA)", choices=dtypes)
    add("--compile", "compile the loss step: minutes at the start, faster steps on a GPU", action="store_true")
    add("--save-every", "steps between states to resume from; 0: at the end only", type=run.number(int, 0), default=50)
    add("--checkpoint-activations", "store fewer activations: less memory, 1/4 more work", action="store_true")

    given = vars(parser.parse_args(argv))
    args = argparse.Namespace(**PRESETS[given["preset"]] | given)
    for name in ("steps", "lr", "beta"):  # one value each iteration
        values = getattr(args, name)
        if len(given.get(name, ())) > args.iterations:
            parser.error(f"--{name}: {len(values)} values for {args.iterations} iterations")
        setattr(args, name, (values + values[-1:] * args.iterations)[: args.iterations])
    args.out = args.out or f"runs/{Path(args.data).resolve().name}"
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    return args


def main(argv: list[str] | None = None) -> dict:
    """Returns {"out": run folder, "iterations": [a summary of each iteration's log]}."""
    args = parse(argv)
    this_run = run.Run(args.out)
    with this_run.lock():
        # -------------------------------------------------------------------------------------------------------------
        # the model and the data
        images = data.CaptionedImages(args.data, args.resolution)
        sd = weights.load(args.model, device=run.usable(args.device), unet=args.unet)
        for network in (sd.unet, sd.vae, sd.text_encoder):
            network.requires_grad_(False)
        if args.resolution % sd.vae.downscale:
            raise InputError(f"--resolution {args.resolution}: must be a multiple of {sd.vae.downscale}")
        try:
            sd.scheduler.timesteps(args.sampler_steps)
        except ValueError as error:
            raise InputError(f"--sampler-steps: {error}") from None
        hashes = {
            "model_hash": weights.checkpoint_hash(args.model),
            "unet_hash": weights.checkpoint_hash(args.unet) if args.unet else None,
            "data_hash": images.hash(),
        }
        fixed = hashes | {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
        this_run.settle(vars(args) | hashes | run.provenance(), same=fixed)

        # -------------------------------------------------------------------------------------------------------------
        # real images -> latents, once
        print(f"{len(images)} images; {args.iterations} iterations; steps {args.steps} of {args.batch_size} pairs")
        count = min(len(images), args.num_prompts or len(images))
        real = data.LatentShards(this_run.folder / "cache", range(count))
        encode_images(args, sd, images, real)

        # -------------------------------------------------------------------------------------------------------------
        # Algorithm 1: the player theta_k against its own past, theta_{k-1}
        done = this_run.promoted()
        if done:
            sd.unet = weights.load_unet(this_run.checkpoint(done), device=args.device).requires_grad_(False)
        for k in range(done + 1, args.iterations + 1):
            draw_samples(args, this_run, sd, images.captions, k - 1)

            # generate: x'_0 ~ p_theta_{k-1}(. | c) for the prompts that this iteration will draw
            steps = range(1, args.steps[k - 1] + 1)
            drawn = {row for s in steps for row in data.batch_rows(args.seed, k, s, args.batch_size, count)}
            generated = data.LatentShards(this_run.iteration(k) / "generated", sorted(drawn))
            generate(args, sd, images.captions, generated, k)

            # train: theta_k, started from theta_{k-1}, which stays as it is
            policy = copy.deepcopy(sd.unet).requires_grad_(True)
            train(args, this_run, sd, policy, images.captions, real, generated, k)

            # promote: theta_k is the next opponent
            sd = replace(sd, unet=policy.requires_grad_(False))
            with run.whole(this_run.checkpoint(k)) as part:
                weights.save(sd, part)
            this_run.save_state(k, {"step": args.steps[k - 1]})  # its tensors are in the checkpoint now
        draw_samples(args, this_run, sd, images.captions, args.iterations)
        draw_curves(this_run)

    summary = this_run.summary()
    for line in summary:
        print("  ".join(f"{name} {value:.4g}" for name, value in line.items()))
    print(f"result: {this_run.checkpoint(args.iterations)}; see {args.out}/samples/grid.png and {args.out}/curves.png")
    return {"out": args.out, "iterations": summary}


@torch.no_grad()
def encode_images(args, sd, images: data.CaptionedImages, real: data.LatentShards) -> None:
    """Stores mean and log-variance of every real image's latent, and of its mirror image's if that may be drawn."""
    todo = real.missing()
    with tqdm(total=sum(len(rows) for _, rows in todo), desc="encoding real images", disable=not todo) as bar:
        for shard, rows in todo:
            parts = []
            for at in range(0, len(rows), ENCODE_BATCH):
                batch = torch.stack([images.image(row) for row in rows[at : at + ENCODE_BATCH]]).to(args.device)
                encoded = dict(zip(("mean", "logvar"), sd.vae.encode(batch)))
                if args.flip:
                    encoded |= dict(zip(("mean_flipped", "logvar_flipped"), sd.vae.encode(batch.flip(3))))
                parts.append(encoded)
                bar.update(len(batch))
            real.write(shard, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def generate(args, sd, captions: list[str], generated: data.LatentShards, k: int) -> None:
    """Draws and stores theta_{k-1}'s latent for every row of `generated`; its noise depends on seed, k, row alone."""
    todo = generated.missing()
    with tqdm(total=sum(len(rows) for _, rows in todo), desc=f"iteration {k}: generating", disable=not todo) as bar:
        for shard, rows in todo:
            parts = []
            for at in range(0, len(rows), args.generation_batch):
                batch = rows[at : at + args.generation_batch]
                generators = [data.generator(args.seed, k, row) for row in batch]
                x0 = draw_latents(args, sd, [captions[row] for row in batch], generators)
                parts.append(through_pixels(sd, x0, generators) if args.generated == "images" else x0)
                bar.update(len(batch))
            generated.write(shard, {"x0": torch.cat(parts)})


def train(args, this_run: run.Run, sd, policy, captions: list[str], real, generated, k: int) -> None:
    """Optimiser steps of iteration k on `policy` against the opponent sd.unet; a line of the log each.

    Begins after the last saved state, if there is one.
    """
    steps, dtype = args.steps[k - 1], getattr(torch, args.dtype)
    alphas_cumprod = sd.scheduler.alphas_cumprod.to(args.device)
    beta = torch.tensor(args.beta[k - 1], device=args.device)
    policy.checkpoint_activations = args.checkpoint_activations
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=args.weight_decay, fused=True)
    loss_step = spin_step
    if args.compile:
        # without the option, rounding differs between the compiled policy and opponent: not log 2 at theta_k
        loss_step = torch.compile(spin_step, fullgraph=True, dynamic=False, options={"emulate_precision_casts": True})

    first, state = 1, this_run.load_state(k)
    if "policy" in state:
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"] + 1
    this_run.rewind_log(k, first - 1)

    pairs_done, pairs_all = (first - 1) * args.batch_size, steps * args.batch_size
    bar = tqdm(desc=f"iteration {k}: training", unit="pair", initial=pairs_done, total=pairs_all)
    for s in range(first, steps + 1):
        began = time.perf_counter()
        rows = data.batch_rows(args.seed, k, s, args.batch_size, len(real.rows))
        means: dict[str, torch.Tensor] = {}
        for at in range(0, args.batch_size, args.micro_batch):
            micro = rows[at : at + args.micro_batch]
            pairs = load_pairs(args, sd, real, generated, micro, (k, s, at))
            with torch.no_grad(), torch.autocast(policy.conv_in.weight.device.type, dtype, dtype != torch.float32):
                context = sd.encode_prompts([captions[row] for row in micro])
            loss, metrics = loss_step(
                policy, sd.unet, **pairs, context=context, alphas_cumprod=alphas_cumprod, beta=beta,
                prediction_type=sd.scheduler.prediction_type, link=args.link, autocast=dtype,
            )  # fmt: skip
            share = len(micro) / args.batch_size
            (share * loss).backward()
            for name, value in (metrics | {"loss": loss.detach()}).items():
                means[name] = means.get(name, 0.0) + share * value.mean()
            bar.update(len(micro))

        lr = learning_rate(args.lr[k - 1], s, steps, args.warmup)
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.clip or math.inf)
        line = {"iteration": k, "step": s, "loss": means["loss"].item(), "lr": lr}
        line |= {name: means[name].item() for name in ("margin", "implicit_accuracy", "delta_data", "delta_gen")}
        line |= {"grad_norm": grad_norm.item()}
        if not math.isfinite(line["loss"] + line["grad_norm"]):
            bar.close()
            last = this_run.checkpoint(k - 1) if k > 1 else args.model
            raise InputError(f"iteration {k}, step {s}: the loss or its gradient is not finite; last good: {last}")
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        this_run.log(line | {"seconds": time.perf_counter() - began})
        bar.set_postfix(step=s, loss=f"{line['loss']:.4f}", accuracy=f"{line['implicit_accuracy']:.2f}")
        if s == steps or (args.save_every and s % args.save_every == 0):
            # no random state: every draw is a function of the step
            this_run.save_state(k, {"step": s, "policy": policy.state_dict(), "optimizer": optimizer.state_dict()})
            draw_curves(this_run)
    bar.close()


def learning_rate(peak: float, step: int, steps: int, warmup: int) -> float:
    """Of optimiser step 1..steps: rises to `peak` at step `warmup`, then falls linearly, to 0 after the last."""
    rise = step / warmup if warmup else 1.0
    fall = (steps - step + 1) / (steps - warmup) if steps > warmup else 1.0
    return peak * min(1.0, rise, fall)


def load_pairs(args, sd, real: data.LatentShards, generated: data.LatentShards, rows: list[int], when) -> dict:
    """x0_data, x0_gen, eps [B,4,h,w] and t [B] of some rows of a batch; when: iteration, step, place of the first."""
    mean, logvar = real.read("mean", rows), real.read("logvar", rows)
    (k, s, at), timesteps = when, sd.scheduler.num_train_timesteps
    draws = [data.draw(args.seed, k, s, at + i, mean.shape[1:], timesteps) for i in range(len(rows))]
    random = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
    if args.flip:
        flipped = (random["flip"] < args.flip)[:, None, None, None]
        mean = torch.where(flipped, real.read("mean_flipped", rows), mean)
        logvar = torch.where(flipped, real.read("logvar_flipped", rows), logvar)
    x0_data = (mean + (0.5 * logvar).exp() * random["posterior"]) * sd.vae.scaling_factor
    pairs = {"x0_data": x0_data, "x0_gen": generated.read("x0", rows), "eps": random["eps"], "t": random["t"]}
    return {name: tensor.to(args.device) for name, tensor in pairs.items()}


def draw_latents(args, sd, prompts: list[str], generators: list[torch.Generator]) -> torch.Tensor:
    """Scaled latents [B,4,h,w], drawn with this run's settings."""
    side, dtype = args.resolution, getattr(torch, args.dtype)
    settings = {"height": side, "width": side, "sampler": args.sampler, "autocast": dtype}
    try:
        return sampler.sample(sd, prompts, args.sampler_steps, args.guidance, generators=generators, **settings)
    except ValueError as error:
        raise InputError(str(error)) from None


@torch.no_grad()
def through_pixels(sd, x0: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
    """Scaled latents -> decoded, rounded to 8 bits, encoded: what becomes of an image that is kept as a file."""
    pictures = (sampler.decode(sd, x0) * 255).round() / 255
    encoded = []
    for picture, generator in zip(pictures.split(1), generators):
        mean, logvar = sd.vae.encode(picture * 2 - 1)
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        encoded.append((mean + (0.5 * logvar).exp() * noise) * sd.vae.scaling_factor)
    return torch.cat(encoded)


def draw_samples(args, this_run: run.Run, sd, captions: list[str], k: int) -> None:
    """samples/<model k>/: the first prompts of the data, at fixed seeds; samples/grid.png: a column a model so far."""
    prompts = list(dict.fromkeys(captions))[: args.grid_prompts]
    folder = this_run.folder / "samples"
    names = ["base", *(f"spin-{i}" for i in range(1, k + 1))]
    paths = {name: [folder / name / f"{i}.png" for i in range(len(prompts))] for name in names}
    todo = [i for i, path in enumerate(paths[names[k]]) if not path.exists()]
    settings = {"Steps": args.sampler_steps, "Sampler": args.sampler, "CFG scale": args.guidance, "Model": names[k]}
    for i in tqdm(todo, f"samples of {names[k]}", disable=not todo):
        generator = torch.Generator("cpu").manual_seed(GRID_SEED + i)
        picture = viz.to_pil(sampler.decode(sd, draw_latents(args, sd, [prompts[i]], [generator]))[0])
        text = viz.parameters(prompts[i], "", picture.size, settings | {"Seed": GRID_SEED + i})
        with run.whole(paths[names[k]][i]) as part:
            viz.save_png(picture, part, text)
    if prompts:
        names = [name for name in names if all(path.exists() for path in paths[name])]
        columns = [[Image.open(path) for path in paths[name]] for name in names]
        with run.whole(folder / "grid.png") as part:
            viz.save_png(viz.grid(list(zip(*columns)), names, prompts), part)


def draw_curves(this_run: run.Run) -> None:
    """curves.png: what the log says, over the steps of all iterations."""
    log = this_run.read_log()
    panels = {
        "loss": ["loss"],
        "margin": ["margin"],
        "implicit accuracy": ["implicit_accuracy"],
        "policy's error - opponent's error": ["delta_data", "delta_gen"],
    }
    values = {title: {name: [line[name] for line in log] for name in names} for title, names in panels.items()}
    ends = [i for i, (line, next_line) in enumerate(zip(log, log[1:]), start=1) if next_line["step"] == 1]
    with run.whole(this_run.folder / "curves.png") as part:
        viz.save_png(viz.line_charts(values, ends), part)


if __name__ == "__main__":
    sys.exit(run.script("train.py", main))
