"""Guided sampling: prompts in, latents out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spin.checkpoint.pipeline import default_size, sizes_of_whole_images
from spin.infra.devices import copy_to_device
from spin.infra.errors import InputError
from spin.scheduler import ddim_step, ddpm_step, dpmpp_step, x0_and_eps
from spin.step import mixed_precision
from spin.vae import clamp_finite


@dataclass(frozen=True)
class SamplingOptions:
    """Options for sampling images: keyword arguments of `sample`, which documents them."""

    steps: int = 50
    guidance: float = 7.5
    sampler: str = "ddim"
    eta: float = 0.0
    height: int | None = None
    width: int | None = None
    dtype: torch.dtype = torch.float32


@torch.no_grad()
def sample(
    pipe,
    prompts: Sequence[str],
    steps: int = 50,
    guidance: float = 7.5,
    eta: float = 0.0,
    generators: Sequence[torch.Generator] | None = None,
    *,
    negative_prompts: str | Sequence[str | None] | None = None,
    sampler: str = "ddim",
    height: int | None = None,
    width: int | None = None,
    sizes: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return a scaled latent x0 for each prompt, [B,4,h,w] float32. `decode_latents` makes images.

    pipe: a `spin.checkpoint.Pipeline`.
    steps: sampling steps. Each of today's samplers evaluates the UNet once a step, on twice the
        batch with guidance.
    guidance: w in eps_empty + w (eps_prompt - eps_empty), arXiv 2207.12598. 1: no guidance, at
        half the cost. 0: eps_empty alone (diffusers turns guidance off below 1).
    eta: DDIM's noise as a multiple of DDPM's, 0 to 1. The other samplers ignore it.
    generators: CPU generators, one per prompt, that draw all of its noise, so that no image depends
        on the rest of its batch. None: seeds 0, 1, 2, ...
    negative_prompts: what guidance steers away from, one for all prompts or one for each. None is
        no prompt, see `spin.checkpoint.Pipeline.encode_prompts`.
    sampler: a key of SAMPLERS.
    height, width: pixels, multiples of the VAE's factor. None: the size the UNet was trained at.
    sizes: [B,6], what SDXL is told of each image: see `spin.unet.PooledAndSizesEmbedding`. None:
        that it is whole. Other models read none.
    dtype: compute dtype of the UNet and the text encoder, by autocast.

    Raises InputError if an argument is out of range, or if a latent is not finite.
    """
    if generators is None:
        generators = [torch.Generator("cpu").manual_seed(i) for i in range(len(prompts))]
    if negative_prompts is None or isinstance(negative_prompts, str):
        negative_prompts = [negative_prompts] * len(prompts)
    default_height, default_width = default_size(pipe)
    height = height or default_height
    width = width or default_width
    check_arguments(pipe, prompts, generators, negative_prompts, sampler, height, width)

    factor = pipe.vae.downscale
    shape = (pipe.unet.conv_in.in_channels, height // factor, width // factor)
    if sizes is None:
        sizes = sizes_of_whole_images(height, width, len(prompts))
    model = GuidedUNet(pipe, prompts, negative_prompts, sizes, guidance, dtype)
    x_t = draw_noise(generators, shape, model.device)
    earlier = None
    for t in pipe.scheduler.timesteps(steps).tolist():
        alpha_bar, alpha_bar_prev = model.noise_levels(t, steps, SAMPLERS[sampler].ends_clean)
        x0, eps = model.predict(x_t, t)
        state = SamplerState(
            x_t=x_t,
            x0=x0,
            eps=eps,
            alpha_bar=alpha_bar,
            alpha_bar_prev=alpha_bar_prev,
            earlier=earlier,
            eta=eta,
            generators=generators,
            model=model,
            t_prev=t - pipe.scheduler.stride(steps),
        )
        x_t = SAMPLERS[sampler].update(state)
        earlier = (x0, alpha_bar)

    for prompt, latent in zip(prompts, x_t):
        check_finite(latent, f"the latent sampled for {prompt!r}")
    return x_t


class GuidedUNet:
    """The UNet with prompts and guidance: the one place where sampling evaluates the network."""

    def __init__(self, pipe, prompts, negative_prompts, sizes, guidance: float, dtype: torch.dtype):
        self.unet = pipe.unet
        self.scheduler = pipe.scheduler
        self.guidance = guidance
        self.dtype = dtype
        self.device = pipe.unet.conv_in.weight.device
        self.weight_dtype = pipe.unet.conv_in.weight.dtype
        all_prompts = list(prompts)
        all_sizes = [tuple(numbers) for numbers in sizes.tolist()]
        if guidance != 1:
            all_prompts = [*negative_prompts, *prompts]
            all_sizes = all_sizes * 2
        inputs = list(zip(all_prompts, all_sizes))
        unique_inputs = list(dict.fromkeys(inputs))  # most of the negative ones are the same
        positions = [unique_inputs.index(each) for each in inputs]
        unique_prompts, unique_sizes = zip(*unique_inputs)
        with mixed_precision(self.device, dtype):
            unique_contexts = pipe.encode_prompts(unique_prompts, torch.tensor(unique_sizes))
        positions_on_device = copy_to_device(torch.tensor(positions), self.device)
        self.context = unique_contexts[positions_on_device]
        if dtype == torch.float32:  # without autocast, which casts inputs layer by layer
            self.context = self.context.to(self.weight_dtype)

    def predict(self, x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Predict the clean latent x0 and the noise eps at x_t, [B,4,h,w] each.

        x_t: [B,4,h,w] float32. t: the training timestep of all of them.
        """
        timestep = torch.full((), t, device=self.device)  # torch.tensor would wait for a GPU
        inputs = x_t
        if self.guidance != 1:
            inputs = torch.cat([x_t, x_t])  # for the negative prompts, then for the prompts
        with mixed_precision(self.device, self.dtype):
            prediction = self.unet(inputs.to(self.weight_dtype), timestep, self.context).float()
        if self.guidance != 1:
            negative, positive = prediction.chunk(2)
            prediction = negative + self.guidance * (positive - negative)
        alpha_bar = self.scheduler.alphas_cumprod[t]
        return x0_and_eps(prediction, x_t, alpha_bar, self.scheduler.prediction_type)

    def noise_levels(self, t: int, steps: int, ends_clean: bool) -> tuple[Tensor, Tensor]:
        """Return alpha_bar at t, and after the next of `steps` sampling steps, 0-d each.

        Both are on the CPU, see `spin.scheduler.per_image`.

        ends_clean: whether the last step goes to alpha_bar = 1, the clean image, or to the
            scheduler's `final_alpha_cumprod`.
        """
        t_prev = t - self.scheduler.stride(steps)
        if t_prev >= 0:
            alpha_bar_prev = self.scheduler.alphas_cumprod[t_prev]
        elif ends_clean:
            alpha_bar_prev = torch.tensor(1.0)
        else:
            alpha_bar_prev = self.scheduler.final_alpha_cumprod
        return self.scheduler.alphas_cumprod[t], alpha_bar_prev


def draw_noise(
    generators: Sequence[torch.Generator], shape: tuple[int, int, int], device: torch.device
) -> Tensor:
    """Return standard normal noise [B,*shape], each image's from its own CPU generator."""
    noise = [torch.randn((1, *shape), generator=generator) for generator in generators]
    return copy_to_device(torch.cat(noise), device)


# ---- The samplers --------------------------------------------------------------------------------


@dataclass
class SamplerState:
    """What a sampler's step may use."""

    x_t: Tensor  # [B,4,h,w]
    x0: Tensor  # [B,4,h,w], predicted at x_t
    eps: Tensor  # [B,4,h,w], predicted at x_t
    alpha_bar: Tensor  # 0-d, at x_t, on the CPU
    alpha_bar_prev: Tensor  # 0-d, where the step ends, on the CPU
    earlier: tuple[Tensor, Tensor] | None  # x0 and alpha_bar of the step before
    eta: float
    generators: Sequence[torch.Generator]

    # for samplers that evaluate the network more than once a step
    model: GuidedUNet
    t_prev: int  # where the step ends; below 0 after the last step

    def draw_noise(self) -> Tensor:
        return draw_noise(self.generators, tuple(self.x_t.shape[1:]), self.x_t.device)


def ddim(state: SamplerState) -> Tensor:
    noise = state.draw_noise() if state.eta > 0 else None
    return ddim_step(
        state.x0, state.eps, state.alpha_bar, state.alpha_bar_prev, state.eta, noise
    )


def ddpm(state: SamplerState) -> Tensor:
    noise = state.draw_noise()
    return ddpm_step(state.x_t, state.x0, state.alpha_bar, state.alpha_bar_prev, noise)


def dpmpp(state: SamplerState) -> Tensor:
    return dpmpp_step(state.x_t, state.x0, state.alpha_bar, state.alpha_bar_prev, state.earlier)


@dataclass(frozen=True)
class Sampler:
    """A row of SAMPLERS."""

    update: Callable[[SamplerState], Tensor]  # returns x_{t-1}
    steps: int  # the usual number of steps
    ends_clean: bool  # see `GuidedUNet.noise_levels`


SAMPLERS = {
    "ddim": Sampler(ddim, steps=50, ends_clean=False),
    "ddpm": Sampler(ddpm, steps=50, ends_clean=True),
    "dpm++": Sampler(dpmpp, steps=20, ends_clean=True),
}


# ---- Images --------------------------------------------------------------------------------------


@torch.no_grad()
def decode_latents(pipe, latents: Tensor) -> Tensor:
    """Decode scaled latents [B,4,h,w] to images [B,3,H,W], float32 in [0,1].

    Pixels that are not finite become NaN. Finite ones are clamped, however far out of range they
    are: a damaged checkpoint whose output is finite is not noticed.
    """
    # one latent at a time at 512 px, since the decoder needs much memory
    batch_size = max(1, 64 * 64 // latents[0, 0].numel())
    images = []
    for batch in latents.split(batch_size):
        images.append(pipe.vae.decode(batch / pipe.vae.scaling_factor))
    return clamp_finite(torch.cat(images).float() / 2 + 0.5, 0, 1)


def sample_images(
    pipe,
    prompts: Sequence[str],
    seeds: Sequence[int],
    options: SamplingOptions,
    batch_size: int = 1,
    negative_prompt: str | None = None,
) -> Iterator[Tensor]:
    """Yield an image [3,H,W] in [0,1] for each prompt and the seed of its noise, in order.

    batch_size: images sampled at once.

    Raises InputError in place of an image that is not finite.
    """
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[batch]]
        latents = sample(
            pipe,
            prompts[batch],
            generators=generators,
            negative_prompts=negative_prompt,
            **vars(options),
        )
        images = decode_latents(pipe, latents)
        for prompt, seed, image in zip(prompts[batch], seeds[batch], images):
            check_finite(image, f"the image for {prompt!r}, seed {seed},")
            yield image


def check_finite(values: Tensor, name: str) -> None:
    """Raise InputError unless all values are finite. name: what they are, for the message."""
    if not values.isfinite().all():
        raise InputError(
            f"{name} is not finite: float16 overflows, so use bfloat16 or float32; else the "
            "guidance is too large, or the checkpoint is damaged"
        )


def check_arguments(
    pipe,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    negative_prompts: Sequence[str],
    sampler: str,
    height: int,
    width: int,
) -> None:
    """Raise InputError if `sample` cannot do what these arguments ask."""
    if isinstance(prompts, str) or len(prompts) == 0:
        raise InputError("prompts must be a list of at least one prompt")
    if not len(prompts) == len(generators) == len(negative_prompts):
        raise InputError(
            f"{len(prompts)} prompts, {len(generators)} generators, "
            f"{len(negative_prompts)} negative prompts: the numbers must be equal"
        )
    factor = pipe.vae.downscale
    if height % factor or width % factor or height < factor or width < factor:
        raise InputError(
            f"{height} x {width} pixels: height and width must be multiples of {factor}"
        )
    if sampler not in SAMPLERS:
        raise InputError(f"sampler {sampler!r}: must be one of {', '.join(SAMPLERS)}")
