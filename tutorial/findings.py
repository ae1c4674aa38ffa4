"""What the runs of experiments.py say, in numbers, with intervals over bases, seeds and prompts.

    python tutorial/findings.py        runs/evidence -> tutorial/evidence/evidence.json, and by tables.py its tables

A part of which jobs are missing is told of with the seeds that are whole; of one that has none, what evidence.json says
is left as it is.
"""

import argparse
import math
import os
import platform
import re
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from spin.infra import run  # noqa: E402
from spin.toy import world as toy  # noqa: E402
from spin.eval.comparison import PLATEAU  # noqa: E402
from spin.toy.world import METRICS  # noqa: E402
from tutorial import experiments, tables  # noqa: E402
from tutorial.experiments import BASES, HELD_OUT, MAP, SEEDS, SWEEP, TRIALS, Look  # noqa: E402
from tutorial.intervals import pooled, verdict  # noqa: E402

OUT = ROOT / "tutorial" / "evidence"
AT_3, BEST = Look("test", 3.0).name, Look("test", None).name
AT = {f"at_{look.guidance:g}": look.name for look in experiments.ACROSS}
THETA_0 = ("theta_0", "base")  # job, model
CHIEF = ("reward", "clean")
FIRST, LAST = slice(1, 20), slice(-20, None)  # steps of a log: at the very first, policy and opponent are one


# ---- What the runs say -----------------------------------------------------------------------------------------------
class Runs:
    """The jobs of RUNS, of those bases and seeds."""

    def __init__(self, folder: Path, bases: Sequence[int], seeds: Sequence[int]):
        self.folder, self.bases, self.seeds = folder, bases, seeds
        self.read = lru_cache(maxsize=None)(lambda place: run.read_json(folder / place / "scores.json"))
        self.read_log = lru_cache(maxsize=None)(lambda place: run.Run(folder / place).read_log())

    def places(self, name: str, start: str = "theta_0") -> list[list[str]]:
        """[bases][seeds], or [bases][1] where there is one for all."""
        seeds = SEEDS[:1] if name.startswith(experiments.ONCE_A_BASE) else self.seeds
        return [[f"{start}-{base}/seed-{seed}/{name}" for seed in seeds] for base in self.bases]

    def scores(self, name: str, model: str, look: str, metric: str, start: str = "theta_0") -> np.ndarray:
        """[bases,seeds,prompts,pictures] of one model, or, of HELD_OUT, [bases,seeds,prompts,1]."""

        def one(place: str) -> np.ndarray:
            of = self.read(place)["models"][model][look]
            if look == HELD_OUT:
                return np.array(of)[:, None]
            return np.array(of[metric])[:, : None if look == AT_3 else 1]  # of the others there may be more by chance

        return np.array([[one(place) for place in row] for row in self.places(name, start)])

    def pictures(self, name: str, model: str, look: str, start: str = "theta_0") -> int:
        """How many of each prompt that look has, of the model in all runs."""
        looks = [self.read(place)["models"][model] for row in self.places(name, start) for place in row]
        return min(len(of[look]["reward"][0]) if look in of else 0 for of in looks)

    def difference(
        self,
        a: tuple[str, str],
        b: tuple[str, str],
        look: str = AT_3,
        metric: str = "reward",
        pictures: int = 1,
        best: bool = False,
        start: str = "theta_0",
    ) -> dict:
        """a's less b's, jobs and models, over pictures that begin with the same noise: of each prompt the first one, or
        the mean of so many, or the best. start: what they began with."""
        of_a, of_b = (self.scores(*of, look, metric, start)[..., :pictures] for of in (a, b))
        return pooled(of_a.max(3) - of_b.max(3) if best else of_a.mean(3) - of_b.mean(3))

    def gain(self, name: str, model: str, look: str = AT_3, metric: str = "reward", **how) -> dict:
        """Over theta_0."""
        return self.difference((name, model), THETA_0, look, metric, **how)

    def held_out(self, name: str, model: str, **how) -> dict:
        """The change of the error on curated pictures of test scenes, in percent of theta_0's: ratios, averaged as
        logarithms."""
        before, after = (self.scores(*of, HELD_OUT, "", **how)[..., 0] for of in (THETA_0, (name, model)))
        return {key: percent(value) for key, value in pooled(np.log(after / before)).items()}

    def log(self, name: str, model: str, key: str, steps: slice = slice(None), start: str = "theta_0") -> np.ndarray:
        """[bases,seeds,steps] of the log."""

        def one(place: str) -> list[float]:
            return [line[key] for line in self.read_log(place) if line["model"] == model][steps]

        return np.array([[one(place) for place in row] for row in self.places(name, start)])

    def game(self, name: str, model: str, start: str = "theta_0") -> dict:
        """How a game of self-play went, by its log: means of steps 2 to 20 and of the last 20."""
        keys, whens = ("implicit_accuracy", "delta_data", "delta_gen"), {"first": FIRST, "last": LAST}
        mean = lambda *of: pooled(self.log(name, model, *of, start).mean(2, keepdims=True))  # noqa: E731
        return {f"{when}_{key}": mean(key, steps) for when, steps in whens.items() for key in keys}

    def about(self, part: str) -> dict:
        """Commit, hardware, seconds and seeds."""
        jobs = [*experiments.trials_of(part), *experiments.jobs(self.folder, part, self.bases, self.seeds)]
        facts = [self.read(job.place) for job in jobs]
        commits = sorted({tables.commit(job["commit"]) for job in facts})
        seconds = round(sum(job["seconds"] for job in facts))
        told = {"bases": list(self.bases), "seeds": sorted({job.seed for job in jobs}), "commits": commits}
        return told | {"jobs": len(jobs), "seconds": seconds}


