"""The noise schedule of Stable Diffusion and one step of each sampler.

x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps: x0 is a clean latent, eps standard normal noise of its shape,
alpha_bar_t the cumulative product of 1 - beta_t, `alphas_cumprod[t]` for t = 0..T-1. The SPIN paper (arXiv 2402.10210)
writes alpha_t for it and counts t from 1, so that its alpha_0 is 1. Latents and noise are [B,...], alphas [B] or 0-d.
Sources: DDPM (arXiv 2006.11239), DDIM (arXiv 2010.02502), v-prediction (arXiv 2202.00512)."""

import torch
from torch import Tensor


class Scheduler:
    """What a scheduler_config.json fixes; ValueError for a `beta_schedule` or `prediction_type` that is not known.
    A missing key means what it means to diffusers' DDIMScheduler, but that latents are never clipped. The offset is
    the config's, where StableDiffusionPipeline would replace one of 0, with a warning, by 1."""

    def __init__(self, config: dict):
        self.config = dict(config)
        self.num_train_timesteps = int(config.get("num_train_timesteps", 1000))
        self.prediction_type: str = config.get("prediction_type", "epsilon")
        self.steps_offset = int(config.get("steps_offset", 0))
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type {self.prediction_type!r}: only epsilon and v_prediction are known")
        betas = config.get("beta_schedule", "linear"), config.get("beta_start", 1e-4), config.get("beta_end", 2e-2)
        self.alphas_cumprod = alphas_cumprod(*betas, self.num_train_timesteps)  # [T] float32
        # DDIM's last step lands here: the clean image, or the training schedule's least noisy level
        self.final_alpha_cumprod = torch.tensor(1.0) if config.get("set_alpha_to_one", True) else self.alphas_cumprod[0]

    def timesteps(self, steps: int) -> Tensor:
        """int64 [steps], noisiest first, evenly spaced from the clean end: "leading". ValueError if too many."""
        found = self.stride(steps) * torch.arange(steps).flip(0) + self.steps_offset
        if found[0] >= self.num_train_timesteps:
            most = self.num_train_timesteps - self.steps_offset
            raise ValueError(f"{steps} sampling steps: this checkpoint's schedule has room for {most}")
        return found

    def stride(self, steps: int) -> int:
        """How many training timesteps one of `steps` sampling steps covers. ValueError unless 1 <= steps <= T."""
        if not 1 <= steps <= self.num_train_timesteps:
            raise ValueError(f"{steps} sampling steps: must be 1 to {self.num_train_timesteps}")
        return self.num_train_timesteps // steps

    def alphas_of_step(self, t: int, steps: int, sampler: str) -> tuple[Tensor, Tensor]:
        """alpha_bar at t and a sampling step on, 0-d; past the schedule's end ddim's final_alpha_cumprod, or else 1."""
        previous = t - self.stride(steps)
        past_the_end = self.final_alpha_cumprod if sampler == "ddim" else torch.tensor(1.0)
        return self.alphas_cumprod[t], self.alphas_cumprod[previous] if previous >= 0 else past_the_end


def alphas_cumprod(schedule: str, beta_start: float, beta_end: float, num_train_timesteps: int) -> Tensor:
    """alpha_bar_t [T] float32. "scaled_linear" spaces sqrt(beta) evenly: Stable Diffusion's. ValueError if unknown."""
    if schedule not in ("linear", "scaled_linear"):
        raise ValueError(f"beta_schedule {schedule!r}: only linear and scaled_linear are known")
    power = 2 if schedule == "scaled_linear" else 1
    roots = torch.linspace(beta_start ** (1 / power), beta_end ** (1 / power), num_train_timesteps, dtype=torch.float32)
    return torch.cumprod(1.0 - roots**power, dim=0)


def per_image(coefficient: Tensor, like: Tensor) -> Tensor:
    """[B] or 0-d -> [B,1,...] or [1,1,...], to multiply `like` [B,...] image by image."""
    return coefficient.reshape(-1, *[1] * (like.ndim - 1))


