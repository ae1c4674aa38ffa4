"""Estimate how long a run will take, for `train.py --dry-run`: time a little of each kind of work.

File access and the computation of scores are not counted.
"""

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
from torch import Tensor

from spin.checkpoint import Pipeline
from spin.infra import distributed
from spin.pairs import ENCODE_BATCH, PairLoader
from spin.sampler import SamplingOptions, sample
from spin.step import LossStep, cast_weights_, compile_unet

# Seconds. A shorter measurement is repeated, because the first call of a kernel is slow. So is a
# compiled one of any length, because its first call measures the compiler.
MIN_SECONDS = 10.0

SAMPLING_STEPS = 2  # measured per image


@dataclass
class Estimate:
    """A number of remaining items of one kind, and the seconds that each takes."""

    name: str
    count: int
    seconds_each: float

    @property
    def seconds(self) -> float:
        return self.count * self.seconds_each

    def __str__(self) -> str:
        total = timedelta(seconds=round(self.seconds))
        return f"{self.count} {self.name}, {self.seconds_each:.2g} s each: {total}"


@torch.no_grad()
def measure_encoding(vae, count: int, resolution: int, passes: int, device: str) -> Estimate:
    """Estimate the encoding of `count` images. passes: how often each goes through the VAE."""
    batch_size = min(ENCODE_BATCH, count)
    pixels = torch.zeros((batch_size, 3, resolution, resolution), device=device)
    for _ in range(2):
        started = time.perf_counter()
        mean, _ = vae.encode(pixels)
        seconds = seconds_since(started, mean)
        if seconds > MIN_SECONDS:
            break
    seconds_each = passes * seconds / batch_size / distributed.WORLD_SIZE
    return Estimate("real images to encode", count, seconds_each)


def measure_sampling(
    name: str,
    pipe: Pipeline,
    count: int,
    options: SamplingOptions,
    batch_size: int,
    ranks: int,
    compiled: bool = False,
) -> Estimate:
    """Estimate the sampling of `count` images by `ranks` processes.

    compiled: whether to compile the UNet, if there are enough images for a whole batch.
    """
    if compiled and count >= batch_size:
        pipe = replace(pipe, unet=compile_unet(pipe.unet))
    batch_size = min(batch_size, count)
    steps = min(SAMPLING_STEPS, options.steps)
    few_steps = replace(options, steps=steps)
    for _ in range(2):
        started = time.perf_counter()
        latents = sample(pipe, [""] * batch_size, **vars(few_steps))
        seconds = seconds_since(started, latents)
        if seconds > MIN_SECONDS and not compiled:
            break
    seconds_each = seconds * options.steps / steps / batch_size / ranks
    return Estimate(name, count, seconds_each)


def measure_training(
    count: int,
    loader: PairLoader,
    micro_batch: int,
    compiled: bool,
    checkpoint_activations: bool,
) -> Estimate:
    """Estimate the training on `count` pairs.

    loader: whose latents may be blank, see `BlankLatents`. compiled: whether to compile the step.
    """
    policy = deepcopy(loader.pipe.unet).requires_grad_(True)
    policy.checkpoint_activations = checkpoint_activations
    opponent = deepcopy(loader.pipe.unet)
    cast_weights_(opponent, loader.dtype)
    loss_step = LossStep(
        loader.loss,
        opponent,
        beta=1.0,
        scheduler=loader.pipe.scheduler,
        device=loader.device,
        autocast=loader.dtype,
        compiled=compiled,
    )
    micro_batch = min(micro_batch, loader.batch_size)
    for _ in range(2):
        started = time.perf_counter()
        batch = loader.load(iteration=1, step=1, start=0, end=micro_batch)
        loss, _ = loss_step(policy, batch)
        loss.backward()
        seconds = seconds_since(started, loss.detach())
        if seconds > MIN_SECONDS and not compiled:
            break
    seconds_each = seconds / micro_batch / distributed.WORLD_SIZE
    return Estimate(f"pairs for {loader.loss}", count, seconds_each)


def seconds_since(started: float, result: Tensor) -> float:
    """Return the seconds since `started`, once the device has computed `result`."""
    result.sum().item()
    return time.perf_counter() - started


class BlankLatents:
    """Stands for `LatentShards` whose files are not there yet: all zeros."""

    def __init__(self, shape: tuple[int, int, int]):
        self.shape = shape

    def read(self, name: str, rows: Sequence[int]) -> Tensor:
        if name == "sizes":
            return torch.zeros((len(rows), 6))
        return torch.zeros((len(rows), *self.shape))