def percent(logarithm: float | list[float]):
    """Of a ratio's logarithm, or of each of several, by how many percent the ratio is above 1."""
    if isinstance(logarithm, list):
        return [percent(each) for each in logarithm]
    return round(100 * math.expm1(logarithm), 2)


ROWS = {  # title: (job, model)
    "SFT, 300 steps": ("claims", "sft"),
    "SFT, 900 steps": ("sft-longer", "sft"),
    "DPO, 300 steps": ("claims", "dpo"),
    "SPIN-1": ("claims", "spin-1"),
    "SPIN-2": ("claims", "spin-2"),
    "SPIN-3": ("claims", "spin-3"),
    "SPIN, 300 steps at theta_0": ("continued", "spin-1"),
}
SHORT = dict(zip(ROWS, ("SFT", "SFT 900", "DPO", "SPIN-1", "SPIN-2", "SPIN-3", "SPIN 300")))  # in figures
WEB = {"SFT": ("sft", "sft"), "DPO": ("dpo", "dpo")} | {f"SPIN-{k}": ("spin", f"spin-{k}") for k in (1, 3)}
REGIMES = {  # how `difference` compares
    "single": {},
    "five": {"pictures": 5},
    "best_of_five": {"pictures": 5, "best": True},
    "best_guidance": {"look": BEST},
    "clean": {"metric": "clean"},
    "clean_five": {"metric": "clean", "pictures": 5},
    "clean_best_guidance": {"metric": "clean", "look": BEST},
}
CLAIMS = {
    "SPIN-1 beats SFT": ("SPIN-1", "SFT, 300 steps"),
    "SPIN-2 beats Diffusion-DPO": ("SPIN-2", "DPO, 300 steps"),
    f"SFT plateaus: 300 steps stay within {PLATEAU:g} of theta_0": ("SFT, 300 steps", None),
    f"SFT plateaus: 900 steps stay within {PLATEAU:g} of theta_0": ("SFT, 900 steps", None),
    "a renewed opponent helps: SPIN-3 beats 300 steps against theta_0": ("SPIN-3", "SPIN, 300 steps at theta_0"),
    "so does continuing: 300 steps against theta_0 beat 100, SPIN-1": ("SPIN, 300 steps at theta_0", "SPIN-1"),
    "SPIN-2 beats SPIN-1": ("SPIN-2", "SPIN-1"),
    "SPIN-3 beats SPIN-2": ("SPIN-3", "SPIN-2"),
}
NEGATIVES = {
    "at guidance 1": ("negatives-at-1", "spin-1"),
    "at guidance 2": ("negatives-at-2", "spin-1"),
    "at guidance 3": ("claims", "spin-1"),
    "at guidance 5": ("negatives-at-5", "spin-1"),
    "at 3, 50 sampling steps": ("negatives-50-steps", "spin-1"),
    "at 3, through pixels": ("negatives-as-images", "spin-1"),
    "at 3, (C.5) on the path": ("trajectory", "spin-1"),
}
ONCE, THRICE = ("claims", "spin-1"), ("claims", "spin-3")
CHOICES = {  # title: job and model, and those that it is compared with
    "shared noise, logistic": (ONCE, ONCE),
    "independent noise": (("noise-independent", "spin-1"), ONCE),
    "hinge": (("hinge", "spin-1"), ONCE),
    "correlation": (("correlation", "spin-1"), ONCE),
    "a tenth of the prompts dropped": (("dropout", "spin-1"), ONCE),
}
TRACELESS = ("spin", "spin-1")
ENDING = {  # title: job and model, and the start under which they were judged
    "SFT": (("claims", "sft"), "to_1"),
    "SPIN-1": (ONCE, "to_1"),
    "SPIN-1, both judged as usual": (ONCE, "theta_0"),
    "SPIN-2": (("claims", "spin-2"), "to_1"),
    "SPIN-3": (THRICE, "to_1"),
    "SPIN-1 whose opponents drew so": (TRACELESS, "to_1"),
    "that one, both judged as usual": (TRACELESS, "theta_0"),
}
LENGTHS = {
    "3 x 100 steps": (THRICE, THRICE),
    "1 x 300 steps": (("continued", "spin-1"), THRICE),
    "2 x 225 steps": (("2-times-225", "spin-2"), THRICE),
    "1 x 600 steps": (("1-times-600", "spin-1"), THRICE),
}


