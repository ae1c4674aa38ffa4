"""The visible results of a run: images sampled from its models, training curves and scores."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from spin.checkpoint import Pipeline
from spin.eval import comparison, plots
from spin.eval.comparison import Evaluation, ImageRequest, ModelSource
from spin.eval.scorers import load_scorer
from spin.infra.files import read_json, remove
from spin.infra.images import read_image, save_png
from spin.infra.run import Run
from spin.sampler import SamplingOptions

GRID_SEED = 0  # of the first image of every model in samples/

CURVES_WINDOW = 10  # steps that the running mean of a curve covers

# What curves.png shows of the log: {panel's title: the keys of its lines}.
CURVES = {
    "loss": ["loss"],
    "margin": ["margin"],
    "implicit accuracy": ["implicit_accuracy"],
    "policy's error - opponent's error": ["delta_data", "delta_gen"],
}


def models_of_run(run: Run, base: ModelSource, iterations: int) -> dict[str, ModelSource]:
    """Return the models of a run that are there: "base", then "sft", "dpo", "spin-1", ...

    base: theta_0. Every other model has theta_0's parts and its own UNet.
    """
    models = {"base": base}
    names = ["sft", "dpo", *(f"spin-{k}" for k in range(1, iterations + 1))]
    for name in names:
        if run.has(name):
            models[name] = replace(base, unet=str(run.checkpoint(name)))
    return models


def forget_model(run: Run, name: str) -> None:
    """Delete a model's samples, and results.json, before another model gets its name."""
    samples = run.folder / "samples"
    for folder in [samples / name, *samples.glob(f"{name}-step-*")]:
        remove(folder)
    remove(run.folder / "results.json")


# ---- Samples -------------------------------------------------------------------------------------


class SampleGrid:
    """Images of a few prompts at fixed seeds: <folder>/<model>/<i>.png, and grid.png with all.

    prompts: a row of the grid each; without any, there are no files.
    ideal_images: the images that the prompts describe, if they are known, for the last column.
    """

    def __init__(
        self,
        folder: Path,
        prompts: Sequence[str],
        options: SamplingOptions,
        ideal_images: Sequence[Image.Image] | None = None,
    ):
        self.folder = folder
        self.prompts = prompts
        self.options = options
        self.ideal_images = ideal_images

    def requests(self, name: str) -> list[ImageRequest]:
        """Return a model's column, from top to bottom."""
        requests = []
        for i, prompt in enumerate(self.prompts):
            path = self.folder / name / f"{i}.png"
            requests.append(ImageRequest(path, prompt, GRID_SEED + i, self.options, name))
        return requests

    def add(self, name: str, pipe: Pipeline) -> None:
        """Sample what is missing of a model's column."""
        missing = comparison.missing(self.requests(name))
        comparison.sample_requests(pipe, missing, batch_size=1)

    def is_complete(self, name: str) -> bool:
        return not comparison.missing(self.requests(name))

    def draw(self, names: Sequence[str]) -> None:
        """Write grid.png: the columns of these models, then of models in training, then the ideal.

        Models in training are in folders <model>-step-<step>. An incomplete column is left out.
        """
        if not self.prompts:
            return
        in_training = sorted(path.name for path in self.folder.glob("*-step-*"))
        titles = [name for name in [*names, *in_training] if self.is_complete(name)]
        columns = []
        for title in titles:
            columns.append([read_image(request.path) for request in self.requests(title)])
        cell = 192
        if self.ideal_images is not None:
            titles.append("ideal")
            columns.append(list(self.ideal_images))
            cell = 128  # four times the 32 pixels of the miniature world
        rows = list(zip(*columns, strict=True))
        save_png(plots.grid(rows, titles, self.prompts, cell), self.folder / "grid.png")


def update_samples(grid: SampleGrid, models: dict[str, ModelSource], device: str) -> None:
    """Sample every model whose column is incomplete, then draw grid.png."""
    for name, source in models.items():
        if not grid.is_complete(name):
            grid.add(name, source.load(device))
    grid.draw(list(models))


# ---- Curves --------------------------------------------------------------------------------------


def draw_curves(run: Run) -> None:
    """Write curves.png: the log over the steps of self-play and of each baseline.

    A vertical line marks the end of an iteration. Over the thin single steps lies a running mean.
    """
    log = run.read_log()
    panels: dict[str, plots.Lines] = {}
    ends: set[int] = set()
    for method in ("spin", "sft", "dpo"):
        lines = [line for line in log if line["model"].startswith(method)]
        if not lines:
            continue
        for title, keys in CURVES.items():
            if keys[0] in lines[0]:  # SFT has only a loss
                panels[f"{method}: {title}"] = curves_of(lines, keys)
        for i in range(1, len(lines)):
            if lines[i]["step"] == 1:
                ends.add(i)
    if panels:
        chart = plots.line_charts(panels, sorted(ends), window=CURVES_WINDOW)
        save_png(chart, run.folder / "curves.png")


def curves_of(lines: Sequence[dict], keys: Sequence[str]) -> plots.Lines:
    """Return {key: its value in each line of the log}."""
    curves = {}
    for key in keys:
        curves[key] = [line[key] for line in lines]
    return curves


# ---- Scores --------------------------------------------------------------------------------------


def score_models(
    run: Run,
    models: dict[str, ModelSource],
    prompts: Sequence[str],
    images_per_prompt: int,
    options: SamplingOptions,
    batch_size: int,
    title: str,
    device: str,
) -> dict:
    """Score models by the miniature world's score, and return what results.json holds.

    A prompt's score is the mean over its images. Images and scores are stored in evaluation/,
    where evaluate.py looks for them. If results.json has these models and this title, nothing is
    sampled or scored.

    title: says how many prompts and images, and how they are sampled
    """
    path = run.folder / "results.json"
    if path.exists():
        results = read_json(path)
        if results["title"] == title and results["models"].keys() == models.keys():
            return results

    evaluation = Evaluation(run.folder / "evaluation", prompts, images_per_prompt, options)
    hashes = comparison.hash_models(models)
    evaluations = {name: [evaluation] for name in models}
    comparison.sample_models(evaluations, models, hashes, batch_size, device)

    scorer = load_scorer("toy")
    scores = {}
    for name in models:
        # {metric: [N,images_per_prompt]}
        image_scores = evaluation.score(name, hashes[name], scorer)
        scores[name] = {metric: values.mean(axis=1) for metric, values in image_scores.items()}

    config = read_json(run.folder / "config.json")
    results = comparison.compare(
        title, scores, scorer.less_is_better, scorer.primary_metric, config
    )
    comparison.write_results(run.folder, results)
    return read_json(path)
