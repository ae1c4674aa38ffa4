"""Self-play fine-tuning of a Stable Diffusion model: SPIN-Diffusion (arXiv 2402.10210), Algorithm 1.

    python train.py                                     the miniature world, its baselines and scores: minutes on a CPU
    python train.py --model FOLDER --data FOLDER        the paper's settings on a model and images of yours

For k = 1..K: generate an image from theta_{k-1} for every prompt that the iteration will draw; train theta_k, started
from theta_{k-1}, to tell the real images from those, with the SPIN loss (C.6); promote it to be the next opponent.
The baselines, SFT and Diffusion-DPO, start from theta_0 and see the same real images in the same batches.
The same command, given again after an interruption, goes on where it stopped; a finished stage is not repeated.
"""

import argparse
import copy
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from spin import data, report, run, sampler, toy, viz, weights
from spin.loss import LINKS
from spin.run import InputError
from spin.step import compiled, sft_step, spin_step, spin_trajectory_step

# Of the miniature world, whose captions say left and right, so that nothing is mirrored; and the paper's (appendix A),
# taken literally: iteration 1's 50 steps end inside the 200 of warm-up. Lists have one value an iteration.
SETTINGS = {
    "iterations": (3, 3),
    "steps": ([100], [50, 500, 200]),
    "lr": ([2e-5], [2e-5, 2e-5, 5e-8]),
    "beta": ([10000.0], [2000.0, 5000.0, 5000.0]),
    "sft_lr": (3e-5, 1e-5),
    "dpo_lr": (1e-6, 2e-5),
    "dpo_beta": (20000.0, 2000.0),
    "batch_size": (16, 2048),
    "micro_batch": (16, 8),
    "warmup": (10, 200),
    "weight_decay": (1e-2, 1e-2),
    "clip": (1.0, 1.0),
    "resolution": (toy.SIDE, 512),
    "flip": (0.0, 0.5),
    "guidance": (3.0, 7.5),
    "sampler": ("ddim", "ddim"),
    "sampler_steps": (20, 50),
    "generation_batch": (64, 16),
    "grid_prompts": (5, 4),
    "seed": (0, 5775709),
}
TOY, PAPER = ({name: both[i] for name, both in SETTINGS.items()} for i in (0, 1))
# The paper does not say these. Clipping and mirroring are as in Diffusion-DPO's public code, 50 sampling steps as in
# the authors' demonstration.
ASSUMED = ("clip", "flip", "sampler", "sampler_steps", "micro_batch", "generation_batch", "grid_prompts")
# Found on the validation prompts by tutorial/tuning.py, with as many trials for each method.
TUNED = {"spin": ("lr", "beta"), "sft": ("sft_lr",), "dpo": ("dpo_lr", "dpo_beta")}  # a method's
TUNED |= {"all": sum(TUNED.values(), ()), "spin-trajectory": TUNED["spin"]}
PRESETS = {"toy": TOY, "paper": PAPER}

ENCODE_BATCH = 4  # images a forward pass of the VAE's encoder
GRID_SEED = 0  # of the first picture of every model in samples/
SCORE_SEED = 1_000_000  # of the first of the pictures that are scored: the same noise for every model
# Flags that a run may be continued with other values of: of the first three there are hashes, the others change where
# and how a step is computed, which can change rounding, but not what is computed.
MAY_CHANGE = ("model", "unet", "data", "out", "save_every", "device", "compile", "micro_batch", "generation_batch")
MAY_CHANGE += ("checkpoint_activations",)


