"""Compare models on the same prompts and noise, with intervals: the paper's metrics and win rates.

    python evaluate.py runs/toy                        every model of a run of train.py
    python evaluate.py --models A B --prompts FILE     any checkpoints, by the paper's metrics
    python evaluate.py runs/toy --guidance 3 5 7.5 --validation        each model at its own best

Of a prompt's --num-images images, the one with the highest unweighted average of the scores counts,
as in the paper. After an interruption, the same command samples and scores only what is missing.
"""

import argparse
import re
import sys
from dataclasses import astuple, replace
from os.path import expanduser
from pathlib import Path

import torch

from spin import toy
from spin.checkpoint import hash_checkpoint, locate
from spin.eval import comparison, plots, stats, sweep, world
from spin.eval.comparison import Evaluation, ModelSource
from spin.eval.report import models_of_run
from spin.eval.scorers import FILES, PUBLISHED, PUBLISHED_BY_OTHERS, locate_files
from spin.infra.cli import SEED_TYPE, number, provenance, run_script
from spin.infra.devices import default_dtype, prepare_device
from spin.infra.errors import InputError
from spin.infra.files import hash_files, read_json
from spin.infra.images import read_image, save_png
from spin.infra.prompts import read_prompts
from spin.infra.run import Run, dtype_of_checkpoint
from spin.sampler import SAMPLERS, SamplingOptions
from spin.scheduler import PREDICTION_TYPES

PAPER_METRICS = ["pickscore", "hps", "aesthetic", "imagereward"]
GRID_ROWS = 6  # prompts in grid.png, at most

# What evaluate.py needs of a run's config.json.
RUN_KEYS = [
    "model",
    "unet",
    "iterations",
    "guidance",
    "resolution",
    "dtype",
    "sampler",
    "sampler_steps",
    "generation_batch",
]

WORLDS_OWN = ""  # the value of --validation that is given without a file

