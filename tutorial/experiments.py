"""Do the paper's claims hold in the miniature world, and what does self-play learn? Several bases, three seeds each.

    python tutorial/experiments.py               hours of two cores; again, it goes on where it stopped
    python tutorial/experiments.py --parts map   only this part, of bases claims learned ending web failure choices map
                                                 lengths

A job is one run of train.py and a look at its models; each takes one core, and as many run at once as --workers says.
RUNS/<start>-<base>/seed-<seed>/<name>/scores.json keeps every picture's score; tutorial/findings.py makes of them the
numbers in tutorial/evidence. Hyper-parameters are those that tuning.py found on base 0's validation prompts;
where the start or the loss is another, trials of their own are made here, on base 0, as many for each method.
Bases come first; "learned", "ending" and "choices" look at what "claims" made.
"""

import argparse
import multiprocessing
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from spin import data, pairs, sampler  # noqa: E402
from spin.eval import comparison as judge  # noqa: E402
from spin.infra import run  # noqa: E402
from spin.toy import world as toy  # noqa: E402
from spin.eval import plots as viz  # noqa: E402
from spin.checkpoint import pipeline as weights  # noqa: E402
from spin.loss import per_image_error  # noqa: E402
from spin.scheduler import add_noise  # noqa: E402
from spin.step import spin_step  # noqa: E402
from spin.toy import pictures as drawing  # noqa: E402
from tutorial import pretrain_toy as pretrain  # noqa: E402

BASES, SEEDS = (0, 1, 2), (0, 1, 2)  # of pretraining, of fine-tuning
SWEEP = (1.0, 1.5, 2.0, 3.0)  # guidance scales
WIDER = (*SWEEP, 4.0, 5.0)  # where the start is web
AT_ONCE = 32  # pictures drawn, the fastest on one core
FIXED = f"--score none --grid-prompts 0 --save-every 0 --device cpu --generation-batch {AT_ONCE}"
STEPS = sum(train.parse([]).steps)  # of all iterations: 300
DRAWING = 150  # steps for which drawing 600 images takes as long
ONCE_A_BASE = ("theta_0", "gradient", "map")  # jobs whose names begin so have one seed
MAP = list(product((5e-6, 2e-5, 5e-5, 1e-4), (200, 1000, 10000, 100000)))  # (lr, beta)


class Look(NamedTuple):
    """At what a model is judged by. guidance None: the best for that model of those tried on validation
    prompts, by one picture each."""

    split: str
    guidance: float | None
    pictures: int = 1  # a prompt
    steps: int = 20

    @property
    def name(self) -> str:
        guidance = "best guidance" if self.guidance is None else f"guidance {self.guidance:g}"
        return f"{self.split}, {guidance}" + (f", {self.steps} steps" if self.steps != 20 else "")


TUNE = (Look("validation", 3.0),)
SINGLE = (Look("test", 3.0),)
ACROSS = tuple(Look("test", guidance) for guidance in (1.0, 2.0, 3.0, 5.0))
ENDS = (Look("test", 1.0), Look("test", 3.0))
BEST = (*(Look("validation", guidance) for guidance in SWEEP), Look("test", None))
FIVE = (Look("test", 3.0, 5),)
FINER = Look("test", 3.0, steps=50)
HELD_OUT = "held-out error"  # of the predicted noise on curated pictures of the test scenes, which nobody was shown


@dataclass
class Job:
    part: str
    name: str
    base: int
    seed: int
    flags: str = ""  # train.py's; none: nothing is trained
    looks: dict[str, tuple[Look, ...]] = field(default_factory=lambda: {"spin-1": SINGLE})  # of each model to judge
    start: str = "theta_0"  # or web, or to_1: theta_0, but that its sampler's last step goes to alpha_bar = 1
    again: bool = False  # whether the first opponent's images are those of the run "claims", which are not drawn anew
    models: str = ""  # start and name, joined by a slash, of the job whose models are judged, if none are trained here

    @property
    def place(self) -> str:
        return f"{self.start}-{self.base}/seed-{self.seed}/{self.name}"

    def done(self, runs: Path) -> bool:
        path = runs / self.place / "scores.json"
        if not path.exists():
            return False
        known = run.read_json(path)
        judged = known["models"]
        asked = {(model, look.name) for model, looks in self.looks.items() for look in looks}
        return known["flags"] == self.flags and asked <= {(model, look) for model in judged for look in judged[model]}


