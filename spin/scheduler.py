"""The noise schedule of Stable Diffusion, the training target, and one step of each sampler.

    x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps

x0 is a clean latent, eps standard normal noise of its shape, and alpha_bar_t, `alphas_cumprod[t]`
for t = 0..T-1, the cumulative product of 1 - beta_t. The SPIN paper (arXiv 2402.10210) writes
alpha_t for it and counts t from 1, so that its alpha_0 is 1. Latents and noise are [B,...], alphas
are [B] or 0-d. alpha_bar_prev is that of the less noisy level at which a sampling step ends: the
next to be reached, but the one before in training's order, as in diffusers.

Sources: DDPM (arXiv 2006.11239), DDIM (arXiv 2010.02502), v-prediction (arXiv 2202.00512).
"""

import torch
from torch import Tensor

from spin.infra.errors import InputError

PREDICTION_TYPES = ("epsilon", "v_prediction")


class Scheduler:
    """The noise schedule and the other settings in a scheduler_config.json.

    It is read as by diffusers' DDIMScheduler.from_config, whatever sampler it was written for, and
    missing keys have DDIMScheduler's defaults; but latents are never clipped, and timesteps are
    always spaced as "leading". A `steps_offset` of 0 is kept, where StableDiffusionPipeline would
    replace it with 1.

    Raises ValueError for an unknown `beta_schedule` or `prediction_type`, for betas that make no
    schedule, and for a negative `steps_offset`.
    """

    def __init__(self, config: dict):
        self.config = dict(config)
        self.num_train_timesteps = int(config.get("num_train_timesteps", 1000))
        self.steps_offset = int(config.get("steps_offset", 0))
        if self.steps_offset < 0:
            raise ValueError(f"steps_offset {self.steps_offset}: must not be negative")
        self.prediction_type: str = config.get("prediction_type", "epsilon")
        check_prediction_type(self.prediction_type)
        alphas_cumprod = make_alphas_cumprod(
            config.get("beta_schedule", "linear"),
            config.get("beta_start", 1e-4),
            config.get("beta_end", 2e-2),
            self.num_train_timesteps,
            config.get("trained_betas"),
        )
        if config.get("rescale_betas_zero_snr", False):
            alphas_cumprod = rescale_to_zero_snr(alphas_cumprod)
        self.alphas_cumprod = alphas_cumprod  # [T] float32
        # DDIM's last step ends at the clean image, or at the training schedule's least noisy level
        if config.get("set_alpha_to_one", True):
            self.final_alpha_cumprod = torch.tensor(1.0)
        else:
            self.final_alpha_cumprod = self.alphas_cumprod[0]

    def timesteps(self, steps: int) -> Tensor:
        """Return the sampling timesteps, int64 [steps]: noisiest first, "leading" spacing.

        Raises InputError if the schedule has too few timesteps, or if an image cannot be predicted
        at the first.
        """
        timesteps = self.stride(steps) * torch.arange(steps).flip(0) + self.steps_offset
        if timesteps[0] >= self.num_train_timesteps:
            last = self.num_train_timesteps - 1
            raise InputError(
                f"{steps} sampling steps: the first would be timestep {timesteps[0]}, but this "
                f"checkpoint's schedule ends at {last}; choose fewer"
            )
        if self.prediction_type == "epsilon" and self.alphas_cumprod[timesteps[0]] == 0:
            raise InputError(
                f"{steps} sampling steps: the first is at pure noise, where a prediction of the "
                "noise implies no image; choose fewer"
            )
        return timesteps

    def stride(self, steps: int) -> int:
        """Return the number of training timesteps that one of `steps` sampling steps covers.

        Raises InputError unless 1 <= steps <= T.
        """
        if not 1 <= steps <= self.num_train_timesteps:
            raise InputError(f"{steps} sampling steps: must be 1 to {self.num_train_timesteps}")
        return self.num_train_timesteps // steps


