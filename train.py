"""Self-play fine-tuning of a Stable Diffusion model: SPIN-Diffusion (arXiv 2402.10210).

    python train.py                                the miniature world: minutes on a CPU
    python train.py --model FOLDER --data FOLDER   the paper's settings, your model and images
    torchrun --nproc_per_node N train.py ...       on N GPUs of one machine

For k = 1..K: for every prompt that the iteration uses, generate an image from theta_{k-1}; train
theta_k, initialized from theta_{k-1}, to tell the real images from the generated ones, with the
SPIN loss (C.6); make it the next opponent. The baselines, SFT and Diffusion-DPO, start from theta_0
and see the same rows of the data in the same batches.

After an interruption, the same command resumes where it stopped. Finished stages are not repeated.
"""

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from spin import toy
from spin.checkpoint import (
    Pipeline,
    hash_checkpoint,
    load_unet,
    locate,
    save_pipeline,
)
from spin.checkpoint.pipeline import default_size
from spin.config import LOSS_SETTINGS, PRESETS, STORY_TIME, describe_default
from spin.data import CaptionedImages
from spin.eval import comparison, estimate, report, world
from spin.eval.watch import ForgettingWatch
from spin.infra import distributed
from spin.infra.cli import (
    SEED_TYPE,
    flag_name,
    number,
    provenance,
    run_script,
    warn_of_cut_prompts,
)
from spin.infra.devices import default_dtype, is_cuda, prepare_device, repeat_to_the_bit
from spin.infra.errors import InputError
from spin.infra.files import atomic_write, hash_files
from spin.infra.inspection import check_rows
from spin.infra.interrupt import Interrupted, StopRequest
from spin.infra.run import PLAYERS, Run
from spin.infra.shards import LatentShards
from spin.pairs import (
    PairLoader,
    encode_images,
    generate_images,
    load_preferences,
    rows_of_steps,
)
from spin.sampler import SAMPLERS, SamplingOptions
from spin.scheduler import PREDICTION_TYPES
from spin.step import LossStep, cast_weights_

# ---- Algorithm 1 ---------------------------------------------------------------------------------


@dataclass
class Stage:
    """The training of one model: what it is called, what it minimizes, and for how long."""

    name: str  # spin-1, spin-2, ..., or bounded-1, ...; sft, dpo
    loss: str  # spin, spin-bounded, sft, dpo
    steps: list[tuple[int, int]]  # (iteration, step within it) of every optimizer step
    lr: float
    beta: float


def main(argv: list[str] | None = None) -> dict:
    """Train, and return {"out", "models": a summary of the log, "results": the scores or None}.

    Ranks other than 0 return {"out"}, a dry run {"out", "seconds"}.
    """
    args = parse_args(argv)
    args.device = prepare_device(distributed.local_device(args.device))
    # cuDNN times its algorithms and keeps the fastest. Another run may keep others, and round
    # differently, as it may with other compiled code. Uncompiled runs are spared this.
    torch.backends.cudnn.benchmark = args.compile and not args.deterministic
    if args.deterministic and is_cuda(args.device):
        repeat_to_the_bit()
    run = Run(args.out)
    lock = run.lock() if distributed.is_main() else nullcontext()
    with distributed.process_group(args.device), lock:
        return self_play(args, run)


def self_play(args: argparse.Namespace, run: Run) -> dict:
    """Train every model that is not trained yet, and return what `main` returns."""
    # ---- the model, the data, and what is left to do
    theta_0 = args.unet or args.model
    pipe = base_source(args).load(args.device)
    check_sampling(args, pipe)
    images = load_images(args)
    preferences = preferences_of_world(args, pipe)
    cache = prepare_run(args, run, images, pipe.scheduler.prediction_type)
    real = LatentShards(cache, range(len(images)))
    if real.count_missing() > 0:  # said once: at the first start, before latents are cached
        captions = (images.caption(row) for row in range(len(images)))
        warn_of_cut_prompts(pipe.text_encoder.tokenizer, captions)
        warn_of_resolution(args, pipe)
    if args.dry_run:
        return dry_run(args, run, pipe, images, real, preferences)
    announce(args, run, images)
    shared = replace(pipe, unet=None)  # what all players share: VAE, text encoder, scheduler
    del pipe

    # ---- real images -> latents, once
    encode_images(shared.vae, images, real, mirrored=args.flip > 0, device=args.device)
    update_samples(args, run, images)

    # ---- self-play: the player theta_k against its own past, theta_{k-1}
    for loss in report.losses_of_self_play(args.loss):
        play(args, run, loss, shared, images, real)

    # ---- the baselines, from theta_0, on the same rows of the data in the same batches
    for stage in unfinished_baselines(args, run):
        loader = pair_loader(args, stage.loss, shared, images, real, preferences=preferences)
        train(args, run, stage, theta_0, loader)
        update_samples(args, run, images)

    return report_results(args, run)


def play(
    args: argparse.Namespace,
    run: Run,
    loss: str,
    shared: Pipeline,
    images: CaptionedImages,
    real: LatentShards,
) -> None:
    """Algorithm 1 with one of its losses, from where it stopped.

    shared: theta_0 without its UNet; real: the latents of the images.
    """
    opponent = args.unet or args.model
    last = run.latest_iteration(PLAYERS[loss])
    if last > 0:
        opponent = run.checkpoint(self_play_stage(args, loss, last).name)
    for k in unfinished_iterations(args, run, loss):
        stage = self_play_stage(args, loss, k)

        # generate: x' ~ p_theta_{k-1}(. | c) for the prompts c that this iteration will use
        rows = rows_of_steps(args.seed, stage.steps, args.batch_size, len(images))
        generated = LatentShards(run.model_folder(stage.name) / "generated", rows)
        generate_images(
            load_opponent(args, shared, opponent),
            images,
            real,
            generated,
            seed=args.seed,
            iteration=k,
            options=sampling_options(args),
            batch_size=args.generation_batch,
            compiled=args.compile,
        )

        # train: initialize theta_k from theta_{k-1}; it learns to tell x from x'
        loader = pair_loader(args, loss, shared, images, real, generated)
        train(args, run, stage, opponent, loader)

        # promote: theta_k is the next opponent
        opponent = run.checkpoint(stage.name)
        update_samples(args, run, images)


