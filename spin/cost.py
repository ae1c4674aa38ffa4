"""What a run will take before it begins: a little of each kind of work is measured, times what is left to do.

args: train.py's flags.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from spin import pairs, ranks, report, run, toy

QUICK = 10.0  # seconds; a call that takes less is measured a second time, awake


def estimate(args, this_run: run.Run, sd, images, real, stages: list, players: Callable) -> Iterator[tuple[str, float]]:
    """(a line of text, seconds) for each kind of work that is left; files and the scores' arithmetic are not counted.

    real: shards of latents. stages: those to train. players: of sd and a stage, makes the module that is trained.
    """

    def draw(n: int) -> Tensor:
        """Two steps of the sampler, or its only one."""
        generators = [torch.Generator().manual_seed(i) for i in range(n)]
        return pairs.draw_latents(args, sd, [""] * n, generators, steps=min(2, args.sampler_steps))

    def measured(what: str, count: int, most: int, work: Callable, parts: float = 1.0, share: int = ranks.WORLD):
        """work(n): one of the `parts` of doing n <= most of `count` things. Each of `share` ranks does as many."""
        n = min(most, count)
        for _ in range(2):
            began = time.perf_counter()
            work(n).sum().item()  # waits for the device
            took = time.perf_counter() - began
            if took > QUICK and not args.compile:
                break
        each = parts * took / n / share
        return f"{count} {what}, {each:.2g} s each: {run.duration(count * each)}", count * each

    to_encode = sum(len(rows) for _, rows in real.missing())
    if to_encode:
        blank = torch.zeros((3, args.resolution, args.resolution), device=args.device)
        passes = (2 if images.pairs else 1) * (2 if args.flip else 1)
        encode = torch.no_grad()(lambda n: sd.vae.encode(blank.expand(n, -1, -1, -1))[0])
        yield measured("real images to encode", to_encode, pairs.ENCODE_BATCH, encode, passes)

    to_draw, parts = 0, max(1, args.sampler_steps / 2)
    for stage in stages:
        if stage.loss.startswith("spin"):
            to_draw += sum(len(rows) for _, rows in pairs.shards_of(args, this_run, stage, images).missing())
    if to_draw:
        yield measured("images for the opponent to draw", to_draw, args.generation_batch, draw, parts)

    logged = Counter(line["model"] for line in this_run.read_log())
    for loss in dict.fromkeys(stage.loss for stage in stages):
        same = [stage for stage in stages if stage.loss == loss]
        steps = sum(len(stage.batches) - logged[stage.model] for stage in same)
        step = players(args, sd, same[0])

        def train(n: int) -> Tensor:
            loss, _ = step(**pairs.blank(args, sd, same[0].loss, n))
            loss.backward()
            return loss.detach()

        if steps:
            yield measured(f"pairs for {loss}", steps * args.batch_size, args.micro_batch, train)

    pictures = len(stages) * args.grid_prompts
    if args.world and args.score != "none" and not (this_run.folder / "results.json").exists():
        models = len(stages) + len(report.models_of(args, this_run))
        pictures += models * args.score_images * len(toy.split()[args.score])
    if pictures:
        yield measured("pictures for grids and scores", pictures, args.generation_batch, draw, parts, share=1)