# ---- What is asked ---------------------------------------------------------------------------------------------------
def jobs(runs: Path, part: str, bases=BASES, seeds=SEEDS) -> list[Job]:
    """The jobs of a part. web and learned need their trials done, of which they take the best."""
    every = [(base, seed) for seed in seeds for base in bases]

    def of(name: str, flags: str, cells=every, **others) -> list[Job]:
        return [Job(part, name, base, seed, flags, **others) for base, seed in cells]

    once_a_base = [(base, SEEDS[0]) for base in bases]
    once = "--loss spin --iterations 1"
    if part == "claims":
        found = of("theta_0", "", once_a_base, looks={"base": (*FIVE, *BEST, *ACROSS)})
        looks = dict.fromkeys(("sft", "dpo", "spin-1", "spin-2", "spin-3"), (*FIVE, *BEST))
        looks["spin-1"] += ACROSS
        found += of("claims", "--loss all", looks=looks)
        found += of("continued", f"{once} --steps {STEPS}", looks={"spin-1": (*SINGLE, *BEST)}, again=True)
        return found + of("sft-longer", f"--loss sft --steps {STEPS}", looks={"sft": SINGLE})
    if part == "web":
        both = (*SINGLE, *(Look("validation", guidance) for guidance in WIDER), Look("test", None))
        found = of("theta_0", "", once_a_base, looks={"base": both}, start="web")
        for method, looks in (
            ("sft", {"sft": both}),
            ("dpo", {"dpo": both}),
            ("spin", {"spin-1": SINGLE, "spin-3": both}),
        ):
            flags = f"--loss {method} {best_trial(runs, f'web-{method}')}"
            found += of(method, flags, looks=looks, start="web")
        return found
    if part == "learned":
        across, ends = {"looks": {"spin-1": ACROSS}}, {"looks": {"spin-1": ENDS}}
        found = [job for g in (1, 2, 5) for job in of(f"negatives-at-{g}", f"{once} --guidance {g}", **across)]
        found += of("negatives-50-steps", f"{once} --sampler-steps 50", **ends)
        found += of("negatives-as-images", f"{once} --generated images", **ends)
        found += of("theta_0-at-50", "", once_a_base, looks={"base": (FINER,)})
        for name in ("claims", "negatives-50-steps"):  # those whose opponents drew in 20 steps and in 50, judged at 50
            found += of(f"{name}-at-50", "", looks={"spin-1": (FINER,)}, models=f"theta_0/{name}")
        flags = f"--loss spin-trajectory --iterations 1 {best_trial(runs, 'trajectory')}"
        return found + of("trajectory", flags, **ends)
    if part == "ending":
        looks = {"sft": SINGLE, "spin-1": ACROSS, "spin-2": SINGLE, "spin-3": SINGLE}
        found = of("theta_0", "", once_a_base, looks={"base": ACROSS}, start="to_1")
        found += of("claims", "", looks=looks, start="to_1", models="theta_0/claims")
        found += of("spin", once, looks={"spin-1": ACROSS}, start="to_1")
        return found + of("spin", "", looks={"spin-1": ACROSS}, models="to_1/spin")
    if part == "choices":
        found = [Job(part, "gradient", *cell, looks={}) for cell in once_a_base]
        found += of("noise-independent", f"{once} --noise independent", again=True)
        found += [job for link in ("hinge", "correlation") for job in of(link, f"{once} --link {link}", again=True)]
        return found + of("dropout", f"{once} --prompt-dropout 0.1", again=True)
    if part == "lengths":
        found = []
        for k in (2, 1):  # for what 3 x 100 steps cost, drawing included
            steps = (STEPS + 3 * DRAWING) // k - DRAWING
            flags = f"--loss spin --iterations {k} --steps {steps}"
            found += of(f"{k}-times-{steps}", flags, looks={f"spin-{k}": SINGLE}, again=True)
        return found
    if part == "map":
        flags = once + " --lr {:g} --beta {:g}"
        return [job for cell in MAP for job in of(map_name(*cell), flags.format(*cell), once_a_base, again=True)]
    if part == "failure":
        return of("failure", f"{once} --beta 200 --lr 1e-4", again=True)
    raise ValueError(part)