def bases(folder: Path) -> dict:
    """What pretrain.py says of each base. The first one's theta_0 is spin/toy/base, with whose autoencoder all were
    made; its web stage, which is not kept, is made again for the part "web"."""
    found: dict = {"ceiling": run.read_json(toy.BASE / "pretrain.json")["vae"]["ceiling"]["reward"]}
    places = {"0": toy.BASE} | {("0, again" if base == 0 else str(base)): folder / f"base-{base}" for base in BASES}
    for name, place in places.items():
        if (place / "pretrain.json").exists():
            stages = run.read_json(place / "pretrain.json")
            keys = ("seconds", "commit", "reward", "clean", "aligned")
            found[name] = {s: {k: stages[s][k] for k in keys} for s in ("web", "theta_0") if s in stages}
    return found


def regimes(runs: Runs, a: tuple[str, str], b: tuple[str, str], start: str = "theta_0", plateau: bool = False) -> dict:
    """{regime: a's less b's, and what that says of "a beats b", or of reward's plateau}, where both were judged so."""
    found = {}
    for regime, how in REGIMES.items():
        if all(runs.pictures(*of, how.get("look", AT_3), start) >= how.get("pictures", 1) for of in (a, b)):
            gap = found[regime] = runs.difference(a, b, **how, start=start)
            if not (plateau and how.get("metric")):
                gap["verdict"] = verdict(gap, plateau)
    return found


def claims(runs: Runs) -> dict:
    gains = {}
    for title, of in ROWS.items():
        gains[title] = regimes(runs, of, THETA_0) | {m: runs.gain(*of, metric=m) for m in METRICS}
        gains[title] |= {"short": SHORT[title], "held_out_percent": runs.held_out(*of)}
    found = []
    for claim, (a, b) in CLAIMS.items():
        both = ROWS[a], ROWS[b] if b else THETA_0
        found.append({"claim": claim} | regimes(runs, *both, plateau=b is None))
    across = {at: runs.scores(*THETA_0, look, "reward")[..., 0] for at, look in AT.items()}
    theta_0 = {m: pooled(runs.scores(*THETA_0, AT_3, m)[..., 0]) for m in METRICS}
    theta_0["guidance"] = {at: pooled(of - across["at_3"]) for at, of in across.items() if at != "at_3"}
    return {"theta_0": theta_0, "gains": gains, "claims": found, "sweep": sweep(runs, ROWS)}


