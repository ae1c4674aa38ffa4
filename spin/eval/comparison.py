"""Compare models: sample the same prompts from the same noise, score the images, summarize.

    OUT/images/<model>/guidance-<g>/<prompt>-<image>.png    each records how it was made
    OUT/scores/<model>/guidance-<g>-<scorer>.json           scores, by a hash of scorer and image
    OUT/results.json, results.md, results.png               the comparison

An image is reused, with its score, if the settings that it records match the requested ones.
"""

import re
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from spin.checkpoint import Pipeline, hash_checkpoint, load_pipeline, locate
from spin.eval import plots, stats
from spin.eval.scorers import Scorer
from spin.infra.cli import warn_of_cut_prompts
from spin.infra.errors import InputError
from spin.infra.files import atomic_write, hash_files, read_json, write_json
from spin.infra.images import format_parameters, read_image, read_parameters, save_png, to_pil
from spin.sampler import SamplingOptions, sample_images

SEED = 1_000_000  # of the first prompt's first image
STRIDE = 1000  # from a prompt's first seed to the next prompt's
SCORE_BATCH = 32  # images scored at once

# The claim that SFT stays at theta_0 allows it this much reward above or below.
PLATEAU = 0.05

# Verdicts on a claim.
HOLDS = "holds"
FAILS = "fails"
UNDECIDED = "undecided"


# ---- Models --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSource:
    """Where a model is, and what it predicts.

    model: a checkpoint
    unet: another one, whose UNet replaces the model's own
    prediction_type: "epsilon" or "v_prediction"; None for what the files say
    """

    model: str
    unet: str | None = None
    prediction_type: str | None = None

    def load(self, device: str) -> Pipeline:
        pipe = load_pipeline(
            self.model, device=device, unet=self.unet, prediction_type=self.prediction_type
        )
        return pipe.freeze()

    def paths(self) -> list[Path]:
        """Return the one or two checkpoints on this machine. A hub's is downloaded first."""
        paths = [locate(self.model)]
        if self.unet is not None:
            # what load() downloads, so that the hash is the same before and after it
            paths.append(locate(self.unet, parts=("unet", "scheduler")))
        return paths


def hash_models(models: dict[str, ModelSource]) -> dict[str, str]:
    """Return what identifies each model: hashes of its files, and what it predicts, if given.

    A checkpoint that several models share is read once.
    """
    hash_of_path: dict[Path, str] = {}
    hash_of_model: dict[str, str] = {}
    for name, source in models.items():
        hashes = []
        for path in source.paths():
            if path not in hash_of_path:
                hash_of_path[path] = hash_checkpoint(path)
            hashes.append(hash_of_path[path])
        if source.prediction_type is not None:
            hashes.append(source.prediction_type)
        hash_of_model[name] = "-".join(hashes)
    return hash_of_model


# ---- Images --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageRequest:
    """An image file that is to be sampled. `settings` is what its text chunk states."""

    path: Path
    prompt: str
    seed: int
    options: SamplingOptions
    model: str
    model_hash: str | None = None  # None: not stated

    def settings(self) -> dict:
        settings = {
            "Seed": self.seed,
            "Steps": self.options.steps,
            "Sampler": self.options.sampler,
            "CFG scale": float(self.options.guidance),
            "Eta": float(self.options.eta),
            "Precision": str(self.options.dtype).removeprefix("torch."),
            "Model": self.model,
        }
        if self.model_hash is not None:
            settings["Model hash"] = self.model_hash
        return settings

    def is_done(self) -> bool:
        """Return whether the file is there and states the prompt and settings asked for."""
        stated = read_parameters(self.path)
        return stated.startswith(format_parameters(self.prompt, self.settings()) + ", Size: ")


def missing(requests: Sequence[ImageRequest]) -> list[ImageRequest]:
    """Return the requests whose image has yet to be sampled."""
    return [request for request in requests if not request.is_done()]


def sample_requests(
    pipe: Pipeline, requests: Sequence[ImageRequest], batch_size: int, bar: tqdm | None = None
) -> None:
    """Sample images of one model that share their sampling options, and write their files.

    bar: a progress bar that advances by every image; None for one of their own.

    Raises InputError in place of an image that is not finite.
    """
    if not requests:
        return
    images = sample_images(
        pipe,
        prompts=[request.prompt for request in requests],
        seeds=[request.seed for request in requests],
        options=requests[0].options,
        batch_size=batch_size,
    )
    model = requests[0].model
    if bar is None:
        bar = tqdm(desc=f"{model}: sampling", total=len(requests), unit="image", delay=2)
    try:
        for request, image in zip(requests, images):
            save_png(to_pil(image), request.path, request.prompt, request.settings())
            bar.update()
    except InputError as error:
        raise InputError(f"{model}: {error}") from None


