"""What the runs of experiments.py say, in numbers, with intervals over bases, seeds and prompts.

    python tutorial/findings.py        runs/evidence -> tutorial/evidence/evidence.json, and by tables.py its tables

A part of which jobs are missing is told of with the seeds that are whole, or, if there are none, left out.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from spin import run, toy  # noqa: E402
from spin.judge import PLATEAU  # noqa: E402
from spin.toy import METRICS  # noqa: E402
from tutorial import experiments, tables  # noqa: E402
from tutorial.experiments import BASES, HELD_OUT, MAP, SEEDS, SWEEP, TRIALS, Look  # noqa: E402

OUT = ROOT / "tutorial" / "evidence"
AT_3, BEST, AT_50 = Look("test", 3.0).name, Look("test", None).name, Look("test", 3.0, steps=50).name
THETA_0 = ("theta_0", "base")  # job, model
EARLY = slice(1, 20)  # steps 2 to 20: at the first, policy and opponent are one


# ---- Intervals -------------------------------------------------------------------------------------------------------
def pooled(values: np.ndarray, level: float = 0.95) -> dict:
    """mean, low, high of [bases,seeds,prompts]: an interval for another base, seed and prompt of the same kind.

    Bases and prompts are crossed samples: the variance of the mean is that of the bases' means over their number plus
    that of the prompts' over theirs (Cameron, Gelbach and Miller 2011, without the term that is subtracted there: a
    little too wide). Student's t, its degrees of freedom by Welch and Satterthwaite. One base: over prompts only.
    """
    parts = [(means.var(ddof=1) / len(means), len(means) - 1) for means in sides(values) if len(means) > 1]
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / count for part, count in parts) if variance else 1.0
    half = student(freedom, level) * math.sqrt(variance)
    mean = float(values.mean())
    by_base = [round(float(value), 4) for value in sides(values)[0]]
    return {"mean": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4), "by_base": by_base}


def sides(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return values.mean((1, 2)), values.mean((0, 1))


def student(freedom: float, level: float) -> float:
    """The quantile of Student's t between whose negative and itself the share `level` lies."""
    angle = np.linspace(0, np.pi / 2, 20_001)  # t = sqrt(freedom) tan(angle), whose density is cos^(freedom - 1)
    share = np.cumsum(np.cos(angle) ** (freedom - 1))
    at = angle[np.searchsorted(share, level * share[-1])]
    return math.sqrt(freedom) * math.tan(at) if freedom < 1e4 else NormalDist().inv_cdf((1 + level) / 2)


def verdict(gap: dict, plateau: bool = False) -> str:
    """Of "a beats b", or of "a plateaus": that it stays within PLATEAU of b."""
    low, high = gap["low"], gap["high"]
    holds, fails = low > 0, high < 0
    if plateau:
        holds, fails = -PLATEAU < low and high < PLATEAU, low > PLATEAU or high < -PLATEAU
    return "holds" if holds else "fails" if fails else "is not resolved"