def load_opponent(
    args: argparse.Namespace, shared: Pipeline, checkpoint: str | Path
) -> Pipeline:
    """Return the player whose UNet is in `checkpoint`, frozen, with weights stored in --dtype."""
    unet = load_unet(checkpoint, device=args.device)
    cast_weights_(unet, getattr(torch, args.dtype))
    return replace(shared, unet=unet).freeze()


# ---- The optimizer loop --------------------------------------------------------------------------


def train(
    args: argparse.Namespace, run: Run, stage: Stage, start: str | Path, loader: PairLoader
) -> None:
    """Train one model and save it, resuming from its last saved state.

    start: the checkpoint of theta_{k-1} (theta_0 for a baseline). The policy starts from it; the
        opponent keeps its weights.
    """
    policy, loss_step = load_players(args, stage, start, loader.pipe)
    optimizer = make_optimizer(args, policy)
    parts = {"policy": policy, "optimizer": optimizer}  # of a state to resume from
    done = resume(run, stage.name, parts)
    distributed.check_same_weights(policy)
    reducer = distributed.GradientReducer(policy)
    watch = ForgettingWatch(stage.name, run.read_log())
    num_steps = len(stage.steps)
    bar = distributed.progress_bar(
        desc=f"training {stage.name}",
        total=num_steps * args.batch_size,
        initial=done * args.batch_size,
        unit="pair",
    )

    with bar, StopRequest(announce=distributed.is_main()) as stop:
        stop.advice = f"{stage.name} resumes from step {done + 1}"
        for step in range(done + 1, num_steps + 1):
            started = time.perf_counter()
            iteration, step_of_iteration = stage.steps[step - 1]

            # ---- forward and backward
            numbers = accumulate_gradients(
                args, policy, loss_step, loader, iteration, step_of_iteration, bar
            )

            # ---- all-reduce over the ranks: gradients, metrics, and whether any rank should stop
            # torch.full, since torch.tensor would wait for the GPU
            numbers["stop"] = torch.full((), float(stop.requested), device=args.device)
            sums = reducer.all_reduce(torch.stack(list(numbers.values())))
            line = dict(zip(numbers, sums.tolist()))  # one read-back: each one syncs the GPU
            stopping = line.pop("stop") > 0

            # ---- the optimizer's step
            line["lr"] = learning_rate(stage.lr, step, num_steps, args.warmup)
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.clip or math.inf)
            line["grad_norm"] = grad_norm.item()
            if not math.isfinite(line["loss"] + line["grad_norm"]):
                raise InputError(
                    f"{stage.name}, step {step}: the loss or its gradient is not finite: {DIVERGED}"
                )
            optimizer.param_groups[0]["lr"] = line["lr"]
            optimizer.step()
            reducer.zero()

            # ---- the log
            line["seconds"] = time.perf_counter() - started
            position = {"model": stage.name, "iteration": iteration, "step": step_of_iteration}
            if distributed.is_main():
                run.append_log({**position, **line})
            bar.set_postfix(step=step, loss=f"{line['loss']:.4f}")
            watch.update(step, line)

            # ---- periodically: sample images, and save a state to resume from
            is_last = step == num_steps
            is_sampled = is_due(step, args.sample_every) and not is_last
            is_saved = is_due(step, args.save_every) or is_last or stopping
            if is_sampled or is_saved:  # bad weights must not replace a good state
                check_weights(stage.name, step, policy)
            if is_sampled:
                sample_in_training(args, run, stage.name, step, loader, policy)
            if is_saved:
                save_state(run, stage.name, step, parts)
                stop.advice = f"{stage.name} resumes from step {step + 1}"
            if is_last:  # no later step would see a signal that came after the sum
                stopping = distributed.any_rank(stop.requested, args.device)
            if stopping:
                raise Interrupted(
                    f"{stage.name}: {step} of {num_steps} steps are saved; "
                    "the same command resumes from there"
                )

    save_model(run, stage.name, num_steps, replace(loader.pipe, unet=policy))


def load_players(
    args: argparse.Namespace, stage: Stage, start: str | Path, shared: Pipeline
) -> tuple[torch.nn.Module, LossStep]:
    """Return the policy, float32 and trainable, and its loss against the frozen opponent.

    Both have the weights of the checkpoint `start`. The opponent's are stored in --dtype.
    """
    dtype = getattr(torch, args.dtype)
    policy = load_unet(start, device=args.device).requires_grad_(True)
    policy.checkpoint_activations = args.checkpoint_activations
    opponent = None
    if stage.loss != "sft":
        opponent = load_unet(start, device=args.device).requires_grad_(False)
        cast_weights_(opponent, dtype)
    loss_step = LossStep(
        stage.loss, opponent, stage.beta, shared.scheduler, args.device, dtype, args.compile
    )
    return policy, loss_step


def make_optimizer(args: argparse.Namespace, policy: torch.nn.Module) -> torch.optim.Optimizer:
    """Return AdamW, whose learning rate is set before every step."""
    return torch.optim.AdamW(
        policy.parameters(), lr=0.0, weight_decay=args.weight_decay, fused=True
    )