@dataclass(frozen=True)
class Evaluation:
    """A set of images to sample from every model: `images_per_prompt` for each of N prompts.

    A seed depends on prompt and image alone, so that all models start from the same noise.
    """

    folder: Path
    prompts: Sequence[str]
    images_per_prompt: int
    options: SamplingOptions
    seed: int = SEED

    def file_stem(self) -> str:
        """Return the name of its files: guidance-3-32px."""
        title = f"guidance-{self.options.guidance:g}"
        if self.options.height is not None:
            title += f"-{self.options.height}px"
        return title

    def requests(self, model: str, model_hash: str) -> list[ImageRequest]:
        """Return the images to be sampled from a model, prompt by prompt."""
        folder = self.folder / "images" / model / self.file_stem()
        requests = []
        for i, prompt in enumerate(self.prompts):
            for j in range(self.images_per_prompt):
                path = folder / f"{i:05d}-{j}.png"
                seed = self.seed + STRIDE * i + j
                request = ImageRequest(path, prompt, seed, self.options, model, model_hash)
                requests.append(request)
        return requests

    def score(self, model: str, model_hash: str, scorer: Scorer) -> dict[str, np.ndarray]:
        """Return {metric: [N,images_per_prompt]} of a model's images, which have been sampled.

        Scores are stored under a hash of the scorer and the image's file, which states its prompt.
        A metric of a prompt's images as a set is the same for all of them; with an image per prompt
        there is none. Raises InputError if a score is not finite.
        """
        requests = self.requests(model, model_hash)
        keys = []
        for request in requests:
            keys.append(hash_files([request.path], [scorer.hash]))
        path = self.folder / "scores" / model / f"{self.file_stem()}-{scorer.name}.json"
        known = read_scores(path, scorer.metrics)

        unknown = [i for i, key in enumerate(keys) if key not in known]
        title = f"{model}: {scorer.name}"
        # the miniature world's score is too fast for a bar
        bar = tqdm(total=len(unknown), desc=title, unit="image", disable=not unknown, delay=2)
        with bar:
            for start in range(0, len(unknown), SCORE_BATCH):
                batch = unknown[start : start + SCORE_BATCH]
                scores = score_images(scorer, [requests[i] for i in batch])
                for i, scores_of_image in zip(batch, scores):
                    known[keys[i]] = scores_of_image
                write_json(path, known)
                bar.update(len(batch))

        result = {}
        for metric in scorer.metrics:
            values = np.array([known[key][metric] for key in keys])
            result[metric] = values.reshape(len(self.prompts), self.images_per_prompt)
        if self.images_per_prompt > 1:
            result.update(self.score_sets(requests, scorer))
        return result

    def score_sets(
        self, requests: Sequence[ImageRequest], scorer: Scorer
    ) -> dict[str, np.ndarray]:
        """Return {metric: [N,images_per_prompt]} of the scorer's metrics of sets."""
        result = {}
        for metric in scorer.set_metrics:
            result[metric] = np.empty((len(self.prompts), self.images_per_prompt))
        for i, prompt in enumerate(self.prompts):
            start = i * self.images_per_prompt
            set_requests = requests[start : start + self.images_per_prompt]
            images = [read_image(request.path) for request in set_requests]
            for metric, value in scorer.score_set(images, prompt).items():
                result[metric][i] = value
        return result


def read_scores(path: Path, metrics: Collection[str]) -> dict[str, dict[str, float]]:
    """Return stored scores {key: {metric: score}}, without those that lack one of `metrics`."""
    if not path.exists():
        return {}
    stored = read_json(path)
    return {key: scores for key, scores in stored.items() if set(metrics) <= scores.keys()}


def score_images(scorer: Scorer, requests: Sequence[ImageRequest]) -> list[dict[str, float]]:
    """Return {metric: score} for each image. Raises InputError if a score is not finite."""
    images = [read_image(request.path) for request in requests]
    scores = scorer.score(images, [request.prompt for request in requests])  # {metric: [N]}
    for values in scores.values():
        if not np.isfinite(values).all():
            raise InputError(f"{scorer.name}: a score is not finite; is one of its files broken?")

    scores_of_images = []
    for i in range(len(images)):
        scores_of_images.append({metric: float(scores[metric][i]) for metric in scorer.metrics})
    return scores_of_images


