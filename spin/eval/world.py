"""The results of the miniature world: all models at one guidance, and each at its own best.

A model is judged twice, because guidance alone moves the scores more than fine-tuning does: at the
guidance at which the opponents' images were generated, as in the paper, and at the best of several,
chosen on the validation prompts.

Real images, through the autoencoder as a model's are, are scored beside the models. Their energy
and spread are what a perfect model would have.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from spin import toy
from spin.eval import comparison, stats, sweep
from spin.eval.comparison import Evaluation, ModelSource
from spin.eval.scorers import ToyScorer
from spin.infra.files import read_json
from spin.infra.images import to_pil
from spin.infra.run import Run

BEST_GUIDANCE = "best guidance"  # the setting in which each model has its own
BATCH = 64  # images that pass through the autoencoder at once
REAL_STREAM = 2  # of random numbers; data sets and the score's own drawings have others


def captions(split: str) -> list[str]:
    """Return the captions of a split's scenes, in order."""
    return [scene.caption for scene in toy.split()[split]]


def score_models(
    run: Run,
    models: dict[str, ModelSource],
    evaluation: Evaluation,
    sweep_guidance: Sequence[float],
    split: str,
    batch_size: int,
    device: str,
) -> dict:
    """Score all models, "base" first, and return what results.json holds.

    A prompt's score is the mean over its images. Images and scores are stored where evaluate.py
    looks for them. If results.json has these models and this title, nothing is sampled or scored.

    evaluation: the prompts to report on, and the run's guidance
    sweep_guidance: where to look for each model's best guidance, with one image for each of the
        validation prompts; a single value, or the split "validation": do not look
    split: of the prompts, for the title
    """
    guidance = evaluation.options.guidance
    images = f"{evaluation.images_per_prompt} images each"
    if evaluation.images_per_prompt == 1:
        images = "an image each"
    title = f"{len(evaluation.prompts)} {split} prompts, {images}"
    setting = f"guidance {guidance:g}"
    path = run.folder / "results.json"
    if path.exists():
        results = read_json(path)
        swept = results.get("at_best_guidance", {}).get("sweep_guidance", [])
        if (
            results["title"] == title
            and results.get("setting") == setting
            and results["models"].keys() == models.keys()
            and swept == (list(sweep_guidance) if has_sweep(sweep_guidance, split) else [])
        ):
            return results

    hashes = comparison.hash_models(models)

    def sample_and_score(
        evaluation: Evaluation, guidance_of: dict, purpose: str
    ) -> sweep.Scored:
        return sweep.sample_and_score(
            evaluation, guidance_of, models, hashes, ["toy"], batch_size, device, purpose=purpose
        )

    # ---- all at the run's guidance
    same_guidance = {name: [guidance] for name in models}
    scored = sample_and_score(evaluation, same_guidance, f"sampling at {setting}")
    scores = {name: scored.mean(guidance, name) for name in models}
    config = read_json(run.folder / "config.json")
    results = comparison.compare(
        title, setting, scores, scored.less_is_better, scored.metric, config
    )
    vae = models["base"].load(device).vae
    results["real"] = summarize_real(vae, evaluation)

    # ---- each at its best guidance, chosen on the validation prompts
    if has_sweep(sweep_guidance, split):
        chosen_on = replace(
            evaluation,
            folder=evaluation.folder / "validation",
            prompts=captions("validation"),
            images_per_prompt=1,
        )
        all_guidance = {name: sweep_guidance for name in models}
        swept = sample_and_score(chosen_on, all_guidance, "looking for each model's best guidance")
        best = swept.best_guidance()
        own_guidance = {name: [best[name]] for name in models}
        scored = sample_and_score(evaluation, own_guidance, "sampling at the best guidance")
        scores = {name: scored.mean(best[name], name) for name in models}
        at_best = comparison.compare(
            title, BEST_GUIDANCE, scores, scored.less_is_better, scored.metric, {}
        )
        at_best["best_guidance"] = best
        at_best["sweep_guidance"] = list(sweep_guidance)
        at_best["real"] = results["real"]
        real = summarize_real(vae, chosen_on)[scored.metric]
        at_best["tables"] = {sweep.VALIDATION.format(scored.metric): swept.table(real)}
        results["at_best_guidance"] = at_best

    comparison.write_results(run.folder, results)
    return read_json(path)


def summarize_real(vae, evaluation: Evaluation) -> dict[str, stats.Summary]:
    """Return the summary of each metric of real images of an evaluation's prompts."""
    scores = score_real(vae, evaluation.prompts, evaluation.images_per_prompt)
    return stats.summarize({metric: values.mean(axis=1) for metric, values in scores.items()})