def accumulate_gradients(
    args: argparse.Namespace,
    policy: torch.nn.Module,
    loss_step: LossStep,
    loader: PairLoader,
    iteration: int,
    step: int,
    bar,
) -> dict[str, torch.Tensor]:
    """Add this rank's share of a step's gradient to the policy's, one micro-batch at a time.

    Return {"loss" or a metric: this rank's share of its mean over the batch, 0-d}. Summed over the
    ranks, the shares are the means. Nothing here waits for a GPU.

    bar: the progress bar, which advances by the pairs of all ranks.
    """
    pairs_per_rank = args.batch_size // distributed.WORLD_SIZE
    first_pair = distributed.RANK * pairs_per_rank
    numbers = {}
    for begin in range(first_pair, first_pair + pairs_per_rank, args.micro_batch):
        end = min(begin + args.micro_batch, first_pair + pairs_per_rank)
        weight = (end - begin) / args.batch_size
        batch = loader.load(iteration, step, begin, end)
        loss, metrics = loss_step(policy, batch)
        (weight * loss).backward()
        for name, value in {"loss": loss.detach(), **metrics}.items():
            numbers[name] = numbers.get(name, 0.0) + weight * value.mean()
        bar.update((end - begin) * distributed.WORLD_SIZE)
    return numbers


def learning_rate(peak: float, step: int, steps: int, warmup: int) -> float:
    """Return the learning rate at `step`, 1 to `steps`.

    It rises linearly to `peak` at step `warmup`, then falls linearly, to 0 after the last step.
    """
    rise = step / warmup if warmup else 1.0
    fall = (steps - step + 1) / (steps - warmup) if steps > warmup else 1.0
    return peak * min(1.0, rise, fall)


#: What to do about a policy or a loss that is not finite.
DIVERGED = "training diverged; what was saved before is kept. Lower --lr and choose another --out"


def check_weights(name: str, step: int, policy: torch.nn.Module) -> None:
    """Raise InputError if a weight is not finite after optimizer step `step`."""
    for parameter in policy.parameters():
        if not parameter.isfinite().all():
            raise InputError(f"{name}, step {step}: a weight is not finite: {DIVERGED}")


def is_due(step: int, every: int) -> bool:
    """Return whether `step` is a multiple of `every`. An `every` of 0 means never."""
    return every > 0 and step % every == 0


# ---- Files of a model: rank 0 writes them --------------------------------------------------------


def resume(run: Run, name: str, parts: dict) -> int:
    """Load a model's last saved state, and return the number of optimizer steps it has seen.

    Log lines of later steps are dropped and, where training starts anew, what was sampled and
    scored of an earlier model of this name. No random state is saved: every draw is a function of
    the step.

    parts: {name: module or optimizer}, which are loaded in place.
    """
    done = run.saved_steps(name)
    if done > 0:
        state = run.load_state(name)
        for part, holder in parts.items():
            holder.load_state_dict(state[part])
    distributed.barrier()
    if distributed.is_main():
        run.truncate_log(name, done)
        if done == 0:
            report.forget_model(run, name)
    return done


def save_state(run: Run, name: str, step: int, parts: dict) -> None:
    """Save what `resume` loads, after optimizer step `step`, and redraw the curves."""
    if distributed.is_main():
        state = {"step": step}
        for part, holder in parts.items():
            state[part] = holder.state_dict()
        run.save_state(name, state)
        report.update_curves(run)


def save_model(run: Run, name: str, num_steps: int, pipe: Pipeline) -> None:
    """Save a trained model as a checkpoint, which takes the place of its state."""
    check_weights(name, num_steps, pipe.unet)
    if distributed.is_main():
        with atomic_write(run.checkpoint(name)) as temporary:
            save_pipeline(pipe, temporary)
        run.save_state(name, {"step": num_steps})  # the checkpoint holds the weights now
    distributed.barrier()


# ---- Arguments -----------------------------------------------------------------------------------

SOURCES = """In parentheses: the default, or its value in each preset. toy: chosen so that the run
takes minutes on a CPU; tuned: chosen by tutorial/tune_toy.py on validation prompts; paper: from its
appendix A; assumed: not stated in the paper. paper-sdxl: paper, but for what Diffusion-DPO's public
code has for SDXL (PAPER_SDXL in spin/config.py). It is not SPIN's."""

COUNT = number(int, 1)
COUNT_OR_0 = number(int, 0)
NOT_NEGATIVE = number(float, 0)
PROBABILITY = number(float, 0, 1)

# what --help calls a value
METAVARS = {
    str: "PATH",
    COUNT: "N",
    COUNT_OR_0: "N",
    SEED_TYPE: "N",
    NOT_NEGATIVE: "X",
    PROBABILITY: "P",
}