# ---- What the runs say -----------------------------------------------------------------------------------------------
class Runs:
    """The jobs of RUNS, of those bases and seeds."""

    def __init__(self, folder: Path, bases: Sequence[int], seeds: Sequence[int]):
        self.folder, self.bases, self.seeds = folder, bases, seeds
        self.read = lru_cache(maxsize=None)(lambda place: run.read_json(folder / place / "scores.json"))
        self.read_log = lru_cache(maxsize=None)(lambda place: run.Run(folder / place).read_log())

    def places(self, name: str, start: str = "theta_0") -> list[list[str]]:
        """[bases][seeds]; theta_0 and the gradient's have one seed."""
        seeds = SEEDS[:1] if name in ("theta_0", "gradient") or name.startswith("map") else self.seeds
        return [[f"{start}-{base}/seed-{seed}/{name}" for seed in seeds] for base in self.bases]

    def scores(self, name: str, model: str, look: str, metric: str, start: str = "theta_0") -> np.ndarray:
        """[bases,seeds,prompts,pictures] of one model, or, of HELD_OUT, [bases,seeds,prompts,1]."""

        def one(place: str) -> np.ndarray:
            of = self.read(place)["models"][model][look]
            return np.array(of)[:, None] if look == HELD_OUT else np.array(of[metric])

        return np.array([[one(place) for place in row] for row in self.places(name, start)])

    def difference(
        self, a: tuple[str, str], b: tuple[str, str], look: str = AT_3, metric: str = "reward", **how
    ) -> dict:
        """a's less b's, jobs and models, over the pictures that both have drawn, which begin with the same noise.

        best_of: the one of so many that has the most reward, instead of the average. start: what they began with.
        """
        best_of = how.pop("best_of", 0)
        of_a, of_b = (self.scores(*of, look, metric, **how) for of in (a, b))
        both = best_of or min(of_a.shape[3], of_b.shape[3])
        if best_of:
            return pooled(of_a[..., :both].max(3) - of_b[..., :both].max(3))  # of reward
        return pooled(of_a[..., :both].mean(3) - of_b[..., :both].mean(3))

    def gain(self, name: str, model: str, look: str = AT_3, metric: str = "reward", **how) -> dict:
        """Over theta_0."""
        return self.difference((name, model), THETA_0, look, metric, **how)

    def held_out(self, name: str, model: str, **how) -> dict:
        """The change of the error on curated pictures of test scenes, in percent of theta_0's: ratios, averaged as
        logarithms."""
        before, after = (self.scores(*of, HELD_OUT, "", **how)[..., 0] for of in (THETA_0, (name, model)))
        percent = lambda logarithm: round(100 * math.expm1(logarithm), 2)  # noqa: E731
        found = pooled(np.log(after / before))
        return {k: [percent(x) for x in v] if k == "by_base" else percent(v) for k, v in found.items()}

    def log(self, name: str, model: str, key: str, steps: slice = slice(None)) -> np.ndarray:
        """[bases,seeds,steps] of the log."""

        def one(place: str) -> list[float]:
            return [line[key] for line in self.read_log(place) if line["model"] == model][steps]

        return np.array([[one(place) for place in row] for row in self.places(name)])

    def seconds(self, name: str, key: str = "training_seconds", start: str = "theta_0") -> float:
        """Of one core, the mean of the jobs."""
        return float(np.mean([self.read(place)[key] for row in self.places(name, start) for place in row]))

    def about(self, part: str) -> dict:
        """Commit, hardware, seconds and seeds."""
        jobs = [*experiments.trials_of(part), *experiments.jobs(self.folder, part, self.bases, self.seeds)]
        facts = [self.read(job.place) for job in jobs]
        commits = sorted({job["commit"][:9] for job in facts})
        minutes = round(sum(job["seconds"] for job in facts) / 60)
        told = {
            "bases": list(self.bases),
            "seeds": sorted({job.seed for job in jobs}),
            "commits": commits,
            "jobs": len(jobs),
        }
        return told | {"minutes": minutes, "hardware": "one core of an x86-64 CPU a job, float32"}


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
WEB = {"SFT": ("sft", "sft"), "DPO": ("dpo", "dpo")} | {f"SPIN-{k}": ("spin", f"spin-{k}") for k in (1, 2, 3)}
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
    "at guidance 1": "negatives-at-1",
    "at guidance 2": "negatives-at-2",
    "at guidance 3": "claims",
    "at guidance 5": "negatives-at-5",
    "at 3, 50 sampling steps": "negatives-50-steps",
    "at 3, through pixels": "negatives-as-images",
    "at 3, (C.5) on the path": "trajectory",
}
CHOICES = {
    "3 x 100 steps, shared noise, logistic": ("claims", "spin-3"),
    "independent noise": ("noise-independent", "spin-3"),
    "hinge": ("hinge", "spin-3"),
    "correlation": ("correlation", "spin-3"),
    "a tenth of the prompts dropped": ("dropout", "spin-3"),
    "1 x 300 steps": ("continued", "spin-1"),
    "2 x 150 steps": ("2-times-150", "spin-2"),
    "6 x 50 steps": ("6-times-50", "spin-6"),
    "1 x 500 steps": ("1-times-500", "spin-1"),
}


def bases(folder: Path) -> dict:
    """What pretrain.py says of each base; the first one is spin/toy_base."""
    found = {}
    for base in BASES:
        path = (folder / f"base-{base}" if base else toy.BASE) / "pretrain.json"
        if not path.exists():
            continue
        stages = run.read_json(path)
        keys = ("seconds", "commit", "reward", "aligned", "ceiling")
        found[str(base)] = {s: {k: stages[s][k] for k in keys if k in stages[s]} for s in ("vae", "web", "theta_0")}
    return found


