"""Self-play fine-tuning of a Stable Diffusion model: SPIN-Diffusion (arXiv 2402.10210), Algorithm 1.

    python train.py                                     the miniature world, its baselines and scores: minutes on a CPU
    python train.py --model FOLDER --data FOLDER        the paper's settings on a model and images of yours
    torchrun --nproc_per_node N train.py ...            on N GPUs of one machine

For k = 1..K: generate an image from theta_{k-1} for every prompt that the iteration will draw; train theta_k, started
from theta_{k-1}, to tell the real images from those, with the SPIN loss (C.6); promote it to be the next opponent.
The baselines, SFT and Diffusion-DPO, start from theta_0 and see the same real images in the same batches.
The same command, given again after an interruption, goes on where it stopped; a finished stage is not repeated."""

import argparse
import copy
import gc
import math
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from spin import data, pairs
from spin.eval import estimate as cost
from spin.eval import comparison as judge
from spin.infra import distributed as ranks
from spin.eval import report
from spin.infra import run
from spin.toy import world as toy
from spin.checkpoint import pipeline as weights
from spin.loss import LINKS
from spin.infra.run import InputError
from spin.sampler import SAMPLERS, timesteps
from spin.step import PolicyStep, as_autocast_would, compiled, sft_step, spin_step, spin_trajectory_step

# The miniature world's captions say left and right, so nothing is mirrored. The paper's settings are taken literally:
# iteration 1's 50 steps end inside the 200 of warm-up. Assumed is what it does not say: clipping and mirroring as in
# Diffusion-DPO's public code, which also drops a fifth of the prompts, and 50 sampling steps as in the authors' demo.
TOY, PAPER, ASSUMED, TUNED = run.read_json(Path(data.__file__).with_name("presets.json")).values()
PRESETS = {"toy": TOY, "paper": PAPER}
TUNED |= {"all": sum(TUNED.values(), []), "spin-trajectory": TUNED["spin"]}