class FlagGroup:
    """Flags under a title of their own in --help.

    A flag that changes what is computed goes into MUST_MATCH, too.
    """

    def __init__(self, parser: argparse.ArgumentParser, title: str):
        self.group = parser.add_argument_group(title)

    def flag(self, name: str, kind: Callable, help: str, **kwargs) -> None:
        """Add a flag. kind: argparse's type of its value."""
        if "choices" not in kwargs:
            kwargs.setdefault("metavar", METAVARS[kind])
        self.group.add_argument(name, type=kind, help=help, **kwargs)

    def setting(self, name: str, kind: Callable, help: str, **kwargs) -> None:
        """Add a flag whose defaults are in spin/config.py."""
        default = describe_default(name.strip("-").replace("-", "_"))
        self.flag(name, kind, f"{help} ({default})", **kwargs)

    def switch(self, name: str, help: str) -> None:
        self.group.add_argument(name, action="store_true", help=help)


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser. The settings of spin/config.py have no defaults yet."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        usage=argparse.SUPPRESS,
        epilog=SOURCES,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=26),
    )

    # ---- what to do
    group = FlagGroup(parser, "what to train, and on what")
    group.flag("--model", str, "theta_0: folder, hub id or single file (the miniature base)")
    group.flag("--unet", str, "checkpoint whose UNet to start from (the model's own)")
    group.flag("--data", str, "folder with metadata.jsonl (the miniature world's curated set)")
    group.flag("--out", str, "run folder (runs/toy, or runs/<name of the data folder>)")
    group.flag("--preset", str, "defaults of the settings (toy without --model, paper with it)",
               choices=list(PRESETS))  # fmt: skip
    group.flag("--loss", str, "spin, its bounded form, a baseline, or all four (all without --data, "
               "else spin)",
               choices=["all", "spin", "spin-bounded", "sft", "dpo"])  # fmt: skip
    group.switch("--dry-run", "estimate how long the run will take, print it, and exit")

    group = FlagGroup(parser, "training; --steps, --lr and --beta: one value, or one per iteration")
    group.setting("--iterations", COUNT, "iterations K of self-play; baselines take all steps")
    group.setting("--steps", COUNT, "optimizer steps", nargs="+")
    group.setting("--lr", NOT_NEGATIVE, "peak learning rate", nargs="+")
    group.setting("--beta", NOT_NEGATIVE, "beta in logit = beta / 2 * margin, or in the bounded "
                  "loss's scale, beta / 4", nargs="+")  # fmt: skip
    group.setting("--sft-lr", NOT_NEGATIVE, "peak learning rate of SFT")
    group.setting("--dpo-lr", NOT_NEGATIVE, "peak learning rate of Diffusion-DPO")
    group.setting("--dpo-beta", NOT_NEGATIVE, "beta of Diffusion-DPO")
    group.setting("--batch-size", COUNT, "pairs per optimizer step, over all GPUs")
    group.setting("--warmup", COUNT_OR_0, "steps of linear warmup; then linear decay to 0")
    group.setting("--weight-decay", NOT_NEGATIVE, "weight decay of AdamW; 0: none")
    group.setting("--clip", NOT_NEGATIVE, "maximum gradient norm; 0: no clipping")
    group.flag("--noise", str, "of a pair's two images; the paper mentions both (shared)",
               choices=["shared", "independent"], default="shared")  # fmt: skip
    group.setting("--seed", SEED_TYPE, "seed of all randomness in training and generation")

    group = FlagGroup(parser, "data")
    group.setting("--resolution", COUNT, "height and width of the images, in pixels")
    group.setting("--flip", PROBABILITY, "probability of mirroring a real image; 0: never")
    group.setting("--prompt-dropout", PROBABILITY, "probability of no prompt; 0: never")
    group.flag("--num-prompts", COUNT, "use only the first N rows of the data (all)")
    group.switch("--skip-bad", "skip data rows that cannot be used, instead of stopping")
    group.switch("--follow-links", "read images through links that leave the data folder")

    group = FlagGroup(parser, "generating the opponent's images")
    group.setting("--guidance", NOT_NEGATIVE, "guidance scale; 1: none")
    group.setting("--sampler", str, "dpm++ is DPM-Solver++(2M)", choices=list(SAMPLERS))
    group.setting("--sampler-steps", COUNT, "sampling steps per image; fewer with dpm++")
    group.setting("--generation-batch", COUNT, "images generated at once")
    group.flag("--prediction-type", str, "what the UNet predicts (what the model's files say)",
               choices=PREDICTION_TYPES)  # fmt: skip

    group = FlagGroup(parser, "looking at the run")
    group.setting("--grid-prompts", COUNT_OR_0, "prompts in samples/grid.png; 0: no grid")
    group.flag("--sample-every", COUNT_OR_0, "steps between grids; 0: none (0)", default=0)
    group.flag("--score", str, "the miniature world's prompts to score all models on (test)",
               choices=["test", "validation", "none"], default="test")  # fmt: skip
    group.flag("--score-images", COUNT, "images per prompt and model (2)", default=2)
    group.flag("--score-guidance", NOT_NEGATIVE, "where to look for each model's best guidance, on "
               "validation prompts; one value: do not (3 5 7.5)",
               nargs="+", default=[3.0, 5.0, 7.5])  # fmt: skip

    group = FlagGroup(parser, "speed and memory; only --dtype changes more than rounding")
    group.flag("--device", str, "cpu, cuda, cuda:1, ... (%(default)s)", metavar="NAME",
               default="cuda" if torch.cuda.is_available() else "cpu")  # fmt: skip
    group.flag("--dtype", str, "of the networks (toy: float32; paper: bfloat16 on CUDA)",
               choices=["float32", "bfloat16"])  # fmt: skip
    group.setting("--micro-batch", COUNT, "pairs per forward pass on one GPU")
    group.group.add_argument("--compile", action=argparse.BooleanOptionalAction,
                             help="compile networks, for minutes (paper: on CUDA)")  # fmt: skip
    group.group.add_argument("--deterministic", action=argparse.BooleanOptionalAction,
                             help="on a GPU: equal runs, equal bits; slower (toy: yes)")  # fmt: skip
    group.switch("--checkpoint-activations", "less memory, a quarter more compute")
    group.flag("--save-every", COUNT_OR_0, "steps between states; 0: only at the end (50)",
               default=50)  # fmt: skip
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the flags, with everything that follows from others filled in."""
    parser = build_parser()
    given = parser.parse_args(argv)  # where a setting is None, it was not given
    preset = given.preset or ("paper" if given.model else "toy")
    parser.set_defaults(**PRESETS[preset])
    args = parser.parse_args(argv)
    args.preset = preset

    # ---- what follows from other flags
    args.world = args.data is None  # whether this is the miniature world
    if args.loss is None:
        args.loss = "all" if args.world else "spin"
    if given.sampler_steps is None:  # dpm++ needs fewer than the presets' ddim
        args.sampler_steps = min(args.sampler_steps, SAMPLERS[args.sampler].steps)
    args.dtype = args.dtype or default_dtype(args.device)
    if args.compile is None:
        args.compile = is_cuda(args.device)

    check_flags(parser, args, given)

    # ---- one value per iteration
    args.steps = one_per_iteration(args.steps, args.iterations)
    args.lr = one_per_iteration(args.lr, args.iterations)
    args.beta = one_per_iteration(args.beta, args.iterations)

    # ---- paths: those of the inputs are absolute, so that the run can be read from any folder
    if args.out is None:
        args.out = "runs/toy" if args.world else f"runs/{Path(args.data).resolve().name}"
    args.out = str(Path(args.out).expanduser())
    if args.world:
        args.data = str(Path(args.out).absolute().parent / "toy-curated")
    args.data = str(Path(args.data).expanduser().absolute())
    args.model = absolute_if_local(args.model or str(toy.BASE))
    if args.unet is not None:
        args.unet = absolute_if_local(args.unet)
    return args


def check_flags(parser: argparse.ArgumentParser, args, given) -> None:
    """Exit with a one-line error if flags conflict.

    given: the flags before defaults were filled in: None where one was not given.
    """
    if args.preset != "toy" and (args.model is None or args.data is None):
        default = ", the default with --model," if args.preset == "paper" else ""
        parser.error(f"--preset {args.preset}{default} needs both --model and --data")
    for name in all_loss_settings():
        if getattr(given, name) is not None and name not in settings_of_loss(args.loss):
            own = " and ".join(flag_name(other) for other in settings_of_loss(args.loss))
            parser.error(f"{flag_name(name)}: --loss {args.loss} does not use it; give {own}")
    if args.loss == "sft" and args.noise != "shared":
        parser.error("--noise: has no effect with --loss sft, which uses one image per pair")
    if args.world and args.score != "none" and args.resolution != toy.SIDE:
        parser.error(
            f"--resolution: the miniature world's score needs {toy.SIDE} x {toy.SIDE} pixels; "
            "or pass --score none"
        )
    if args.batch_size % distributed.WORLD_SIZE:
        parser.error(
            f"--batch-size {args.batch_size}: not a multiple of the "
            f"{distributed.WORLD_SIZE} processes"
        )
    pairs_per_rank = args.batch_size // distributed.WORLD_SIZE
    has_remainder = pairs_per_rank > args.micro_batch and pairs_per_rank % args.micro_batch > 0
    if args.compile and has_remainder:
        divisor = largest_divisor(pairs_per_rank, args.micro_batch)
        whole = args.batch_size - args.batch_size % (args.micro_batch * distributed.WORLD_SIZE)
        advice = f"--micro-batch {divisor}"
        if divisor < args.micro_batch / 2:  # that would be slow
            advice = f"--batch-size {whole}"
        parser.error(
            f"--micro-batch {args.micro_batch}: does not divide the {pairs_per_rank} pairs of a "
            "step on each GPU, so that another size would be compiled, too; "
            f"use {advice}, or --no-compile"
        )
    for name in ("steps", "lr", "beta"):
        values = getattr(given, name) or []
        if len(values) > args.iterations:
            parser.error(f"--{name}: {len(values)} values for {args.iterations} iterations")


def largest_divisor(count: int, limit: int) -> int:
    """Return the largest divisor of `count` that is at most `limit`."""
    return max(divisor for divisor in range(1, limit + 1) if count % divisor == 0)


def settings_of_loss(loss: str) -> list[str]:
    """Return the settings of a loss that not all losses have; of "all", every such setting."""
    if loss == "all":
        return all_loss_settings()
    return list(LOSS_SETTINGS[loss])


def all_loss_settings() -> list[str]:
    """Return the settings that not all losses have."""
    settings: dict[str, None] = {}  # in order, without repetitions
    for names in LOSS_SETTINGS.values():
        settings.update(dict.fromkeys(names))
    return list(settings)


def one_per_iteration(values: list, iterations: int) -> list:
    """Repeat the last value until there is one for each iteration."""
    values = values[:iterations]
    return values + values[-1:] * (iterations - len(values))


def absolute_if_local(source: str) -> str:
    """Return the absolute path of a checkpoint on this machine. A hub id stays as it is."""
    path = Path(source).expanduser()
    if path.exists():
        return str(path.absolute())
    return source


# ---- Preparing a run -----------------------------------------------------------------------------

#: Settings that change what is computed: a run cannot resume with a different value. Those that
#: depend on --loss are added by `settings_to_match`. --data, --num-prompts and --skip-bad are
#: covered by data_sha256. All other flags change rounding at most, or only what is shown.
MUST_MATCH = [
    "loss",
    "predicts",
    "noise",
    "steps",
    "batch_size",
    "warmup",
    "weight_decay",
    "clip",
    "resolution",
    "flip",
    "prompt_dropout",
    "seed",
    "dtype",
    "model_hash",
    "unet_hash",
    "data_sha256",
]

#: Those of self-play alone. A baseline's images are only looked at.
HOW_OPPONENTS_SAMPLE = ["guidance", "sampler", "sampler_steps"]

#: Keys of earlier versions: {name: the values that select the present behavior, None for all}.
REMOVED = {
    "data_hash": None,  # was over the sizes of image files; now it is data_sha256
    "generated": ["latents"],
    "link": ["logistic"],
    "opponent_dtype": ["float32", "bfloat16"],
}


def base_source(args: argparse.Namespace) -> comparison.ModelSource:
    """Return where theta_0 is."""
    return comparison.ModelSource(args.model, args.unet, args.prediction_type)


def load_images(args: argparse.Namespace) -> CaptionedImages:
    """Return the data; those of the miniature world are drawn on first use."""
    if args.world:
        if distributed.is_main():
            toy.write_curated_set(Path(args.data))
        distributed.barrier()
    needs_rejected = args.loss in ("all", "dpo") and not args.world
    return CaptionedImages(
        args.data, args.resolution, needs_rejected, args.num_prompts, args.follow_links
    )


def preferences_of_world(args: argparse.Namespace, pipe: Pipeline) -> dict[str, Tensor] | None:
    """Return the pairs that DPO trains on in the miniature world, see `PairLoader`; None elsewhere.

    Raises InputError if the base lacks them or has those of another base.
    """
    path = preferences_file(args)
    if path is None:
        return None
    if not path.exists():
        raise InputError(
            f"{path}: missing; in the miniature world, DPO trains on the pairs of images in it. "
            "Make it with tutorial/pretrain_toy.py, or choose --loss spin or --loss sft"
        )
    if args.unet is not None:
        raise InputError(
            "--unet: in the miniature world, DPO trains on images by the model's own UNet; "
            "choose --loss spin or --loss sft"
        )
    side = args.resolution // pipe.vae.downscale
    shape = (toy.NUM_ROWS, pipe.unet.conv_in.in_channels, side, side)
    return load_preferences(path, shape, hash_checkpoint(locate(args.model)))


def preferences_file(args: argparse.Namespace) -> Path | None:
    """Return the file of `preferences_of_world`, beside the base; None if no training reads it."""
    if args.world and args.loss in ("all", "dpo"):
        return locate(args.model) / toy.PREFERENCES
    return None


def prepare_run(
    args: argparse.Namespace, run: Run, images: CaptionedImages, prediction_type: str
) -> Path:
    """Check data and settings, write config.json, and return the folder of the cached latents.

    images: loses its unusable rows with --skip-bad; without it, they raise InputError.
    prediction_type: theta_0's, from --prediction-type or from its files.

    Raises InputError if the run was started with other settings or inputs.
    """
    inputs = {
        "predicts": prediction_type,
        "model_hash": hash_checkpoint(locate(args.model)),
        "unet_hash": None,
        "data_sha256": hash_data(args, run, images),
        "drop_draws": "their own stream",
    }
    if args.unet is not None:
        inputs["unet_hash"] = hash_checkpoint(locate(args.unet, ("unet", "scheduler")))
    mirrored = "-mirrored" if args.flip else ""
    key = f"{inputs['model_hash']}-{inputs['data_sha256']}-{args.resolution}px{mirrored}"
    cache = run.folder / "cache" / key

    if distributed.is_main():
        config = {**vars(args), **inputs, **provenance()}
        defaults = {**flag_defaults(args.preset), "drop_draws": "the pair's stream"}
        run.check_config(
            config,
            settings_to_match(args, run),
            defaults,
            REMOVED,
            num_settled=settled_iterations(args, run),
        )
        if not args.dry_run:
            run.write_config(config)
    distributed.barrier()  # the folders of the models depend on config.json
    return cache


def hash_data(args: argparse.Namespace, run: Run, images: CaptionedImages) -> str:
    """Return 16 hexadecimal digits of SHA-256 that identify the data. Drop its unusable rows.

    The miniature world's curated set is identified by its pixels: the bytes of PNG files depend on
    Pillow's version. The pairs of DPO belong to its data.
    """
    if not args.world:
        return check_rows(images, run.folder / "data", args.skip_bad)
    if toy.hash_curated_set(Path(args.data)) != toy.CURATED_SHA256:
        raise InputError(
            f"{args.data}: not the miniature world's curated set; delete it, and it will be "
            "written again"
        )
    preferences = preferences_file(args)
    files = [] if preferences is None else [preferences]
    return hash_files(files, [toy.CURATED_SHA256, f"{len(images)} rows"])


def settings_to_match(args: argparse.Namespace, run: Run) -> list[str]:
    """Return the settings that must be those which the run was started with.

    More iterations may be added to self-play alone, and those that have not begun may be left out.
    The baselines take the steps of all iterations, so that their number is settled.
    """
    settings = MUST_MATCH + settings_of_loss(args.loss)
    if report.losses_of_self_play(args.loss):
        settings += HOW_OPPONENTS_SAMPLE
    if args.prompt_dropout > 0:
        settings.append("drop_draws")
    if args.loss not in PLAYERS or args.iterations < settled_iterations(args, run):
        settings.append("iterations")
    return settings


def settled_iterations(args: argparse.Namespace, run: Run) -> int:
    """Return how many iterations' settings may no longer change: those that have begun."""
    if args.loss not in PLAYERS:
        return args.iterations
    return run.begun_iterations(PLAYERS[args.loss])


