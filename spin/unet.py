"""The UNet of Stable Diffusion 1.x and 2.x: noised latents, timesteps, text context -> the predicted noise.

Attribute names are those of diffusers' UNet2DConditionModel, so a checkpoint loads without renaming a tensor.
Shapes in comments are SD-1.5's at 512 px: latents [B,4,64,64], channels 320, 640, 1280, 1280, context [B,77,768]."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spin.layers import Attention, Downsample2D, Level, MidLevel, Upsample2D

#: level types of config.json -> does the level attend to the text?
DOWN_TYPES = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
UP_TYPES = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}


def timestep_embedding(t: Tensor, channels: int, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Sinusoids of t [B] at geometrically spaced frequencies, 1 to 1/10000: [B,channels] float32."""
    half = channels // 2
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) / (half - freq_shift)
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * exponents)
    waves = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.cat(waves, dim=1)


class GEGLU(nn.Module):
    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Tokens attend to each other (attn1), then to the text (attn2), then each is transformed alone (ff)."""

    def __init__(self, channels: int, heads: int, context_channels: int):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(channels), Attention(channels, heads)
        self.norm2, self.attn2 = nn.LayerNorm(channels), Attention(channels, heads, context_channels)
        # the middle place is a dropout in diffusers: it has no weights, but it counts
        net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))
        self.norm3, self.ff = nn.LayerNorm(channels), nn.ModuleDict({"net": net})

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff["net"](self.norm3(x))


class Transformer2D(nn.Module):
    """A transformer block over the pixels of a feature map, which are its tokens."""

    def __init__(self, channels: int, heads: int, context_channels: int, groups: int, linear: bool):
        super().__init__()
        # a 1x1 convolution (SD-1.x) and a linear layer (SD-2.x) are one map with differently shaped weights
        projection = nn.Linear if linear else lambda inputs, outputs: nn.Conv2d(inputs, outputs, 1)
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = projection(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads, context_channels)])
        self.proj_out = projection(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B,320,64,64] -> [B,4096,320]
        tokens = F.linear(tokens, self.proj_in.weight.flatten(1), self.proj_in.bias)
        tokens = self.transformer_blocks[0](tokens, context)
        tokens = F.linear(tokens, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + tokens.transpose(1, 2).reshape(x.shape)


class DownLevel(Level):
    def forward(self, x: Tensor, temb: Tensor, context: Tensor) -> list[Tensor]:
        """What the way up will read: the output of every layer and of the downsampling, the level's output last."""
        outputs = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, temb, context)
            outputs.append(x)
        return outputs + [downsample(x) for downsample in getattr(self, "downsamplers", ())]


class UpLevel(Level):
    def forward(self, x: Tensor, skips: list[Tensor], size: torch.Size, temb: Tensor, context: Tensor) -> Tensor:
        """Reads `skips` from its end, one a layer; `size`: height and width to leave with."""
        for i, skip in enumerate(reversed(skips)):
            x = self.layer(i, torch.cat([x, skip], dim=1), temb, context)
        return self.upsamplers[0](x, size) if hasattr(self, "upsamplers") else x


class UNet(nn.Module):
    """config: diffusers' unet/config.json. Sizes come from it alone. ValueError for a level type it does not know."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = dict(config)
        self.checkpoint_activations = False  # True: recompute each level in the backward pass instead of storing them
        self.sample_size = int(config.get("sample_size") or 64)  # latent height and width it was trained at
        channels, depth = config["block_out_channels"], config.get("layers_per_block", 2)
        groups, eps = norm = config.get("norm_num_groups", 32), config.get("norm_eps", 1e-5)
        temb_channels = 4 * channels[0]
        # "attention_head_dim": 8 in SD-1.x files means 8 heads; SD-2.x gives the number of heads level by level
        heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
        heads = [heads] * len(channels) if isinstance(heads, int) else heads
        if odd := {*config["down_block_types"]} - {*DOWN_TYPES} | {*config["up_block_types"]} - {*UP_TYPES}:
            raise ValueError(f"level types {sorted(odd)}: only {', '.join([*DOWN_TYPES, *UP_TYPES])} are known")
        shared = config["cross_attention_dim"], groups, config.get("use_linear_projection", False)
        transformers = [partial(Transformer2D, c, n, *shared) for c, n in zip(channels, heads)]  # one a level
        self.conv_in = nn.Conv2d(config.get("in_channels", 4), channels[0], 3, padding=1)
        sizes = {"linear_1": channels[0], "linear_2": temb_channels}
        self.time_embedding = nn.ModuleDict({name: nn.Linear(c, temb_channels) for name, c in sizes.items()})
        self.down_blocks, skip_channels = nn.ModuleList(), [channels[0]]
        for level, name in zip(range(len(channels)), config["down_block_types"], strict=True):
            width, before = channels[level], channels[max(level - 1, 0)]
            attention = transformers[level] if DOWN_TYPES[name] else None
            block = DownLevel([before] + [width] * (depth - 1), width, norm, temb_channels, attention)
            skip_channels += [width] * depth
            if level < len(channels) - 1:
                block.downsamplers = nn.ModuleList([Downsample2D(width, config.get("downsample_padding", 1))])
                skip_channels.append(width)
            self.down_blocks.append(block)
        self.mid_block = MidLevel(channels[-1], norm, transformers[-1], temb_channels)
        self.up_blocks = nn.ModuleList()
        for level, name in zip(reversed(range(len(channels))), config["up_block_types"], strict=True):
            width, before = channels[level], channels[min(level + 1, len(channels) - 1)]
            attention = transformers[level] if UP_TYPES[name] else None
            # one layer more than on the way down: the first level, or the last downsampling, left a skip of its own
            inputs = [c + skip_channels.pop() for c in [before] + [width] * depth]
            block = UpLevel(inputs, width, norm, temb_channels, attention)
            if level > 0:
                block.upsamplers = nn.ModuleList([Upsample2D(width)])
            self.up_blocks.append(block)
        self.conv_norm_out = nn.GroupNorm(groups, channels[0], eps)
        self.conv_out = nn.Conv2d(channels[0], config.get("out_channels", 4), 3, padding=1)

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """latents [B,4,h,w], timesteps [B] or 0-d, context [B,77,D] -> [B,4,h,w]"""
        flip, shift = self.config.get("flip_sin_to_cos", True), self.config.get("freq_shift", 0)
        sinusoids = timestep_embedding(timesteps.expand(len(latents)), self.conv_in.out_channels, flip, shift)
        temb = self.time_embedding["linear_1"](sinusoids.to(latents.dtype))
        temb = self.time_embedding["linear_2"](F.silu(temb))  # [B,1280]
        skips = [self.conv_in(latents)]  # [B,320,64,64]
        for block in self.down_blocks:  # -> [B,320,32,32] -> [B,640,16,16] -> [B,1280,8,8] -> [B,1280,8,8]
            skips += self.call(block, skips[-1], temb, context)
        x = self.call(self.mid_block, skips[-1], temb, context)
        for block in self.up_blocks:  # -> [B,1280,16,16] -> [B,1280,32,32] -> [B,640,64,64] -> [B,320,64,64]
            depth = len(block.resnets)
            mine, skips = skips[-depth:], skips[:-depth]
            # upsample to the size of the next skip, not simply twice: halving an odd size had lost a row
            size = skips[-1].shape[-2:] if skips else None
            x = self.call(block, x, mine, size, temb, context)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def call(self, block: nn.Module, *inputs):
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        return checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