def sweep(runs: Runs, rows: dict, start: str = "theta_0") -> dict:
    """{model: {guidance: reward on the validation prompts}}; under "best" the guidance chosen, a base and seed each."""
    found: dict = {}
    for title, (name, model) in ({"theta_0": THETA_0} | rows).items():
        if runs.pictures(name, model, BEST, start):
            tried = SWEEP if start == "theta_0" else experiments.WIDER
            looks = {f"{g:g}": Look("validation", g).name for g in tried}
            scores = {g: runs.scores(name, model, look, "reward", start)[..., 0] for g, look in looks.items()}
            found[title] = {g: pooled(of) for g, of in scores.items()}
            places = [place for row in runs.places(name, start) for place in row]
            found[title]["best"] = [runs.read(place)["models"][model][BEST]["guidance"] for place in places]
    return found


def web(runs: Runs) -> dict:
    gains = {}
    for title, of in WEB.items():
        gains[title] = regimes(runs, of, THETA_0, "web") | {m: runs.gain(*of, metric=m, start="web") for m in METRICS}
        gains[title] |= {"held_out_percent": runs.held_out(*of, start="web")}
        gains[title] |= runs.game(*of, "web") if of[0] == "spin" else {}
    pairs = ("SPIN-3", "SFT"), ("SPIN-1", "SFT"), ("SPIN-3", "DPO"), ("SFT", "DPO")
    found = []
    for a, b in pairs:
        line = {"claim": f"{a} beats {b}"} | regimes(runs, WEB[a], WEB[b], "web")
        found.append(line | {"aligned": runs.difference(WEB[a], WEB[b], metric="aligned", start="web")})
    theta_0 = {m: pooled(runs.scores(*THETA_0, AT_3, m, "web")[..., 0]) for m in METRICS}
    tried = {kind: experiments.rewards_of_trials(runs.folder, kind) for kind in TRIALS if kind.startswith("web")}
    return {"theta_0": theta_0, "gains": gains, "claims": found, "sweep": sweep(runs, WEB, "web"), "trials": tried}


def learned(runs: Runs) -> dict:
    """Of SPIN-1, whose opponent, theta_0, drew in different ways; of SFT, too."""
    gains = {}
    for title, (name, model) in (NEGATIVES | {"SFT, for comparison": ("claims", "sft")}).items():
        judged = {at: look for at, look in AT.items() if runs.pictures(name, model, look)}
        of = {at: {m: runs.gain(name, model, look, m) for m in METRICS} for at, look in judged.items()}
        of["held_out_percent"] = runs.held_out(name, model)
        for metric in CHIEF:
            of[f"{metric}_less_reference"] = runs.difference((name, model), ONCE, metric=metric)
        # of (C.5) the opponent's error on what it drew is 0, and delta_gen above 0, whatever it drew
        gains[title] = of | (runs.game(name, model) if model != "sft" and name != "trajectory" else {})
    finer = experiments.FINER.name
    jobs = {"20": "claims-at-50", "50": "negatives-50-steps-at-50"}  # by the steps in which the opponents drew
    base = "theta_0-at-50", "base"
    at_50 = {n: {m: runs.difference((name, "spin-1"), base, finer, m) for m in CHIEF} for n, name in jobs.items()}
    both = [(name, "spin-1") for name in (jobs["50"], jobs["20"])]
    at_50["difference"] = {m: runs.difference(*both, finer, m) for m in CHIEF}
    tried = {"trajectory": experiments.rewards_of_trials(runs.folder, "trajectory")}
    return {"gains": gains, "judged_at_50": at_50, "trials": tried}


