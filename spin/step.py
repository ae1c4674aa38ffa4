"""The loss of one training step, from latents to a scalar: what torch.compile sees as one function.

Arguments that all steps share:

    policy, opponent    UNets. Gradients flow into the policy alone.
    x0_data, x0_gen     [B,4,h,w], scaled latents of a real image and of the opponent's image for
                        the same prompt
    eps                 [B,4,h,w], standard normal noise
    t                   [B] int64, timesteps in 0..T-1
    context             [B,77,D], encoded prompts
    alphas_cumprod      [T], the noise schedule
    beta                0-d tensor: a new value of a Python float would trigger recompilation
    prediction_type     "epsilon" or "v_prediction"; with the latter, errors are those of v
    autocast            compute dtype of the networks; errors and losses are float32

Each step returns the loss of the micro-batch, 0-d, and its metrics, [B] each. No step copies a
value back from the device.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spin.loss import per_image_error, sft_loss, spin_bounded_loss, spin_loss
from spin.scheduler import Scheduler, add_noise, training_target


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
    autocast: torch.dtype = torch.float32,
    eps_gen: Tensor | None = None,
    bounded: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of equation (C.6), averaged over B pairs, and its metrics.

    bounded: return `spin_bounded_loss` instead.

    The two images of a pair share the timestep and the prompt. They share the noise, too, unless
    `eps_gen` [B,4,h,w] is given for the generated one.

    Diffusion-DPO is the same step: its reference, theta_0, is the opponent, x0_data the preferred
    image, and x0_gen the rejected one (see `spin.loss.dpo_loss`).
    """
    if eps_gen is None:
        eps_gen = eps

    # Noise both images of every pair, real ones first.
    x0 = torch.cat([x0_data, x0_gen])  # [2B,4,h,w]
    noise = torch.cat([eps, eps_gen])
    timesteps = torch.cat([t, t])
    contexts = torch.cat([context, context])
    alpha_bar = alphas_cumprod[timesteps]
    x_t = add_noise(x0, noise, alpha_bar)
    target = training_target(x0, noise, alpha_bar, prediction_type)

    # Both networks under one autocast: at theta = theta_k they agree to the last bit, uncompiled.
    with mixed_precision(x_t.device, autocast):
        prediction = policy(x_t, timesteps, contexts)
        with torch.no_grad():
            opponent_prediction = opponent(x_t, timesteps, contexts)

    err_data, err_gen = per_image_error(prediction, target).chunk(2)
    opp_err_data, opp_err_gen = per_image_error(opponent_prediction, target).chunk(2)
    errors = (err_data, err_gen, opp_err_data, opp_err_gen)
    if bounded:
        _, gap_gen = per_image_error(prediction, opponent_prediction).chunk(2)
        losses, metrics = spin_bounded_loss(*errors, gap_gen, beta)
    else:
        losses, metrics = spin_loss(*errors, beta)
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
    """Return equation (3.3) with gamma_t = 1, averaged over B real images, and no metrics."""
    alpha_bar = alphas_cumprod[t]
    x_t = add_noise(x0_data, eps, alpha_bar)
    target = training_target(x0_data, eps, alpha_bar, prediction_type)
    with mixed_precision(x_t.device, autocast):
        prediction = policy(x_t, t, context)
    losses, metrics = sft_loss(per_image_error(prediction, target))
    return losses.mean(), metrics


class LossStep:
    """A loss bound to everything that stays constant while one model is trained.

    loss: "spin", "spin-bounded", "dpo" or "sft".
    opponent: theta_k for self-play, the reference for DPO, None for SFT.
    beta: see `spin.loss.spin_loss`; SFT has none.
    autocast: dtype that the networks compute in.
    compiled: whether to compile the step, see `compile_step`.
    """

    def __init__(
        self,
        loss: str,
        opponent: nn.Module | None,
        beta: float,
        scheduler: Scheduler,
        device: str,
        autocast: torch.dtype = torch.float32,
        compiled: bool = False,
    ):
        self.constants = {
            "alphas_cumprod": scheduler.alphas_cumprod.to(device),
            "prediction_type": scheduler.prediction_type,
            "autocast": autocast,
        }
        if loss in ("spin", "spin-bounded", "dpo"):
            self.function = spin_step
            self.constants["bounded"] = loss == "spin-bounded"
            self.constants["opponent"] = opponent
            self.constants["beta"] = torch.tensor(beta, device=device)
        elif loss == "sft":
            self.function = sft_step
        else:
            raise ValueError(f"loss {loss!r}: must be spin, spin-bounded, dpo or sft")
        if compiled:
            self.function = compile_step(self.function)

    def __call__(self, policy: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, 0-d, and its metrics, [B] each.

        batch: the tensors that the step takes, as `spin.pairs.PairLoader` loads them.
        """
        return self.function(policy, **batch, **self.constants)


def compile_step(step: Callable) -> Callable:
    """Return `step`, to be compiled on its first call.

    Compilation takes minutes for a large UNet, and happens once, whatever the tensors' values.

    By default, the compiler rounds the policy, whose activations are saved for the backward pass,
    differently from the opponent, so that in bfloat16 the loss at theta_k is not log 2. The option
    makes both round as in eager mode (on a CPU from torch 2.14 on). On a GPU, the numbers within a
    norm may still be added in another order for the policy than for the opponent.
    """
    options = {"emulate_precision_casts": True}
    return torch.compile(step, fullgraph=True, dynamic=False, options=options)


def compile_unet(unet: nn.Module) -> Callable:
    """Return the UNet for sampling, to be compiled on its first call and for every new shape."""
    return torch.compile(unet, fullgraph=True, dynamic=False)


def cast_weights_(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast conv and linear weights to `dtype`, in place.

    Autocast would round them on every call anyway: the outputs are the same, in half the memory.
    The weights of norms stay as they are, since autocast computes norms in float32.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)


def mixed_precision(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return a context in which networks compute in `dtype`; float32 switches autocast off."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