def flag_defaults(preset: str) -> dict:
    """Return the default of every flag."""
    parser = build_parser()
    parser.set_defaults(**PRESETS[preset])
    return vars(parser.parse_args([]))


def check_sampling(args: argparse.Namespace, pipe: Pipeline) -> None:
    """Raise InputError if the model cannot sample at this resolution or in so many steps."""
    if args.resolution % pipe.vae.downscale:
        raise InputError(
            f"--resolution {args.resolution}: must be a multiple of {pipe.vae.downscale}"
        )
    pipe.scheduler.timesteps(args.sampler_steps)


def warn_of_resolution(args: argparse.Namespace, pipe: Pipeline) -> None:
    """Say on stderr if the checkpoint is for images of another resolution."""
    height, width = default_size(pipe)
    if distributed.is_main() and (height, width) != (args.resolution, args.resolution):
        sys.stderr.write(
            f"note: the checkpoint is for images of {height} x {width} pixels (sample_size); "
            f"--resolution is {args.resolution}\n"
        )


def sampling_options(args: argparse.Namespace) -> SamplingOptions:
    """Return how all images of the run are sampled."""
    return SamplingOptions(
        steps=args.sampler_steps,
        guidance=args.guidance,
        sampler=args.sampler,
        height=args.resolution,
        width=args.resolution,
        dtype=getattr(torch, args.dtype),
    )


