"""What came of a run: the pictures its models draw, the curves of its log, their scores, the verdict on the claims.

args: train.py's flags. player: gives the model of a name, "base", "sft", "spin-1", ..., ready to draw.
"""

from collections.abc import Callable, Collection
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from spin import pairs, run, sampler, stats, toy, viz

GRID_SEED = 0  # of the first picture of every model in samples/
SCORE_SEED = 1_000_000  # of the first of the pictures that are scored: the same noise for every model
PLATEAU = 0.05  # points of reward that SFT may move theta_0 and be said to have stood still
Scores = dict[str, dict[str, np.ndarray]]  # {model: {metric: [N]}}, entry i of every model being prompt i


# ---- Pictures and curves ---------------------------------------------------------------------------------------------
def models_of(args, this_run: run.Run) -> list[str]:
    """Those whose checkpoints are there; the baselines come first."""
    names = ["sft", "dpo", *(f"spin-{k}" for k in range(1, args.iterations + 1))]
    return ["base", *(name for name in names if this_run.checkpoint(name).exists())]


def draw_samples(args, this_run: run.Run, player: Callable, images, now: tuple[str, object] | None = None) -> None:
    """samples/<model>/: what each model draws for a few prompts, at fixed seeds; samples/grid.png: a column a model.

    The prompts are the data's first, or on the miniature world of those to be scored, with the ideal picture last.
    now: name and model of one that is at hand, perhaps still in training; its pictures stay in the grid.
    """
    scenes = toy.split()["test" if args.score == "none" else args.score][: args.grid_prompts] if args.world else []
    captions = dict.fromkeys(images.caption(row) for row in range(min(len(images), 1000)))
    prompts = [scene.caption for scene in scenes] or list(islice(captions, args.grid_prompts))
    folder, columns = this_run.folder / "samples", {}
    in_training = [path.name for path in folder.glob("*-step-*") if len(list(path.glob("*.png"))) == len(prompts)]
    for name in dict.fromkeys([*models_of(args, this_run), *sorted({*in_training, *(now or ())[:1]})]):
        paths = [folder / name / f"{i}.png" for i in range(len(prompts))]
        todo = [i for i, path in enumerate(paths) if not path.exists()]
        sd = (now[1] if now and name == now[0] else None) or player(name) if todo else None
        settings = {"Steps": args.sampler_steps, "Sampler": args.sampler, "CFG scale": args.guidance, "Model": name}
        jobs = [(prompts[i], GRID_SEED + i) for i in todo]
        drawn = tqdm(sampler.pictures(sd, jobs, **pairs.how_to_draw(args)), f"samples of {name}", disable=not todo)
        for i, image in zip(todo, drawn):
            viz.save_png(viz.to_pil(image), paths[i], prompts[i], settings | {"Seed": GRID_SEED + i})
        columns[name] = [Image.open(path) for path in paths]
    if scenes:
        columns["ideal"] = [toy.to_pil(toy.ideal(scene)) for scene in scenes]
    if prompts:
        cell = 4 * toy.SIDE if scenes else 192
        viz.save_png(viz.grid(list(zip(*columns.values())), list(columns), prompts, cell), folder / "grid.png")


def draw_curves(this_run: run.Run) -> None:
    """curves.png: what the log says, over the steps of self-play's iterations and of each baseline."""
    log = this_run.read_log()
    panels, ends = {}, []
    for who in ("spin", "sft", "dpo"):
        lines = [line for line in log if line["model"].startswith(who)]
        ends += [i for i, (line, after) in enumerate(zip(lines, lines[1:]), start=1) if after["step"] == 1]
        titles = {name.replace("_", " "): [name] for name in ("loss", "margin", "implicit_accuracy")}
        titles["policy's error - opponent's error"] = ["delta_data", "delta_gen"]
        for title, names in titles.items() if lines else ():
            if names[0] in lines[0]:
                panels[f"{who}: {title}"] = {name: [line[name] for line in lines] for name in names}
    viz.save_png(viz.line_charts(panels, sorted(set(ends))), this_run.folder / "curves.png")


# ---- The miniature world's exact score -------------------------------------------------------------------------------
def judge(args, this_run: run.Run, player: Callable) -> dict:
    """Scores every model on prompts that fine-tuning never saw; writes results.json, .md and .png.

    Every model draws from the same noise, at the guidance that the opponents' images were drawn with.
    """
    if not (this_run.folder / "results.json").exists():
        prompts = [scene.caption for scene in toy.split()[args.score]]
        names = models_of(args, this_run)
        with tqdm(total=len(names) * len(prompts) * args.score_images, desc="scoring", unit="image") as bar:
            scores = {name: score(args, player(name), prompts, bar) for name in names}
        title = f"{len(prompts)} {args.score} prompts, {args.score_images} pictures each, guidance {args.guidance:g}"
        write(this_run.folder, title, scores, run.read_json(this_run.folder / "config.json"), toy.LESS_IS_BETTER)
    return run.read_json(this_run.folder / "results.json")


