"""Compares models on the same prompts and noise: the paper's metrics, tables and win rates, with intervals.

    python evaluate.py runs/toy                                              every model of a run of train.py
    python evaluate.py --models A B C --prompts prompts.jsonl --out FOLDER   any checkpoints, by the paper's metrics

Of a prompt's pictures (--num-images) the one with the highest plain average of the scores counts, as in the paper.
The same command, given again after an interruption, draws and scores only what is missing."""

import argparse
import re
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

from spin import data
from spin.eval import comparison as judge
from spin.eval import report
from spin.eval import scorers as rewards
from spin.infra import run
from spin.eval import stats
from spin.toy import world as toy
from spin.eval import plots as viz
from spin.checkpoint import pipeline as weights
from spin.infra.run import InputError
from spin.sampler import SAMPLERS

PAPERS = ("pickscore", "hps", "aesthetic", "imagereward")
SWEEP = "The {} over guidance. The best is chosen on these very prompts, which flatters it."
PUBLISHED = "Published, not measured here: arXiv 2402.10210, Pick-a-Pic's 500 test prompts, best of five, about."
GRID_ROWS = 6  # prompts that grid.png shows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=argparse.SUPPRESS)
    add, whole = parser.add_argument, run.number(int, 1)
    add("run", nargs="?", help="run folder, train.py's --out: all its models, drawn as its own samples")
    models = "checkpoints instead, each PATH or NAME=PATH; a UNet alone borrows the rest of the first"
    add("--models", nargs="+", default=[], help=models)
    add("--prompts", help="file of prompts: .txt (one a line), .json, .jsonl (default: the miniature world's test set)")
    add("--num-prompts", type=whole, help="only the first N (default: all)")
    add(
        "--num-images",
        type=run.number(int, 1, judge.STRIDE),
        default=5,
        help="pictures a prompt, of which the best counts (default: 5)",
    )
    metrics = f"among {', '.join(rewards.FILES)} (default: toy for the miniature world, else {' '.join(PAPERS)})"
    add("--metrics", nargs="+", choices=list(rewards.FILES), metavar="METRIC", help=metrics)
    add("--scorers", help="folder with the scorers' files, REPOSITORY/FILE each (default: from the hub)")
    guidance = "guidance scales; of several, each model is compared at its best (default: the run's, or 7.5)"
    add("--guidance", type=run.number(float, 0), nargs="+", help=guidance)
    add("--sampler", choices=SAMPLERS, help="default: the run's, or ddim")
    add("--steps", type=whole, help="network evaluations a picture (default: the run's, or 50; with dpm++ 20)")
    add("--eta", type=run.number(float, 0, 1), default=0.0, help="share of DDPM's noise in a DDIM step (default: 0)")
    add("--seed", type=run.SEED, default=judge.SEED, help="of the first prompt's first picture (default: %(default)s)")
    add("--resolution", type=whole, help="pixels a side (default: the run's, or what the UNet was trained at)")
    add("--batch-size", type=whole, help="pictures drawn at once (default: the run's, or 16)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--dtype", choices=["float32", "bfloat16"], help="what drawing computes in (default: the run's, or float32)")
    add("--paper", action="store_true", help="print the published figures beside ours")
    add("--out", help="folder for pictures and results (default: RUN/evaluation, or runs/evaluation)")
    args = parser.parse_args(argv)
    if bool(args.run) == bool(args.models):
        parser.error("give a run folder, or --models")
    # what is not given is as in the run, or as in the paper
    past = run.read_json(Path(args.run, "config.json")) if args.run else {}
    if args.run and not {"model", "unet", "iterations", "sampler_steps", "generation_batch"} <= past.keys():
        parser.error(f"{args.run}: not a run of train.py")
    args.of_run = argparse.Namespace(**past)
    args.sampler = args.sampler or past.get("sampler", "ddim")
    usual = {"steps": 20 if args.sampler == "dpm++" else 50, "guidance": 7.5, "dtype": "float32", "batch_size": 16}
    if args.run:
        usual |= {name: past[name] for name in ("guidance", "resolution", "dtype")}
        usual |= {"batch_size": past["generation_batch"]}
        usual |= {"steps": past["sampler_steps"]} if args.sampler == past["sampler"] else {}
    usual |= {"metrics": ["toy"] if past.get("world") else list(PAPERS), "guidance": [usual["guidance"]]}
    usual |= {"out": f"{args.run}/evaluation" if args.run else "runs/evaluation"}
    for name, value in usual.items():
        setattr(args, name, getattr(args, name) or value)
    args.metrics = list(dict.fromkeys(args.metrics))
    if not args.prompts and args.metrics != ["toy"]:
        parser.error("--prompts: needed, but for the miniature world")
    return args


def main(argv: list[str] | None = None) -> dict:
    """Returns what results.json holds."""
    args = parse(argv)
    args.device = run.usable(args.device)
    with run.Run(args.out).lock():
        return evaluate(args)


