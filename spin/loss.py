"""The objectives, SPIN's and its baselines': pure functions of tensors. No model, no randomness, no configuration.

Everything is said with four numbers a pair of images: the squared error of two players (the policy being trained,
theta, and the frozen opponent, theta_k) on two noised images (a real one, and one the opponent generated for the same
prompt). Equation numbers are those of arXiv 2402.10210. logit = beta / 2 x (delta_gen - delta_data), errors being means
over an image's dimensions: the paper prints neither the half nor the mean, only "beta = 2000"; both are assumed here,
Diffusion-DPO's convention. With sums over D dimensions, beta / D gives the same loss; without the half, beta / 2."""

import torch
import torch.nn.functional as F
from torch import Tensor

#: l(t), decreasing and convex (section 4). The paper's experiments use logistic, log(1 + exp(-t)): l(0) = log 2.
LINKS = {"logistic": lambda t: -F.logsigmoid(t), "hinge": lambda t: F.relu(1 - t), "correlation": lambda t: 1 - t}
Beta = float | Tensor  # 0-d
Losses = tuple[Tensor, dict[str, Tensor]]  # [B], and detached metrics, [B] each


def per_image_error(prediction: Tensor, target: Tensor) -> Tensor:
    """|prediction - target|^2, the mean over all dimensions of an image: [B,...] twice -> [B] float32."""
    # cast first: the loss multiplies differences of errors by thousands, and half precision would drown them
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def spin_loss(
    err_data: Tensor, err_gen: Tensor, opp_err_data: Tensor, opp_err_gen: Tensor, beta: Beta, link: str = "logistic"
) -> Losses:
    """Equation (C.6), the form the paper trains with: l(-w [(policy - opponent on real) - (the same on generated)]).
    err_data, err_gen: [B] errors of the policy on the noised real and generated image, `per_image_error`; opp_err_data,
    opp_err_gen: of the opponent on the same two, without gradient. w = beta / 2. link: KeyError if not in LINKS.
    Metrics: delta_data and delta_gen, policy error minus opponent error on real and generated; margin = delta_gen -
    delta_data, positive when the policy tells the two apart; implicit_accuracy, 1 where the margin is positive, 0 where
    negative, a half where it is zero."""
    delta_data = err_data - opp_err_data.detach()
    delta_gen = err_gen - opp_err_gen.detach()
    logit = -0.5 * beta * (delta_data - delta_gen)
    losses = LINKS[link](logit)  # (C.6)
    metrics = {"delta_data": delta_data.detach(), "delta_gen": delta_gen.detach()}
    metrics["margin"] = metrics["delta_gen"] - metrics["delta_data"]
    return losses, metrics | {"implicit_accuracy": 0.5 * (1 + torch.sign(metrics["margin"]))}


def spin_trajectory_loss(
    err_data: Tensor, gap_gen: Tensor, opp_err_data: Tensor, beta: Beta, link: str = "logistic"
) -> Losses:
    """Equation (C.5): for x'_t on the path by which the opponent drew its image, not an image noised anew.
    Where DDIM takes no noise and no guidance, the noise that the opponent predicted is the one that made the step, so
    that its own error is zero and the policy's, gap_gen [B], the distance of the two predictions. At theta = theta_k
    nothing is pushed: the gradient is SFT's, times -l'(0) beta / 2. Returns what `spin_loss` does."""
    return spin_loss(err_data, gap_gen, opp_err_data, torch.zeros_like(gap_gen), beta, link)  # (C.5)


def spin_exact_loss(
    err_data: Tensor, err_gen: Tensor, opp_err_data: Tensor, opp_err_gen: Tensor, beta: Beta, link: str = "logistic"
) -> Losses:
    """Equation (4.8): the mean over timesteps inside the link; in eps-space, every step of an image weighing the same.
    By Jensen's inequality (Lemma 4.1) at most the mean over t of `spin_loss`, which is what is trained, since it needs
    one timestep a pair where this needs all. Errors [B,T]; otherwise as `spin_loss`, with metrics [B] of the means."""
    data, gen, opp_data, opp_gen = (e.mean(1) for e in (err_data, err_gen, opp_err_data, opp_err_gen))
    return spin_loss(data, gen, opp_data, opp_gen, beta, link)  # (4.8)


def dpo_loss(err_win: Tensor, err_lose: Tensor, ref_err_win: Tensor, ref_err_lose: Tensor, beta: Beta) -> Losses:
    """Diffusion-DPO (arXiv 2311.12908): -log sigmoid of the same logit as SPIN's, on a preference pair. [B] each.
    The preferred image stands for the real one, the rejected for the opponent's, frozen theta_0 for the opponent."""
    return spin_loss(err_win, err_lose, ref_err_win, ref_err_lose, beta)


def sft_loss(err_data: Tensor) -> Losses:
    """Supervised fine-tuning, equation (3.3) with gamma_t = 1: the error on the real image itself. [B] -> [B], {}."""
    return err_data, {}