SOURCES = """toy: chosen so that the story takes minutes on a CPU; tuned: by tutorial/tuning.py on validation prompts;
paper: from its appendix A; assumed: the paper does not say, see ASSUMED in train.py."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=argparse.SUPPRESS, epilog=SOURCES)
    whole, from_0, share = run.number(int, 1), run.number(float, 0), run.number(float, 0, 1)

    def add(flag: str, help: str, **kwargs) -> None:
        """A flag whose default is the preset's, where it has one."""
        name = flag.strip("-").replace("-", "_")
        defaults = []
        for preset, values in PRESETS.items() if name in PAPER else [("default", kwargs)]:
            value = values.get(name, values.get("default"))
            shown = " ".join(f"{x:g}" if isinstance(x, float) else f"{x}" for x in np.atleast_1d(value).tolist())
            tuned, assumed = name in TUNED["all"], name in ASSUMED
            source = {"toy": ", tuned" * tuned, "paper": ", assumed" * assumed}.get(preset, "")
            defaults += [] if value is None else [f"{preset}: {shown}{source}"]
        help += f" ({'; '.join(defaults)})" if defaults else ""
        parser.add_argument(flag, help=help, **({"default": argparse.SUPPRESS} if name in PAPER else {}), **kwargs)

    models = "theta_0: a checkpoint folder in the diffusers layout, a hub id like org/name, or a single original file"
    add("--model", f"{models} (default: the miniature world's base)")
    add("--unet", "another one, or a folder unet/, whose UNet to start from instead of the model's own")
    add("--data", "folder of images with metadata.jsonl: file_name, text (default: the miniature world's curated set)")
    add("--out", "run folder (default: runs/toy, or runs/<name of the data folder>)")
    presets = "where flags that are not given get their values (default: toy without --model, paper with it)"
    add("--preset", presets, choices=list(PRESETS))
    losses = "spin: self-play by equation (C.6); spin-trajectory: by (C.5), on the path by which the opponent drew, "
    losses += "guided, but compared to its prediction without guidance; sft, dpo: a baseline; all: spin and both "
    losses += "(default: all without --data, spin with it)"
    add("--loss", losses, choices=["all", "spin", "spin-trajectory", "sft", "dpo"])
    noises = "whether the images of a pair, also of DPO's, are drowned in the same noise; the paper says both"
    add("--noise", noises, choices=["shared", "independent"], default="shared")
    add("--link", "self-play's convex function l around the margin", choices=list(LINKS), default="logistic")
    add("--iterations", "self-play iterations K; each renews the opponent", type=whole)
    add("--steps", "optimiser steps: one value, or one an iteration, the last repeated", type=whole, nargs="+")
    add("--lr", "AdamW's learning rate after warm-up: one value, or one an iteration", type=from_0, nargs="+")
    add("--beta", "weight of half the margin, errors being means: one, or one an iteration", type=from_0, nargs="+")
    add("--sft-lr", "SFT's learning rate; it takes the steps of all iterations", type=from_0)
    add("--dpo-lr", "Diffusion-DPO's learning rate; it takes the steps of all iterations", type=from_0)
    add("--dpo-beta", "Diffusion-DPO's beta", type=from_0)
    add("--batch-size", "pairs an optimiser step", type=whole)
    add("--micro-batch", "pairs a forward pass; the gradients of a batch are accumulated", type=whole)
    add("--warmup", "steps in which the learning rate rises; then it falls linearly to 0", type=run.number(int, 0))
    add("--weight-decay", "AdamW's: share of a weight lost a step, times the learning rate", type=from_0)
    add("--clip", "norm that longer gradients are cut to; 0: never", type=from_0)
    add("--resolution", "pixels a side", type=whole)
    add("--flip", "probability of mirroring a real image; 0: never, if captions say left and right", type=share)
    add("--guidance", "guidance scale of the generated images; 1: none", type=from_0)
    add("--sampler", "how the opponent draws", choices=["ddim", "ddpm"])
    add("--sampler-steps", "network evaluations a generated image", type=whole)
    add("--num-prompts", "use only the first N rows of the data (default: all)", type=whole)
    generated = {"choices": ["latents", "images"], "default": "latents"}
    add("--generated", "keep latents as drawn, or decode, round to 8 bits and encode them", **generated)
    add("--generation-batch", "images drawn at once", type=whole)
    add("--grid-prompts", "prompts that every model draws for samples/; 0: none", type=run.number(int, 0))
    splits = {"choices": ["test", "validation", "none"], "default": "test"}
    add("--score", "the miniature world's prompts that models are scored on at the end", **splits)
    add("--score-images", "pictures a prompt and model for the scores", type=whole, default=2)
    add("--seed", "of every random choice in training and generation", type=run.SEED)
    add("--device", "cpu, cuda, cuda:1, ...", default="cuda" if torch.cuda.is_available() else "cpu")
    dtype = "what networks compute in; weights stay float32 (default: bfloat16 on CUDA, else float32)"
    add("--dtype", dtype, choices=["float32", "bfloat16"])
    compiled = "compile the loss step: minutes at the start, faster steps on a GPU (default: on CUDA)"
    add("--compile", compiled, action=argparse.BooleanOptionalAction)
    add("--save-every", "steps between states to resume from; 0: at the end only", type=run.number(int, 0), default=50)
    add("--checkpoint-activations", "store fewer activations: less memory, 1/4 more work", action="store_true")

    given = vars(parser.parse_args(argv))
    given["preset"] = given["preset"] or ("paper" if given["model"] else "toy")
    args = argparse.Namespace(**PRESETS[given["preset"]] | given)
    if args.preset == "paper" and not (args.model and args.data):
        parser.error("--preset paper, the default with --model, needs both --model and --data")
    args.world = args.data is None  # the miniature one
    args.loss = args.loss or ("all" if args.world else "spin")
    for name in TUNED["all"]:
        if name in given and name not in TUNED[args.loss]:
            own = " and ".join(f"--{of_loss.replace('_', '-')}" for of_loss in TUNED[args.loss])
            parser.error(f"--{name.replace('_', '-')}: --loss {args.loss} has {own} instead")
    if args.world and args.score != "none" and args.resolution != toy.SIDE:
        parser.error(f"--resolution: the miniature world's score needs {toy.SIDE} pixels a side; or say --score none")
    if args.loss == "spin-trajectory" and (args.noise, args.generated, args.sampler) != ("shared", "latents", "ddim"):
        parser.error(
            "--loss spin-trajectory: for a path drawn by ddim, without --noise independent, --generated images"
        )
    if args.loss in ("sft", "dpo") and args.link != "logistic" or args.loss == "sft" and args.noise != "shared":
        parser.error(f"--link and --noise: not for --loss {args.loss}, which has no choice there")
    for name in ("steps", "lr", "beta"):  # one value each iteration
        values = getattr(args, name)
        if len(given.get(name, ())) > args.iterations:
            parser.error(f"--{name}: {len(values)} values for {args.iterations} iterations")
        setattr(args, name, (values + values[-1:] * args.iterations)[: args.iterations])
    args.out = args.out or ("runs/toy" if args.world else f"runs/{Path(args.data).resolve().name}")
    args.data = args.data or f"{args.out}/curated"
    args.model = args.model or str(toy.BASE)
    cuda = args.device.startswith("cuda")
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.compile = cuda if args.compile is None else args.compile
    return args


