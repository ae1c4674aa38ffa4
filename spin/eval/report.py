"""The visible results of a run: images sampled from its models, and training curves."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from spin.checkpoint import Pipeline
from spin.eval import comparison, plots
from spin.eval.comparison import Evaluation, ImageRequest, ModelSource
from spin.eval.scorers import load_scorer
from spin.infra.files import remove
from spin.infra.images import read_image, save_png
from spin.infra.run import PLAYERS, Run
from spin.sampler import SamplingOptions

# How grid.png shows what an image differs from the ideal one by.
DIFFERENCE_GAIN = 3
DIFFERENCE_CAPTION = f"difference from the ideal, x {DIFFERENCE_GAIN} (gray: none)"

CURVES_WINDOW = 10  # steps that the running mean of a curve covers

# What curves.png shows of the log: {panel's title: the keys of its lines}.
CURVES = {
    "loss": ["loss"],
    "margin": ["margin"],
    "implicit accuracy": ["implicit_accuracy"],
    "error minus the opponent's": ["delta_data", "delta_gen"],
}


def models_of_run(run: Run, base: ModelSource, iterations: int) -> dict[str, ModelSource]:
    """Return the models of a run that are there: "base", "sft", "dpo", "spin-1", "bounded-1", ...

    base: theta_0. Every other model has theta_0's parts and its own UNet.
    """
    models = {"base": base}
    names = ["sft", "dpo"]
    for loss in losses_of_self_play(run.read_config().get("loss", "spin")):
        names += [f"{PLAYERS[loss]}-{k}" for k in range(1, iterations + 1)]
    for name in names:
        if run.has(name):
            models[name] = replace(base, unet=str(run.checkpoint(name)))
    return models


def losses_of_self_play(loss: str) -> list[str]:
    """Return the losses with which a run of --loss `loss` plays: none with a baseline's."""
    return [each for each in PLAYERS if loss in ("all", each)]


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
    seeds: a seed for each prompt, which all models share.
    ideal_images: the images that the prompts describe, if they are known. They are the last column,
        and below each row stands what its images differ from the ideal one by.
    """

    def __init__(
        self,
        folder: Path,
        prompts: Sequence[str],
        seeds: Sequence[int],
        options: SamplingOptions,
        ideal_images: Sequence[Image.Image] | None = None,
    ):
        self.folder = folder
        self.prompts = prompts
        self.seeds = seeds
        self.options = options
        self.ideal_images = ideal_images

    def requests(self, name: str) -> list[ImageRequest]:
        """Return a model's column, from top to bottom."""
        requests = []
        for i, (prompt, seed) in enumerate(zip(self.prompts, self.seeds, strict=True)):
            path = self.folder / name / f"{i}.png"
            requests.append(ImageRequest(path, prompt, seed, self.options, name))
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
        columns = {}
        for name in [*names, *in_training]:
            if self.is_complete(name):
                columns[name] = [read_image(request.path) for request in self.requests(name)]
        save_png(draw_grid(columns, self.prompts, self.ideal_images), self.folder / "grid.png")


def draw_grid(
    columns: dict[str, list[Image.Image]],
    prompts: Sequence[str],
    ideal_images: Sequence[Image.Image] | None = None,
) -> Image.Image:
    """Return the grid with a row for each prompt.

    columns: {title: an image of each prompt}. For ideal_images, see `SampleGrid`.
    """
    cell = 192
    if ideal_images is not None:
        columns = {**columns, "ideal": list(ideal_images)}
        cell = 96  # three times the 32 pixels of the miniature world

    rows = []
    captions = []
    for i, prompt in enumerate(prompts):
        images = [column[i] for column in columns.values()]
        rows.append(images)
        captions.append(prompt)
        if ideal_images is not None:
            ideal = ideal_images[i]
            rows.append([plots.difference(image, ideal, DIFFERENCE_GAIN) for image in images])
            captions.append(DIFFERENCE_CAPTION)
    return plots.grid(rows, list(columns), captions, cell)


def update_samples(grid: SampleGrid, models: dict[str, ModelSource], device: str) -> None:
    """Sample every model whose column is incomplete, then draw grid.png."""
    for name, source in models.items():
        if not grid.is_complete(name):
            grid.add(name, source.load(device))
    grid.draw(list(models))


def typical_rows(
    evaluation: Evaluation, base: ModelSource, count: int, batch_size: int, device: str
) -> list[int]:
    """Return the rows of `count` prompts, from one that theta_0 does badly to one it does well.

    They are at quantiles of the rewards of theta_0's first images, see `rows_at_quantiles`. Its
    images are sampled and scored for that. `world.score_models` finds them there later.
    """
    models = {"base": base}
    hashes = comparison.hash_models(models)
    purpose = "sampling theta_0, to choose the grid's rows"
    comparison.sample_models({"base": [evaluation]}, models, hashes, batch_size, device, purpose)
    scores = evaluation.score("base", hashes["base"], load_scorer("toy"))
    return rows_at_quantiles(scores["reward"][:, 0], count)


def rows_at_quantiles(scores: np.ndarray, count: int) -> list[int]:
    """Return the rows of `scores` [N] nearest to the quantiles 1/(n+1), ..., n/(n+1).

    They go from the lowest score to the highest. n = min(count, N); 3 gives the quartiles. Each
    quantile takes the nearest row that no lower one has taken, and the first of equally near rows.
    """
    count = min(count, len(scores))
    rows: list[int] = []
    for i in range(1, count + 1):
        quantile = np.quantile(scores, i / (count + 1))
        distances = np.abs(scores - quantile)
        distances[rows] = np.inf
        rows.append(int(distances.argmin()))
    return sorted(rows, key=lambda row: scores[row])


# ---- Curves --------------------------------------------------------------------------------------


def update_curves(run: Run) -> None:
    """Write curves.png, if the log has a line."""
    log = run.read_log()
    if log:
        save_png(draw_curves(log), run.folder / "curves.png")


def draw_curves(log: Sequence[dict]) -> Image.Image:
    """Plot a log over the steps of self-play with each loss, and of each baseline.

    A vertical line marks the end of an iteration. Over the thin single steps lies a running mean.

    log: at least one line of `Run.read_log`.
    """
    charts = []
    for method in (*PLAYERS.values(), "sft", "dpo"):
        lines = [line for line in log if line["model"].startswith(method)]
        if not lines:
            continue
        ends = []  # of iterations, which a baseline's training runs through
        if method in PLAYERS.values():
            ends = [i for i in range(1, len(lines)) if lines[i]["step"] == 1]
        for title, keys in CURVES.items():
            if keys[0] in lines[0]:  # SFT has only a loss
                curves = curves_of(lines, keys)
                colors = [plots.METHOD_COLORS[method]] if len(keys) == 1 else plots.COLORS
                chart = plots.line_chart(
                    f"{method}: {title}", curves, ends, window=CURVES_WINDOW, colors=colors
                )
                charts.append(chart)
    return plots.two_a_row(charts)


def curves_of(lines: Sequence[dict], keys: Sequence[str]) -> plots.Lines:
    """Return {key: its value in each line of the log}."""
    curves = {}
    for key in keys:
        curves[key] = [line[key] for line in lines]
    return curves
