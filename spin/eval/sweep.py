"""Sample and score models at several guidance scales, and choose the best one for each model."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from spin.eval import comparison, stats
from spin.eval.comparison import Evaluation, ModelSource
from spin.eval.scorers import load_scorer

# Titles of tables in results.json.
SAME_PROMPTS = "The {} by guidance. The best is chosen on these same prompts, a bias in its favor."
VALIDATION = "The {} by guidance on the validation prompts, on which the best is chosen."


@dataclass
class Scored:
    """The images of some models for the same prompts, and their scores."""

    evaluations: dict[float, Evaluation]  # by guidance
    scores: dict[tuple[float, str], dict]  # of (guidance, model): {metric: [N,num_images]}
    best: dict[tuple[float, str], dict]  # the same, of each prompt's best image: {metric: [N]}
    metric: str  # by which images are chosen and claims are judged
    less_is_better: list[str]  # metrics
    scorer_hashes: dict[str, str]

    def mean(self, guidance: float, model: str) -> dict[str, np.ndarray]:
        """Return {metric: [N]}, the mean over each prompt's images."""
        scores = self.scores[guidance, model]
        return {metric: values.mean(axis=1) for metric, values in scores.items()}

    def best_guidance(self) -> dict[str, float]:
        """Return the guidance at which each model scores best, of those at which it is sampled."""
        means: dict[str, dict[float, float]] = defaultdict(dict)
        for (guidance, model), scores in self.best.items():
            means[model][guidance] = scores[self.metric].mean()
        return {model: max(values, key=values.get) for model, values in means.items()}

    def table(self, real: stats.Summary | None = None) -> dict[str, dict]:
        """Return {model: {"best at", then the metric at each guidance}}, a table's rows.

        real: the metric of real images, for a row of their own.
        """
        rows = {}
        for model, best in self.best_guidance().items():
            rows[model] = {"best at": f"{best:g}"}
            for guidance in self.evaluations:
                values = self.best[guidance, model][self.metric]
                rows[model][f"{guidance:g}"] = stats.interval(values)
        if real is not None:
            rows["real"] = {"best at": "any"}
            for guidance in self.evaluations:
                rows["real"][f"{guidance:g}"] = real
        return rows


def sample_and_score(
    evaluation: Evaluation,
    guidance_of: dict[str, Sequence[float]],
    models: dict[str, ModelSource],
    hashes: dict[str, str],
    metrics: Sequence[str],
    batch_size: int,
    device: str,
    scorers_folder: str | Path | None = None,
    purpose: str = "sampling",
) -> Scored:
    """Sample and score what is missing in the evaluation's folder.

    evaluation: what to sample; its guidance is replaced
    guidance_of: the values of guidance at which each model is sampled
    hashes: of the models, see `comparison.hash_models`
    metrics: names of scorers
    purpose: what the progress bars say
    """
    # ---- every model samples every prompt
    evaluations: dict[float, Evaluation] = {}
    evaluations_of: dict[str, list[Evaluation]] = {}
    for model, values in guidance_of.items():
        for guidance in values:
            options = replace(evaluation.options, guidance=guidance)
            evaluations[guidance] = replace(evaluation, options=options)
        evaluations_of[model] = [evaluations[guidance] for guidance in values]
    comparison.sample_models(evaluations_of, models, hashes, batch_size, device, purpose)

    # ---- every scorer scores every image; the best of a prompt's images counts
    scores = defaultdict(dict)
    primary_metrics = []
    less_is_better = []
    scorer_hashes = {}
    for name in metrics:
        scorer = load_scorer(name, scorers_folder, device)
        for model, values in guidance_of.items():
            for guidance in values:
                new_scores = evaluations[guidance].score(model, hashes[model], scorer)
                scores[guidance, model].update(new_scores)
        primary_metrics.append(scorer.primary_metric)
        less_is_better += scorer.less_is_better
        scorer_hashes[name] = scorer.hash
        del scorer  # frees its network's memory before the next is loaded
    best = {key: stats.best_of(values, primary_metrics) for key, values in scores.items()}
    metric = primary_metrics[0] if len(primary_metrics) == 1 else "average"
    return Scored(evaluations, dict(scores), best, metric, less_is_better, scorer_hashes)
