"""results.json, results.md, results.png: what models score, and what that says about the paper's claims."""

from pathlib import Path

import numpy as np

from spin import run, stats, viz

Scores = dict[str, dict[str, np.ndarray]]  # {model: {metric: [N]}}, entry i of every model being prompt i


def write(folder: Path, title: str, scores: Scores, config: dict) -> None:
    results = {"title": title} | stats.compare(scores) | {"claims": claims(scores), "config": config}
    with run.whole(folder / "results.png") as part:
        viz.save_png(viz.interval_charts(results["models"]), part)
    with run.whole(folder / "results.md") as part:
        part.write_text(markdown(results))
    run.write_json(folder / "results.json", results)  # last: its presence says that the others are there


def claims(scores: Scores, metric: str = "reward") -> list[dict]:
    """The paper's claims that these models allow to judge, each as a difference that would be positive.

    A claim holds if the whole interval of its difference is positive, fails if it is negative.
    """
    last = max((name for name in scores if name.startswith("spin-")), key=lambda name: int(name[5:]), default="spin-0")
    said = {
        "SPIN-1 beats SFT": {"spin-1": 1, "sft": -1},
        "SPIN-2 beats Diffusion-DPO": {"spin-2": 1, "dpo": -1},
        f"SFT plateaus, gaining less than half of what {last.upper()} does": {last: 0.5, "base": 0.5, "sft": -1},
        f"A renewed opponent helps: {last.upper()} beats SPIN-1": {last: 1, "spin-1": -1},
    }
    found = []
    for claim, weights in said.items():
        if weights.keys() <= scores.keys() and len(weights) > 1:  # spin-1 does not beat itself
            gap = stats.interval(sum(weight * scores[name][metric] for name, weight in weights.items()))
            verdict = {1: "holds", 0: "is not resolved", -1: "fails"}[stats.resolved(gap)]
            found.append({"claim": claim, "verdict": verdict, "metric": metric, "difference": gap})
    return found


def markdown(results: dict, brief: bool = False) -> str:
    """results.md: two tables, and in plain words what they say. brief: without the second, of the differences."""
    differences = {name: of | {"reward wins": of["reward"]["win_rate"]} for name, of in results["differences"].items()}
    verdicts = [
        "{claim}: {verdict} ({mean:+.3f} [{low:+.3f}, {high:+.3f}]).".format(**line, **line["difference"])
        for line in results["claims"]
    ]
    paragraphs = [f"# {results['title']}", stats.markdown(results["models"])]
    if differences and not brief:
        paragraphs += ["Differences, paired by prompt; wins: the share of prompts with more reward, ties one half."]
        paragraphs += [stats.markdown(differences, sign="+")]
    paragraphs += ["What this run says, in reward. " + " ".join(verdicts or ["Too few models to judge a claim."])]
    paragraphs += ["Brackets: 95 % bootstrap intervals over the prompts of this run. Another seed may say otherwise."]
    return "\n\n".join(paragraphs) + "\n"