# Titles of tables in results.json.
SINGLE_TITLE = "One image per prompt: the mean over all images."
PUBLISHED_TITLE = (
    "Published, not measured here: arXiv 2402.10210, Pick-a-Pic's 500 test prompts, best of five "
    "images, approximate."
)
MEDIAN_TITLE = "Of each prompt's images, the one with the median PickScore."
OTHERS_TITLE = (
    "Published by others, not measured here: arXiv 2510.18353, Table 3, Pick-a-Pic v2's test "
    "prompts; of five images, the one with the median PickScore counts."
)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the flags; those that are not given are filled in from the run, or from the paper."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], usage=argparse.SUPPRESS
    )
    parser.add_argument(
        "run",
        type=expanduser,
        nargs="?",
        help="run folder, train.py's --out: all its models, with the run's sampling settings",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=[],
        help="checkpoints instead of a run, each PATH or NAME=PATH; a UNet alone uses the other "
        "parts of the first",
    )
    parser.add_argument(
        "--prediction-type",
        choices=PREDICTION_TYPES,
        help="what the UNets predict (default: the run's, or what the models' files say)",
    )
    parser.add_argument(
        "--prompts",
        type=expanduser,
        help="file of prompts: .txt (one per line), .json, .jsonl (default: the miniature world's "
        "test set)",
    )
    parser.add_argument(
        "--validation",
        type=expanduser,
        nargs="?",
        const=WORLDS_OWN,
        metavar="FILE",
        help="choose each model's best guidance on these prompts, and report it on --prompts "
        "(without FILE: the miniature world's validation set; default: choose on --prompts)",
    )
    parser.add_argument(
        "--num-prompts", type=number(int, 1), help="use only the first N prompts (default: all)"
    )
    parser.add_argument(
        "--num-images",
        type=number(int, 1, comparison.STRIDE),
        default=5,
        help="images per prompt, of which the best one counts (default: 5)",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=list(FILES),
        metavar="METRIC",
        help=f"any of {', '.join(FILES)} (default: toy for the miniature world, else "
        f"{' '.join(PAPER_METRICS)})",
    )
    parser.add_argument(
        "--scorers",
        type=expanduser,
        help="folder with the scorers' files, REPOSITORY/FILE each (default: from the hub)",
    )
    parser.add_argument(
        "--guidance",
        type=number(float, 0),
        nargs="+",
        help="guidance scales; 1: none; with several, each model is compared at its best (default: "
        "the run's, or 7.5)",
    )
    parser.add_argument("--sampler", choices=list(SAMPLERS), help="default: the run's, or ddim")
    parser.add_argument(
        "--steps",
        type=number(int, 1),
        help="sampling steps (default: the run's, or the sampler's usual number)",
    )
    parser.add_argument(
        "--eta",
        type=number(float, 0, 1),
        default=0.0,
        help="DDIM noise as a fraction of DDPM's; 0: deterministic (default: 0)",
    )
    parser.add_argument(
        "--seed",
        type=SEED_TYPE,
        default=comparison.SEED,
        help="seed of the first prompt's first image (default: %(default)s)",
    )
    parser.add_argument(
        "--resolution",
        type=number(int, 1),
        help="height and width in pixels (default: the run's, or what the UNet was trained at)",
    )
    parser.add_argument(
        "--batch-size",
        type=number(int, 1),
        help="images sampled at once (default: the run's, or 16)",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="compute dtype for sampling (default: the run's, that of a run which trained one of "
        "the models, or bfloat16 on CUDA, else float32)",
    )
    parser.add_argument(
        "--paper", action="store_true", help="print the published figures beside ours"
    )
    parser.add_argument(
        "--out",
        type=expanduser,
        help="folder for images and results (default: RUN/evaluation, or runs/evaluation)",
    )
    args = parser.parse_args(argv)

    if args.validation and Path(args.validation).is_dir():
        parser.error(
            f"--validation: {args.validation} is a folder, not a file of prompts; a run goes "
            "before the flags: python evaluate.py RUN --validation"
        )
    if bool(args.run) == bool(args.models):
        parser.error("give a run folder, or --models")
    config = read_json(Path(args.run, "config.json")) if args.run else {}
    if args.run and not set(RUN_KEYS) <= config.keys():
        parser.error(f"{args.run}: not a run of train.py")
    args.run_config = config

    # ---- unset flags default to the run's settings, or else to the paper's
    args.prediction_type = args.prediction_type or config.get("prediction_type")
    args.sampler = args.sampler or config.get("sampler", "ddim")
    steps = SAMPLERS[args.sampler].steps
    if args.sampler == config.get("sampler"):
        steps = config["sampler_steps"]
    args.steps = args.steps or steps
    if args.eta > 0 and args.sampler != "ddim":
        parser.error(f"--eta: --sampler {args.sampler} does not use it")
    args.guidance = args.guidance or [config.get("guidance", 7.5)]
    args.resolution = args.resolution or config.get("resolution")
    args.dtype = args.dtype or config.get("dtype") or dtype_of_models(args.models, args.device)
    args.batch_size = args.batch_size or config.get("generation_batch", 16)
    args.metrics = args.metrics or (["toy"] if config.get("world") else PAPER_METRICS)
    args.metrics = list(dict.fromkeys(args.metrics))  # without repetitions
    args.out = args.out or (f"{args.run}/evaluation" if args.run else "runs/evaluation")
    if not args.prompts and args.metrics != ["toy"]:
        parser.error("--prompts: required, except in the miniature world")
    if args.validation == WORLDS_OWN and args.metrics != ["toy"]:
        parser.error("--validation: needs a file of prompts, except in the miniature world")
    if args.validation is not None and len(args.guidance) == 1:
        parser.error("--validation: there is nothing to choose; give several values of --guidance")
    return args


def main(argv: list[str] | None = None) -> dict:
    """Return what results.json holds."""
    args = parse_args(argv)
    args.device = prepare_device(args.device)
    with Run(args.out).lock():
        return evaluate(args)


