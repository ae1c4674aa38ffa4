"""What came of a run: the pictures its models draw, the curves of its log, the miniature world's scores.
args: train.py's flags. player: gives the model of a name, "base", "sft", "spin-1", ..., ready to draw."""

from collections.abc import Callable
from functools import partial
from itertools import islice

from PIL import Image

from spin import pairs
from spin.eval import comparison as judge
from spin.eval import scorers as rewards
from spin.infra import run
from spin.toy import world as toy
from spin.eval import plots as viz

GRID_SEED = 0  # of the first picture of every model in samples/


def models_of(args, this_run: run.Run) -> dict[str, tuple[str, str | None]]:
    """{name: (checkpoint, another one's UNet in its place or None)} of those that are there; the baselines first."""
    names = ["sft", "dpo", *(f"spin-{k}" for k in range(1, args.iterations + 1))]
    places = {name: this_run.checkpoint(name) for name in names}
    promoted = {name: (args.model, str(place)) for name, place in places.items() if place.exists()}
    return {"base": (args.model, args.unet)} | promoted


def draw_samples(args, this_run: run.Run, player: Callable, images, now: tuple[str, object] | None = None) -> None:
    """samples/<model>/: what each model draws for a few prompts, at fixed seeds; samples/grid.png: a column a model.
    The prompts are the data's first, or on the miniature world of those to be scored, with the ideal picture last.
    now: name and model of one that is at hand, perhaps still in training; its pictures stay in the grid."""
    scenes = toy.split()["test" if args.score == "none" else args.score][: args.grid_prompts] if args.world else []
    captions = dict.fromkeys(images.caption(row) for row in range(min(len(images), 1000)))
    prompts = [scene.caption for scene in scenes] or list(islice(captions, args.grid_prompts))
    folder, columns = this_run.folder / "samples", {}
    in_training = [path.name for path in folder.glob("*-step-*") if len(list(path.glob("*.png"))) == len(prompts)]
    for name in dict.fromkeys([*models_of(args, this_run), *sorted({*in_training, *(now or ())[:1]})]):
        paths = [folder / name / f"{i}.png" for i in range(len(prompts))]
        jobs = [(prompt, GRID_SEED + i) for i, prompt in enumerate(prompts)]
        at_hand = (lambda: now[1]) if now and name == now[0] else partial(player, name)
        judge.draw(at_hand, jobs, paths, {"Model": name}, pairs.how_to_draw(args))
        columns[name] = [Image.open(path) for path in paths]
    if scenes:
        columns["ideal"] = [toy.to_pil(toy.ideal(scene)) for scene in scenes]
    if prompts:
        sheet = viz.grid(list(zip(*columns.values())), list(columns), prompts, 128 if scenes else 192)
        viz.save_png(sheet, folder / "grid.png")


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


def judge_models(args, this_run: run.Run, player: Callable) -> dict:
    """The miniature world's exact score of every model, on prompts that fine-tuning never saw: results.json, .md, .png.
    All draw from the same noise, at the guidance that the opponents' images were drawn with; pictures and scores are
    kept in evaluation/, where evaluate.py finds them."""
    if not (this_run.folder / "results.json").exists():
        prompts, scorer = [scene.caption for scene in toy.split()[args.score]], rewards.load("toy")
        settings, folder = pairs.how_to_draw(args), this_run.folder / "evaluation"
        contest = judge.Contest(prompts, args.score_images, judge.SEED, settings, folder)
        hashes, scores = judge.hashes(models_of(args, this_run)), {}
        for name in hashes:
            drawn = contest.draw(name, hashes[name], partial(player, name), args.generation_batch)
            scores[name] = {metric: v.mean(1) for metric, v in contest.score(name, drawn, scorer).items()}
        title = f"{len(prompts)} {args.score} prompts, {args.score_images} pictures each, guidance {args.guidance:g}"
        config = run.read_json(this_run.folder / "config.json")
        judge.write(this_run.folder, judge.compare(title, scores, [scorer], scorer.judged_by, config))
    return run.read_json(this_run.folder / "results.json")