def map_name(lr: float, beta: float) -> str:
    return f"map-lr-{lr:g}-beta-{beta:g}"


TRIALS = {
    "web-sft": [f"--sft-lr {lr:g}" for lr in (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 3e-3)],
    "web-dpo": [
        f"--dpo-lr {lr:g} --dpo-beta {beta:g}"
        for lr, beta in (
            *product((1e-5, 1e-4), (2000, 20000)),
            *((3e-5, 2000), (1e-5, 500), (3e-6, 2000), (3e-6, 500)),
        )
    ],
    "web-spin": [
        f"--lr {lr:g} --beta {beta:g}"
        for lr, beta in (*product((2e-5, 1e-4), (1000, 10000)), *product((5e-6, 1e-5), (10000, 100000)))
    ],
    "trajectory": [f"--lr {lr:g} --beta {beta:g}" for lr, beta in product((1e-5, 5e-5), (2000, 20000))],
}


def trials(kind: str) -> list[Job]:
    """Of one base and seed, judged on validation prompts."""
    start, method = ("web", kind.removeprefix("web-")) if kind.startswith("web") else ("theta_0", "spin-trajectory")
    model = {"spin": "spin-3", "spin-trajectory": "spin-1"}.get(method, method)
    once = " --iterations 1" if model == "spin-1" else ""
    names = [f"trial-{kind}{flags.replace(' --', '-').replace('--', '-').replace(' ', '-')}" for flags in TRIALS[kind]]
    given = {"looks": {model: TUNE}, "start": start}
    named = zip(names, TRIALS[kind])
    return [Job("trials", name, BASES[0], SEEDS[0], f"--loss {method}{once} {flags}", **given) for name, flags in named]


def rewards_of_trials(runs: Path, kind: str) -> dict[str, float]:
    """{flags: mean reward of the last model}."""
    found = {}
    for job, flags in zip(trials(kind), TRIALS[kind]):
        (scores,) = run.read_json(runs / job.place / "scores.json")["models"].values()
        found[flags] = round(float(np.mean(scores[TUNE[0].name]["reward"])), 4)
    return found


def best_trial(runs: Path, kind: str) -> str:
    rewards = rewards_of_trials(runs, kind)
    return max(rewards, key=rewards.get)


def trials_of(part: str) -> list[Job]:
    kinds = {"web": ("web-sft", "web-dpo", "web-spin"), "learned": ("trajectory",)}.get(part, ())
    return [job for kind in kinds for job in trials(kind)]


# ---- A job -----------------------------------------------------------------------------------------------------------
def start_of(runs: Path, start: str, base: int) -> Path:
    """The checkpoint that a job begins with. theta_0 of base 0 is the one in spin/toy/base."""
    if (start, base) == ("theta_0", 0):
        return toy.BASE
    place = runs / f"base-{base}" / start
    if start == "to_1" and not place.exists():
        with run.whole(place) as part:
            shutil.copytree(start_of(runs, "theta_0", base), part)
            path = part / "scheduler" / "scheduler_config.json"
            run.write_json(path, run.read_json(path) | {"set_alpha_to_one": True})
    return place