@dataclass
class Stage:
    """One model to train, from the opponent it is trained against."""

    model: str  # spin-1, spin-2, ..., sft, dpo
    loss: str  # spin, spin-trajectory, sft, dpo
    batches: list[tuple[int, int]]  # (iteration, step) of each optimiser step: the draws' key
    lr: float
    beta: float = 0.0

    @classmethod
    def of(cls, model: str, args) -> "Stage":
        every = [(k, s) for k in range(1, args.iterations + 1) for s in range(1, args.steps[k - 1] + 1)]
        if model == "sft":
            return cls(model, "sft", every, args.sft_lr)
        if model == "dpo":
            return cls(model, "dpo", every, args.dpo_lr, args.dpo_beta)
        k = int(model.removeprefix("spin-"))
        loss = "spin" if args.loss == "all" else args.loss
        return cls(model, loss, [(i, s) for i, s in every if i == k], args.lr[k - 1], args.beta[k - 1])


def main(argv: list[str] | None = None) -> dict:
    """Returns {"out": run folder, "models": a summary of each model's log, "results": results.json or None}."""
    args = parse(argv)
    this_run = run.Run(args.out)
    with this_run.lock():
        # -------------------------------------------------------------------------------------------------------------
        # the model and the data
        if args.world and not Path(args.data).exists():
            with run.whole(Path(args.data)) as part:
                toy.write_curated(part)
        images = data.CaptionedImages(args.data, args.resolution, pairs=args.loss in ("all", "dpo"))
        theta_0 = weights.load(args.model, device=run.usable(args.device), unet=args.unet)
        for network in (theta_0.unet, theta_0.vae, theta_0.text_encoder):
            network.requires_grad_(False)
        if args.resolution % theta_0.vae.downscale:
            raise InputError(f"--resolution {args.resolution}: must be a multiple of {theta_0.vae.downscale}")
        try:
            theta_0.scheduler.timesteps(args.sampler_steps)
        except ValueError as error:
            raise InputError(f"--sampler-steps: {error}") from None
        hashes = {
            "model_hash": weights.checkpoint_hash(weights.locate(args.model)),
            "unet_hash": weights.checkpoint_hash(weights.locate(args.unet, ("unet",))) if args.unet else None,
            "data_hash": images.hash(),
        }
        free = {*MAY_CHANGE, *TUNED["all"]} - {*TUNED[args.loss]}  # what another method uses changes nothing
        fixed = hashes | {name: value for name, value in vars(args).items() if name not in free}
        this_run.settle(vars(args) | hashes | run.provenance(), same=fixed)

        # -------------------------------------------------------------------------------------------------------------
        # real images -> latents, once
        print(f"{len(images)} images; {args.iterations} iterations; steps {args.steps} of {args.batch_size} pairs")
        count = min(len(images), args.num_prompts or len(images))
        real = data.LatentShards(this_run.folder / "cache", range(count))
        encode_images(args, theta_0, images, real)
        draw_samples(args, this_run, theta_0, images.captions)

        # -------------------------------------------------------------------------------------------------------------
        # Algorithm 1: the player theta_k against its own past, theta_{k-1}
        done = this_run.promoted()
        opponent = player(this_run, theta_0, f"spin-{done}" if done else "base")
        iterations = range(done + 1, args.iterations + 1) if args.loss not in ("sft", "dpo") else []
        for k in iterations:
            # generate: x'_0 ~ p_theta_{k-1}(. | c) for the prompts that this iteration will draw
            stage = Stage.of(f"spin-{k}", args)
            drawn = {row for _, s in stage.batches for row in data.batch_rows(args.seed, k, s, args.batch_size, count)}
            generated = data.LatentShards(this_run.place(stage.model) / "generated", sorted(drawn))
            generate(args, opponent, images.captions, generated, k)

            # train: theta_k, started from theta_{k-1}, which stays as it is; then promote: it is the next opponent
            opponent = train(args, this_run, opponent, stage, images.captions, real, generated)
            draw_samples(args, this_run, theta_0, images.captions)

        # -------------------------------------------------------------------------------------------------------------
        # the baselines, from theta_0
        for model in ("sft", "dpo"):
            if args.loss in ("all", model) and not this_run.checkpoint(model).exists():
                train(args, this_run, theta_0, Stage.of(model, args), images.captions, real, None)
                draw_samples(args, this_run, theta_0, images.captions)

        # -------------------------------------------------------------------------------------------------------------
        # what came of it
        draw_curves(this_run)
        summary = this_run.summary()
        for line in summary:
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()))
        results = judge(args, this_run, theta_0) if args.world and args.score != "none" else None
        if results:
            print("\n" + report.markdown(results, brief=True))
    files = ["samples/grid.png", "curves.png", "results.md", "results.png"]
    there = [name for name in files if (this_run.folder / name).exists()]
    print(f"{args.out}: see {', '.join(there)}; models are in */checkpoint")
    return {"out": args.out, "models": summary, "results": results}