# Flags that a run may be continued with other values of: of the first three there are hashes, the others change where
# and how a step is computed, which can change rounding, but not what is computed.
MAY_CHANGE = ("model", "unet", "data", "out", "save_every", "sample_every", "skip_bad", "dry_run", "device", "compile")
MAY_CHANGE += ("opponent_dtype", "micro_batch", "generation_batch", "checkpoint_activations")
WATCHED = 50  # steps over which the known failure is looked for
FORGETTING = """both errors have long been up, on real images more than half as much as on generated ones. The policy \
forgets how to denoise, however good its loss: see 'Reading the picture' in tutorial/00_the_map.md"""
SOURCES = """toy: chosen so that the story takes minutes on a CPU; tuned: by tutorial/tuning.py on validation prompts;
paper: from its appendix A; assumed: the paper does not say."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=argparse.SUPPRESS, epilog=SOURCES)
    either = lambda *names: {"choices": names, "default": names[0]}  # noqa: E731
    whole, from_0, share = run.number(int, 1), run.number(float, 0), run.number(float, 0, 1)

    def add(flag: str, help: str, **kwargs) -> None:  # its default is the preset's, where it has one
        name = flag.strip("-").replace("-", "_")
        source = {"toy": ", tuned" * (name in TUNED["all"]), "paper": ", assumed" * (name in ASSUMED), "default": ""}
        defaults, presets = [], PRESETS if name in PAPER else {"default": {name: kwargs.get("default")}}
        for preset, values in presets.items():
            value = np.atleast_1d(values[name]).tolist()
            shown = " ".join(f"{x:g}" if isinstance(x, float) else f"{x}" for x in value)
            defaults += [] if value == [None] else [f"{preset}: {shown}{source[preset]}"]
        help += f" ({'; '.join(defaults)})" if defaults else ""
        parser.add_argument(flag, help=help, **({"default": argparse.SUPPRESS} if name in PAPER else {}), **kwargs)

    add("--model", "theta_0: diffusers folder, hub id org/name, or original file (default: the miniature world's base)")
    add("--unet", "another one, or a folder unet/, whose UNet to start from instead of the model's own")
    add("--data", "folder of images with metadata.jsonl: file_name, text (default: the miniature world's curated set)")
    add("--out", "run folder (default: runs/toy, or runs/<name of the data folder>)")
    add("--preset", "the other flags' values (default: toy without --model, paper with it)", choices=list(PRESETS))
    losses = "spin: self-play by (C.6); spin-trajectory: by (C.5), on the guided path by which the opponent drew; sft, "
    losses += "dpo: a baseline; all: spin and both (default: all without --data, spin with it)"
    add("--loss", losses, choices=["all", "spin", "spin-trajectory", "sft", "dpo"])
    add("--noise", "of a pair's two images, also of DPO's; the paper says both", **either("shared", "independent"))
    add("--link", "self-play's convex function l around the margin", choices=list(LINKS), default="logistic")
    add("--iterations", "self-play iterations K; each renews the opponent", type=whole)
    add("--steps", "optimiser steps: one value, or one an iteration, the last repeated", type=whole, nargs="+")
    add("--lr", "AdamW's learning rate after warm-up: one value, or one an iteration", type=from_0, nargs="+")
    add("--beta", "weight of half the margin, errors being means: one, or one an iteration", type=from_0, nargs="+")
    add("--sft-lr", "SFT's learning rate; it takes the steps of all iterations", type=from_0)
    add("--dpo-lr", "Diffusion-DPO's learning rate; it takes the steps of all iterations", type=from_0)
    add("--dpo-beta", "Diffusion-DPO's beta", type=from_0)
    add("--batch-size", "pairs an optimiser step, over all GPUs", type=whole)
    add("--micro-batch", "pairs a forward pass on one GPU; the gradients of a batch are accumulated", type=whole)
    add("--warmup", "steps in which the learning rate rises; then it falls linearly to 0", type=run.number(int, 0))
    add("--weight-decay", "AdamW's: share of a weight lost a step, times the learning rate", type=from_0)
    add("--clip", "norm that longer gradients are cut to; 0: never", type=from_0)
    add("--resolution", "pixels a side", type=whole)
    add("--flip", "probability of mirroring a real image; 0: never, if captions say left and right", type=share)
    add("--prompt-dropout", "probability of training a pair with the empty prompt; 0: never", type=share)
    add("--guidance", "guidance scale of the generated images; 1: none", type=from_0)
    add("--sampler", "how the opponent draws; dpm++: DPM-Solver++(2M), for which 20 steps do", choices=SAMPLERS)
    add("--sampler-steps", "network evaluations a generated image; 20 with --sampler dpm++", type=whole)
    add("--num-prompts", "use only the first N rows of the data (default: all)", type=whole)
    add("--skip-bad", "leave out rows of the data that cannot be used, instead of stopping", action="store_true")
    add("--generated", "keep latents, or decode, round to 8 bits and encode them", **either("latents", "images"))
    add("--generation-batch", "images drawn at once", type=whole)
    add("--grid-prompts", "prompts that every model draws for samples/; 0: none", type=run.number(int, 0))
    add("--sample-every", "steps between drawing them also in training; 0: never", type=run.number(int, 0), default=0)
    add("--score", "the miniature world's prompts to score models on", **either("test", "validation", "none"))
    add("--score-images", "pictures a prompt and model for the scores", type=whole, default=2)
    add("--seed", "of every random choice in training and generation", type=run.SEED)
    add("--device", "cpu, cuda, cuda:1, ...", default="cuda" if torch.cuda.is_available() else "cpu")
    dtypes = {"choices": ["float32", "bfloat16"]}
    add("--dtype", "what networks compute in; weights stay float32 (default: bfloat16 on CUDA, else float32)", **dtypes)
    add("--opponent-dtype", "of the opponent's weights in training; no answer changes (default: --dtype)", **dtypes)
    on_off = argparse.BooleanOptionalAction
    add("--compile", "the loss step: minutes at the start, faster steps on a GPU (default: on CUDA)", action=on_off)
    add("--save-every", "steps between states to resume from; 0: at the end only", type=run.number(int, 0), default=50)
    add("--checkpoint-activations", "store fewer activations: less memory, 1/4 more work", action="store_true")
    add("--dry-run", "say what is to do and how long it will take, measured, and stop", action="store_true")

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
        parser.error("--loss spin-trajectory: for a path drawn by ddim, no --noise independent or --generated images")
    if args.loss in ("sft", "dpo") and args.link != "logistic" or args.loss == "sft" and args.noise != "shared":
        parser.error(f"--link and --noise: not for --loss {args.loss}, which has no choice there")
    if "sampler_steps" not in given and args.sampler == "dpm++":
        args.sampler_steps = 20
    if args.batch_size % ranks.WORLD:
        parser.error(f"--batch-size {args.batch_size}: no multiple of the {ranks.WORLD} processes")
    for name in ("steps", "lr", "beta"):  # one value each iteration
        values = getattr(args, name)
        if len(given.get(name, ())) > args.iterations:
            parser.error(f"--{name}: {len(values)} values for {args.iterations} iterations")
        setattr(args, name, (values + values[-1:] * args.iterations)[: args.iterations])
    args.out = args.out or ("runs/toy" if args.world else f"runs/{Path(args.data).resolve().name}")
    args.data = args.data or str(toy.CURATED)
    args.model = args.model or str(toy.BASE)
    cuda = args.device.startswith("cuda")
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.opponent_dtype = args.opponent_dtype or args.dtype
    if args.opponent_dtype == "bfloat16" != args.dtype:
        parser.error("--opponent-dtype bfloat16: only with --dtype bfloat16")
    args.compile = cuda if args.compile is None else args.compile
    return args


@dataclass
class Stage:  # one model to train
    model: str  # spin-1, spin-2, ..., sft, dpo
    loss: str  # spin, spin-trajectory, sft, dpo
    batches: list[tuple[int, int]]  # (iteration, step) of each optimiser step: the draws' key
    lr: float
    beta: float  # SFT has none

    @classmethod
    def of(cls, model: str, args) -> "Stage":
        every = [(k, s) for k in range(1, args.iterations + 1) for s in range(1, args.steps[k - 1] + 1)]
        if model in ("sft", "dpo"):
            return cls(model, model, every, getattr(args, f"{model}_lr"), args.dpo_beta)
        k = int(model.removeprefix("spin-"))
        loss = "spin" if args.loss == "all" else args.loss
        return cls(model, loss, [(i, s) for i, s in every if i == k], args.lr[k - 1], args.beta[k - 1])


def main(argv: list[str] | None = None) -> dict:
    """On rank 0 {"out", "models": a summary of each log, "results": results.json or None}; dry: {"out", "seconds"}."""
    args = parse(argv)
    args.device = run.usable(ranks.own(args.device))
    this_run, rank_0 = run.Run(args.out), ranks.RANK == 0
    with ranks.together(args.device), this_run.lock() if rank_0 else nullcontext():
        # ---- the model and the data ----------------------------------------------------------------------------------
        images = data.CaptionedImages(args.data, args.resolution, args.loss in ("all", "dpo"), args.num_prompts)
        opponent = weights.load(args.model, device=args.device, unet=args.unet)  # theta_0
        for network in (opponent.unet, opponent.vae, opponent.text_encoder):
            network.requires_grad_(False)
        parts = replace(opponent, unet=None)  # what all players share
        if args.resolution % parts.vae.downscale:
            raise InputError(f"--resolution {args.resolution}: must be a multiple of {parts.vae.downscale}")
        timesteps(parts, args.sampler_steps)
        hashes = {"model_hash": weights.checkpoint_hash(weights.locate(args.model))}
        hashes["unet_hash"] = weights.checkpoint_hash(weights.locate(args.unet, ("unet",))) if args.unet else None
        hashes["data_hash"] = images.hash()
        transform = f"{args.resolution}px{'-mirrored' if args.flip else ''}"
        cache = this_run.folder / "cache" / f"{hashes['model_hash']}-{hashes['data_hash']}-{transform}"
        leave_out_bad_rows(args, images, cache)
        free = {*MAY_CHANGE, *TUNED["all"]} - {*TUNED[args.loss]}  # what another method uses changes nothing
        fixed = hashes | {name: value for name, value in vars(args).items() if name not in free}
        if rank_0:
            this_run.settle(vars(args) | hashes | run.provenance(), same=fixed, write=not args.dry_run)

        def player(model: str):  # theta_0, or one of the run's models
            checkpoint, unet = report.models_of(args, this_run)[model]
            return replace(parts, unet=weights.load_unet(unet or checkpoint, device=args.device).requires_grad_(False))

        def draw(model: str, sd) -> None:
            if rank_0:
                report.draw_samples(args, this_run, player, images, (model, sd))

        # ---- what is to do, and what it costs ------------------------------------------------------------------------
        if done := this_run.promoted():
            opponent = player(f"spin-{done}")
        last = 0 if args.loss in ("sft", "dpo") else args.iterations
        self_play = [Stage.of(f"spin-{k}", args) for k in range(done + 1, last + 1)]
        baselines = [model for model in ("sft", "dpo") if args.loss in ("all", model)]
        baselines = [Stage.of(model, args) for model in baselines if not this_run.checkpoint(model).exists()]
        real = data.LatentShards(cache, range(len(images)))
        seconds = 0.0
        for line, more in cost.estimate(args, this_run, opponent, images, real, self_play + baselines, players):
            ranks.say(line)
            seconds += more
        ranks.say(f"in all, about {timedelta(seconds=round(seconds))}")
        if args.dry_run:
            return {"out": args.out, "seconds": seconds}

        # ---- real images -> latents, once ----------------------------------------------------------------------------
        pairs.encode(args, parts, images, real)
        draw("base", None if done else opponent)

        # ---- Algorithm 1: the player theta_k against its own past, theta_{k-1} ---------------------------------------
        for stage in self_play:
            # generate: x'_0 ~ p_theta_{k-1}(. | c) for the prompts that this iteration will draw
            generated = pairs.shards_of(args, this_run, stage, images)
            pairs.generate(args, opponent, images, generated, stage.batches[0][0])

            # train: theta_k, started from theta_{k-1}, which stays as it is; then promote: it is the next opponent
            opponent = train(args, this_run, opponent, stage, images, real, generated, draw)
            gc.collect()  # the optimiser, whose references go round in a circle
            draw(stage.model, opponent)

        # ---- the baselines, from theta_0 -----------------------------------------------------------------------------
        del opponent
        for stage in baselines:
            draw(stage.model, train(args, this_run, player("base"), stage, images, real, None, draw))

        # ---- what came of it -----------------------------------------------------------------------------------------
        if not rank_0:
            return {"out": args.out}
        report.draw_curves(this_run)
        summary = this_run.summary()
        for line in summary:
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()))
        results = report.judge_models(args, this_run, player) if args.world and args.score != "none" else None
        if results:
            print("\n" + judge.markdown(results, brief=True))
    files = ["samples/grid.png", "curves.png", "results.md", "results.png"]
    there = [name for name in files if (this_run.folder / name).exists()]
    print(f"{args.out}: see {', '.join(there)}; models are in */checkpoint")
    return {"out": args.out, "models": summary, "results": results}


def leave_out_bad_rows(args, images: data.CaptionedImages, cache: Path) -> None:
    """Looks at every row of the data, once, and lists in cache/bad_rows.txt those that cannot be used.
    With --skip-bad the others are `images` from now on; without, InputError if there is one."""
    usable, listed = cache / "usable_rows.npy", cache / "bad_rows.txt"
    if ranks.RANK == 0 and not usable.exists():
        keep = np.ones(len(images), dtype=bool)
        with ranks.bar(total=len(images), desc="looking at the data", delay=1) as bar, run.whole(listed) as part:
            with open(part, "w", encoding="utf-8") as file:
                for row, problem in images.inspect(bar):
                    file.write(problem + "\n")
                    keep[row] = False
        if keep.all() or args.skip_bad:
            with run.whole(usable) as part, open(part, "wb") as file:
                np.save(file, keep.nonzero()[0])
    ranks.wait()
    with open(listed, encoding="utf-8") as file:
        first = list(islice(file, 5))
        bad = len(first) + sum(1 for _ in file)
    if bad:
        found = f"{bad} of {len(images)} rows cannot be used; {listed} names them all"
        ranks.say("\n".join([f"{found}, of which the first are", *(f"  {line.strip()}" for line in first)]))
        if not args.skip_bad or bad == len(images):
            raise InputError(found + ". Mend them, or go on without them: --skip-bad" * (bad < len(images)))
        images.keep(np.load(usable))


def players(args, sd, stage: Stage) -> PolicyStep:
    """A copy of sd.unet, the policy, in the step of its loss; sd.unet, its opponent, is kept in --opponent-dtype."""
    policy = copy.deepcopy(sd.unet).requires_grad_(True)
    policy.checkpoint_activations = args.checkpoint_activations
    loss_step = {"sft": sft_step, "spin-trajectory": spin_trajectory_step}.get(stage.loss, spin_step)
    given = {"alphas_cumprod": sd.scheduler.alphas_cumprod.to(args.device), "autocast": getattr(torch, args.dtype)}
    given["prediction_type"] = sd.scheduler.prediction_type
    if stage.loss != "sft":
        given["opponent"] = as_autocast_would(sd.unet, getattr(torch, args.opponent_dtype))
        given["beta"] = torch.tensor(stage.beta, device=args.device)
        given["link"] = "logistic" if stage.loss == "dpo" else args.link
    return PolicyStep(policy, partial(compiled(loss_step) if args.compile else loss_step, **given))


def train(args, this_run: run.Run, sd, stage: Stage, images, real, generated, draw: Callable):
    """Trains a copy of sd.unet, with sd.unet as its opponent, a line of the log each step; returns sd with the copy.
    Begins after the last saved state. real, generated: latents of the images and, for self-play, of the opponent's."""
    steps, size, rank_0 = len(stage.batches), args.batch_size, ranks.RANK == 0
    step_of_loss = players(args, sd, stage)
    policy = step_of_loss.policy
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=args.weight_decay, fused=True)

    first = this_run.steps_saved(stage.model) + 1
    if first > 1:
        state = this_run.load_state(stage.model)
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        del state
    ranks.wait()
    if rank_0:
        this_run.rewind_log(stage.model, first - 1)
    step_of_loss = ranks.parallel(step_of_loss)
    share = size // ranks.WORLD  # of a batch, this rank's
    begin, end = ranks.RANK * share, (ranks.RANK + 1) * share
    recent: deque[tuple[float, float]] = deque(maxlen=WATCHED)
    bar = ranks.bar(None, f"training {stage.model}", steps * size, unit="pair", initial=(first - 1) * size)

    def save(step: int) -> None:  # no random state: every draw is a function of the step
        state = {"step": step, "policy": policy.state_dict(), "optimizer": optimizer.state_dict()}
        this_run.save_state(stage.model, state)

    done = None
    try:
        for step, (k, s) in enumerate(stage.batches[first - 1 :], start=first):
            began, now = time.perf_counter(), f"{stage.model}, step {step}"
            rows = data.batch_rows(args.seed, k, s, size, len(images))
            means: dict[str, torch.Tensor] = {}
            for at in range(begin, end, args.micro_batch):
                micro = rows[at : min(at + args.micro_batch, end)]
                batch = pairs.read(args, sd, stage.loss, images, real, generated, micro, (k, s, at))
                with ranks.alone(step_of_loss, at + args.micro_batch < end):
                    loss, metrics = step_of_loss(**batch)
                    (len(micro) / share * loss).backward()
                for name, value in ({"loss": loss.detach()} | metrics).items():
                    means[name] = means.get(name, 0.0) + len(micro) / size * value.mean()
                bar.update(len(micro) * ranks.WORLD)

            lr = learning_rate(stage.lr, step, steps, args.warmup)
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.clip or math.inf)
            line = {"model": stage.model, "iteration": k, "step": s}
            line |= dict(zip(means, ranks.total(torch.stack(list(means.values()))).tolist()))  # read back at once
            line |= {"lr": lr, "grad_norm": grad_norm.item()}
            if not math.isfinite(line["loss"] + line["grad_norm"]):
                bar.close()
                promoted = stage.model == f"spin-{k}" and k > 1
                last = this_run.checkpoint(f"spin-{k - 1}") if promoted else args.unet or args.model
                raise InputError(f"{now}: the loss or its gradient is not finite; last good: {last}")
            optimizer.param_groups[0]["lr"] = lr  # the one there is
            done = None  # until weights and log are both a step further
            optimizer.step()
            optimizer.zero_grad()
            if rank_0:
                this_run.log(line | {"seconds": time.perf_counter() - began})
            done = step

            bar.set_postfix(step=step, loss=f"{line['loss']:.4f}")
            recent.append((line.get("delta_data", 0.0), line.get("delta_gen", 0.0)))
            if forgetting(recent):
                ranks.say(f"warning: {now}: {FORGETTING}")
                recent = deque([(0.0, 0.0)], maxlen=1)  # said once
            if args.sample_every and step % args.sample_every == 0 and step < steps:
                draw(f"{stage.model}-step-{step:05d}", replace(sd, unet=policy))
            if rank_0 and (step == steps or (args.save_every and step % args.save_every == 0)):
                save(step)
                report.draw_curves(this_run)
    except KeyboardInterrupt:
        if rank_0 and done:
            save(done)
        raise
    bar.close()
    if not all(parameter.isfinite().all() for parameter in policy.parameters()):
        raise InputError(f"{stage.model}: its weights are not finite after the last step; nothing is promoted")

    sd = replace(sd, unet=policy.requires_grad_(False))
    if rank_0:
        with run.whole(this_run.checkpoint(stage.model)) as part:
            weights.save(sd, part)
        this_run.save_state(stage.model, {"step": steps})  # its tensors are in the checkpoint now
    return sd


def forgetting(recent: deque[tuple[float, float]]) -> bool:
    """Whether both errors were up, on real images by more than half as much: the means of (delta_data, delta_gen)."""
    delta_data, delta_gen = np.mean(recent, axis=0)
    return len(recent) == WATCHED and delta_data > delta_gen / 2 > 0


def learning_rate(peak: float, step: int, steps: int, warmup: int) -> float:
    """Of optimiser step 1..steps: rises to `peak` at step `warmup`, then falls linearly, to 0 after the last."""
    rise = step / warmup if warmup else 1.0
    fall = (steps - step + 1) / (steps - warmup) if steps > warmup else 1.0
    return peak * min(1.0, rise, fall)


if __name__ == "__main__":
    sys.exit(run.script("train.py", main, "what is finished is kept, and the same command goes on from there"))