def claims(runs: Runs) -> dict:
    regimes = {"single": {"look": AT_3}, "best_of_five": {"look": AT_3, "best_of": 5}, "best_guidance": {"look": BEST}}
    gains: dict = {}
    for title, (name, model) in ROWS.items():
        five = name == "claims"
        gains[title] = {m: runs.gain(name, model, metric=m) for m in METRICS}
        gains[title] |= {
            regime: runs.gain(name, model, **how) for regime, how in regimes.items() if five or "best_of" not in how
        }
        places = [place for row in runs.places(name) for place in row]
        gains[title]["short"] = SHORT[title]
        gains[title]["guidance"] = [runs.read(place)["models"][model][BEST]["guidance"] for place in places]
    found = []
    for claim, (a, b) in CLAIMS.items():
        line: dict = {"claim": claim}
        both = ROWS[a], ROWS[b] if b else THETA_0
        for regime, how in regimes.items():
            if "best_of" not in how or {name for name, _ in both} <= {"claims", "theta_0"}:
                gap = runs.difference(*both, **how)
                line[regime] = gap | {"verdict": verdict(gap, plateau=b is None)}
        for regime, look in (("clean", AT_3), ("clean_best_guidance", BEST)):
            gap = runs.difference(*both, look, "clean")
            line[regime] = gap | {"verdict": verdict(gap, plateau=b is None)}
        found.append(line)
    theta_0 = {m: pooled(runs.scores(*THETA_0, AT_3, m).mean(3)) for m in METRICS}
    chosen = [runs.read(row[0])["models"]["base"][BEST]["guidance"] for row in runs.places("theta_0")]
    told = {"theta_0": theta_0 | {"guidance": chosen}, "gains": gains, "claims": found}
    held_out = {title: runs.held_out(*of) for title, of in ROWS.items()}
    return told | {"held_out_percent": held_out, "sweep": sweep(runs, ROWS)}


def sweep(runs: Runs, rows: dict, start: str = "theta_0") -> dict:
    """{model: {guidance: reward on the validation prompts}}."""
    rows = {"theta_0": THETA_0} | rows
    looks = {g: Look("validation", g).name for g in SWEEP}
    return {
        t: {f"{g:g}": pooled(runs.scores(*of, look, "reward", start)[..., 0]) for g, look in looks.items()}
        for t, of in rows.items()
    }


def web(runs: Runs) -> dict:
    gains = {t: {m: runs.gain(*of, metric=m, start="web") for m in METRICS} for t, of in WEB.items()}
    for title, of in WEB.items():
        gains[title]["best_guidance"] = runs.gain(*of, BEST, start="web")
    found = []
    for a, b in (("SPIN-3", "SFT"), ("SPIN-1", "SFT"), ("SPIN-2", "DPO"), ("SFT", "DPO")):
        gaps = {}
        for regime, look in (("single", AT_3), ("best_guidance", BEST)):
            gap = runs.difference(WEB[a], WEB[b], look, start="web")
            gaps[regime] = gap | {"verdict": verdict(gap)}
        found.append({"claim": f"{a} beats {b}"} | gaps)
    theta_0 = {m: pooled(runs.scores(*THETA_0, AT_3, m, "web").mean(3)) for m in METRICS}
    tried = {kind: experiments.rewards_of_trials(runs.folder, kind) for kind in TRIALS if kind.startswith("web")}
    return {"theta_0": theta_0, "gains": gains, "claims": found, "sweep": sweep(runs, WEB, "web"), "trials": tried}


def learned(runs: Runs) -> dict:
    gains = {}
    for title, name in (NEGATIVES | {"SFT, for comparison": "claims"}).items():
        model = "sft" if title.startswith("SFT") else "spin-3"
        looks = {f"at_{g:g}": Look("test", g).name for g in ((3.0,) if model == "sft" else (1.0, 2.0, 3.0, 5.0))}
        of = {at: {m: runs.gain(name, model, look, m) for m in METRICS} for at, look in looks.items()}
        if name in ("negatives-50-steps", "claims") and model == "spin-3":
            of["at_50"] = {m: runs.gain(name, model, AT_50, m) for m in METRICS}
        of["held_out_percent"] = runs.held_out(name, model)
        if model == "spin-3":
            for k in (1, 2, 3):
                of[f"early_accuracy_{k}"] = pooled(runs.log(name, f"spin-{k}", "implicit_accuracy", EARLY))
        gains[title] = of
    return {"gains": gains, "trials": {"trajectory": experiments.rewards_of_trials(runs.folder, "trajectory")}}


def choices(runs: Runs) -> dict:
    rows: dict = {}
    for title, (name, model) in CHOICES.items():
        rows[title] = {m: runs.gain(name, model, metric=m) for m in METRICS}
        rows[title]["less_reference"] = runs.difference((name, model), ("claims", "spin-3"))
        steps = [sum(line["seconds"] for line in runs.read_log(place)) for row in runs.places(name) for place in row]
        rows[title] |= {"step_seconds": round(float(np.mean(steps)), 1), "seconds": runs.seconds(name)}
    gradients = [runs.read(row[0])["gradient"] for row in runs.places("gradient")]
    noise = {of: {key: [g[of][key] for g in gradients] for key in ("variance", "signal")} for of in gradients[0]}
    return {"rows": rows, "gradient": noise}


