"""The two images of a pair: real ones encoded, the opponent's drawn, both kept as latents, and read with their noise.
args: train.py's flags. real, generated: `data.LatentShards`; each rank fills its share of their files."""

import numpy as np
import torch
from torch import Tensor

from spin import data, sampler
from spin.infra import distributed as ranks
from spin.infra.run import Run
from spin.step import mixed_precision

ENCODE_BATCH = 4  # images a forward pass of the VAE's encoder


@torch.no_grad()
def encode(args, sd, images: data.CaptionedImages, real: data.LatentShards) -> None:
    """Stores mean and log-variance of every image's latent, and of its mirror image's if that may be drawn."""

    def encoded(rows: list[int]) -> dict[str, Tensor]:
        found = {}
        for kind, rejected in (("", False), ("rejected_", True))[: 1 + images.pairs]:
            batch = torch.stack([images.image(row, rejected) for row in rows]).to(args.device)
            found[f"{kind}mean"], found[f"{kind}logvar"] = sd.vae.encode(batch)
            if args.flip:
                found[f"{kind}mean_flipped"], found[f"{kind}logvar_flipped"] = sd.vae.encode(batch.flip(3))
        return found

    fill(real, encoded, ENCODE_BATCH, "encoding real images")


def generate(args, sd, images: data.CaptionedImages, generated: data.LatentShards, k: int) -> None:
    """Draws and stores theta_{k-1}'s latent for every row of `generated`; its noise depends on seed, k, row alone.
    For (C.5) it stores the path, [sampler steps,4,h,w] a row, instead of its end: 1.6 MB at 512 px and 50 steps."""

    def drawn(rows: list[int]) -> dict[str, Tensor]:
        generators = [data.generator(args.seed, k, row) for row in rows]
        path: list[Tensor] | None = [] if args.loss == "spin-trajectory" else None
        prompts = [images.caption(row) for row in rows]
        x0 = sampler.sample(sd, prompts, generators=generators, trajectory=path, **how_to_draw(args))
        if path:
            return {"path": torch.stack(path, dim=1).half().cpu()}
        return {"x0": through_pixels(sd, x0, generators) if args.generated == "images" else x0}

    fill(generated, drawn, args.generation_batch, f"iteration {k}: generating")


def fill(shards: data.LatentShards, make, batch_size: int, title: str) -> None:
    """Writes its share of the missing files: what make(rows) returns for batches, the same for any number of ranks."""
    ranks.wait()
    todo = shards.missing()[ranks.RANK :: ranks.WORLD]
    ranks.wait()  # all have looked before one writes, so that they share one list
    with ranks.bar(total=sum(len(rows) for _, rows in todo), desc=title, disable=not todo or ranks.RANK > 0) as bar:
        for shard, rows in todo:
            parts = []
            for at in range(0, len(rows), batch_size):
                parts.append(make(rows[at : at + batch_size]))
                bar.update(min(batch_size, len(rows) - at))
            shards.write(shard, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    ranks.wait()


def how_to_draw(args) -> dict:
    size = {"height": args.resolution, "width": args.resolution, "autocast": getattr(torch, args.dtype)}
    return size | {"steps": args.sampler_steps, "guidance": args.guidance, "sampler": args.sampler}


@torch.no_grad()
def through_pixels(sd, x0: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Scaled latents -> decoded, rounded to 8 bits, encoded: what becomes of an image that is kept as a file."""
    pictures = (sampler.decode(sd, x0) * 255).round() / 255
    mean, logvar = map(torch.cat, zip(*(sd.vae.encode(picture * 2 - 1) for picture in pictures.split(1))))
    noise = torch.cat([torch.randn(mean[:1].shape, generator=generator) for generator in generators])
    return (mean + (0.5 * logvar).exp() * noise.to(mean.device)) * sd.vae.scaling_factor


def shards_of(args, this_run: Run, stage, images: data.CaptionedImages) -> data.LatentShards:
    """The opponent's latents for the rows that a self-play stage will draw, and for no others."""
    drawn = [data.batch_rows(args.seed, k, s, args.batch_size, len(images)) for k, s in stage.batches]
    return data.LatentShards(this_run.place(stage.model) / "generated", np.unique(drawn))


@torch.no_grad()
def read(args, sd, loss: str, images, real, generated, rows: list[int], when: tuple[int, int, int]) -> dict:
    """What the step of a loss takes, on the device. when: iteration, step, and the first row's place in the batch."""
    (k, s, at), schedule, trajectory = when, sd.scheduler, loss == "spin-trajectory"
    timesteps = schedule.timesteps(args.sampler_steps) if trajectory else torch.arange(schedule.num_train_timesteps)
    shape = real.read("mean", rows[:1]).shape[1:]
    draws = [data.draw(args.seed, k, s, at + i, shape, len(timesteps)) for i in range(len(rows))]
    random = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}

    def encoded(kind: str) -> Tensor:
        mean, logvar = real.read(f"{kind}mean", rows), real.read(f"{kind}logvar", rows)
        if args.flip:
            flipped = (random["flip"] < args.flip)[:, None, None, None]
            mean = torch.where(flipped, real.read(f"{kind}mean_flipped", rows), mean)
            logvar = torch.where(flipped, real.read(f"{kind}logvar_flipped", rows), logvar)
        return (mean + (0.5 * logvar).exp() * random["posterior"]) * sd.vae.scaling_factor

    pairs = {"x0_data": encoded(""), "eps": random["eps"], "t": timesteps[random["t"]]}
    if trajectory:
        pairs["x_t_gen"] = generated.read("path", rows, random["t"].tolist())
    elif loss != "sft":
        pairs["x0_gen"] = generated.read("x0", rows) if loss == "spin" else encoded("rejected_")
        if args.noise == "independent":
            pairs["eps_gen"] = random["eps_gen"]
    pairs = {name: tensor.to(args.device) for name, tensor in pairs.items()}
    prompts = ["" if drop < args.prompt_dropout else images.caption(row) for drop, row in zip(random["drop"], rows)]
    with mixed_precision(pairs["x0_data"], getattr(torch, args.dtype)):
        return pairs | {"context": sd.encode_prompts(prompts)}