def pair_loader(
    args: argparse.Namespace,
    loss: str,
    shared: Pipeline,
    images: CaptionedImages,
    real: LatentShards,
    generated: LatentShards | None = None,
    preferences: dict[str, Tensor] | None = None,
) -> PairLoader:
    """Return what loads the pairs for a loss.

    generated: the opponent's latents, for self-play.
    preferences: for "dpo" in the miniature world, see `preferences_of_world`.
    """
    return PairLoader(
        loss=loss,
        pipe=shared,
        images=images,
        real=real,
        generated=generated,
        preferences=preferences,
        seed=args.seed,
        batch_size=args.batch_size,
        flip=args.flip,
        prompt_dropout=args.prompt_dropout,
        independent_noise=args.noise == "independent",
        dtype=getattr(torch, args.dtype),
        device=args.device,
    )


def unfinished_iterations(args: argparse.Namespace, run: Run, loss: str) -> range:
    """Return the iterations of self-play still to run with a loss."""
    return range(run.latest_iteration(PLAYERS[loss]) + 1, args.iterations + 1)


def unfinished_self_play(args: argparse.Namespace, run: Run) -> list[Stage]:
    """Return the players still to train: none if --loss is a baseline's."""
    stages = []
    for loss in report.losses_of_self_play(args.loss):
        for k in unfinished_iterations(args, run, loss):
            stages.append(self_play_stage(args, loss, k))
    return stages