def ending(runs: Runs) -> dict:
    """Where the sampler's last step goes to alpha_bar = 1, not to the schedule's least noisy level, which leaves a
    trace of noise. alone: what theta_0 gains by that. gains: over theta_0, both judged so, or as usual. change: by
    judging so, of SPIN-1's gain; change_traceless: of the gain of a SPIN-1 whose opponents left no trace, which cannot
    have learned to make up for it; made_up: the former less the latter. less_usual: the traceless SPIN-1 less SPIN-1,
    judged as usual; less_usual_to_1: judged so."""

    def scores(of: tuple[str, str], look: str, metric: str, start: str) -> np.ndarray:
        return runs.scores(*of, look, metric, start)[..., 0]

    def change(of: tuple[str, str], *how: str) -> np.ndarray:
        to_1, usual = (scores(of, *how, start) - scores(THETA_0, *how, start) for start in ("to_1", "theta_0"))
        return to_1 - usual

    each = {
        "alone": lambda *how: scores(THETA_0, *how, "to_1") - scores(THETA_0, *how, "theta_0"),
        "change": lambda *how: change(ONCE, *how),
        "change_traceless": lambda *how: change(TRACELESS, *how),
        "made_up": lambda *how: change(ONCE, *how) - change(TRACELESS, *how),
        "less_usual": lambda *how: scores(TRACELESS, *how, "theta_0") - scores(ONCE, *how, "theta_0"),
        "less_usual_to_1": lambda *how: scores(TRACELESS, *how, "to_1") - scores(ONCE, *how, "to_1"),
    }
    found: dict = {
        name: {at: {m: pooled(of(look, m)) for m in CHIEF} for at, look in AT.items()} for name, of in each.items()
    }
    found["gains"] = {}
    for title, (of, start) in ENDING.items():
        judged = {at: look for at, look in AT.items() if runs.pictures(*of, look, start)}
        found["gains"][title] = {
            at: {m: runs.gain(*of, look, m, start=start) for m in CHIEF} for at, look in judged.items()
        }
    return found


def choices(runs: Runs) -> dict:
    gradients = [runs.read(row[0])["gradient"] for row in runs.places("gradient")]
    noise = {of: {key: [g[of][key] for g in gradients] for key in ("variance", "signal")} for of in gradients[0]}
    return {"rows": compared(runs, CHOICES), "gradient": noise}


def compared(runs: Runs, rows: dict) -> dict:
    """rows: {title: (job and model, those they are compared with)}."""
    found: dict = {}
    for title, (of, reference) in rows.items():
        found[title] = {m: runs.gain(*of, metric=m) for m in METRICS}
        for metric in CHIEF:
            found[title][f"{metric}_less_reference"] = runs.difference(of, reference, metric=metric)
    return found


def lengths(runs: Runs) -> dict:
    """steps: the optimiser's, and what the opponents' pictures cost, as many as DRAWING a time."""
    rows = compared(runs, LENGTHS)
    for title in LENGTHS:
        iterations, each = (int(part) for part in title.removesuffix(" steps").split(" x "))
        rows[title]["steps"] = iterations * (each + experiments.DRAWING)
    return {"rows": rows}


def map_of(runs: Runs) -> dict:
    found = []
    for lr, beta in MAP:
        name = experiments.map_name(lr, beta)
        deltas = [runs.log(name, "spin-1", key, slice(-50, None)).mean(2) for key in ("delta_data", "delta_gen")]
        line: dict = {"lr": lr, "beta": beta}
        line |= {metric: runs.gain(name, "spin-1", metric=metric) for metric in CHIEF}
        line["delta_data"], line["delta_gen"] = (round(float(delta.mean()), 6) for delta in deltas)
        line["loss"] = round(float(runs.log(name, "spin-1", "loss", slice(-10, None)).mean()), 4)
        found.append(line)
    return {"cells": found}


