"""The layers that the UNet and the VAE share. Attribute names are diffusers'."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

CUDNN_HEAD_SIZE = 128  # the largest whose gradient cuDNN can compute, in every version


def attention_kernels(head_size: int) -> list[SDPBackend]:
    """Return the kernels that may compute an attention, the preferred one first.

    On a GPU that is cuDNN's in half precision, flash for larger heads, the efficient one in
    float32, and plain matrix products where none of these can.

    PyTorch's own choice also depends on whether a gradient is wanted: the policy's attention would
    then be rounded unlike the opponent's, and the first loss of an iteration would not be log 2. A
    caller's own choice of kernels has no effect.
    """
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if head_size <= CUDNN_HEAD_SIZE:
        return [SDPBackend.CUDNN_ATTENTION, *kernels]
    return kernels


class Conv2d(nn.Conv2d):
    """A convolution whose input, where it is compiled for a GPU, is made channels-last.

    cuDNN is faster with that layout. The compiler chooses it by itself for sampling, but not for
    training, and merges the copy into the operation that makes the input. Uncompiled, every
    convolution would pay for a copy, since group norms return the other layout.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and x.is_cuda:
            x = x.contiguous(memory_format=torch.channels_last)
        return super().forward(x)


class ResnetBlock2D(nn.Module):
    """A residual block: norm, SiLU, convolution, twice. [B,C,H,W] -> [B,C',H,W].

    temb_channels: channels of the timestep embedding that is added between the two convolutions;
    None for the VAE, which has no timestep.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        groups: int,
        eps: float,
        temb_channels: int | None = None,
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps)
        self.conv1 = Conv2d(channels, out_channels, 3, padding=1)
        if temb_channels is not None:
            self.time_emb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        if channels == out_channels:
            self.conv_shortcut = nn.Identity()
        else:
            self.conv_shortcut = Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Multi-head attention from x [B,N,C] to context [B,M,D], or to x itself -> [B,N,C].

    Raises ValueError if the heads do not divide the channels.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        context_channels: int | None = None,
        qkv_bias: bool = False,
    ):
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be split into {heads} attention heads")
        if context_channels is None:
            context_channels = channels
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=qkv_bias)
        self.to_k = nn.Linear(context_channels, channels, bias=qkv_bias)
        self.to_v = nn.Linear(context_channels, channels, bias=qkv_bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is None:
            context = x  # self-attention
        q = self.split_heads(self.to_q(x))
        k = self.split_heads(self.to_k(context))
        v = self.split_heads(self.to_v(context))
        with sdpa_kernel(attention_kernels(q.shape[-1]), set_priority=True):
            attended = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](attended.transpose(1, 2).flatten(2))

    def split_heads(self, tokens: Tensor) -> Tensor:
        """Reshape [B,N,C] to [B,heads,N,C/heads]."""
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Downsample2D(nn.Module):
    """Halve height and width by a convolution of stride 2.

    padding: 1 pads every side by a pixel (UNet); 0 pads only the bottom and the right (VAE).
    """

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.pads_bottom_right = padding == 0
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.pads_bottom_right:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Upsample2D(nn.Module):
    """Repeat pixels up to `size` (height, width), by default double, then apply a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is None:
            enlarged = F.interpolate(x, scale_factor=2.0, mode="nearest")
        else:
            enlarged = F.interpolate(x, size=size, mode="nearest")
        return self.conv(enlarged)


def check_block_types(block_types: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError for a block type of config.json that is not in `known`."""
    for block_type in block_types:
        if block_type not in known:
            raise ValueError(f"block type {block_type!r}: must be one of {', '.join(known)}")