def do(job: Job, runs: Path) -> float:
    """Trains and judges what `job` says; seconds. What is there already is kept."""
    out, began, before = runs / job.place, time.perf_counter(), 0.0
    if job.done(runs):  # by another process in the meantime
        return 0.0
    if (out / "scores.json").exists():
        known = run.read_json(out / "scores.json")
        if known["flags"] == job.flags:
            before = known["seconds"]  # only looks are missing
        else:
            run.remove(out)  # the best of the trials is another than it was
    out.mkdir(parents=True, exist_ok=True)
    start = start_of(runs, job.start, job.base)
    with open(out / "output.txt", "a") as said, redirect_stdout(said), redirect_stderr(said):
        found = run.provenance() | {"threads": torch.get_num_threads(), "flags": job.flags}
        if job.name == "gradient":
            found |= {"gradient": gradient_noise(runs, job)}
        if job.flags:
            encoded = runs / f"{job.start}-{job.base}" / "cache"  # of real images, which no job needs to encode again
            if job.again:
                copy(runs / replace(job, name="claims").place / "iter1" / "generated", out / "iter1" / "generated")
            copy(encoded, out / "cache")
            train.main([*job.flags.split(), *FIXED.split(), *to_start(start, job.seed), "--out", str(out)])
            for folder in (out / "cache").iterdir():
                copy(folder, encoded / folder.name)
        found["models"] = {}
        sd, (of_start, name) = weights.load(start), (job.models or f"{job.start}/{job.name}").split("/")
        trained = run.Run(runs / replace(job, start=of_start, name=name).place)
        for model, looks in job.looks.items():
            unet = sd.unet if model == "base" else weights.load_unet(str(trained.checkpoint(model)))
            found["models"][model] = judged(replace(sd, unet=unet), looks)
        found["seconds"] = round(time.perf_counter() - began + before, 1)
        run.write_json(out / "scores.json", found)
    return found["seconds"]


def to_start(start: Path, seed: int) -> list[str]:
    return ["--preset", "toy", "--model", str(start), "--seed", str(seed)]


def copy(source: Path, to: Path) -> None:
    if source.exists() and not to.exists():
        with run.whole(to) as part:
            shutil.copytree(source, part)


def judged(sd, looks: tuple[Look, ...]) -> dict:
    """{look: {metric: [prompts][pictures]}} of a model; under HELD_OUT, [prompts], its error on real pictures."""
    found: dict = {HELD_OUT: np.round(held_out_error(sd), 6).tolist()}
    for look in looks:
        guidance = look.guidance
        if guidance is None:
            of_validation = [of for name, of in found.items() if name.startswith("validation")]
            tried = {of["guidance"]: np.mean(of["reward"]) for of in of_validation}
            guidance = max(tried, key=tried.get)
        same = found.get(look._replace(guidance=guidance).name)
        if not same or len(same["reward"][0]) < look.pictures:
            same = {"guidance": guidance} | scores_of(sd, look.split, guidance, look.steps, look.pictures)
        found[look.name] = same
    return found


def scores_of(sd, split: str, guidance: float, steps: int, pictures: int) -> dict:
    """{metric: [prompts][pictures]} of what a model draws."""
    prompts = [scene.caption for scene in toy.split()[split]]
    jobs = [(p, judge.SEED + judge.STRIDE * i + j) for i, p in enumerate(prompts) for j in range(pictures)]
    settings = {"steps": steps, "guidance": guidance, "height": toy.SIDE, "width": toy.SIDE}
    drawn = [np.asarray(viz.to_pil(x)) / np.float32(255) for x in sampler.pictures(sd, jobs, AT_ONCE, **settings)]
    scores = toy.score(np.stack(drawn), [prompt for prompt, _ in jobs])
    return {metric: np.round(of, 4).reshape(len(prompts), -1).tolist() for metric, of in scores.items()}


@torch.no_grad()
def held_out_error(sd) -> np.ndarray:
    """[200]: of each test scene the mean squared error of the noise predicted, over ten timesteps, for its prompt."""
    scenes = toy.split()["test"]
    drawn = [drawing.curated(scene, np.random.default_rng([1, i])) for i, scene in enumerate(scenes)]
    mean, _ = pretrain.encode(sd, pretrain.to_tensor(drawn))
    context = sd.encode_prompts([scene.caption for scene in scenes])
    noise, errors = torch.Generator().manual_seed(0), []
    for t in range(50, 1000, 100):
        eps, at = torch.randn(mean.shape, generator=noise), torch.full((len(mean),), t)
        x_t = add_noise(mean * sd.vae.scaling_factor, eps, sd.scheduler.alphas_cumprod[at])
        errors.append(per_image_error(sd.unet(x_t, at, context), eps))
    return torch.stack(errors).mean(0).numpy()


