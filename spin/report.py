"""results.json, results.md, results.png: what models score, and what that says about the paper's claims."""

from collections.abc import Collection
from pathlib import Path

import numpy as np

from spin import run, stats, viz

PLATEAU = 0.05  # points of reward that SFT may move theta_0 and be said to have stood still
Scores = dict[str, dict[str, np.ndarray]]  # {model: {metric: [N]}}, entry i of every model being prompt i


def write(folder: Path, title: str, scores: Scores, config: dict, less_is_better: Collection[str] = ()) -> None:
    """Writes the three files into `folder`. less_is_better: names of metrics of which that is so."""
    results = {"title": title} | stats.compare(scores, less_is_better) | {"claims": claims(scores), "config": config}
    with run.whole(folder / "results.png") as part:
        viz.save_png(viz.interval_charts(gains(results)), part)
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
    verdicts = [
        "{claim}: this {verdict}, the difference being {mean:+.3f} [{low:+.3f}, {high:+.3f}].".format(
            **line, **line["difference"]
        )
        for line in results["claims"]
    ]
    paragraphs = [f"# {results['title']}", stats.markdown(results["models"])]
    if differences and not brief:
        paragraphs += ["Differences, paired by prompt; wins: the share of prompts with more reward, ties one half."]
        paragraphs += [stats.markdown(differences, sign="+")]
    if any("renewed" in line["claim"] for line in results["claims"]):
        verdicts += ["An iteration adds steps as well as an opponent: which of the two helps, this run does not say."]
    paragraphs += ["What this run says of reward. " + " ".join(verdicts or ["Too few models to judge a claim."])]
    paragraphs += ["Brackets: 95 % bootstrap intervals over the prompts of this run. Another seed may say otherwise."]
    return "\n\n".join(paragraphs) + "\n"
