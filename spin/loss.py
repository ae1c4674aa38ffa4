"""The objectives of SPIN and of its baselines: pure functions of tensors.

There is no model here, no randomness and no configuration. Every loss is computed from four numbers
per pair of images: the squared errors of two players (the policy, theta, which is trained, and the
frozen opponent, theta_k) on two noised images (a real one, and one that the opponent generated
for the same prompt). `spin_bounded_loss` takes a fifth, how far the two players' predictions are
apart. train.py uses `spin_loss` and `sft_loss`, and `spin_bounded_loss` if it is asked for; the
other losses are the paper's theory, and Diffusion-DPO's name for the same formula.

Equation numbers are those of arXiv 2402.10210. The logit is

    beta / 2 x (delta_gen - delta_data)

where errors are means over an image's dimensions. The paper states neither the factor 1/2 nor the
mean, only "beta = 2000"; both are assumed here, as in Diffusion-DPO. With sums over D dimensions,
beta / D gives the same loss; without the factor 1/2, beta / 2 does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Beta = float | Tensor  # a Tensor is 0-d
Losses = tuple[Tensor, dict[str, Tensor]]  # losses [B], and detached metrics, [B] each


def per_image_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return |prediction - target|^2, averaged over an image: [B,...] twice -> [B] float32."""
    # The loss multiplies differences of errors by thousands, so half-precision rounding would swamp
    # them: cast both to float32 before subtracting.
    difference = prediction.float() - target.float()
    return difference.square().flatten(1).mean(1)


def logistic(x: Tensor) -> Tensor:
    return -F.logsigmoid(x)  # log(1 + exp(-x)): log 2 at 0


def hinge(x: Tensor) -> Tensor:
    return F.relu(1 - x)


def correlation(x: Tensor) -> Tensor:
    return 1 - x


#: The link l(x), decreasing and convex (section 4). The paper's experiments use the logistic one.
LINKS = {"logistic": logistic, "hinge": hinge, "correlation": correlation}


def spin_loss(
    err_data: Tensor,
    err_gen: Tensor,
    opp_err_data: Tensor,
    opp_err_gen: Tensor,
    beta: Beta,
    link: str = "logistic",
) -> Losses:
    """Return the losses of equation (C.6), the form that the paper trains with, and their metrics.

    l(-w [(policy - opponent on the real image) - (the same on the generated one)]), w = beta / 2.

    err_data, err_gen: [B], the policy's `per_image_error` on the noised real and generated image.
    opp_err_data, opp_err_gen: [B], the opponent's on the same two. No gradient flows into them.
    link: a key of LINKS, KeyError otherwise.

    Metrics: delta_data and delta_gen, the policy's error minus the opponent's on real and on
    generated images; margin = delta_gen - delta_data, positive where the policy tells the two
    apart; implicit_accuracy, 1 where the margin is positive, 0 where negative, 1/2 where zero.
    """
    delta_data = err_data - opp_err_data.detach()
    delta_gen = err_gen - opp_err_gen.detach()
    logit = -0.5 * beta * (delta_data - delta_gen)
    losses = LINKS[link](logit)  # (C.6)
    return losses, pair_metrics(delta_data.detach(), delta_gen.detach())


def pair_metrics(delta_data: Tensor, delta_gen: Tensor) -> dict[str, Tensor]:
    """Return the metrics of `spin_loss`, [B] each."""
    margin = delta_gen - delta_data
    return {
        "delta_data": delta_data,
        "delta_gen": delta_gen,
        "margin": margin,
        "implicit_accuracy": 0.5 * (1 + torch.sign(margin)),
    }


def spin_bounded_loss(
    err_data: Tensor,
    err_gen: Tensor,
    opp_err_data: Tensor,
    opp_err_gen: Tensor,
    gap_gen: Tensor,
    beta: Beta,
) -> Losses:
    """Return the losses of bounded self-play, which is not of the SPIN paper, and their metrics.

    beta / 4 [delta_data - delta_gen + 2 gap_gen]: 0 at theta = theta_k, where its gradient is that
    of (C.6) with the logistic link. gap_gen [B] is the mean squared distance between the two
    players' predictions on the generated image. The rest is as in `spin_loss`.

    With policy p, opponent k and noise eps on the generated image, gap_gen is |p - k|^2, and

        2 gap_gen - delta_gen = |p - (2 k - eps)|^2 - |k - eps|^2

    So the policy is pulled to the noise mirrored at the opponent's prediction, 2 k - eps, where
    (C.6) pushes it away from eps without end. It is DiffusionNFT's loss (arXiv 2509.16117) at its
    beta = 1, with real images as its positive samples and the opponent's as its negative ones.
    """
    delta_data = err_data - opp_err_data.detach()
    delta_gen = err_gen - opp_err_gen.detach()
    losses = 0.25 * beta * (delta_data - delta_gen + 2 * gap_gen)
    return losses, pair_metrics(delta_data.detach(), delta_gen.detach())


def spin_trajectory_loss(
    err_data: Tensor,
    gap_gen: Tensor,
    opp_err_data: Tensor,
    beta: Beta,
    link: str = "logistic",
) -> Losses:
    """Return the losses of equation (C.5): generated images noised along the path that made them.

    With deterministic DDIM and no guidance, the noise that the opponent predicted is exactly the
    one used in the step. So the opponent's error is zero, and the policy's is gap_gen [B], the mean
    squared distance between the two predictions. At theta = theta_k, generated images contribute no
    gradient: what remains is SFT's gradient, times -l'(0) beta / 2. The other arguments and the
    metrics are those of `spin_loss`.
    """
    opp_err_gen = torch.zeros_like(gap_gen)
    return spin_loss(err_data, gap_gen, opp_err_data, opp_err_gen, beta, link)  # (C.5)


def spin_exact_loss(
    err_data: Tensor,
    err_gen: Tensor,
    opp_err_data: Tensor,
    opp_err_gen: Tensor,
    beta: Beta,
    link: str = "logistic",
) -> Losses:
    """Return the losses of equation (4.8), which takes the mean over timesteps inside the link.

    Errors are [B,T], one for each of an image's T timesteps, weighted equally; metrics are [B],
    computed from the means over t. By Jensen's inequality (Lemma 4.1) this loss is at most the mean
    over t of `spin_loss`. Training uses `spin_loss`: it needs one timestep per pair, not all T.
    """
    return spin_loss(  # (4.8)
        err_data.mean(1),
        err_gen.mean(1),
        opp_err_data.mean(1),
        opp_err_gen.mean(1),
        beta,
        link,
    )


def dpo_loss(
    err_win: Tensor,
    err_lose: Tensor,
    ref_err_win: Tensor,
    ref_err_lose: Tensor,
    beta: Beta,
) -> Losses:
    """Return the loss of Diffusion-DPO (arXiv 2311.12908) on preference pairs, [B] each.

    It is `spin_loss` with the preferred image as the real one, the rejected image as the
    generated one, and the frozen theta_0, called the reference, as the opponent.
    """
    return spin_loss(err_win, err_lose, ref_err_win, ref_err_lose, beta)


def sft_loss(err_data: Tensor) -> Losses:
    """Return the losses of equation (3.3) with gamma_t = 1, for SFT: the errors [B] themselves."""
    return err_data, {}
