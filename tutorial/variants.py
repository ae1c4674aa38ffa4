"""What train.py has no flag for: other losses and other opponents, as controls for the evidence.

A variant replaces functions of train.py while it runs:

    with variants.VARIANTS["pixels"]():
        train.main(["--loss", "spin", ...])

The variants of how opponents draw keep what they need in memory. So an interrupted run cannot go
on: delete its folder and begin again.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

import train
from spin import pairs, sampler, step, toy
from spin.checkpoint import Pipeline
from spin.data import batch_rows
from spin.loss import Beta, Losses, per_image_error, spin_bounded_loss, spin_loss
from spin.sampler import GuidedUNet, decode_latents
from spin.scheduler import add_noise

CHARGE = 5.0  # what a rise of delta_data counts

# ---- Losses --------------------------------------------------------------------------------------


def correlation_loss(
    err_data: Tensor,
    err_gen: Tensor,
    opp_err_data: Tensor,
    opp_err_gen: Tensor,
    gap_gen: Tensor,
    beta: Beta,
) -> Losses:
    """Return the bounded loss without its bound, beta / 4 (delta_data - delta_gen).

    It is (C.6) with the correlation link, at the bounded loss's scale.
    """
    no_gap = torch.zeros_like(gap_gen)
    return spin_bounded_loss(err_data, err_gen, opp_err_data, opp_err_gen, no_gap, beta)


def charged_loss(
    err_data: Tensor, err_gen: Tensor, opp_err_data: Tensor, opp_err_gen: Tensor, beta: Beta
) -> Losses:
    """Return (C.6) where a rise of the error on the real image counts CHARGE times."""
    rise = (err_data - opp_err_data.detach()).relu()
    charged = err_data + (CHARGE - 1) * rise
    losses, _ = spin_loss(charged, err_gen, opp_err_data, opp_err_gen, beta)
    _, metrics = spin_loss(err_data, err_gen, opp_err_data, opp_err_gen, beta)
    return losses, metrics


# ---- How opponents draw --------------------------------------------------------------------------


@contextmanager
def pixels() -> Iterator[None]:
    """Take the opponents' images through files: decoded, rounded to 8 bits, encoded again."""
    sample = pairs.sample

    def sample_through_pixels(pipe: Pipeline, prompts: Sequence[str], **options) -> Tensor:
        return through_pixels(pipe, sample(pipe, prompts, **options))

    with patch.object(pairs, "sample", sample_through_pixels):
        yield


@torch.no_grad()
def through_pixels(pipe: Pipeline, latents: Tensor) -> Tensor:
    """Return scaled latents [B,4,h,w] after they were decoded, rounded to 8 bits, and encoded."""
    images = decode_latents(pipe, latents)
    rounded = (images * 255).round() / 255
    mean, _ = pipe.vae.encode(2 * rounded - 1)
    return mean * pipe.vae.scaling_factor