def player(this_run: run.Run, theta_0, model: str):
    """theta_0, with the UNet of one of the run's models in its place unless that is "base"."""
    if model == "base":
        return theta_0
    unet = weights.load_unet(this_run.checkpoint(model), device=theta_0.unet.conv_in.weight.device)
    return replace(theta_0, unet=unet.requires_grad_(False))


def models_of(args, this_run: run.Run) -> list[str]:
    """Those whose checkpoints are there; the baselines come first."""
    names = ["sft", "dpo", *(f"spin-{k}" for k in range(1, args.iterations + 1))]
    return ["base", *(name for name in names if this_run.checkpoint(name).exists())]


@torch.no_grad()
def encode_images(args, sd, images: data.CaptionedImages, real: data.LatentShards) -> None:
    """Stores mean and log-variance of every image's latent, and of its mirror image's if that may be drawn."""
    todo = real.missing()
    kinds = {"": images.image} | ({"rejected_": images.rejected_image} if images.pairs else {})
    with tqdm(total=sum(len(rows) for _, rows in todo), desc="encoding real images", disable=not todo) as bar:
        for shard, rows in todo:
            parts = []
            for at in range(0, len(rows), ENCODE_BATCH):
                encoded = {}
                for kind, image in kinds.items():
                    batch = torch.stack([image(row) for row in rows[at : at + ENCODE_BATCH]]).to(args.device)
                    encoded |= dict(zip((f"{kind}mean", f"{kind}logvar"), sd.vae.encode(batch)))
                    if args.flip:
                        names = (f"{kind}mean_flipped", f"{kind}logvar_flipped")
                        encoded |= dict(zip(names, sd.vae.encode(batch.flip(3))))
                parts.append(encoded)
                bar.update(len(batch))
            real.write(shard, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def generate(args, sd, captions: list[str], generated: data.LatentShards, k: int) -> None:
    """Draws and stores theta_{k-1}'s latent for every row of `generated`; its noise depends on seed, k, row alone.

    For (C.5) it stores the path, [sampler steps,4,h,w] a row, instead of its end: 1.6 MB a row at 512 px and 50 steps.
    """
    todo = generated.missing()
    with tqdm(total=sum(len(rows) for _, rows in todo), desc=f"iteration {k}: generating", disable=not todo) as bar:
        for shard, rows in todo:
            parts = []
            for at in range(0, len(rows), args.generation_batch):
                batch = rows[at : at + args.generation_batch]
                generators = [data.generator(args.seed, k, row) for row in batch]
                path: list[torch.Tensor] | None = [] if args.loss == "spin-trajectory" else None
                x0 = draw_latents(args, sd, [captions[row] for row in batch], generators, path)
                x0 = through_pixels(sd, x0, generators) if args.generated == "images" else x0
                parts.append({"path": torch.stack(path, dim=1).half().cpu()} if path else {"x0": x0})
                bar.update(len(batch))
            generated.write(shard, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def train(args, this_run: run.Run, sd, stage: Stage, captions: list[str], real, generated):
    """Trains a copy of sd.unet, with sd.unet as its opponent, a line of the log each step; returns sd with the copy.

    Begins after the last saved state, if there is one. generated: the opponent's latents, for self-play.
    """
    steps, dtype = len(stage.batches), getattr(torch, args.dtype)
    policy = copy.deepcopy(sd.unet).requires_grad_(True)
    policy.checkpoint_activations = args.checkpoint_activations
    alphas_cumprod = sd.scheduler.alphas_cumprod.to(args.device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=args.weight_decay, fused=True)
    loss_step = {"sft": sft_step, "spin-trajectory": spin_trajectory_step}.get(stage.loss, spin_step)
    players, game = (policy,), {}
    if stage.loss != "sft":
        players = (policy, sd.unet)
        game = {"beta": torch.tensor(stage.beta, device=args.device), "link": args.link}
    if stage.loss == "dpo":
        game["link"] = "logistic"
    if args.compile:
        loss_step = compiled(loss_step)

    first, state = 1, this_run.load_state(stage.model)
    if "policy" in state:
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"] + 1
    this_run.rewind_log(stage.model, first - 1)

    pairs_done, pairs_all = (first - 1) * args.batch_size, steps * args.batch_size
    bar = tqdm(desc=f"training {stage.model}", unit="pair", initial=pairs_done, total=pairs_all)
    for step, (k, s) in enumerate(stage.batches[first - 1 :], start=first):
        began = time.perf_counter()
        rows = data.batch_rows(args.seed, k, s, args.batch_size, len(real.rows))
        means: dict[str, torch.Tensor] = {}
        for at in range(0, args.batch_size, args.micro_batch):
            micro = rows[at : at + args.micro_batch]
            pairs = load_pairs(args, sd, stage, real, generated, micro, (k, s, at))
            with torch.no_grad(), torch.autocast(policy.conv_in.weight.device.type, dtype, dtype != torch.float32):
                context = sd.encode_prompts([captions[row] for row in micro])
            loss, metrics = loss_step(
                *players, **pairs, **game, context=context, alphas_cumprod=alphas_cumprod,
                prediction_type=sd.scheduler.prediction_type, autocast=dtype,
            )  # fmt: skip
            share = len(micro) / args.batch_size
            (share * loss).backward()
            for name, value in ({"loss": loss.detach()} | metrics).items():
                means[name] = means.get(name, 0.0) + share * value.mean()
            bar.update(len(micro))

        lr = learning_rate(stage.lr, step, steps, args.warmup)
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.clip or math.inf)
        line = {"model": stage.model, "iteration": k, "step": s}
        line |= dict(zip(means, torch.stack(list(means.values())).tolist()))  # read back at once
        line |= {"lr": lr, "grad_norm": grad_norm.item()}
        if not math.isfinite(line["loss"] + line["grad_norm"]):
            bar.close()
            last = this_run.checkpoint(f"spin-{k - 1}") if stage.model == f"spin-{k}" and k > 1 else args.model
            raise InputError(f"{stage.model}, step {step}: the loss or its gradient is not finite; last good: {last}")
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        this_run.log(line | {"seconds": time.perf_counter() - began})
        bar.set_postfix(step=step, loss=f"{line['loss']:.4f}")
        if step == steps or (args.save_every and step % args.save_every == 0):
            # no random state: every draw is a function of the step
            state = {"step": step, "policy": policy.state_dict(), "optimizer": optimizer.state_dict()}
            this_run.save_state(stage.model, state)
            draw_curves(this_run)
    bar.close()

    sd = replace(sd, unet=policy.requires_grad_(False))
    with run.whole(this_run.checkpoint(stage.model)) as part:
        weights.save(sd, part)
    this_run.save_state(stage.model, {"step": steps})  # its tensors are in the checkpoint now
    return sd


def learning_rate(peak: float, step: int, steps: int, warmup: int) -> float:
    """Of optimiser step 1..steps: rises to `peak` at step `warmup`, then falls linearly, to 0 after the last."""
    rise = step / warmup if warmup else 1.0
    fall = (steps - step + 1) / (steps - warmup) if steps > warmup else 1.0
    return peak * min(1.0, rise, fall)


def load_pairs(args, sd, stage: Stage, real, generated, rows: list[int], when: tuple[int, int, int]) -> dict:
    """What the step of the stage's loss takes of some rows of a batch, on the device: x0_data, eps, t, ...

    real, generated: `data.LatentShards`. when: iteration, step, and the place in the batch of the first row.
    """
    (k, s, at), timesteps = when, torch.arange(sd.scheduler.num_train_timesteps)
    if stage.loss == "spin-trajectory":
        timesteps = sd.scheduler.timesteps(args.sampler_steps)
    shape = real.read("mean", rows[:1]).shape[1:]
    draws = [data.draw(args.seed, k, s, at + i, shape, len(timesteps)) for i in range(len(rows))]
    random = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}

    def encoded(kind: str) -> torch.Tensor:
        mean, logvar = real.read(f"{kind}mean", rows), real.read(f"{kind}logvar", rows)
        if args.flip:
            flipped = (random["flip"] < args.flip)[:, None, None, None]
            mean = torch.where(flipped, real.read(f"{kind}mean_flipped", rows), mean)
            logvar = torch.where(flipped, real.read(f"{kind}logvar_flipped", rows), logvar)
        return (mean + (0.5 * logvar).exp() * random["posterior"]) * sd.vae.scaling_factor

    pairs = {"x0_data": encoded(""), "eps": random["eps"], "t": timesteps[random["t"]]}
    if stage.loss == "spin-trajectory":
        pairs["x_t_gen"] = generated.read("path", rows, random["t"].tolist())
    elif stage.loss != "sft":
        pairs["x0_gen"] = generated.read("x0", rows) if stage.loss == "spin" else encoded("rejected_")
        if args.noise == "independent":
            pairs["eps_gen"] = random["eps_gen"]
    return {name: tensor.to(args.device) for name, tensor in pairs.items()}