def failure(runs: Runs) -> dict:
    """Of the failing run and, beside it, of the tuned one: gains, the log, and when it shows the failure. rule: when
    that of train.py, 50 steps, fires in games that are none."""
    found: dict = {}
    every = [(b, s) for b in range(len(runs.bases)) for s in range(len(runs.seeds))]
    for name in ("failure", "claims"):
        of = found[name] = {m: runs.gain(name, "spin-1", metric=m) for m in METRICS}
        of["held_out_percent"] = runs.held_out(name, "spin-1")
        of["curves"] = {key: curve(runs, name, key) for key in ("loss", "implicit_accuracy", "delta_data", "delta_gen")}
        of["alarms"] = {
            str(n): [first_alarm(runs, name, "spin-1", *cell, n) for cell in every] for n in (5, 10, 20, 50)
        }
    deltas = ("delta_data", "delta_gen")
    found["continued"] = {key: curve(runs, "continued", key, 50) for key in deltas}  # the opponent is never renewed
    others = {
        "SPIN-2": ("claims", "spin-2"),
        "SPIN-3": ("claims", "spin-3"),
        "SPIN, 300 steps": ("continued", "spin-1"),
    }
    found["rule"] = {title: [first_alarm(runs, *of, *cell, 50) for cell in every] for title, of in others.items()}
    return found


def curve(runs: Runs, name: str, key: str, every: int = 5) -> dict[str, list[float]]:
    """Means of `every` steps of the log: of all runs the mean, the smallest, the largest."""
    values = runs.log(name, "spin-1", key)
    means = values.reshape(-1, values.shape[2] // every, every).mean(2)
    ends = {"mean": means.mean(0), "low": means.min(0), "high": means.max(0)}
    return {end: [round(float(value), 6) for value in of] for end, of in ends.items()}


def first_alarm(runs: Runs, name: str, model: str, base: int, seed: int, window: int) -> int | None:
    """The step at which, over so many steps, delta_data has been more than half of a positive delta_gen."""
    data, gen = (runs.log(name, model, key)[base, seed] for key in ("delta_data", "delta_gen"))
    for step in range(window, len(data) + 1):
        a, b = data[step - window : step].mean(), gen[step - window : step].mean()
        if a > b / 2 > 0:
            return step
    return None


MAKERS = {"claims": claims, "learned": learned, "web": web, "failure": failure, "choices": choices, "map": map_of}
MAKERS |= {"lengths": lengths, "ending": ending}


# ---- All of it -------------------------------------------------------------------------------------------------------
def collect(folder: Path) -> dict:
    """Of every part what its runs say, over the seeds of which all bases are there."""
    found: dict = {}
    for part, make in MAKERS.items():
        needs = [part] if part == "web" else ["claims", part]
        whole = [seed for seed in SEEDS if all(there(folder, name, seed) for name in needs)]
        if whole:
            runs = Runs(folder, BASES, whole)
            found[part] = {"about": runs.about(part)} | make(runs)
        print(f"{part}: seeds {', '.join(map(str, whole)) or 'none: as it was'}")
    return found and {"hardware": hardware(), **found}


def hardware() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    cpu = names[0] if names else platform.processor() or platform.machine()
    return f"one core a job of {os.cpu_count()} ({cpu}, {platform.machine()}), float32, torch {torch.__version__}"


def there(folder: Path, part: str, seed: int) -> bool:
    jobs = experiments.trials_of(part)
    if all(job.done(folder) for job in jobs):
        jobs = experiments.jobs(folder, part, seeds=[seed])
    return all(job.done(folder) for job in jobs)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", default="runs/evidence", help="where experiments.py made them (default: %(default)s)")
    parser.add_argument("--out", default=str(OUT), help="default: tutorial/evidence; figures go beside it")
    args = parser.parse_args(argv)
    path = Path(args.out) / "evidence.json"
    known = run.read_json(path) if path.exists() else {}
    found = known | collect(Path(args.runs))
    found["bases"] = known.get("bases", {}) | bases(Path(args.runs))
    run.write_json(path, found)
    tables.main(["--out", args.out])
    return found


if __name__ == "__main__":
    sys.exit(run.script("findings.py", main))