def score(args, sd, prompts: list[str], bar: tqdm) -> dict[str, np.ndarray]:
    """`toy.score` of each prompt [N], the mean over its pictures."""
    captions = [prompt for prompt in prompts for _ in range(args.score_images)]
    jobs = list(zip(captions, range(SCORE_SEED, SCORE_SEED + len(captions))))
    pictures = []
    for image in sampler.pictures(sd, jobs, args.generation_batch, **pairs.how_to_draw(args)):
        pictures.append(image.permute(1, 2, 0).cpu().numpy())
        bar.update()
    scores = toy.score(np.stack(pictures), captions)
    return {name: scores[name].reshape(len(prompts), -1).mean(1) for name in toy.METRICS}


# ---- Tables and verdicts ---------------------------------------------------------------------------------------------
def write(folder: Path, title: str, scores: Scores, config: dict, less_is_better: Collection[str] = ()) -> None:
    """Writes the three files into `folder`. less_is_better: names of metrics of which that is so."""
    results = {"title": title} | stats.compare(scores, less_is_better) | {"claims": claims(scores), "config": config}
    viz.save_png(viz.interval_charts(gains(results)), folder / "results.png")
    with run.whole(folder / "results.md") as part:
        part.write_text(markdown(results))
    run.write_json(folder / "results.json", results)  # last: its presence says that the others are there


def gains(results: dict) -> dict[str, dict[str, stats.Summary]]:
    """{model: {"metric, less A's": interval}}: what each model has over A, the first, which itself has 0."""
    first, *others = results["models"]
    of = {name: results["differences"][f"{name} - {first}"] for name in others}
    of = {first: dict.fromkeys(results["models"][first], {"mean": 0.0, "low": 0.0, "high": 0.0})} | of
    return {name: {f"{metric}, less {first}'s": of[name][metric] for metric in of[name]} for name in of}


def claims(scores: Scores, metric: str = "reward") -> list[dict]:
    """The paper's claims that these models allow to judge: [{"claim", "verdict", "metric", "difference"}].

    "A beats B" holds if the whole interval of the difference is positive, and fails if it is negative. "SFT plateaus"
    holds if its interval lies within PLATEAU of 0, and fails if it lies beyond, on either side.
    """
    last = max((int(name[5:]) for name in scores if name.startswith("spin-")), default=0)
    said = {"SPIN-1 beats SFT": ("spin-1", "sft"), "SPIN-2 beats Diffusion-DPO": ("spin-2", "dpo")}
    plateau = f"SFT plateaus, staying within {PLATEAU:g} of theta_0"
    said[plateau] = ("sft", "base")
    for k in range(2, last + 1):
        said[f"A renewed opponent helps: SPIN-{k} beats SPIN-{k - 1}"] = (f"spin-{k}", f"spin-{k - 1}")
    found = []
    for claim, (one, other) in said.items():
        if one in scores and other in scores:
            gap = stats.interval(scores[one][metric] - scores[other][metric])
            sign = stats.resolved(gap)
            if claim == plateau:
                within = max(abs(gap["low"]), abs(gap["high"])) < PLATEAU
                sign = 1 if within else -(gap["low"] > PLATEAU or gap["high"] < -PLATEAU)
            verdict = {1: "holds", 0: "is not resolved", -1: "fails"}[sign]
            found.append({"claim": claim, "verdict": verdict, "metric": metric, "difference": gap})
    return found


def markdown(results: dict, brief: bool = False) -> str:
    """results.md: two tables, and in plain words what they say. brief: without the second, of the differences."""
    differences = {name: of | {"reward wins": of["reward"]["win_rate"]} for name, of in results["differences"].items()}
    verdict = "{claim}: this {verdict}, the difference being {mean:+.3f} [{low:+.3f}, {high:+.3f}]."
    verdicts = [verdict.format(**line, **line["difference"]) for line in results["claims"]]
    paragraphs = [f"# {results['title']}", stats.markdown(results["models"])]
    if differences and not brief:
        paragraphs += ["Differences, paired by prompt; wins: the share of prompts with more reward, ties one half."]
        paragraphs += [stats.markdown(differences, sign="+")]
    if any("renewed" in line["claim"] for line in results["claims"]):
        verdicts += ["An iteration adds steps as well as an opponent: which of the two helps, this run does not say."]
    paragraphs += ["What this run says of reward. " + " ".join(verdicts or ["Too few models to judge a claim."])]
    paragraphs += ["Brackets: 95 % bootstrap intervals over the prompts of this run. Another seed may say otherwise."]
    return "\n\n".join(paragraphs) + "\n"