class RecordingUNet(GuidedUNet):
    """Records the path of a batch: at each sampling step x_t, and a noise that is taken from it."""

    def __init__(self, *args, guided_noise: bool, path: list[tuple[Tensor, Tensor]]):
        """guided_noise: see `on_path`. path: gets (x_t, noise), [B,4,h,w] each, noisiest first."""
        super().__init__(*args)
        self.guided_noise = guided_noise
        self.path = path

    def predict(self, x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
        x0, eps = super().predict(x_t, t)
        noise = eps
        if not self.guided_noise:  # the opponent's own prediction for the prompt
            prompts = self.context[-len(x_t) :]
            noise = self.unet(x_t, torch.full((), t, device=self.device), prompts)
        self.path.append((x_t, noise))
        return x0, eps


@contextmanager
def on_path(guided_noise: bool) -> Iterator[None]:
    """Train on the paths by which the opponents drew, equation (C.5), at the sampler's timesteps.

    The generated image of a pair is where its path was at t. What noise is in it can be read in
    two ways:

    guided_noise: False: what the opponent predicts there for the prompt, so that its own error is
        0. True: what the path followed, the prediction with guidance.
    """
    paths: dict[int, list[tuple[Tensor, Tensor]]] = {}  # {row: [(x_t, noise) [4,h,w]]}
    rows_to_draw: list[int] = []
    timesteps: list[int] = []  # of the path, noisiest first
    generate_images = train.generate_images
    sample = pairs.sample
    load = pairs.PairLoader.load

    def generate_recorded(opponent, images, real, latents, **options) -> None:
        steps = options["options"].steps
        timesteps[:] = opponent.scheduler.timesteps(steps).tolist()
        paths.clear()
        rows_to_draw[:] = [row for _, rows in latents.missing() for row in rows]
        generate_images(opponent, images, real, latents, **options)

    def sample_recorded(pipe: Pipeline, prompts: Sequence[str], **options) -> Tensor:
        path: list[tuple[Tensor, Tensor]] = []
        recording_unet = partial(RecordingUNet, guided_noise=guided_noise, path=path)
        with patch.object(sampler, "GuidedUNet", recording_unet):
            x0 = sample(pipe, prompts, **options)
        for i in range(len(prompts)):
            paths[rows_to_draw.pop(0)] = [(x_t[i], noise[i]) for x_t, noise in path]
        return x0

    def load_from_path(loader, iteration: int, step: int, start: int, end: int) -> dict:
        batch = load(loader, iteration, step, start, end)
        num_rows = len(loader.images)
        rows = batch_rows(loader.seed, iteration, step, loader.batch_size, num_rows)[start:end]
        stride = loader.pipe.scheduler.stride(len(timesteps))
        from_end = (batch["t"] // stride).clamp(max=len(timesteps) - 1)
        places = [len(timesteps) - 1 - i for i in from_end.tolist()]
        points = [paths[row][place] for row, place in zip(rows, places)]
        x_t = torch.stack([x_t for x_t, _ in points])
        noise = torch.stack([noise for _, noise in points])

        # The step adds noise to an image. This is the image of which x_t is the result.
        batch["t"] = torch.tensor([timesteps[place] for place in places], device=x_t.device)
        alpha_bar = loader.pipe.scheduler.alphas_cumprod[batch["t"].cpu()].view(-1, 1, 1, 1)
        batch["x0_gen"] = (x_t - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
        batch["eps_gen"] = noise
        return batch

    with (
        patch.object(train, "generate_images", generate_recorded),
        patch.object(pairs, "sample", sample_recorded),
        patch.object(pairs.PairLoader, "load", load_from_path),
    ):
        yield


# ---- Which player is promoted --------------------------------------------------------------------


@contextmanager
def best_promoted() -> Iterator[None]:
    """Save, and promote, of each model's saved states the one with the least held-out error.

    --save-every says how often one is saved. Held out are the scenes of the validation prompts.
    """
    best: dict = {"error": math.inf}
    save_state = train.save_state
    save_model = train.save_model

    def save_state_and_compare(run, name: str, step: int, parts: dict) -> None:
        save_state(run, name, step, parts)
        error = denoising_error(replace(best["pipe"], unet=parts["policy"]), "validation").mean()
        if error < best["error"]:
            best.update(error=error, weights=copy.deepcopy(parts["policy"].state_dict()))

    def save_best_model(run, name: str, num_steps: int, pipe: Pipeline) -> None:
        pipe.unet.load_state_dict(best["weights"])
        save_model(run, name, num_steps, pipe)
        best.update(error=math.inf)

    def load_players(args, stage, start, shared: Pipeline) -> tuple[nn.Module, Callable]:
        best["pipe"] = shared
        return players(args, stage, start, shared)

    players = train.load_players
    with (
        patch.object(train, "save_state", save_state_and_compare),
        patch.object(train, "save_model", save_best_model),
        patch.object(train, "load_players", load_players),
    ):
        yield


@torch.no_grad()
def denoising_error(pipe: Pipeline, split: str) -> np.ndarray:
    """Return the error on a fresh curated image of each prompt, averaged over ten timesteps.

    [N]: `per_image_error`. Images and noise are the same for all models.

    split: "test" or "validation".
    """
    scenes = toy.split()[split]
    images = []
    for i, scene in enumerate(scenes):
        images.append(toy.curated_image(scene, np.random.default_rng([3, i])))
    pixels = torch.tensor(np.stack(images), dtype=torch.float32).permute(0, 3, 1, 2) * 2 - 1
    latents = pipe.vae.encode(pixels)[0] * pipe.vae.scaling_factor
    context = pipe.encode_prompts([scene.caption for scene in scenes])
    generator = torch.Generator().manual_seed(0)
    errors = []
    for level in range(50, 1000, 100):
        t = torch.full((len(latents),), level)
        eps = torch.randn(latents.shape, generator=generator)
        x_t = add_noise(latents, eps, pipe.scheduler.alphas_cumprod[t])
        errors.append(per_image_error(pipe.unet(x_t, t, context), eps))
    return torch.stack(errors).mean(0).numpy()


VARIANTS = {
    "correlation": partial(patch.object, step, "spin_bounded_loss", correlation_loss),
    "charge": partial(patch.object, step, "spin_loss", charged_loss),
    "pixels": pixels,
    "path": partial(on_path, guided_noise=False),
    "guided-path": partial(on_path, guided_noise=True),
    "best-promoted": best_promoted,
}