def evaluate(args: argparse.Namespace) -> dict:
    prompts = data.read_prompts(args.prompts) if args.prompts else [scene.caption for scene in toy.split()["test"]]
    prompts = prompts[: args.num_prompts]
    models = report.models_of(args.of_run, run.Run(args.run)) if args.run else named(args.models)
    hashes = judge.hashes(models)
    for metric in args.metrics:
        rewards.files(metric, args.scorers)  # before hours of drawing

    def player(name: str) -> weights.StableDiffusion:
        sd = weights.load(models[name][0], device=args.device, unet=models[name][1])
        for network in (sd.unet, sd.vae, sd.text_encoder):
            network.requires_grad_(False)
        return sd

    # ---- every model draws every prompt, at every guidance -----------------------------------------------------------
    settings = {"steps": args.steps, "sampler": args.sampler, "eta": args.eta, "autocast": getattr(torch, args.dtype)}
    settings |= {"height": args.resolution, "width": args.resolution}
    of_all = (prompts, args.num_images, args.seed)
    contests = {g: judge.Contest(*of_all, settings | {"guidance": g}, Path(args.out)) for g in args.guidance}
    drawn = {}
    for name in models:
        loaded = cache(partial(player, name))  # once, if there is anything to draw
        for g, contest in contests.items():
            drawn[g, name] = contest.draw(name, hashes[name], loaded, args.batch_size)
    del loaded  # a model's memory, which the scorers can use

    # ---- every scorer judges every picture; of a prompt's, the best counts -------------------------------------------
    scorers, scores = [], {at: {} for at in drawn}
    for metric in args.metrics:
        scorer = rewards.load(metric, args.scorers, args.device)
        for (g, name), pictures in drawn.items():
            scores[g, name] |= contests[g].score(name, pictures, scorer)
        scorers.append(scorer := replace(scorer, score=None))  # its network goes
    judged_by = [scorer.judged_by for scorer in scorers]
    metric = judged_by[0] if len(judged_by) == 1 else "average"
    best = {at: stats.best_of(of, judged_by) for at, of in scores.items()}

    # ---- what came of it: each model at its best guidance, which for a single value is that --------------------------
    best_at = {name: max(args.guidance, key=lambda g: best[g, name][metric].mean()) for name in models}
    k = f"the best of {args.num_images} pictures each" if args.num_images > 1 else "a picture each"
    at = f"guidance {args.guidance[0]:g}" if len(args.guidance) == 1 else "each model at its best guidance"
    config = vars(args) | {"of_run": vars(args.of_run), "models": models, "hashes": hashes}
    hashed = run.hash_files([Path(args.prompts)] if args.prompts else [], prompts)
    config |= {"count": len(prompts), "prompts_hash": hashed, "resamples": stats.RESAMPLES} | run.provenance()
    config |= {"scorer_hashes": {scorer.name: scorer.hash for scorer in scorers}, "best_guidance": best_at}
    found = {name: best[g, name] for name, g in best_at.items()}
    found = judge.compare(f"{len(prompts)} prompts, {k}, {at}", found, scorers, metric, config)
    single = {n: {m: stats.interval(v.mean(1)) for m, v in scores[g, n].items()} for n, g in best_at.items()}
    sweep = {n: {f"{g:g}": stats.interval(best[g, n][metric]) for g in args.guidance} for n in models}
    sweep = {n: {"best at": f"{best_at[n]:g}"} | of for n, of in sweep.items()}
    tables = {"One picture a prompt: the mean over all.": single, SWEEP.format(metric): sweep}
    found["tables"] = tables | ({PUBLISHED: rewards.PUBLISHED} if args.paper else {})
    judge.write(Path(args.out), found)

    places = range(0, min(GRID_ROWS, len(prompts)) * args.num_images, args.num_images)
    rows = [[data.read_picture(drawn[g, name][i]) for name, g in best_at.items()] for i in places]
    viz.save_png(viz.grid(rows, list(models), prompts[: len(rows)]), Path(args.out, "grid.png"))
    print(judge.markdown(found))
    print(f"{args.out}: see results.md, results.png, grid.png")
    return found


def named(models: list[str]) -> dict[str, tuple[str, str | None]]:
    """{name: (checkpoint, UNet or None)}: NAME=PATH, or named by the last part of the path that tells something.
    A UNet alone, as the authors published theirs, borrows the other parts of the first model."""
    found: dict[str, tuple[str, str | None]] = {}
    for model in models:
        name, _, source = model.partition("=") if re.match(r"[\w.-]+=", model) else ("", "", model)
        name = name or [part for part in Path("model", source).parts if part not in ("checkpoint", "unet")][-1]
        name = re.sub(r"[^\w.-]", "-", name).strip(".") or "model"  # of a folder, and of a table's column
        if name in found:
            raise InputError(f"--models: two are called {name}; give one another name: {name}-2={source}")
        path = weights.locate(source)
        alone = found and path.is_dir() and not (path / "vae").exists()
        found[name] = (next(iter(found.values()))[0], source) if alone else (source, None)
    return found


if __name__ == "__main__":
    sys.exit(run.script("evaluate.py", main, "what is drawn and scored is kept; the same command goes on from there"))
