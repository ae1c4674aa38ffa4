"""AutoencoderKL, the VAE of Stable Diffusion: images <-> latents of 1/8 the height and width.

Attribute names are those of diffusers' AutoencoderKL. Shapes in comments are SD-1.5's at 512 px.
Images are in [-1,1]. Latents are unscaled: the UNet works on them times `scaling_factor`.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spin.infra.devices import tf32
from spin.layers import (
    Attention,
    Conv2d,
    Downsample2D,
    ResnetBlock2D,
    Upsample2D,
    check_block_types,
)

EPS = 1e-6  # of every group norm in the VAE; the UNet's residual blocks have 1e-5


class PixelAttention(Attention):
    """Self-attention with one head over all pixels, and its norm. [B,C,H,W] -> [B,C,H,W]."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, heads=1, qkv_bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, EPS)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # [B,512,64,64] -> [B,4096,512]
        tokens = super().forward(tokens)
        return x + tokens.transpose(1, 2).reshape(x.shape)  # [B,4096,512] -> [B,512,64,64]


class Block(nn.Module):
    """Residual blocks at one resolution, then a downsampling or upsampling if one was added.

    [B,in_channels,H,W] -> [B,channels,H,W], or H and W halved or doubled by the resampling.
    """

    def __init__(self, in_channels: int, channels: int, depth: int, groups: int):
        super().__init__()
        self.channels = channels
        self.resnets = nn.ModuleList()
        for _ in range(depth):
            self.resnets.append(ResnetBlock2D(in_channels, channels, groups, EPS))
            in_channels = channels
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def add_downsampler(self) -> None:
        self.downsamplers.append(Downsample2D(self.channels, padding=0))

    def add_upsampler(self) -> None:
        self.upsamplers.append(Upsample2D(self.channels))

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *self.downsamplers, *self.upsamplers]:
            x = layer(x)
        return x


def make_blocks(channels: list[int], depth: int, groups: int) -> nn.ModuleList:
    """Return a block of `depth` residual blocks for each of `channels`, without resampling."""
    blocks = nn.ModuleList()
    in_channels = channels[0]
    for width in channels:
        blocks.append(Block(in_channels, width, depth, groups))
        in_channels = width
    return blocks


class MidBlock(nn.Module):
    """Two residual blocks with attention between them, at the lowest resolution."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList()
        for _ in range(2):
            self.resnets.append(ResnetBlock2D(channels, channels, groups, EPS))
        self.attentions = nn.ModuleList([PixelAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """Images [B,3,512,512] -> [B,8,64,64], which quant_conv turns into mean and log-variance."""

    def __init__(
        self, in_channels: int, latent_channels: int, channels: list[int], depth: int, groups: int
    ):
        super().__init__()
        self.conv_in = Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks = make_blocks(channels, depth, groups)
        for block in self.down_blocks[:-1]:  # the last block keeps its resolution
            block.add_downsampler()
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = Conv2d(channels[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)  # [B,128,512,512]
        for block in self.down_blocks:
            x = block(x)  # [B,128,256,256], [B,256,128,128], [B,512,64,64], [B,512,64,64]
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents [B,4,64,64], after post_quant_conv -> images [B,3,512,512].

    channels: of its blocks, from the lowest resolution to the highest
    """

    def __init__(
        self, out_channels: int, latent_channels: int, channels: list[int], depth: int, groups: int
    ):
        super().__init__()
        self.conv_in = Conv2d(latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups)
        self.up_blocks = make_blocks(channels, depth, groups)
        for block in self.up_blocks[:-1]:  # the last block keeps its resolution
            block.add_upsampler()
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))  # [B,512,64,64]
        for block in self.up_blocks:
            x = block(x)  # [B,512,128,128], [B,512,256,256], [B,256,512,512], [B,128,512,512]
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """The VAE of SD-1.x, SD-2.x and SDXL.

    config: the contents of diffusers' vae/config.json, which fixes every size.
    Raises ValueError for an unknown block type, and for a `scaling_factor` that is not positive.
    """

    def __init__(self, config: dict):
        super().__init__()
        check_block_types(config.get("down_block_types", []), ["DownEncoderBlock2D"])
        check_block_types(config.get("up_block_types", []), ["UpDecoderBlock2D"])
        self.config = dict(config)
        channels = config["block_out_channels"]
        depth = config.get("layers_per_block", 1)  # residual blocks of an encoder's block
        groups = config.get("norm_num_groups", 32)
        latent_channels = config.get("latent_channels", 4)

        self.scaling_factor = read_scaling_factor(config)
        # whether to compute in float32 if the weights are float16; True is diffusers' default, too
        self.force_upcast: bool = config.get("force_upcast", True)
        # f: pixels per latent, each way
        self.downscale = 2 ** (len(channels) - 1)

        in_channels = config.get("in_channels", 3)
        self.encoder = Encoder(in_channels, latent_channels, channels, depth, groups)
        out_channels = config.get("out_channels", 3)
        self.decoder = Decoder(out_channels, latent_channels, channels[::-1], depth + 1, groups)
        self.quant_conv = Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = Conv2d(latent_channels, latent_channels, 1)

    # TF32 has as many binary digits as float16, in which latents are stored; a pixel has 8.
    @tf32()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of the latents, unscaled, [B,4,H/f,W/f] each.

        images: [B,3,H,W] in [-1,1]
        """
        vae = self.upcast()
        moments = vae.quant_conv(vae.encoder(images.to(vae.quant_conv.weight.dtype)))
        mean, logvar = moments.chunk(2, dim=1)
        return mean, clamp_finite(logvar, -30, 20)

    @tf32()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode unscaled latents [B,4,h,w] to images [B,3,f h,f w], not clamped to [-1,1]."""
        vae = self.upcast()
        return vae.decoder(vae.post_quant_conv(latents.to(vae.post_quant_conv.weight.dtype)))

    def upcast(self) -> "AutoencoderKL":
        """Return the network to compute with: itself, or a float32 copy if its weights are float16.

        Activations of many VAEs, such as SDXL's, exceed float16's range. A config whose
        `force_upcast` is false states that those of its VAE do not.
        """
        if self.force_upcast and self.quant_conv.weight.dtype == torch.float16:
            return deepcopy(self).float()
        return self


def read_scaling_factor(config: dict) -> float:
    """Return what a VAE's config says that its latents are multiplied by."""
    scaling_factor = config.get("scaling_factor")
    if scaling_factor is None:
        return 0.18215  # configs of older checkpoints lack it and mean this
    if not 0 < scaling_factor < float("inf"):
        raise ValueError(f"scaling_factor {scaling_factor!r}: must be a positive number")
    return scaling_factor


def clamp_finite(values: Tensor, low: float, high: float) -> Tensor:
    """Clamp finite values. Infinite ones become NaN, since clamping would hide them."""
    return values.clamp(low, high).masked_fill(values.isinf(), torch.nan)