def sample_models(
    evaluations: dict[str, Sequence[Evaluation]],
    models: dict[str, ModelSource],
    hashes: dict[str, str],
    batch_size: int,
    device: str,
    purpose: str = "sampling",
) -> None:
    """Sample every model's missing images. A model that has none missing is not loaded.

    evaluations: {model: the sets of images to sample from it}
    purpose: what the progress bar says
    """
    todo: dict[str, list] = {}
    total = 0
    for name in models:
        batches = [
            missing(evaluation.requests(name, hashes[name])) for evaluation in evaluations[name]
        ]
        count = sum(len(requests) for requests in batches)
        if count > 0:
            todo[name] = batches
            total += count

    warned = False
    with tqdm(desc=purpose, total=total, unit="image", disable=not todo) as bar:
        for name, batches in todo.items():
            bar.set_postfix_str(name)
            pipe = models[name].load(device)
            if not warned:
                warn_of_cut_prompts(pipe.text_encoder.tokenizer, evaluations[name][0].prompts)
                warned = True
            for requests in batches:
                sample_requests(pipe, requests, batch_size, bar)
            del pipe  # frees its memory before the next model is loaded
        bar.set_postfix_str("")


# ---- The comparison ------------------------------------------------------------------------------


def compare(
    title: str,
    setting: str,
    scores: dict[str, dict[str, np.ndarray]],
    less_is_better: Collection[str],
    metric: str,
    config: dict,
) -> dict:
    """Return the content of results.json.

    title: which images are compared: "200 prompts, 2 images each".
    setting: what distinguishes this comparison from another one of them: "guidance 7.5".
    scores: {model: {metric: [N]}}, the N prompts being the same for all models.
    less_is_better: the metrics of which a lower score is better.
    metric: the one that claims are judged by.
    config: what the results depend on.
    """
    compared = stats.compare(scores, less_is_better)
    return {
        "title": title,
        "setting": setting,
        "metric": metric,
        "less_is_better": list(less_is_better),
        "models": compared["models"],
        "differences": compared["differences"],
        "claims": judge_claims(compared["differences"], metric),
        "tables": {},
        "config": config,
    }


def judge_claims(differences: dict[str, dict], metric: str) -> list[dict]:
    """Return verdicts on those of the paper's claims that these models can test.

    Where bounded self-play was trained beside SPIN, the claim that it beats SPIN is another one.
    Each is {"claim", "verdict", "difference"}. The claim that one model beats another holds if the
    whole interval of their difference is above 0, and fails if it is below 0.
    """
    claims = {"spin-1 - sft": "SPIN-1 beats SFT", "spin-2 - dpo": "SPIN-2 beats Diffusion-DPO"}
    if metric == "reward":  # of the miniature world
        claims["sft - base"] = f"SFT stays within {PLATEAU:g} of theta_0"
    for pair in differences:
        iterations = re.fullmatch(r"spin-(\d+) - spin-(\d+)", pair)
        if iterations and int(iterations[1]) == int(iterations[2]) + 1:
            claims[pair] = f"SPIN-{iterations[1]} beats SPIN-{iterations[2]}"
    for pair in differences:
        iteration = re.fullmatch(r"bounded-(\d+) - spin-\1", pair)
        if iteration:
            claims[pair] = f"bounded-{iteration[1]} beats SPIN-{iteration[1]}"

    judged = []
    for pair, claim in claims.items():
        if pair not in differences:
            continue
        summary = differences[pair][metric]
        difference = {key: summary[key] for key in ("mean", "low", "high", "n")}
        verdict = judge_plateau(difference) if pair == "sft - base" else judge_gain(difference)
        judged.append({"claim": claim, "verdict": verdict, "difference": difference})
    return judged


def judge_gain(difference: stats.Summary) -> str:
    verdicts = {1: HOLDS, 0: UNDECIDED, -1: FAILS}
    return verdicts[stats.significant_sign(difference)]


def judge_plateau(difference: stats.Summary) -> str:
    """Return the verdict on a difference that is claimed to be within PLATEAU of 0."""
    if difference["n"] < stats.FEW:
        return UNDECIDED
    if -PLATEAU < difference["low"] and difference["high"] < PLATEAU:
        return HOLDS
    if difference["low"] > PLATEAU or difference["high"] < -PLATEAU:
        return FAILS
    return UNDECIDED


# ---- The files of a comparison -------------------------------------------------------------------


def write_results(folder: Path, results: dict) -> None:
    """Write results.png and results.md, then results.json, which marks all three as complete."""
    save_png(results_chart(results), folder / "results.png")
    with atomic_write(folder / "results.md") as temporary:
        temporary.write_text(format_markdown(results))
    write_json(folder / "results.json", results)


def verdicts_of(results: dict) -> dict[str, dict]:
    """Return the comparisons in results.json, each under its setting.

    There is one or, in the miniature world, a second one: of each model at its best guidance.
    """
    verdicts = {results["setting"]: results}
    if "at_best_guidance" in results:
        at_best = results["at_best_guidance"]
        verdicts[at_best["setting"]] = at_best
    return verdicts