def self_play_stage(args: argparse.Namespace, loss: str, k: int) -> Stage:
    """Return the training of theta_k with a loss of self-play."""
    steps = [(k, step) for step in range(1, args.steps[k - 1] + 1)]
    return Stage(f"{PLAYERS[loss]}-{k}", loss, steps, args.lr[k - 1], args.beta[k - 1])


def unfinished_baselines(args: argparse.Namespace, run: Run) -> list[Stage]:
    """Return the baselines still to train. Each takes the steps of all iterations together."""
    steps = []
    for k in range(1, args.iterations + 1):
        steps += self_play_stage(args, "spin", k).steps
    stages = []
    if args.loss in ("all", "sft") and not run.has("sft"):
        stages.append(Stage("sft", "sft", steps, args.sft_lr, beta=0.0))
    if args.loss in ("all", "dpo") and not run.has("dpo"):
        stages.append(Stage("dpo", "dpo", steps, args.dpo_lr, args.dpo_beta))
    return stages


# ---- Looking at a run ----------------------------------------------------------------------------


def announce(args: argparse.Namespace, run: Run, images: CaptionedImages) -> None:
    """Print what is left to do, in at most five lines."""
    iterations = unfinished_self_play(args, run)
    baselines = unfinished_baselines(args, run)
    if not iterations and not baselines:
        return
    theta_0 = args.unet or args.model
    if theta_0 == str(toy.BASE):
        theta_0 = "the miniature base"
    lines = [
        f"theta_0, to be fine-tuned, is {theta_0}; {len(images)} real images are in {args.data}"
    ]
    if iterations:
        names = ", ".join(stage.name for stage in iterations)
        steps = ", ".join(str(len(stage.steps)) for stage in iterations)
        lines.append(
            f"self-play: {names}, each learns to tell real images from its predecessor's "
            f"(steps: {steps}; pairs per step: {args.batch_size})"
        )
    if baselines:
        names = ", ".join(stage.name for stage in baselines)
        steps = len(baselines[0].steps)
        lines.append(
            f"baselines: {names}, from theta_0 on the same rows in the same batches "
            f"(steps: {steps})"
        )
    if args.world and args.score != "none":
        line = f"then all models are scored on {len(toy.split()[args.score])} {args.score} prompts"
        if world.has_sweep(args.score_guidance, args.score):
            line += f", at guidance {args.guidance:g} and each at its best guidance"
        lines.append(line)
    duration = ""
    if is_unchanged_story(args):
        duration = f"took {STORY_TIME} when it was last measured; "
    lines.append(f"{duration}Ctrl-C stops it, and the same command goes on from there")
    for line in lines:
        distributed.print0(line)


def is_unchanged_story(args: argparse.Namespace) -> bool:
    """Return whether this is `python train.py` without flags that change how long it takes."""
    changed = {"device": args.device, "dtype": args.dtype, "out": args.out, "data": args.data}
    story = {**vars(parse_args([])), **changed}
    return vars(args) == story and args.device == "cpu"


def models_of_run(args: argparse.Namespace, run: Run) -> dict[str, comparison.ModelSource]:
    """Return the models that are trained, and theta_0."""
    return report.models_of_run(run, base_source(args), args.iterations)


def sample_grid(
    args: argparse.Namespace, run: Run, images: CaptionedImages
) -> report.SampleGrid:
    """Return the grid in samples/. Its prompts are the data's first.

    In the miniature world they are prompts to be scored, at quantiles of theta_0's reward, with
    the seeds of their scored images. With --score none they are the first test prompts.
    """
    folder = run.folder / "samples"
    options = sampling_options(args)
    if not args.world:
        captions = [images.caption(row) for row in range(min(len(images), 1000))]
        different = list(dict.fromkeys(captions))[: args.grid_prompts]
        return report.SampleGrid(folder, different, range(len(different)), options)

    if args.score == "none":
        scenes = toy.split()["test"]
        rows = list(range(min(args.grid_prompts, len(scenes))))
    else:
        scenes = toy.split()[args.score]
        rows = report.typical_rows(
            evaluation_of_run(args, run),
            base_source(args),
            args.grid_prompts,
            args.generation_batch,
            args.device,
        )
    return report.SampleGrid(
        folder,
        prompts=[scenes[row].caption for row in rows],
        seeds=[comparison.SEED + comparison.STRIDE * row for row in rows],
        options=options,
        ideal_images=[toy.to_pil(toy.ideal_image(scenes[row])) for row in rows],
    )


