"""Models side by side: all draw the same prompts from the same noise, are scored, compared with intervals, told of.
OUT/images/<model>/guidance-<g>/<prompt>-<image>.png says in itself how it was made, OUT/scores/... of what its scores
are. What is there, and was made as is now asked, is not made again. OUT/results.json, .md and .png tell of it all."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from spin import data, sampler
from spin.eval import scorers as rewards
from spin.infra import run
from spin.eval import stats
from spin.eval import plots as viz
from spin.checkpoint import pipeline as weights

SEED, STRIDE = 1_000_000, 1000  # the first picture's of the first prompt; from one prompt's to the next one's
PLATEAU = 0.05  # points of reward that SFT may move theta_0 and be said to have stood still
AT_ONCE = 32  # pictures scored at once


@dataclass
class Contest:
    """What every model draws: k pictures of each of N prompts, each seed a function of prompt and picture alone."""

    prompts: Sequence[str]
    k: int
    seed: int
    settings: dict  # `sampler.sample`'s, guidance among them
    out: Path

    def __post_init__(self):
        """jobs: (prompt, seed) of every picture, N k of them, prompt by prompt; names: of their files."""
        places = [(i, j) for i in range(len(self.prompts)) for j in range(self.k)]
        self.jobs = [(self.prompts[i], self.seed + STRIDE * i + j) for i, j in places]
        self.names = [f"{i:05d}-{j}.png" for i, j in places]
        pixels = self.settings.get("height")
        self.at = f"guidance-{self.settings['guidance']:g}" + (f"-{pixels}px" if pixels else "")

    def draw(self, model: str, identity: str, player: Callable, at_once: int) -> list[Path]:
        """A model's N k pictures. identity: a hash of its weights; player(): the model itself, if it is to draw."""
        paths = [self.out / "images" / model / self.at / name for name in self.names]
        draw(player, self.jobs, paths, {"Model": model, "Model hash": identity}, self.settings, at_once)
        return paths

    def score(self, model: str, paths: list[Path], scorer: rewards.Scorer) -> dict[str, np.ndarray]:
        """{metric: [N,k]} of those pictures, each kept under a hash of scorer, model, prompt, seed and settings."""
        keys = [run.hash_files([], [scorer.hash, parameters(path)]) for path in paths]
        file = self.out / "scores" / model / f"{self.at}-{scorer.name}.json"
        known = run.read_json(file) if file.exists() else {}
        known = {key: of for key, of in known.items() if of.keys() >= set(scorer.metrics)}
        todo = [i for i, key in enumerate(keys) if key not in known]
        with tqdm(total=len(todo), desc=f"{scorer.name}: {model}", unit="image", disable=not todo) as bar:
            for at in range(0, len(todo), AT_ONCE):
                batch = todo[at : at + AT_ONCE]
                pictures = [data.read_picture(paths[i]) for i in batch]
                found = scorer.score(pictures, [self.jobs[i][0] for i in batch])
                if not all(np.isfinite(values).all() for values in found.values()):
                    raise run.InputError(f"{scorer.name}: a score is not finite; is one of its files broken?")
                known |= {keys[i]: {m: float(found[m][n]) for m in scorer.metrics} for n, i in enumerate(batch)}
                run.write_json(file, known)
                bar.update(len(batch))
        return {m: np.array([known[key][m] for key in keys]).reshape(-1, self.k) for m in scorer.metrics}


def draw(player: Callable, jobs: list, paths: list[Path], about: dict, settings: dict, at_once: int = 1) -> None:
    """Draws (prompt, seed) to its path, unless what is there says that it was drawn with the same settings.
    about: what else a picture says in its text chunk "parameters", its "Model" for one."""
    said = {"Steps": settings["steps"], "Sampler": settings["sampler"], "CFG scale": settings["guidance"]}
    said |= {"Eta": settings.get("eta", 0.0), "Precision": str(settings["autocast"]).removeprefix("torch.")} | about

    def as_asked(prompt: str, seed: int, path: Path) -> bool:
        return parameters(path).startswith(viz.parameters(prompt, {"Seed": seed} | said) + ", Size: ")

    todo = [(*job, path) for job, path in zip(jobs, paths) if not as_asked(*job, path)]
    if todo:
        drawn = sampler.pictures(player(), [(prompt, seed) for prompt, seed, _ in todo], at_once, **settings)
        for image, (prompt, seed, path) in zip(tqdm(drawn, f"{about['Model']} draws", len(todo), unit="image"), todo):
            viz.save_png(viz.to_pil(image), path, prompt, {"Seed": seed} | said)


def hashes(models: dict[str, tuple[str, str | None]]) -> dict[str, str]:
    """{name: (checkpoint, another one's UNet or None)} -> {name: a hash of its weights}."""
    hashed = cache(lambda source: weights.checkpoint_hash(weights.locate(source)))  # each checkpoint is read once
    return {name: "-".join(hashed(source) for source in place if source) for name, place in models.items()}