def evaluate(args: argparse.Namespace) -> dict:
    """Sample, score and compare the models; write and return the results."""
    out = Path(args.out)
    prompts = read_prompts_or_split(args.prompts, "test")[: args.num_prompts]
    if args.run:
        base = base_of_run(args.run_config, args.prediction_type)
        models = models_of_run(Run(args.run), base, args.run_config["iterations"])
    else:
        models = name_models(args.models, args.prediction_type)
    hashes = comparison.hash_models(models)
    if args.run:
        check_base(args.run, args.run_config, hashes["base"])
    for metric in args.metrics:
        locate_files(metric, args.scorers)  # fail on missing files before hours of sampling

    # ---- each model at its best guidance, which for a single value is that
    options = SamplingOptions(
        steps=args.steps,
        sampler=args.sampler,
        eta=args.eta,
        height=args.resolution,
        width=args.resolution,
        dtype=getattr(torch, args.dtype),
    )
    evaluation = Evaluation(out, prompts, args.num_images, options, args.seed)
    all_guidance = {model: args.guidance for model in models}
    if args.validation is None:
        swept = sample_and_score(args, evaluation, models, hashes, all_guidance)
        reported = swept
        sweep_title = sweep.SAME_PROMPTS
    else:
        validation = read_prompts_or_split(args.validation, "validation")[: args.num_prompts]
        chosen_on = replace(evaluation, folder=out / "validation", prompts=validation)
        swept = sample_and_score(args, chosen_on, models, hashes, all_guidance)
        chosen = {model: [guidance] for model, guidance in swept.best_guidance().items()}
        reported = sample_and_score(args, evaluation, models, hashes, chosen)
        sweep_title = sweep.VALIDATION
    best_guidance = swept.best_guidance()

    # ---- the comparison
    best_scores = {}
    single: dict[str, dict] = {}
    for model, guidance in best_guidance.items():
        best_scores[model] = reported.best[guidance, model]
        single[model] = stats.summarize(reported.mean(guidance, model))
    config = {
        **vars(args),
        "models": {model: astuple(source) for model, source in models.items()},
        "hashes": hashes,
        "count": len(prompts),
        "prompts_hash": hash_files([Path(args.prompts)] if args.prompts else [], prompts),
        "resamples": stats.RESAMPLES,
        **provenance(),
        "scorer_hashes": reported.scorer_hashes,
        "best_guidance": best_guidance,
    }
    title = describe(len(prompts), args.num_images, args.metrics)
    setting = world.BEST_GUIDANCE
    if len(args.guidance) == 1:
        setting = f"guidance {args.guidance[0]:g}"
    metric = reported.metric
    results = comparison.compare(
        title, setting, best_scores, reported.less_is_better, metric, config
    )
    real_swept = None
    if args.metrics == ["toy"]:
        [base, *_] = models.values()
        vae = base.load(args.device).vae
        real = world.score_real(vae, prompts, args.num_images)
        results["real"] = stats.summarize(stats.best_of(real, [metric]))
        means = {name: values.mean(axis=1) for name, values in real.items()}
        single["real"] = stats.summarize(means)
        real_swept = results["real"][metric]
        if args.validation is not None:
            real = world.score_real(vae, validation, args.num_images)
            real_swept = stats.summarize(stats.best_of(real, [metric]))[metric]

    # ---- more tables: single images, guidance, what the paper published
    results["tables"] = {SINGLE_TITLE: single}
    if len(args.guidance) > 1:
        results["tables"][sweep_title.format(metric)] = swept.table(real_swept)
    if args.paper:
        if "pickscore" in args.metrics:  # by the protocol of the others
            by_median = {}
            for model, guidance in best_guidance.items():
                chosen = stats.median_of(reported.scores[guidance, model], "pickscore")
                by_median[model] = stats.summarize(chosen)
            results["tables"][MEDIAN_TITLE] = by_median
        results["tables"][PUBLISHED_TITLE] = PUBLISHED
        results["tables"][OTHERS_TITLE] = PUBLISHED_BY_OTHERS
    comparison.write_results(out, results)

    # ---- a grid: each prompt's first image, a column for each model
    rows = []
    for i in range(min(GRID_ROWS, len(prompts))):
        row = []
        for model, guidance in best_guidance.items():
            requests = reported.evaluations[guidance].requests(model, hashes[model])
            row.append(read_image(requests[i * args.num_images].path))
        rows.append(row)
    save_png(plots.grid(rows, list(models), prompts[: len(rows)]), out / "grid.png")

    print(comparison.format_markdown(results))
    print(f"{args.out}: see results.md, results.png, grid.png")
    return results


def read_prompts_or_split(path: str | None, split: str) -> list[str]:
    """Return the prompts in a file or, without one, those of the miniature world's split."""
    if path:
        return read_prompts(path)
    return world.captions(split)