def draw_latents(args, sd, prompts: list[str], generators: list[torch.Generator], path=None) -> torch.Tensor:
    """Scaled latents [B,4,h,w], drawn with this run's settings; path: see `sampler.sample`'s trajectory."""
    side, dtype = args.resolution, getattr(torch, args.dtype)
    settings = {"height": side, "width": side, "sampler": args.sampler, "autocast": dtype, "trajectory": path}
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


def draw_samples(args, this_run: run.Run, theta_0, captions: list[str]) -> None:
    """samples/<model>/: what each model draws for a few prompts, at fixed seeds; samples/grid.png: a column a model.

    The prompts are the data's first, or on the miniature world of those to be scored, with the ideal picture last.
    """
    scenes = toy.split()["test" if args.score == "none" else args.score][: args.grid_prompts] if args.world else []
    prompts = [scene.caption for scene in scenes] or list(dict.fromkeys(captions))[: args.grid_prompts]
    folder, columns = this_run.folder / "samples", {}
    for model in models_of(args, this_run):
        paths = [folder / model / f"{i}.png" for i in range(len(prompts))]
        todo = [i for i, path in enumerate(paths) if not path.exists()]
        sd = player(this_run, theta_0, model) if todo else None
        settings = {"Steps": args.sampler_steps, "Sampler": args.sampler, "CFG scale": args.guidance, "Model": model}
        for i in tqdm(todo, f"samples of {model}", disable=not todo):
            generator = torch.Generator("cpu").manual_seed(GRID_SEED + i)
            picture = viz.to_pil(sampler.decode(sd, draw_latents(args, sd, [prompts[i]], [generator]))[0])
            text = viz.parameters(prompts[i], "", picture.size, settings | {"Seed": GRID_SEED + i})
            with run.whole(paths[i]) as part:
                viz.save_png(picture, part, text)
        columns[model] = [Image.open(path) for path in paths]
    if scenes:
        columns["ideal"] = [toy.to_pil(toy.ideal(scene)) for scene in scenes]
    if prompts:
        with run.whole(folder / "grid.png") as part:
            cell = 4 * toy.SIDE if scenes else 192
            viz.save_png(viz.grid(list(zip(*columns.values())), list(columns), prompts, cell), part)