def parameters(path: Path) -> str:
    """What a picture says of how it was made; nothing if it is not there, or no picture."""
    try:
        return Image.open(path).info.get("parameters", "")
    except OSError:
        return ""


# ---- Tables and verdicts ---------------------------------------------------------------------------------------------
def compare(title: str, scores: dict[str, dict[str, np.ndarray]], scorers: list, metric: str, config: dict) -> dict:
    """What results.json holds. scores: {model: {metric: [N]}}, prompt by prompt; metric: the one that counts."""
    less = [name for scorer in scorers for name in scorer.less_is_better]
    found = {"less_is_better": less} | stats.compare(scores, less)
    verdicts = claims(found["differences"], metric)
    return {"title": title, "metric": metric} | found | {"claims": verdicts, "tables": {}, "config": config}


def claims(differences: dict[str, dict], metric: str) -> list[dict]:
    """The paper's claims that these models allow to judge: [{"claim", "verdict", "difference"}].
    "A beats B" holds if the whole interval of the difference is positive, and fails if it is negative. "SFT plateaus",
    said of the miniature world's reward, holds if its interval lies within PLATEAU of 0, and fails if it lies beyond.
    """
    said = {"spin-1 - sft": "SPIN-1 beats SFT", "spin-2 - dpo": "SPIN-2 beats Diffusion-DPO"}
    said |= {"sft - base": f"SFT plateaus, staying within {PLATEAU:g} of theta_0"} if metric == "reward" else {}
    renewed = "A renewed opponent helps: SPIN-{1} beats SPIN-{0}"
    last = max(map(int, re.findall(r"spin-(\d+)", " ".join(differences))), default=1)
    said |= {f"spin-{k} - spin-{k - 1}": renewed.format(k - 1, k) for k in range(2, last + 1)}
    found = []
    for pair in [pair for pair in said if pair in differences]:
        gap = {name: differences[pair][metric][name] for name in ("mean", "low", "high", "n")}
        sign = stats.resolved(gap)
        if pair == "sft - base" and gap["n"] >= stats.FEW:
            within = max(abs(gap["low"]), abs(gap["high"])) < PLATEAU
            sign = 1 if within else -(gap["low"] > PLATEAU or gap["high"] < -PLATEAU)
        verdict = {1: "holds", 0: "is not resolved", -1: "fails"}[sign]
        found.append({"claim": said[pair], "verdict": verdict, "difference": gap})
    return found


def write(folder: Path, found: dict) -> None:
    """results.json, .md and .png."""
    first, *others = found["models"]
    gains = {first: dict.fromkeys(found["models"][first], {"mean": 0.0, "low": 0.0, "high": 0.0})}
    gains |= {name: found["differences"][f"{name} - {first}"] for name in others}
    gains = {name: {f"{metric}, less {first}'s": of[metric] for metric in of} for name, of in gains.items()}
    viz.save_png(viz.interval_charts(gains if others else found["models"]), folder / "results.png")
    with run.whole(folder / "results.md") as part:
        part.write_text(markdown(found))
    run.write_json(folder / "results.json", found)  # last: its presence says that the others are there


def markdown(found: dict, brief: bool = False) -> str:
    """results.md: what results.json says, in tables and plain words. brief: the first table and the verdicts alone."""
    metric, models, differences = found["metric"], found["models"], found["differences"]
    sections = {f"# {found['title']}": stats.markdown(models)}
    if not brief:
        medians = {name: {m: summary["median"] for m, summary in of.items()} for name, of in models.items()}
        sections |= {title: stats.markdown(rows) for title, rows in ({"Medians.": medians} | found["tables"]).items()}
    if differences and not brief:
        metrics = list(next(iter(models.values())))
        sections["Differences, paired by prompt."] = stats.markdown(differences, sign="+")
        less = {name: " (less is better)" for name in found["less_is_better"]}
        verdicts = [f"- {name}{less.get(name, '')}: {stats.verdicts(differences, name)}" for name in metrics]
        sections["Which of them their intervals resolve:"] = "\n".join(verdicts)
        for name in metrics:
            title = f"How often a line's model is better than a column's, by {name}; ties count one half."
            sections[title] = stats.markdown(stats.win_rates(found, name), 2)
    said = "{claim}: this {verdict}, the difference being {mean:+.3f} [{low:+.3f}, {high:+.3f}]."
    verdicts = [said.format(**line, **line["difference"]) for line in found["claims"]]
    if any("renewed" in line["claim"] for line in found["claims"]):
        verdicts += ["An iteration adds steps as well as an opponent: which of the two helps, this run does not say."]
    last = [f"What this says of {metric}. " + " ".join(verdicts)] if verdicts else []
    last += ["Brackets: 95 % bootstrap intervals over the prompts. Another seed of training may say otherwise."]
    return "\n\n".join([part for section in sections.items() for part in section] + last) + "\n"