def check_prediction_type(prediction_type: str) -> None:
    """Raise ValueError unless `prediction_type` is one of PREDICTION_TYPES."""
    if prediction_type not in PREDICTION_TYPES:
        allowed = " or ".join(PREDICTION_TYPES)
        raise ValueError(f"prediction_type {prediction_type!r}: must be {allowed}")


def make_alphas_cumprod(
    schedule: str,
    beta_start: float,
    beta_end: float,
    num_train_timesteps: int,
    trained_betas: list[float] | None = None,
) -> Tensor:
    """Return alpha_bar_t, [T] float32.

    schedule: "linear" spaces beta evenly, "scaled_linear" sqrt(beta), as Stable Diffusion does.
    trained_betas: all betas, in place of a schedule.

    Raises ValueError for another schedule, and unless there are T betas, all from 0 to below 1.
    """
    if trained_betas is not None:
        betas = torch.tensor(trained_betas, dtype=torch.float32)
    elif schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float32)
    elif schedule == "scaled_linear":
        roots = torch.linspace(
            beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float32
        )
        betas = roots**2
    else:
        raise ValueError(f"beta_schedule {schedule!r}: must be linear or scaled_linear")

    if num_train_timesteps < 1 or betas.shape != (num_train_timesteps,):
        raise ValueError(f"{list(betas.shape)} betas for {num_train_timesteps} timesteps")
    possible = (0 <= betas) & (betas < 1)
    if not possible.all():
        raise ValueError("some betas are not between 0 and 1")
    return torch.cumprod(1.0 - betas, dim=0)


def rescale_to_zero_snr(alphas_cumprod: Tensor) -> Tensor:
    """Return alpha_bar_t, [T], rescaled so that the last is 0: at t = T-1, x_t is pure noise.

    sqrt(alpha_bar) is shifted until it ends at 0, then stretched until it begins where it did:
    arXiv 2305.08891, algorithm 1.
    """
    roots = alphas_cumprod.sqrt()
    first = roots[0]
    last = roots[-1]
    return ((roots - last) * (first / (first - last))) ** 2


def per_image(coefficient: Tensor, like: Tensor) -> Tensor:
    """Reshape [B] to [B,1,...], to multiply `like` [B,...] image by image.

    A 0-d coefficient, one for all images, is returned as it is. It may stay on the CPU: a GPU's
    kernel takes its value as an argument, without a copy to wait for.
    """
    if coefficient.ndim == 0:
        return coefficient
    ones = [1] * (like.ndim - 1)
    return coefficient.reshape(-1, *ones)


