"""Both images of each pair, as latents: encode the real ones, generate the opponent's, load both.

`encode_images` and `generate_images` fill folders of latents before training; each rank writes its
share of the files. `PairLoader` then reads them, and makes all random draws of a pair.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from spin.checkpoint import Pipeline
from spin.checkpoint.tensors import read_tensors
from spin.data import (
    CaptionedImages,
    batch_rows,
    center_square,
    noise_generator,
    random_draws,
    sizes_of_square,
)
from spin.infra import distributed
from spin.infra.devices import copy_to_device
from spin.infra.errors import InputError
from spin.infra.inspection import check_unchanged
from spin.infra.shards import LatentShards
from spin.sampler import SamplingOptions, sample
from spin.step import compile_unet, mixed_precision

ENCODE_BATCH = 4  # images in a forward pass of the VAE's encoder


# ---- Real images -> latents ----------------------------------------------------------------------


@torch.no_grad()
def encode_images(
    vae, images: CaptionedImages, latents: LatentShards, mirrored: bool, device: str
) -> None:
    """Store mean and log-variance of every image's latent, and its sizes, where they are missing.

    mirrored: whether to store those of the mirrored images, too.

    Raises InputError if an image is not readable or has changed since `check_rows` read it, or if a
    latent cannot be stored.
    """
    for shard, batches in missing_batches(latents, ENCODE_BATCH, "encoding real images"):
        encoded = []
        for rows in batches:
            whole = [images.whole_image(row) for row in rows]
            squares = [center_square(image, images.resolution) for image in whole]
            pixels = torch.stack(squares).to(device)
            tensors = encode(vae, pixels, "", mirrored)
            if images.with_rejected:
                pixels = torch.stack([images.rejected_image(row) for row in rows]).to(device)
                tensors.update(encode(vae, pixels, "rejected_", mirrored))
            check_unchanged(images, rows)
            check_storable(tensors, rows, images)
            sizes = [sizes_of_square(image, images.resolution) for image in whole]
            tensors["sizes"] = torch.tensor(sizes)
            encoded.append(tensors)
        latents.write(shard, encoded)
    distributed.barrier()


def encode(vae, pixels: Tensor, prefix: str, mirrored: bool) -> dict[str, Tensor]:
    """Encode images [B,3,H,W] in [-1,1]. The names of the tensors begin with `prefix`."""
    mean, logvar = vae.encode(pixels)
    tensors = {f"{prefix}mean": mean, f"{prefix}logvar": logvar}
    if mirrored:
        mean, logvar = vae.encode(pixels.flip(3))
        tensors[f"{prefix}mean_flipped"] = mean
        tensors[f"{prefix}logvar_flipped"] = logvar
    return tensors


# ---- Prompts -> the opponent's latents -----------------------------------------------------------


def generate_images(
    opponent: Pipeline,
    images: CaptionedImages,
    real: LatentShards,
    latents: LatentShards,
    seed: int,
    iteration: int,
    options: SamplingOptions,
    batch_size: int,
    compiled: bool = False,
) -> None:
    """Generate and store a latent for every row of `latents` that has none yet.

    opponent: a pipeline whose UNet is theta_{k-1}, in iteration k.
    images: their captions are the prompts.
    real: what `encode_images` stored. The images' sizes belong to the prompts, for SDXL.
    batch_size: images generated at once. An image's noise depends on (seed, iteration, row) alone.
    compiled: whether to compile the UNet for batches of `batch_size`. A smaller one, at the end of
        a file, runs uncompiled, since to compile for its shape would take minutes.
    """
    compiled_opponent = opponent
    if compiled:
        compiled_opponent = replace(opponent, unet=compile_unet(opponent.unet))
    title = f"iteration {iteration}: generating"
    for shard, batches in missing_batches(latents, batch_size, title):
        generated = []
        for rows in batches:
            prompts = [images.caption(row) for row in rows]
            generators = [noise_generator(seed, iteration, row) for row in rows]
            pipe = compiled_opponent if len(rows) == batch_size else opponent
            sizes = None
            if opponent.reads_sizes:  # part of what the opponent's image is conditioned on
                sizes = real.read("sizes", rows)
            x0 = sample(pipe, prompts, generators=generators, sizes=sizes, **vars(options))
            check_storable({"x0": x0}, rows, images)
            generated.append({"x0": x0})
        latents.write(shard, generated)
    distributed.barrier()


def missing_batches(
    latents: LatentShards, batch_size: int, title: str
) -> Iterator[tuple[int, Iterator[list[int]]]]:
    """Yield (shard, batches of its rows) for every missing file that this rank is to write.

    Consuming a batch advances a progress bar. Batches do not depend on the number of ranks.
    """
    # No rank writes between the barriers, so that all of them find the same files missing.
    distributed.barrier()
    missing = latents.missing()
    distributed.barrier()
    mine = missing[distributed.RANK :: distributed.WORLD_SIZE]
    num_rows = sum(len(rows) for _, rows in mine)
    bar = distributed.progress_bar(
        total=num_rows, desc=title, unit="image", disable=num_rows == 0
    )
    with bar:
        for shard, rows in mine:
            yield shard, split_rows(rows, batch_size, bar)


def split_rows(rows: list[int], batch_size: int, bar) -> Iterator[list[int]]:
    """Yield the rows in batches, and advance the bar after each."""
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        yield batch
        bar.update(len(batch))


def check_storable(
    tensors: dict[str, Tensor], rows: Sequence[int], images: CaptionedImages
) -> None:
    """Raise InputError, with the row's line, unless all tensors are finite as float16.

    tensors: [B,4,h,w] each, of the B rows: what `LatentShards` will store, as float16.
    images:  says where a row stands, for the message.
    """
    for name, tensor in tensors.items():
        for row, values in zip(rows, tensor.half()):
            if not values.isfinite().all():
                raise InputError(
                    f"{images.location(row)}: its latent ({name}) is not finite, or too large for "
                    "float16, in which latents are stored; the checkpoint is damaged, or the "
                    "guidance is too large"
                )


# ---- Batches of pairs ----------------------------------------------------------------------------


def load_preferences(path: Path, shape: tuple[int, ...], model_hash: str) -> dict[str, Tensor]:
    """Return pairs of generated images for DPO, as scaled latents: "preferred" and "rejected".

    path: a .safetensors file with these two tensors, which states "model_hash" in its metadata.
    shape: of each, [rows,4,h,w], a pair for each row of the data.
    model_hash: `hash_checkpoint` of the model that must have generated them.

    Raises InputError if the file cannot be read, holds other tensors or those of another model, or
    is damaged.
    """
    preferences = read_tensors(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in preferences.items()}
    if shapes != {"preferred": shape, "rejected": shape}:
        raise InputError(
            f"{path}: must hold two tensors, preferred and rejected, of shape {list(shape)}; "
            "it was made for another model or other data"
        )
    with safe_open(path, "pt") as file:
        stated = (file.metadata() or {}).get("model_hash")
    if stated != model_hash:
        raise InputError(
            f"{path}: not generated by the model beside it; make it with tutorial/pretrain_toy.py"
        )
    for name, tensor in preferences.items():
        if not tensor.isfinite().all():
            raise InputError(f"{path}: {name} holds NaN or infinity: the file is damaged")
    return preferences


@dataclass
class PairLoader:
    """Loads the pairs of a training step.

    Every draw is a function of (seed, iteration, step, position in the batch).

    loss: "spin", "spin-bounded", "dpo" or "sft". It determines what a pair's second image is.
    pipe: its text encoder, VAE and scheduler are used.
    images: the data, whose captions are the prompts.
    real: latents of the real images. generated: the opponent's latents, for self-play alone.
    preferences: for "dpo" alone, what `load_preferences` returns: both images of the pairs, which
        are never mirrored. None: the pairs are of the real images and of the data's rejected ones.
    batch_size: pairs of a step, over all ranks.
    flip: probability of mirroring a real image.
    prompt_dropout: probability of training a pair without its prompt.
    independent_noise: whether each image of a pair gets noise of its own.
    dtype: compute dtype of the text encoder.
    """

    loss: str
    pipe: Pipeline
    images: CaptionedImages
    real: LatentShards
    generated: LatentShards | None
    preferences: dict[str, Tensor] | None
    seed: int
    batch_size: int
    flip: float
    prompt_dropout: float
    independent_noise: bool
    dtype: torch.dtype
    device: str

    @torch.no_grad()
    def load(self, iteration: int, step: int, start: int, end: int) -> dict[str, Tensor]:
        """Return positions start..end-1 of a step's batch, as `spin.step`'s arguments, [B,...]."""
        rows = batch_rows(self.seed, iteration, step, self.batch_size, len(self.images))[start:end]
        has_eps_gen = self.independent_noise and self.loss != "sft"
        draws = self.draws_of_batch(iteration, step, start, rows, has_eps_gen)
        batch = self.latents_of_batch(rows, draws)
        batch["eps"] = draws["eps"]
        batch["t"] = draws["t"]
        if has_eps_gen:
            batch["eps_gen"] = draws["eps_gen"]

        batch = {name: copy_to_device(tensor, self.device) for name, tensor in batch.items()}
        dropped = draws["drop"] < self.prompt_dropout
        batch["context"] = self.encode_prompts(rows, dropped)
        return batch

    def draws_of_batch(
        self, iteration: int, step: int, start: int, rows: Sequence[int], independent_noise: bool
    ) -> dict[str, Tensor]:
        """Return everything random in these pairs, [B,...] each: see `spin.data.random_draws`."""
        shape = tuple(self.real.read("mean", rows[:1]).shape[1:])  # a latent's, [4,h,w]
        num_timesteps = self.pipe.scheduler.num_train_timesteps
        pairs = []
        for position in range(start, start + len(rows)):
            draws = random_draws(
                self.seed, iteration, step, position, shape, num_timesteps, independent_noise
            )
            pairs.append(draws)
        batch = {}
        for name in pairs[0]:
            batch[name] = torch.stack([pair[name] for pair in pairs])
        return batch

    def latents_of_batch(self, rows: Sequence[int], draws: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the images of the rows' pairs, x0_data and (not for "sft") x0_gen, [B,4,h,w]."""
        if self.loss == "dpo" and self.preferences is not None:
            return {
                "x0_data": self.preferences["preferred"][rows].float(),
                "x0_gen": self.preferences["rejected"][rows].float(),
            }
        flipped = draws["flip"] < self.flip
        noise = draws["posterior_noise"]
        latents = {"x0_data": self.real_latents("", rows, flipped, noise)}
        if self.loss in ("spin", "spin-bounded"):
            latents["x0_gen"] = self.generated.read("x0", rows)
        elif self.loss == "dpo":
            latents["x0_gen"] = self.real_latents("rejected_", rows, flipped, noise)
        elif self.loss != "sft":
            raise ValueError(f"loss {self.loss!r}: must be spin, spin-bounded, dpo or sft")
        return latents

    def real_latents(
        self, prefix: str, rows: Sequence[int], flipped: Tensor, noise: Tensor
    ) -> Tensor:
        """Return scaled latents of real images, drawn from the VAE's posterior: [B,4,h,w].

        prefix: "" or "rejected_". flipped: [B], which images to mirror. noise: [B,4,h,w].
        """
        means = []
        logvars = []
        for row, is_flipped in zip(rows, flipped.tolist()):
            suffix = "_flipped" if is_flipped else ""
            means.append(self.real.read(f"{prefix}mean{suffix}", [row]))
            logvars.append(self.real.read(f"{prefix}logvar{suffix}", [row]))
        mean = torch.cat(means)
        logvar = torch.cat(logvars)
        return (mean + (0.5 * logvar).exp() * noise) * self.pipe.vae.scaling_factor

    def encode_prompts(self, rows: Sequence[int], dropped: Tensor) -> Tensor:
        """Return the context of the rows' captions, and of their images' sizes.

        Both images of a pair share it. So with DPO and SDXL, the rejected image is trained under
        the preferred image's sizes.

        dropped: [B], which to replace by no prompt, the one that guidance leads away from.
        """
        sizes = self.real.read("sizes", rows) if self.pipe.reads_sizes else None
        prompts = [self.images.caption(row) for row in rows]
        for i, drop in enumerate(dropped.tolist()):
            if drop:
                prompts[i] = None
        with mixed_precision(torch.device(self.device), self.dtype):
            return self.pipe.encode_prompts(prompts, sizes)


def rows_of_steps(
    seed: int, steps: Sequence[tuple[int, int]], batch_size: int, num_rows: int
) -> list[int]:
    """Return the data rows that (iteration, step) pairs draw, each once, ascending."""
    rows = set()
    for iteration, step in steps:
        rows.update(batch_rows(seed, iteration, step, batch_size, num_rows))
    return sorted(rows)
