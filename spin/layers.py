"""The pieces that the UNet and the VAE share. Attribute names are those of diffusers' checkpoints."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class ResnetBlock2D(nn.Module):
    """norm, SiLU, conv, twice, around a skip connection: [B,C,H,W] -> [B,C',H,W]; the timestep is added in between."""

    def __init__(self, channels: int, out_channels: int, groups: int, eps: float, temb_channels: int | None = None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        if temb_channels is not None:
            self.time_emb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


Norm = tuple[int, float]  # groups and eps
Attend = Callable[[], nn.Module] | None  # makes one of a level's attentions; None: the level has none


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where the level has it."""

    def __init__(self, channels_in: list[int], channels: int, norm: Norm, temb_channels=None, attention: Attend = None):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock2D(c, channels, *norm, temb_channels) for c in channels_in)
        if attention is not None:
            self.attentions = nn.ModuleList(attention() for _ in channels_in)

    def layer(self, i: int, x: Tensor, temb: Tensor | None = None, *context: Tensor) -> Tensor:
        x = self.resnets[i](x, temb)
        return self.attentions[i](x, *context) if hasattr(self, "attentions") else x


class MidLevel(nn.Module):
    """Two residual blocks with attention between them."""

    def __init__(self, channels: int, norm: Norm, attention: Attend, temb_channels: int | None = None):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock2D(channels, channels, *norm, temb_channels) for _ in range(2))
        self.attentions = nn.ModuleList([attention()])

    def forward(self, x: Tensor, temb: Tensor | None = None, *context: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, temb), *context), temb)


class Attention(nn.Module):
    """Multi-head attention of x [B,N,C] to context [B,M,D] (to itself without one) -> [B,N,C]."""

    def __init__(self, channels: int, heads: int, context_channels: int | None = None, qkv_bias: bool = False):
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be shared among {heads} attention heads")
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=qkv_bias)
        self.to_k = nn.Linear(context_channels or channels, channels, bias=qkv_bias)
        self.to_v = nn.Linear(context_channels or channels, channels, bias=qkv_bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # [B,heads,N or M,C/heads]
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Downsample2D(nn.Module):
    """Half the height and width. `padding` 1: all around (UNet). 0: one row and column at the end (VAE)."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample2D(nn.Module):
    """Repeat every pixel up to `size` (default twice the height and width), then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return self.conv(F.interpolate(x, size=size, scale_factor=None if size else 2.0, mode="nearest"))