def signal_and_sigma(alpha_bar: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(alpha_bar) and sqrt(1 - alpha_bar), to multiply `like` image by image."""
    level = per_image(alpha_bar, like)
    return level.sqrt(), (1 - level).sqrt()


# ---- Training ------------------------------------------------------------------------------------


def add_noise(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return x_t [B,...], the clean latents `x0` noised to the level alpha_bar."""
    signal, sigma = signal_and_sigma(alpha_bar, x0)
    return signal * x0 + sigma * eps


def velocity(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return v_t = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x0."""
    signal, sigma = signal_and_sigma(alpha_bar, x0)
    return signal * eps - sigma * x0


def training_target(x0: Tensor, eps: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """Return what the network is trained to predict at x_t: eps, or v for "v_prediction"."""
    check_prediction_type(prediction_type)
    if prediction_type == "v_prediction":
        return velocity(x0, eps, alpha_bar)
    return eps


# ---- Sampling ------------------------------------------------------------------------------------


def x0_and_eps(
    prediction: Tensor, x_t: Tensor, alpha_bar: Tensor, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """Return the clean latent and the noise that a prediction [B,...] at x_t [B,...] implies."""
    check_prediction_type(prediction_type)
    signal, sigma = signal_and_sigma(alpha_bar, x_t)
    if prediction_type == "v_prediction":  # (x_t, v) is (x0, eps) rotated: this rotates it back
        x0 = signal * x_t - sigma * prediction
        eps = signal * prediction + sigma * x_t
        return x0, eps
    x0 = (x_t - sigma * prediction) / signal
    return x0, prediction


def posterior_std(alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """Return the standard deviation of q(x_{t-1} | x_t, x0): DDPM's, "fixed_small" in diffusers."""
    return ((1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt() * (1 - alpha_bar / alpha_bar_prev).sqrt()


def error_weight(alpha_bar: Tensor, alpha_bar_prev: Tensor, eta: float) -> Tensor:
    """Return h_t of appendix C.3, the weight of a prediction's error in a step.

    x_{t-1} - mu_theta(x_t) = h_t (eps - eps_theta) + s_t times the step's noise. The paper prints
    sqrt(1 - alpha_{t-1}) as the last factor; the algebra gives sqrt(1 - alpha_t). The losses do not
    multiply by h_t: beta absorbs it.
    """
    s = eta * posterior_std(alpha_bar, alpha_bar_prev)
    eps_weight = (1 - alpha_bar_prev - s**2).clamp(min=0).sqrt()
    return eps_weight - (alpha_bar_prev / alpha_bar).sqrt() * (1 - alpha_bar).sqrt()


def ddim_step(
    x0: Tensor,
    eps: Tensor,
    alpha_bar: Tensor,
    alpha_bar_prev: Tensor,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """Return x_{t-1} ~ N(mu_theta, s_t^2), equation (3.2).

    x0, eps: [B,...], what the network implies at x_t, see `x0_and_eps`.
    eta: s_t as a multiple of DDPM's; with 0, no `noise` is needed.
    """
    s = eta * posterior_std(alpha_bar, alpha_bar_prev)
    eps_weight = (1 - alpha_bar_prev - s**2).clamp(min=0).sqrt()
    mean = per_image(alpha_bar_prev.sqrt(), x0) * x0 + per_image(eps_weight, x0) * eps
    if eta == 0:
        return mean
    return mean + per_image(s, x0) * noise


def ddpm_step(
    x_t: Tensor, x0: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor, noise: Tensor
) -> Tensor:
    """Return x_{t-1} ~ q(x_{t-1} | x_t, x0), DDPM's equations (6) and (7).

    They hold between any two levels of the schedule, not only between neighbors.
    """
    alpha = alpha_bar / alpha_bar_prev
    weight_of_x0 = alpha_bar_prev.sqrt() * (1 - alpha) / (1 - alpha_bar)
    weight_of_x_t = alpha.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
    mean = per_image(weight_of_x0, x0) * x0 + per_image(weight_of_x_t, x0) * x_t
    s = posterior_std(alpha_bar, alpha_bar_prev)
    return mean + per_image(s, x0) * noise


def dpmpp_step(
    x_t: Tensor,
    x0: Tensor,
    alpha_bar: Tensor,
    alpha_bar_prev: Tensor,
    earlier: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Return x_{t-1} by DPM-Solver++(2M), arXiv 2211.01095, algorithm 2.

    This is a DDIM step without noise whose x0 is linearly extrapolated in
    lambda = log(signal / noise), to the middle of the step, from the last two predictions.

    earlier: x0 and alpha_bar of the step before. Without one (the first step), and to
    alpha_bar_prev = 1 (the last), the step is DDIM's. Alphas are 0-d.
    """
    if earlier is not None and alpha_bar_prev < 1:
        x0_earlier, alpha_bar_earlier = earlier
        lambda_now = 0.5 * torch.logit(alpha_bar)
        lambda_next = 0.5 * torch.logit(alpha_bar_prev)
        lambda_earlier = 0.5 * torch.logit(alpha_bar_earlier)
        ratio = 0.5 * (lambda_next - lambda_now) / (lambda_now - lambda_earlier)
        x0 = x0 + ratio * (x0 - x0_earlier)
    eps = (x_t - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
    return ddim_step(x0, eps, alpha_bar, alpha_bar_prev)
