"""The results of the miniature world: all models at one guidance, and each at its own best.

A model is judged twice, because guidance alone moves the scores more than fine-tuning does: at the
guidance at which the opponents' images were generated, as in the paper, and at the best of several,
chosen on the validation prompts.

Real images, through the autoencoder as a model's are, are scored beside the models. Their energy
and spread are what a perfect model would have.
"""

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

SWEEP_PROMPTS = 40  # validation prompts on which a model's best guidance is chosen
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
    sweep_guidance: where to look for each model's best guidance, with one image for each of
        SWEEP_PROMPTS validation prompts; a single value, or the split "validation": do not look
    split: of the prompts, for the title
    """
    guidance = evaluation.options.guidance
    count = f"{len(evaluation.prompts)} {split} prompts, {evaluation.images_per_prompt} images each"
    title = f"{count}, guidance {guidance:g}"
    path = run.folder / "results.json"
    if path.exists():
        results = read_json(path)
        is_same = results["title"] == title and results["models"].keys() == models.keys()
        if is_same and has_sweep(sweep_guidance, split) == ("at_best_guidance" in results):
            return results

    hashes = comparison.hash_models(models)

    def sample_and_score(evaluation: Evaluation, guidance_of: dict) -> sweep.Scored:
        return sweep.sample_and_score(
            evaluation, guidance_of, models, hashes, ["toy"], batch_size, device
        )

    # ---- all at the run's guidance
    scored = sample_and_score(evaluation, {name: [guidance] for name in models})
    scores = {name: scored.mean(guidance, name) for name in models}
    config = read_json(run.folder / "config.json")
    results = comparison.compare(title, scores, scored.less_is_better, scored.metric, config)
    real = score_real(
        models["base"].load(device).vae, evaluation.prompts, evaluation.images_per_prompt
    )
    results["real"] = {name: stats.interval(values.mean(axis=1)) for name, values in real.items()}

    # ---- each at its best guidance, chosen on the validation prompts
    if has_sweep(sweep_guidance, split):
        chosen_on = replace(
            evaluation,
            folder=evaluation.folder / "validation",
            prompts=captions("validation")[:SWEEP_PROMPTS],
            images_per_prompt=1,
        )
        swept = sample_and_score(chosen_on, {name: sweep_guidance for name in models})
        best = swept.best_guidance()
        scored = sample_and_score(evaluation, {name: [best[name]] for name in models})
        scores = {name: scored.mean(best[name], name) for name in models}
        title = f"{count}, each model at its best guidance"
        at_best = comparison.compare(title, scores, scored.less_is_better, scored.metric, {})
        at_best["best_guidance"] = best
        at_best["real"] = results["real"]
        at_best["tables"] = {sweep.VALIDATION.format(scored.metric): swept.table()}
        results["at_best_guidance"] = at_best

    comparison.write_results(run.folder, results)
    return read_json(path)


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
    scorer = ToyScorer()
    scores: dict[str, list] = {}
    for prompt in prompts:
        scene = toy.SCENE_OF_CAPTION[prompt]
        rng = np.random.default_rng([REAL_STREAM, toy.SCENES.index(scene)])
        drawings = [toy.curated_image(scene, rng) for _ in range(images_per_prompt)]
        pixels = torch.tensor(np.stack(drawings), dtype=torch.float32, device=vae_device(vae))
        mean, logvar = vae.encode(pixels.permute(0, 3, 1, 2) * 2 - 1)
        noise = torch.tensor(rng.standard_normal(mean.shape), dtype=mean.dtype, device=mean.device)
        decoded = vae.decode(mean + (0.5 * logvar).exp() * noise) / 2 + 0.5
        images = [to_pil(image) for image in decoded.clamp(0, 1)]

        for metric, values in scorer.score(images, [prompt] * images_per_prompt).items():
            scores.setdefault(metric, []).append(values)
        if images_per_prompt > 1:
            for metric, value in scorer.score_set(images, prompt).items():
                scores.setdefault(metric, []).append(np.full(images_per_prompt, value))
    return {metric: np.stack(values) for metric, values in scores.items()}


def vae_device(vae) -> torch.device:
    return next(vae.parameters()).device


def conclusions(results: dict) -> list[str]:
    """Return three sentences on what came out, for the end of a run; fewer of a partial run."""
    sentences = []
    models = results["models"]
    others = [name for name in models if name != "base"]
    if not others:
        return []

    gains = []
    for name in others:
        difference = results["differences"][f"{name} - base"]["reward"]
        gains.append(f"{name} {stats.format_cell(difference, sign='+')}")
    sentences.append(f"At the run's guidance, reward gained over theta_0: {', '.join(gains)}.")

    if "at_best_guidance" in results:
        at_best = results["at_best_guidance"]
        rewards = []
        for name in models:
            guidance = at_best["best_guidance"][name]
            mean = at_best["models"][name]["reward"]["mean"]
            rewards.append(f"{name} {mean:.2f} (at {guidance:g})")
        sentences.append(f"At each model's best guidance, reward: {', '.join(rewards)}.")

    if "energy" in results["real"]:
        energies = []
        for name in models:
            energies.append(f"{name} {models[name]['energy']['mean']:.4f}")
        real = f"{results['real']['energy']['mean']:.4f}"
        sentences.append(
            f"Energy, lower for images distributed like the real ones, which have {real}: "
            f"{', '.join(energies)}."
        )
    return sentences