UNSEEN = 1000


def gradient_noise(runs: Path, job: Job, batches: int = 100) -> dict:
    """Of the gradient of (C.6) over batches of 16 pairs, at theta_0 and at SPIN-1 with theta_0 its opponent: the total
    variance and the squared length of its mean (without bias), where a pair shares its noise and where it does not.
    Batches and noise are those of an iteration UNSEEN, which nobody was trained with."""
    claims = runs / replace(job, name="claims").place
    start = to_start(start_of(runs, job.start, job.base), job.seed)
    args = train.parse([*job.flags.split(), *start, "--out", str(claims)])
    sd, found = weights.load(args.model), {}
    images = data.CaptionedImages(args.data, args.resolution, False, args.num_prompts)
    real = data.LatentShards(sorted((claims / "cache").iterdir())[0], range(len(images)))  # any has the mean and logvar
    generated = pairs.shards_of(args, run.Run(claims), train.Stage.of("spin-1", args), images)
    for at, unet in (("theta_0", sd.unet), ("spin-1", weights.load_unet(str(run.Run(claims).checkpoint("spin-1"))))):
        for args.noise in ("shared", "independent"):
            total, squared = 0.0, 0.0
            for s in range(1, batches + 1):
                rows = data.batch_rows(job.seed, UNSEEN, s, args.batch_size, len(images))
                batch = pairs.read(args, sd, "spin", images, real, generated, rows, (UNSEEN, s, 0))
                unet.requires_grad_(True).zero_grad()
                given = {"alphas_cumprod": sd.scheduler.alphas_cumprod, "beta": torch.tensor(args.beta[0])}
                loss, _ = spin_step(unet, sd.unet, **batch, **given)
                loss.backward()
                gradient = torch.cat([p.grad.flatten() for p in unet.parameters()]).double()
                total, squared = total + gradient, squared + gradient.square().sum().item()
            variance = (squared - total.square().sum().item() / batches) / (batches - 1)
            signal = (total / batches).square().sum().item() - variance / batches
            found[f"{at}, {args.noise}"] = {"variance": variance, "signal": signal, "batches": batches}
    return found


# ---- All of them -----------------------------------------------------------------------------------------------------
def make_base(base: int, runs: Path) -> float:
    """All share the autoencoder of spin/toy/base, which is base 0's theta_0; that one's web stage is not kept there."""
    began, out = time.perf_counter(), runs / f"base-{base}"
    out.mkdir(parents=True, exist_ok=True)
    if not base:
        copy(toy.BASE, out / "theta_0")
    with open(out / "output.txt", "a") as said, redirect_stdout(said), redirect_stderr(said):
        pretrain.main(["--seed", str(base), "--vae", str(toy.BASE), "--out", str(out)])
    return time.perf_counter() - began


PARTS = ("bases", "claims", "learned", "ending", "web", "failure", "choices", "map", "lengths")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--bases", nargs="+", type=int, choices=BASES, default=BASES, help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS, help="default: all")
    parser.add_argument("--runs", default="runs/evidence", help="folder for the runs (default: %(default)s)")
    parser.add_argument("--workers", type=run.number(int, 1), default=2, help="jobs at once (default: %(default)s)")
    args = parser.parse_args(argv)
    runs = Path(args.runs)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def each(names: list[str], work, things: list) -> None:
            began = [pool.submit(work, thing, runs) for thing in things]
            for name, seconds in zip(names, began):
                print(f"{name}: {seconds.result():.0f} s", flush=True)

        try:
            for part in args.parts:
                if part == "bases":
                    each([f"base-{base}" for base in args.bases], make_base, args.bases)
                    continue
                if part == "ending":
                    for base in args.bases:
                        start_of(runs, "to_1", base)  # not by two processes at once
                for wanted in (partial(trials_of, part), partial(jobs, runs, part, args.bases, args.seeds)):
                    todo = [job for job in wanted() if not job.done(runs)]
                    each([job.place for job in todo], do, todo)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


if __name__ == "__main__":
    sys.exit(run.script("experiments.py", main))
