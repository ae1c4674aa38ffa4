"""One training step's loss, from latents to a scalar: what torch.compile sees as one function."""

import torch
from torch import Tensor, nn

from spin.loss import per_image_error, sft_loss, spin_loss
from spin.scheduler import add_noise, target


def spin_step(
    policy: nn.Module,
    opponent: nn.Module,
    x0_data: Tensor,
    x0_gen: Tensor,
    eps: Tensor,
    t: Tensor,
    context: Tensor,
    alphas_cumprod: Tensor,
    beta: Tensor,
    prediction_type: str = "epsilon",
    link: str = "logistic",
    autocast: torch.dtype = torch.float32,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean SPIN loss (C.6) of a micro-batch of B pairs; a pair shares its timestep, its noise and its prompt.

    policy, opponent: UNets; gradients flow into the policy alone.
    x0_data, x0_gen: [B,4,h,w] scaled latents of a real image and of the opponent's image for the same prompt.
    eps: [B,4,h,w] standard normal. t: [B] int64 in 0..T-1. context: [B,77,D]. alphas_cumprod: [T].
    beta: 0-d tensor (a Python float that changes would recompile). autocast: dtype both networks compute in.
    prediction_type: with "v_prediction" the errors compared are those of v.
    Diffusion-DPO is the same step: theta_0 is the opponent and x0_gen the rejected image (`spin.loss.dpo_loss`).

    Returns the loss, 0-d, and `spin_loss`'s metrics, [B] each. No value is read back from the device.
    """
    x0 = torch.cat([x0_data, x0_gen])  # [2B,4,h,w]
    eps, t, context = torch.cat([eps, eps]), torch.cat([t, t]), torch.cat([context, context])
    alpha_bar = alphas_cumprod[t]
    x_t = add_noise(x0, eps, alpha_bar)
    wanted = target(x0, eps, alpha_bar, prediction_type)

    # both players under the same autocast: at theta = theta_k their answers agree to the last bit
    with torch.autocast(x0.device.type, dtype=autocast, enabled=autocast != torch.float32):
        answer = policy(x_t, t, context)
        with torch.no_grad():
            opponent_answer = opponent(x_t, t, context)

    err_data, err_gen = per_image_error(answer, wanted).chunk(2)
    opp_err_data, opp_err_gen = per_image_error(opponent_answer, wanted).chunk(2)
    losses, metrics = spin_loss(err_data, err_gen, opp_err_data, opp_err_gen, beta, link)
    return losses.mean(), metrics


def sft_step(
    policy: nn.Module,
    x0_data: Tensor,
    eps: Tensor,
    t: Tensor,
    context: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: str = "epsilon",
    autocast: torch.dtype = torch.float32,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean SFT loss (3.3) of a micro-batch, and no metrics; arguments as in `spin_step`."""
    alpha_bar = alphas_cumprod[t]
    x_t = add_noise(x0_data, eps, alpha_bar)
    with torch.autocast(x_t.device.type, dtype=autocast, enabled=autocast != torch.float32):
        answer = policy(x_t, t, context)
    losses, metrics = sft_loss(per_image_error(answer, target(x0_data, eps, alpha_bar, prediction_type)))
    return losses.mean(), metrics