def add_noise(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    alpha_bar = per_image(alpha_bar, x0)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps


def velocity(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """v_t = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x0, what a v-prediction network is trained on."""
    alpha_bar = per_image(alpha_bar, x0)
    return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0


def target(x0: Tensor, eps: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """What the network should answer at x_t: eps, or v for prediction_type "v_prediction"."""
    return velocity(x0, eps, alpha_bar) if prediction_type == "v_prediction" else eps


def x0_and_eps(output: Tensor, x_t: Tensor, alpha_bar: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """The clean latent and the noise that the network's answer [B,...] at x_t [B,...] implies."""
    if prediction_type == "v_prediction":  # (x_t, v) is (x0, eps) turned by an angle: the same formulas turn it back
        return velocity(output, x_t, alpha_bar), add_noise(output, x_t, alpha_bar)
    alpha_bar = per_image(alpha_bar, x_t)
    return (x_t - (1 - alpha_bar).sqrt() * output) / alpha_bar.sqrt(), output


def posterior_std(alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """s_t of DDPM, standard deviation of q(x_{t-1} | x_t, x0): "fixed_small" in diffusers."""
    return ((1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt() * (1 - alpha_bar / alpha_bar_prev).sqrt()


def error_weight(alpha_bar: Tensor, alpha_bar_prev: Tensor, eta: float) -> Tensor:
    """h_t of appendix C.3: x_{t-1} - mu_theta(x_t) = h_t (eps - eps_theta) + s_t times the step's noise.
    The paper prints sqrt(1 - alpha_{t-1}) as the last factor; the algebra gives sqrt(1 - alpha_t). Part of what beta
    stands for: it is nowhere multiplied."""
    s = eta * posterior_std(alpha_bar, alpha_bar_prev)
    of_eps = (1 - alpha_bar_prev - s**2).clamp(min=0).sqrt()
    return of_eps - (alpha_bar_prev / alpha_bar).sqrt() * (1 - alpha_bar).sqrt()


def ddim_step(x0: Tensor, eps: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor, eta: float, noise: Tensor) -> Tensor:
    """x_{t-1} ~ N(mu_theta, s_t^2), equation (3.2), s_t = eta times DDPM's, from what the network implies at x_t."""
    s = eta * posterior_std(alpha_bar, alpha_bar_prev)
    direction = (1 - alpha_bar_prev - s**2).clamp(min=0).sqrt()
    mean = per_image(alpha_bar_prev.sqrt(), x0) * x0 + per_image(direction, x0) * eps
    return mean + per_image(s, x0) * noise if eta else mean


def dpmpp_step(
    x_t: Tensor, x0: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor, before: tuple[Tensor, Tensor] | None
) -> Tensor:
    """DPM-Solver++(2M), arXiv 2211.01095, algorithm 2: DDIM without noise, to an x0 that is extrapolated.
    Along lambda = log(signal / noise), half-way to the next level, by what x0 did since the level before, whose x0 and
    alpha_bar are `before`. The first step, without one, and a step to alpha_bar 1 are DDIM's. alphas: 0-d."""
    if before is not None and alpha_bar_prev < 1:
        x0_before, alpha_bar_before = before
        now, then, last = (0.5 * torch.logit(a) for a in (alpha_bar, alpha_bar_prev, alpha_bar_before))
        x0 = x0 + 0.5 * (then - now) / (now - last) * (x0 - x0_before)
    eps = (x_t - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
    return ddim_step(x0, eps, alpha_bar, alpha_bar_prev, 0.0, x_t)


def ddpm_step(x_t: Tensor, x0: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor, noise: Tensor) -> Tensor:
    """x_{t-1} ~ q(x_{t-1} | x_t, x0), DDPM's equations (6) and (7), between any two levels of the schedule."""
    alpha = alpha_bar / alpha_bar_prev
    of_x0 = alpha_bar_prev.sqrt() * (1 - alpha) / (1 - alpha_bar)
    of_x_t = alpha.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
    s = posterior_std(alpha_bar, alpha_bar_prev)
    return per_image(of_x0, x0) * x0 + per_image(of_x_t, x0) * x_t + per_image(s, x0) * noise
