"""What a run will take before it begins: a little of each kind of work is measured, times what is left to do."""

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import torch
from torch import Tensor

from spin import pairs, sampler
from spin.infra import distributed as ranks
from spin.eval import report
from spin.infra import run
from spin.toy import world as toy

QUICK = 10.0  # seconds; a call that takes less is measured a second time, awake


def estimate(args, this_run: run.Run, sd, images, real, stages: list, players: Callable) -> Iterator[tuple[str, float]]:
    """(a line of text, seconds) for each kind of work that is left; files and the scores' arithmetic are not counted.
    real: shards of latents. stages: those to train. players: of args, sd and a stage, makes the module to train."""
    side = args.resolution // sd.vae.downscale
    blank = SimpleNamespace(read=lambda name, rows, entries=None: torch.zeros((len(rows), 4, side, side)))

    def encode(n: int) -> Tensor:
        with torch.no_grad():
            return sd.vae.encode(torch.zeros((n, 3, args.resolution, args.resolution), device=args.device))[0]

    def draw(n: int) -> Tensor:
        return sampler.sample(sd, [""] * n, **pairs.how_to_draw(args) | {"steps": min(2, args.sampler_steps)})

    def train(n: int) -> Tensor:
        rows = [i % len(images) for i in range(n)]
        loss, _ = step(**pairs.read(args, sd, stage.loss, images, blank, blank, rows, (0, 0, 0)))
        loss.backward()
        return loss.detach()

    def measured(what: str, count: int, most: int, work: Callable, parts: float = 1.0, share: int = ranks.WORLD):
        """work(n): one of the `parts` of doing n <= most of `count` things. Each of `share` ranks does as many."""
        for _ in range(2):
            began, n = time.perf_counter(), min(most, count)
            work(n).sum().item()  # waits for the device
            each = parts * (time.perf_counter() - began) / n / share
            if each * n * share > QUICK * parts and not args.compile:
                break
        return f"{count} {what}, {each:.2g} s each: {timedelta(seconds=round(count * each))}", count * each

    of_two = args.sampler_steps / 2  # `draw` takes two steps of these
    if count := real.count_missing():
        passes = (1 + images.pairs) * (1 + bool(args.flip))
        yield measured("real images to encode", count, pairs.ENCODE_BATCH, encode, passes)
    self_play = [stage for stage in stages if stage.loss.startswith("spin")]
    if count := sum(pairs.shards_of(args, this_run, stage, images).count_missing() for stage in self_play):
        yield measured("images for the opponent to draw", count, args.generation_batch, draw, of_two)
    for stage in {stage.loss: stage for stage in stages}.values():
        same = [other for other in stages if other.loss == stage.loss]
        if left := sum(len(other.batches) - this_run.steps_saved(other.model) for other in same):
            step = players(args, replace(sd, unet=deepcopy(sd.unet)), stage)
            yield measured(f"pairs for {stage.loss}", left * args.batch_size, args.micro_batch, train)
    pictures = len(stages) * args.grid_prompts
    if args.world and args.score != "none" and not (this_run.folder / "results.json").exists():
        models = len(stages) + len(report.models_of(args, this_run))
        pictures += models * args.score_images * len(toy.split()[args.score])
    if pictures:
        yield measured("pictures for grids and scores", pictures, args.generation_batch, draw, of_two, share=1)
