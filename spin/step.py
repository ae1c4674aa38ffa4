"""One training step's loss, from latents to a scalar: what torch.compile sees as one function.

Each loss has its step, with arguments of the same meaning. policy, opponent: UNets; gradients flow into the policy
alone. x0_data, x0_gen: [B,4,h,w] scaled latents of a real image and of the opponent's image for the same prompt.
eps: [B,4,h,w] standard normal. t: [B] int64 in 0..T-1. context: [B,77,D]. alphas_cumprod: [T]. beta: 0-d tensor (a
Python float that changes would recompile). prediction_type: with "v_prediction" the errors compared are those of v.
autocast: dtype that the networks compute in; errors and losses are float32.
Each returns the loss of the micro-batch, 0-d, and its metrics, [B] each. No value is read back from the device."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spin.loss import per_image_error, sft_loss, spin_loss, spin_trajectory_loss
from spin.scheduler import add_noise, target


def spin_step(
    policy: nn.Module, opponent: nn.Module, x0_data: Tensor, x0_gen: Tensor, eps: Tensor, t: Tensor, context: Tensor,
    alphas_cumprod: Tensor, beta: Tensor, prediction_type: str = "epsilon", link: str = "logistic",
    autocast: torch.dtype = torch.float32, eps_gen: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Equation (C.6), the mean over B pairs; a pair shares its timestep, its prompt and, without `eps_gen`, its noise.
    Diffusion-DPO is the same step: theta_0 is the opponent and x0_gen the rejected image (`spin.loss.dpo_loss`)."""
    x0 = torch.cat([x0_data, x0_gen])  # [2B,4,h,w]
    eps = torch.cat([eps, eps if eps_gen is None else eps_gen])
    t, context = torch.cat([t, t]), torch.cat([context, context])
    alpha_bar = alphas_cumprod[t]
    x_t = add_noise(x0, eps, alpha_bar)
    wanted = target(x0, eps, alpha_bar, prediction_type)
    answer, opponent_answer = answers(policy, opponent, x_t, t, context, autocast)
    err_data, err_gen = per_image_error(answer, wanted).chunk(2)
    opp_err_data, opp_err_gen = per_image_error(opponent_answer, wanted).chunk(2)
    losses, metrics = spin_loss(err_data, err_gen, opp_err_data, opp_err_gen, beta, link)
    return losses.mean(), metrics


def spin_trajectory_step(
    policy: nn.Module, opponent: nn.Module, x0_data: Tensor, x_t_gen: Tensor, eps: Tensor, t: Tensor, context: Tensor,
    alphas_cumprod: Tensor, beta: Tensor, prediction_type: str = "epsilon", link: str = "logistic",
    autocast: torch.dtype = torch.float32,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Equation (C.5), the mean over B pairs; x_t_gen: [B,4,h,w], where the opponent's image was at t while drawn.
    Guidance bends that path: its steps are made by another noise than the one predicted for the prompt alone. What
    counts is the latter, also the opponent's answer on real images: so at theta = theta_k nothing is pushed."""
    alpha_bar = alphas_cumprod[t]
    x_t = torch.cat([add_noise(x0_data, eps, alpha_bar), x_t_gen])  # [2B,4,h,w]
    wanted = target(x0_data, eps, alpha_bar, prediction_type)
    t, context = torch.cat([t, t]), torch.cat([context, context])
    answer, opponent_answer = answers(policy, opponent, x_t, t, context, autocast)
    (answer_data, answer_gen), (opp_data, opp_gen) = answer.chunk(2), opponent_answer.chunk(2)
    err_data, opp_err_data = per_image_error(answer_data, wanted), per_image_error(opp_data, wanted)
    losses, metrics = spin_trajectory_loss(err_data, per_image_error(answer_gen, opp_gen), opp_err_data, beta, link)
    return losses.mean(), metrics


def sft_step(
    policy: nn.Module, x0_data: Tensor, eps: Tensor, t: Tensor, context: Tensor, alphas_cumprod: Tensor,
    prediction_type: str = "epsilon", autocast: torch.dtype = torch.float32,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Equation (3.3) with gamma_t = 1, the mean over B real images; no metrics."""
    alpha_bar = alphas_cumprod[t]
    x_t = add_noise(x0_data, eps, alpha_bar)
    with mixed_precision(x_t, autocast):
        answer = policy(x_t, t, context)
    losses, metrics = sft_loss(per_image_error(answer, target(x0_data, eps, alpha_bar, prediction_type)))
    return losses.mean(), metrics


def answers(
    policy: nn.Module, opponent: nn.Module, x_t: Tensor, t: Tensor, context: Tensor, autocast: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What both players predict at x_t [N,4,h,w], under one autocast: at theta = theta_k, equal to the last bit."""
    with mixed_precision(x_t, autocast):
        answer = policy(x_t, t, context)
        with torch.no_grad():
            return answer, opponent(x_t, t, context)


class PolicyStep(nn.Module):
    """A step's loss as a module around the policy, forward(everything else), which is what data parallelism wraps."""

    def __init__(self, policy: nn.Module, loss_step: Callable):
        super().__init__()
        self.policy, self.loss_step = policy, loss_step

    def forward(self, **others) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss_step(self.policy, **others)


def as_autocast_would(unet: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Gives `unet`, where it stands, the rounded weights that autocast makes anew at every call: half the memory."""
    for module in unet.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):  # not the norms, which autocast computes in float32
            module.to(dtype)
    return unet


def compiled(step):
    """`step`, compiled when it is first called: minutes for a large UNet, once for any values of its tensors.
    By itself, the compiler rounds the policy, whose activations are kept, otherwise than the opponent: in bfloat16 the
    loss at theta_k missed log 2 by 0.04 to 1. The option makes both round as eager code (on a CPU from torch 2.14)."""
    torch._dynamo.config.optimize_ddp = False  # one graph also under DistributedDataParallel
    return torch.compile(step, fullgraph=True, dynamic=False, options={"emulate_precision_casts": True})


def mixed_precision(like: Tensor, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(like.device.type, dtype=dtype, enabled=dtype != torch.float32)