def has_sweep(sweep_guidance: Sequence[float], split: str) -> bool:
    """Return whether each model's best guidance is looked for.

    It is not if the models are reported on the validation prompts, on which it would be chosen.
    """
    return len(sweep_guidance) > 1 and split != "validation"


@torch.no_grad()
def score_real(vae, prompts: Sequence[str], images_per_prompt: int) -> dict[str, np.ndarray]:
    """Score fresh curated images of the prompts, encoded and decoded, as a model's are.

    Return {metric: [N,images_per_prompt]} of the N prompts.
    """
    # ---- each scene's drawings, then the noise of its posteriors, of a stream of its own
    streams = []
    drawings = []
    for prompt in prompts:
        scene = toy.SCENE_OF_CAPTION[prompt]
        rng = np.random.default_rng([REAL_STREAM, toy.SCENES.index(scene)])
        streams.append(rng)
        drawings += [toy.curated_image(scene, rng) for _ in range(images_per_prompt)]
    pixels = torch.tensor(np.stack(drawings), dtype=torch.float32, device=vae_device(vae))
    mean, logvar = encode(vae, pixels.permute(0, 3, 1, 2) * 2 - 1)
    shape = (images_per_prompt, *mean.shape[1:])
    noise = np.concatenate([rng.standard_normal(shape) for rng in streams])
    latents = mean + (0.5 * logvar).exp() * torch.tensor(noise).to(mean)
    images = [to_pil(image) for batch in latents.split(BATCH) for image in decode(vae, batch)]

    # ---- the scores, as those of a model's images
    scorer = ToyScorer()
    repeated = np.repeat(prompts, images_per_prompt).tolist()
    shape = (len(prompts), images_per_prompt)
    scores = {}
    for metric, values in scorer.score(images, repeated).items():
        scores[metric] = values.reshape(shape)
    if images_per_prompt > 1:
        for metric in scorer.set_metrics:
            scores[metric] = np.empty(shape)
        for i, prompt in enumerate(prompts):
            own = images[i * images_per_prompt : (i + 1) * images_per_prompt]
            for metric, value in scorer.score_set(own, prompt).items():
                scores[metric][i] = value
    return scores


def encode(vae, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the posteriors' mean and log variance of images [N,3,H,W] in [-1,1], in batches."""
    moments = [vae.encode(batch) for batch in pixels.split(BATCH)]
    means, logvars = zip(*moments)
    return torch.cat(means), torch.cat(logvars)


def decode(vae, latents: torch.Tensor) -> torch.Tensor:
    """Return images [N,3,H,W] in [0,1] of latents that are not scaled."""
    return (vae.decode(latents) / 2 + 0.5).clamp(0, 1)


def vae_device(vae) -> torch.device:
    return next(vae.parameters()).device


def conclusions(results: dict) -> list[str]:
    """Return three sentences on what came out, for the end of a run; fewer of a partial run.

    Their lines have at most 100 characters.
    """
    models = results["models"]
    others = [name for name in models if name != "base"]
    if not others:
        return []

    gains = {name: results["differences"][f"{name} - base"]["reward"] for name in others}
    ranking = sorted(others, key=lambda name: gains[name]["mean"], reverse=True)
    places = [f"{name} {stats.format_cell(gains[name], sign='+')}" for name in ranking]
    sentences = [
        f"At the run's guidance, {ranking[0]} gains the most reward over theta_0: "
        f"{', '.join(places)}."
    ]

    if "at_best_guidance" in results:
        at_best = results["at_best_guidance"]
        rewards = {name: scores["reward"]["mean"] for name, scores in at_best["models"].items()}
        ranking = sorted(rewards, key=rewards.get, reverse=True)
        places = [f"{name} {rewards[name]:.2f}" for name in ranking]
        sentences.append(
            f"With each model at its own best guidance, {ranking[0]} comes first by reward: "
            f"{', '.join(places)}."
        )

    if "energy" in results["real"]:
        real = results["real"]["energy"]["mean"]
        own = nearest_by_energy(results)
        sentence = f"By energy (real images: {real:.4f}), the best images at the run's guidance are"
        sentence += f" {own}"
        if "at_best_guidance" in results:
            at_best = nearest_by_energy(results["at_best_guidance"])
            sentence += f"; with each model at its own best guidance, {at_best}"
        sentences.append(f"{sentence}.")
    return [textwrap.fill(sentence, 100) for sentence in sentences]


def nearest_by_energy(results: dict) -> str:
    """Return whose images are distributed most like the real ones, and theta_0's energy."""
    energies = {name: scores["energy"]["mean"] for name, scores in results["models"].items()}
    nearest = min(energies, key=energies.get)
    return f"those of {nearest}, {energies[nearest]:.4f} (theta_0's {energies['base']:.4f})"