def summary_metrics(results: dict) -> list[str]:
    """Return the metrics to show side by side. Of two comparisons, only some have room for that."""
    metrics = list(next(iter(results["models"].values())))
    if "at_best_guidance" not in results:
        return metrics
    return [metric for metric in metrics if metric in (results["metric"], "energy")]


def results_chart(results: dict) -> Image.Image:
    """Return a chart of what each model gains over the first one, or of a single model's scores."""
    first, *others = results["models"]
    if not others:
        return plots.interval_charts(results["models"])

    verdicts = verdicts_of(results)
    gains: dict[str, dict] = {name: {} for name in results["models"]}
    for metric in summary_metrics(results):
        for setting, verdict in verdicts.items():
            panel = f"{metric}, minus {first}'s"
            if len(verdicts) > 1:
                panel += f", {setting}"
            gains[first][panel] = {"mean": 0.0, "low": 0.0, "high": 0.0}
            for name in others:
                gains[name][panel] = verdict["differences"][f"{name} - {first}"][metric]
    return plots.interval_charts(gains)


def format_markdown(results: dict) -> str:
    """Return results.md: the summary of results.json, then all its tables."""
    parts = [format_summary(results)]
    verdicts = verdicts_of(results)
    for setting, verdict in verdicts.items():
        if len(verdicts) > 1:
            parts += [f"# {verdict['title']}, {setting}", stats.format_table(rows_of(verdict))]
        parts += format_details(verdict)
    return "\n\n".join(parts) + "\n"


def format_summary(results: dict) -> str:
    """Return the first lines of results.md: scores, and verdicts on claims, side by side."""
    verdicts = verdicts_of(results)
    heading = f"# {results['title']}"
    if len(verdicts) == 1:
        heading += f", {results['setting']}"

    scores: dict[str, dict] = {name: {} for name in rows_of(results)}
    for metric in summary_metrics(results):
        for setting, verdict in verdicts.items():
            column = f"{metric}, {setting}" if len(verdicts) > 1 else metric
            for name, metrics in rows_of(verdict).items():
                scores[name][column] = metrics[metric]
    parts = [heading, stats.format_table(scores)]

    if results["claims"]:
        claims: dict[str, dict] = {claim["claim"]: {} for claim in results["claims"]}
        for setting, verdict in verdicts.items():
            column = setting if len(verdicts) > 1 else "verdict"
            for claim in verdict["claims"]:
                difference = stats.format_cell(claim["difference"], sign="+")
                claims[claim["claim"]][column] = f"{claim['verdict']}, {difference}"
        parts.append(stats.format_table(claims, corner=f"by {results['metric']}"))

    note = "Brackets: 95% bootstrap intervals over the prompts, for this one training seed."
    if len(verdicts) > 1:
        note += " Best guidance: each model's own, chosen on other prompts."
    if "real" in results:
        note += (
            " Reward is from 0 to 10, how near an image is to the one that its prompt describes. "
            "base: theta_0. real: fresh real images."
        )
    lower = [metric for metric in results["less_is_better"] if metric in summary_metrics(results)]
    if lower:
        note += f" Lower is better: {', '.join(lower)}."
    parts.append(textwrap.fill(note, 100))
    return "\n\n".join(parts)


def rows_of(results: dict) -> dict[str, dict]:
    """Return the scores of a comparison's models and, in the miniature world, of real images."""
    rows = dict(results["models"])
    if "real" in results:
        rows["real"] = results["real"]
    return rows


def format_details(results: dict) -> list[str]:
    """Return the paragraphs on one comparison that its summary leaves out."""
    parts = ["Medians.", stats.format_table(medians(rows_of(results)))]
    for title, table in results["tables"].items():
        parts += [title, stats.format_table(table)]

    if results["differences"]:
        title = "Differences, paired by prompt. *: significant."
        parts += [title, stats.format_table(marked_differences(results["differences"]))]
        metrics = [results["metric"]]
        if results["metric"] == "average":
            metrics = list(next(iter(results["models"].values())))
        for metric in metrics:
            rates = stats.win_rates(results, metric)
            title = f"How often a row's model beats a column's, by {metric}; a tie counts as half."
            parts += [title, stats.format_table(rates, digits=2)]
    return parts


def medians(models: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Return {model: {metric: median}}."""
    table = {}
    for name, metrics in models.items():
        table[name] = {metric: summary["median"] for metric, summary in metrics.items()}
    return table


def marked_differences(differences: dict[str, dict]) -> dict[str, dict[str, str]]:
    """Return the differences as a table's cells, with a * after those that are significant."""
    table: dict[str, dict[str, str]] = {}
    for pair, metrics in differences.items():
        table[pair] = {}
        for metric, difference in metrics.items():
            mark = " *" if stats.significant_sign(difference) != 0 else ""
            table[pair][metric] = stats.format_cell(difference, sign="+") + mark
    return table
