"""Guided sampling: prompts in, latents out."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spin.infra.run import InputError
from spin.scheduler import ddim_step, ddpm_step, dpmpp_step, x0_and_eps

SAMPLERS = ("ddim", "ddpm", "dpm++")


@torch.no_grad()
def sample(
    sd, prompts: Sequence[str], steps: int = 50, guidance: float = 7.5, eta: float = 0.0,
    generators: Sequence[torch.Generator] | None = None, *, negative_prompts: str | Sequence[str] = "",
    height: int | None = None, width: int | None = None, sampler: str = "ddim", autocast: torch.dtype = torch.float32,
    trajectory: list[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Draws one latent for each prompt: x0, scaled, [B,4,h,w] float32. `decode` makes pictures. sd: see `weights.load`.
    guidance: eps_empty + guidance (eps_prompt - eps_empty), arXiv 2207.12598; 1: none, at half the cost; 0: eps_empty
        alone (below 1, diffusers turns it off). negative_prompts: instead of the empty one, one for all or for each.
    eta: share of DDPM's noise that DDIM adds in a step, 0 to 1; the other samplers ignore it.
    generators: on the CPU, one a prompt, of all its noise: no image depends on its batch. None: seeds 0, 1, 2, ...
    height, width: pixels, multiples of the VAE's factor; None: the size the UNet was trained at.
    trajectory: a list to which x_t [B,4,h,w] is appended at each of the scheduler's timesteps, noisiest first.
    Raises InputError, a ValueError, where an argument is out of range, or what was drawn is not finite."""
    batch, f = len(prompts), sd.vae.downscale
    if isinstance(prompts, str) or not batch:
        raise InputError("prompts must be a list of at least one prompt")
    negative_prompts = [negative_prompts] * batch if isinstance(negative_prompts, str) else list(negative_prompts)
    generators = [torch.Generator("cpu").manual_seed(i) for i in range(batch)] if generators is None else generators
    height, width = (size or sd.unet.sample_size * f for size in (height, width))
    if height % f or width % f or min(height, width) < f:
        raise InputError(f"{height} x {width} pixels: height and width must be multiples of {f}")
    if not len(prompts) == len(generators) == len(negative_prompts):
        raise InputError(f"{batch} prompts, {len(generators)} generators, {len(negative_prompts)} negative prompts")
    if sampler not in SAMPLERS:
        raise InputError(f"sampler {sampler!r}: only {', '.join(SAMPLERS)} are known")
    first, guided = sd.unet.conv_in, guidance != 1
    device, dtype, shape = first.weight.device, first.weight.dtype, (1, first.in_channels, height // f, width // f)
    noise = lambda: torch.cat([torch.randn(shape, generator=own) for own in generators]).to(device)  # noqa: E731
    with torch.autocast(device.type, dtype=autocast, enabled=autocast != torch.float32):
        context = sd.encode_prompts([*negative_prompts, *prompts] if guided else list(prompts)).to(dtype)
        x_t, before = noise(), None
        for t in timesteps(sd, steps):
            if trajectory is not None:
                trajectory.append(x_t)
            inputs = torch.cat([x_t, x_t]) if guided else x_t
            output = sd.unet(inputs.to(dtype), t.to(device), context).float()
            if guided:
                empty, prompt = output.chunk(2)
                output = empty + guidance * (prompt - empty)
            alpha_bar, alpha_bar_prev = (a.to(device) for a in sd.scheduler.alphas_of_step(t.item(), steps, sampler))
            x0, eps = x0_and_eps(output, x_t, alpha_bar, sd.scheduler.prediction_type)
            if sampler == "ddpm":
                x_t = ddpm_step(x_t, x0, alpha_bar, alpha_bar_prev, noise())
            elif sampler == "dpm++":
                x_t, before = dpmpp_step(x_t, x0, alpha_bar, alpha_bar_prev, before), (x0, alpha_bar)
            else:
                x_t = ddim_step(x0, eps, alpha_bar, alpha_bar_prev, eta, noise() if eta else x_t)
    if not x_t.isfinite().all():
        raise InputError("what was drawn is not finite: too large a guidance, or a broken checkpoint")
    return x_t


def timesteps(sd, steps: int) -> Tensor:
    """`Scheduler.timesteps`, noisiest first; InputError where the schedule has no room for as many."""
    try:
        return sd.scheduler.timesteps(steps)
    except ValueError as error:
        raise InputError(str(error)) from None


def pictures(sd, jobs: Sequence[tuple[str, int]], at_once: int = 1, **settings) -> Iterator[Tensor]:
    """A picture [3,H,W] in [0,1] for each (prompt, seed of its generator). settings: `sample`'s other arguments."""
    for at in range(0, len(jobs), at_once):
        prompts, seeds = zip(*jobs[at : at + at_once])
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        yield from decode(sd, sample(sd, prompts, generators=generators, **settings))


@torch.no_grad()
def decode(sd, latents: Tensor) -> Tensor:
    """Scaled latents [B,4,h,w] -> pictures [B,3,H,W] float32 in [0,1]."""
    dtype = next(sd.vae.parameters()).dtype
    at_once = max(1, 64 * 64 // latents[0, 0].numel())  # one at 512 px, since the decoder's memory is large
    images = [sd.vae.decode(x0.to(dtype) / sd.vae.scaling_factor) for x0 in latents.split(at_once)]
    return (torch.cat(images).float() / 2 + 0.5).clamp(0, 1)