def update_samples(args: argparse.Namespace, run: Run, images: CaptionedImages) -> None:
    """Sample the grid's images from every model that has none yet."""
    gc.collect()  # reference cycles keep the last optimizer alive; its memory is needed now
    if distributed.is_main() and args.grid_prompts > 0:
        grid = sample_grid(args, run, images)
        report.update_samples(grid, models_of_run(args, run), args.device)


def sample_in_training(
    args: argparse.Namespace,
    run: Run,
    name: str,
    step: int,
    loader: PairLoader,
    policy: torch.nn.Module,
) -> None:
    """Sample the grid's images from a policy that is still being trained."""
    if distributed.is_main() and args.grid_prompts > 0:
        grid = sample_grid(args, run, loader.images)
        grid.add(f"{name}-step-{step:05d}", replace(loader.pipe, unet=policy))
        grid.draw(list(models_of_run(args, run)))


def evaluation_of_run(args: argparse.Namespace, run: Run) -> comparison.Evaluation:
    """Return the images by which the miniature world's models are scored."""
    return comparison.Evaluation(
        run.folder / "evaluation",
        world.captions(args.score),
        args.score_images,
        sampling_options(args),
    )


def report_results(args: argparse.Namespace, run: Run) -> dict:
    """Print a summary of the log, and score the models of the miniature world."""
    if not distributed.is_main():
        return {"out": args.out}
    report.update_curves(run)
    summary = run.summarize()
    print("\nthe log: at the first step, and over the last tenth")
    for row in summary:
        print("  ".join(f"{key} {format_number(value)}" for key, value in row.items()))

    results = None
    if args.world and args.score != "none":
        results = world.score_models(
            run,
            models_of_run(args, run),
            evaluation_of_run(args, run),
            args.score_guidance,
            args.score,
            args.generation_batch,
            args.device,
        )
        print(f"\n{comparison.format_summary(results)}\n")
        for sentence in world.conclusions(results):
            print(sentence)

    files = ["samples/grid.png", "curves.png", "results.md", "results.png"]
    existing = [file for file in files if (run.folder / file).exists()]
    print(f"{args.out}: see {', '.join(existing)}; models are in */checkpoint")
    return {"out": args.out, "models": summary, "results": results}


def format_number(value) -> str:
    """Return four digits of a float, and anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def dry_run(
    args: argparse.Namespace,
    run: Run,
    pipe: Pipeline,
    images: CaptionedImages,
    real: LatentShards,
    preferences: dict[str, Tensor] | None,
) -> dict:
    """Time a little of each kind of work that is left, and print how long all of it will take."""
    iterations = unfinished_self_play(args, run)
    stages = iterations + unfinished_baselines(args, run)
    options = sampling_options(args)
    estimates = []

    # ---- encoding
    num_images = real.count_missing()
    if num_images > 0:
        passes = 1
        if args.flip > 0:
            passes *= 2
        if images.with_rejected:
            passes *= 2
        estimates.append(
            estimate.measure_encoding(pipe.vae, num_images, args.resolution, passes, args.device)
        )

    # ---- generating
    num_images = 0
    for stage in iterations:
        rows = rows_of_steps(args.seed, stage.steps, args.batch_size, len(images))
        folder = run.model_folder(stage.name) / "generated"
        num_images += LatentShards(folder, rows).count_missing()
    if num_images > 0:
        estimates.append(
            estimate.measure_sampling(
                "images for the opponent to generate",
                load_opponent(args, pipe, args.unet or args.model),
                num_images,
                options,
                args.generation_batch,
                ranks=distributed.WORLD_SIZE,
                compiled=args.compile,
            )
        )

    # ---- training
    pairs_of_loss: dict[str, int] = {}
    for stage in stages:
        steps_left = len(stage.steps) - run.saved_steps(stage.name)
        pairs = pairs_of_loss.get(stage.loss, 0)
        pairs_of_loss[stage.loss] = pairs + steps_left * args.batch_size
    side = args.resolution // pipe.vae.downscale
    blank = estimate.BlankLatents((pipe.unet.conv_in.in_channels, side, side))
    for loss, num_pairs in pairs_of_loss.items():
        if num_pairs > 0:
            loader = pair_loader(args, loss, pipe, images, blank, blank, preferences)
            estimates.append(
                estimate.measure_training(
                    num_pairs, loader, args.micro_batch, args.compile, args.checkpoint_activations
                )
            )

    # ---- sampling for grids and scores
    num_images = len(stages) * args.grid_prompts
    unscored = len(stages) > 0 or not (run.folder / "results.json").exists()
    if args.world and args.score != "none" and unscored:
        num_models = len(stages) + len(models_of_run(args, run))
        num_images += num_models * args.score_images * len(toy.split()[args.score])
        if world.has_sweep(args.score_guidance, args.score):
            num_validation = len(toy.split()["validation"])
            num_images += num_models * len(args.score_guidance) * num_validation
            num_images += num_models * args.score_images * len(toy.split()[args.score])
    if num_images > 0:
        estimates.append(
            estimate.measure_sampling(
                "images for grids and scores",
                pipe,
                num_images,
                options,
                args.generation_batch,
                ranks=1,
            )
        )

    seconds = 0.0
    for item in estimates:
        distributed.print0(str(item))
        seconds += item.seconds
    distributed.print0(f"in all, about {timedelta(seconds=round(seconds))}")
    return {"out": args.out, "seconds": seconds}


if __name__ == "__main__":
    advice = "finished work is kept, and the same command resumes from there"
    memory_advice = (
        "lower --micro-batch, which changes no result, or --generation-batch if it was generating; "
        "or add --no-compile --checkpoint-activations"
    )
    sys.exit(run_script("train.py", main, advice, memory_advice))