def draw_curves(this_run: run.Run) -> None:
    """curves.png: what the log says, over the steps of self-play's iterations and of each baseline."""
    log = this_run.read_log()
    panels, ends = {}, []
    for who in ("spin", "sft", "dpo"):
        lines = [line for line in log if line["model"].startswith(who)]
        ends += [i for i, (line, after) in enumerate(zip(lines, lines[1:]), start=1) if after["step"] == 1]
        titles = {
            "loss": ["loss"],
            "margin": ["margin"],
            "implicit accuracy": ["implicit_accuracy"],
            "policy's error - opponent's error": ["delta_data", "delta_gen"],
        }
        for title, names in titles.items() if lines else ():
            if names[0] in lines[0]:
                panels[f"{who}: {title}"] = {name: [line[name] for line in lines] for name in names}
    with run.whole(this_run.folder / "curves.png") as part:
        viz.save_png(viz.line_charts(panels, sorted(set(ends))), part)


# ---------------------------------------------------------------------------------------------------------------------
# The miniature world's exact score


def judge(args, this_run: run.Run, theta_0) -> dict:
    """Scores every model on prompts that fine-tuning never saw; writes results.json, .md and .png.

    Every model draws from the same noise, at the guidance that the opponents' images were drawn with.
    """
    if not (this_run.folder / "results.json").exists():
        prompts = [scene.caption for scene in toy.split()[args.score]]
        names = models_of(args, this_run)
        with tqdm(total=len(names) * len(prompts) * args.score_images, desc="scoring", unit="image") as bar:
            scores = {name: score(args, player(this_run, theta_0, name), prompts, bar) for name in names}
        title = f"{len(prompts)} {args.score} prompts, {args.score_images} pictures each, guidance {args.guidance:g}"
        report.write(this_run.folder, title, scores, run.read_json(this_run.folder / "config.json"), toy.LESS_IS_BETTER)
    return run.read_json(this_run.folder / "results.json")


def score(args, sd, prompts: list[str], bar: tqdm) -> dict[str, np.ndarray]:
    """`toy.score` of each prompt [N], the mean over its pictures."""
    jobs = [prompt for prompt in prompts for _ in range(args.score_images)]
    parts = []
    for at in range(0, len(jobs), args.generation_batch):
        batch = jobs[at : at + args.generation_batch]
        generators = [torch.Generator("cpu").manual_seed(SCORE_SEED + at + i) for i in range(len(batch))]
        pictures = sampler.decode(sd, draw_latents(args, sd, batch, generators))
        parts.append(toy.score(pictures.permute(0, 2, 3, 1).cpu().numpy(), batch))
        bar.update(len(batch))
    metrics = {name: np.concatenate([part[name] for part in parts]) for name in toy.METRICS}
    return {name: values.reshape(len(prompts), -1).mean(1) for name, values in metrics.items()}


if __name__ == "__main__":
    sys.exit(run.script("train.py", main))