def map_of(runs: Runs) -> dict:
    found = []
    for lr, beta in MAP:
        name = experiments.map_name(lr, beta)
        deltas = [runs.log(name, "spin-1", key, slice(-50, None)).mean(2) for key in ("delta_data", "delta_gen")]
        line: dict = {"lr": lr, "beta": beta}
        line |= {metric: runs.gain(name, "spin-1", metric=metric) for metric in ("reward", "clean")}
        line["delta_data"], line["delta_gen"] = (round(float(delta.mean()), 6) for delta in deltas)
        line["loss"] = round(float(runs.log(name, "spin-1", "loss", slice(-10, None)).mean()), 4)
        found.append(line)
    return {"cells": found}


def failure(runs: Runs) -> dict:
    """Of the failing run and, beside it, of the tuned one: {run: {model: ...}}, and when the log shows it."""
    found: dict = {}
    for name in ("failure", "claims"):
        for k in (1, 2, 3):
            model = f"spin-{k}"
            of = {m: runs.gain(name, model, metric=m) for m in METRICS}
            for key in ("loss", "implicit_accuracy", "delta_data", "delta_gen"):
                of[key] = round(float(runs.log(name, model, key, slice(-10, None)).mean()), 5)
            found.setdefault(name, {})[model] = of
        keys = ("loss", "implicit_accuracy", "delta_data", "delta_gen")
        found[name]["curves"] = {key: curve(runs, name, key) for key in keys}
        found[name]["alarms"] = {}
        for window in (5, 10, 20, 50):
            alarms = [
                first_alarm(runs, name, b, s, window) for b in range(len(runs.bases)) for s in range(len(runs.seeds))
            ]
            found[name]["alarms"][str(window)] = alarms
    return found


def curve(runs: Runs, name: str, key: str, every: int = 10) -> dict[str, list[float]]:
    """Over the steps of three iterations, means of `every` steps: of all runs the mean, the smallest, the largest."""
    values = np.concatenate([runs.log(name, f"spin-{k}", key) for k in (1, 2, 3)], axis=2)
    means = values.reshape(-1, values.shape[2] // every, every).mean(2)
    ends = {"mean": means.mean(0), "low": means.min(0), "high": means.max(0)}
    return {end: [round(float(value), 6) for value in of] for end, of in ends.items()}


def first_alarm(runs: Runs, name: str, base: int, seed: int, window: int) -> int | None:
    """The step of SPIN-1 at which, over so many steps, delta_data has been more than half of a positive delta_gen."""
    data, gen = (runs.log(name, "spin-1", key)[base, seed] for key in ("delta_data", "delta_gen"))
    for step in range(window, len(data) + 1):
        a, b = data[step - window : step].mean(), gen[step - window : step].mean()
        if a > b / 2 > 0:
            return step
    return None


MAKERS = {"claims": claims, "web": web, "learned": learned, "choices": choices, "map": map_of, "failure": failure}


# ---- All of it -------------------------------------------------------------------------------------------------------
def collect(folder: Path) -> dict:
    """evidence.json: of every part what its runs say, over the seeds of which all bases are there."""
    found: dict = {"bases": bases(folder)}
    for part, make in MAKERS.items():
        needs = ["claims"] if part != "web" else []
        of_part = experiments.bases_of(part)
        whole = [seed for seed in SEEDS if all(there(folder, name, of_part, seed) for name in [*needs, part])]
        if whole:
            runs = Runs(folder, of_part, whole)
            found[part] = {"about": runs.about(part)} | make(runs)
        print(f"{part}: seeds {', '.join(map(str, whole)) or 'none: left out'}")
    return found


def there(folder: Path, part: str, bases: Sequence[int], seed: int) -> bool:
    jobs = experiments.trials_of(part)
    if all(job.done(folder) for job in jobs):
        jobs = experiments.jobs(folder, part, bases, [seed])
    return all(job.done(folder) for job in jobs)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", default="runs/evidence", help="where experiments.py made them (default: %(default)s)")
    parser.add_argument("--out", default=str(OUT), help="default: tutorial/evidence; figures go beside it")
    args = parser.parse_args(argv)
    found = collect(Path(args.runs))
    run.write_json(Path(args.out) / "evidence.json", found)
    tables.main(["--out", args.out])
    return found


if __name__ == "__main__":
    sys.exit(run.script("findings.py", main))