def sample_and_score(
    args: argparse.Namespace,
    evaluation: Evaluation,
    models: dict[str, ModelSource],
    hashes: dict[str, str],
    guidance_of: dict[str, list[float]],
) -> sweep.Scored:
    """Sample and score what is missing in the evaluation's folder, with the flags' scorers."""
    return sweep.sample_and_score(
        evaluation,
        guidance_of,
        models,
        hashes,
        args.metrics,
        args.batch_size,
        args.device,
        args.scorers,
    )


def describe(num_prompts: int, num_images: int, metrics: list[str]) -> str:
    """Return the results' title: 200 prompts, the best of 5 images each."""
    if num_images == 1:
        return f"{num_prompts} prompts, an image each"
    images = f"the best of {num_images} images each"
    if metrics == ["toy"]:
        images += f" (energy and spread: all {num_images})"
    return f"{num_prompts} prompts, {images}"


def base_of_run(config: dict, prediction_type: str | None = None) -> ModelSource:
    """Return theta_0 of a run.

    The miniature world's base may have moved since. Its hash tells whether it was the run's.
    """
    model = config["model"]
    if config.get("world") and not Path(model).exists():
        if config.get("model_hash") != hash_checkpoint(toy.BASE):
            raise InputError(f"{model}: the run's model no longer exists")
        model = str(toy.BASE)
    return ModelSource(model, config.get("unet"), prediction_type)


def check_base(run: str, config: dict, base_hash: str) -> None:
    """Raise InputError if theta_0, whose other parts all models share, is not the run's any more.

    base_hash: its hash, see `comparison.hash_models`
    """
    files = [config[key] for key in ("model_hash", "unet_hash") if config.get(key)]
    if base_hash.split("-")[: len(files)] != files:
        raise InputError(
            f"{run}: the files of {config['model']}, which it was started with, have changed; "
            "restore them, or pass the checkpoints to --models"
        )


def name_models(
    arguments: list[str], prediction_type: str | None = None
) -> dict[str, ModelSource]:
    """Return the models of --models, each of which is PATH or NAME=PATH.

    Without a NAME, a model is called by the last part of its path that is not "checkpoint" or
    "unet". A UNet alone, as the paper's authors published theirs, borrows the other parts of the
    first model. Raises InputError if two have one name, and for a UNet with a text encoder.
    """
    models: dict[str, ModelSource] = {}
    for argument in arguments:
        name, source = split_name(argument)
        if name in models:
            raise InputError(
                f"--models: two models are named {name}; rename one of them: {name}-2={source}"
            )
        path = locate(source)
        if models and path.is_dir() and not (path / "vae").exists():
            if (path / "text_encoder").exists():
                raise InputError(
                    f"{source}: has a text encoder of its own, but no VAE; pass {source}/unet to "
                    "compare its UNet alone"
                )
            first = next(iter(models.values()))
            models[name] = ModelSource(first.model, source, prediction_type)
        else:
            models[name] = ModelSource(source, None, prediction_type)
    return models


def dtype_of_models(arguments: list[str], device: str) -> str:
    """Return the dtype in which the models of --models are sampled unless --dtype is given.

    All models have the same: that of the first one that was trained in a run.
    """
    for argument in arguments:
        _, source = split_name(argument)
        dtype = dtype_of_checkpoint(source)
        if dtype is not None:
            return dtype
    return default_dtype(device)


def split_name(argument: str) -> tuple[str, str]:
    """Split PATH or NAME=PATH into a name and a source. The name is safe for files and tables."""
    given_name = re.match(r"([\w.-]+)=", argument)
    if given_name:
        name = given_name[1]
        source = expanduser(argument.removeprefix(given_name[0]))
    else:
        source = expanduser(argument)
        parts = ["model", *Path(source).parts]
        name = [part for part in parts if part not in ("checkpoint", "unet")][-1]
    safe_name = re.sub(r"[^\w.-]", "-", name).strip(".")
    return safe_name or "model", source


if __name__ == "__main__":
    advice = "finished images and scores are kept; the same command resumes from there"
    memory_advice = "lower --batch-size"
    sys.exit(run_script("evaluate.py", main, advice, memory_advice))
