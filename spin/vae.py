"""AutoencoderKL, Stable Diffusion's picture codec: images in [-1,1] <-> latents a factor f = 8 smaller each way.

Attribute names are those of diffusers' AutoencoderKL. Shapes in comments are SD-1.5's at 512 px.
Latents here are unscaled: the UNet works on them times `scaling_factor`."""

import torch.nn.functional as F
from torch import Tensor, nn

from spin.layers import Attention, Downsample2D, Level, MidLevel, Upsample2D

EPS = 1e-6  # of every GroupNorm in the VAE; the UNet's residual blocks have 1e-5


class PixelAttention(Attention):
    """One head over all pixels, with its norm and its residual inside: [B,C,H,W] -> [B,C,H,W]."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, heads=1, qkv_bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, EPS)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # [B,512,64,64] -> [B,4096,512]
        return x + super().forward(tokens).transpose(1, 2).reshape(x.shape)


class PlainLevel(Level):
    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())]:
            x = layer(x)
        return x


def levels(channels: list[int], depth: int, groups: int) -> nn.Sequential:
    """A level for each of `channels`; the caller hangs `downsamplers` or `upsamplers` on it."""
    inputs = [[before] + [c] * (depth - 1) for before, c in zip([channels[0], *channels], channels)]
    return nn.Sequential(*[PlainLevel(*sizes, (groups, EPS)) for sizes in zip(inputs, channels)])


class Encoder(nn.Module):
    def __init__(self, in_channels: int, latent_channels: int, channels: list[int], depth: int, groups: int):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks = levels(channels, depth, groups)
        for block, width in zip(self.down_blocks[:-1], channels):
            block.downsamplers = nn.ModuleList([Downsample2D(width, padding=0)])
        self.mid_block = MidLevel(channels[-1], (groups, EPS), lambda: PixelAttention(channels[-1], groups))
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # [B,128,512,512] -> [B,128,256,256] -> [B,256,128,128] -> [B,512,64,64] -> [B,512,64,64]
        x = self.down_blocks(self.conv_in(x))
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, out_channels: int, latent_channels: int, channels: list[int], depth: int, groups: int):
        super().__init__()
        channels = channels[::-1]
        self.conv_in = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidLevel(channels[0], (groups, EPS), lambda: PixelAttention(channels[0], groups))
        self.up_blocks = levels(channels, depth + 1, groups)
        for block, width in zip(self.up_blocks[:-1], channels):
            block.upsamplers = nn.ModuleList([Upsample2D(width)])
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # [B,512,64,64] -> [B,512,128,128] -> [B,512,256,256] -> [B,256,512,512] -> [B,128,512,512]
        x = self.up_blocks(self.mid_block(self.conv_in(x)))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """config: diffusers' vae/config.json. Sizes come from it alone. ValueError for a level type it does not know."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = dict(config)
        channels, depth = config["block_out_channels"], config.get("layers_per_block", 1)
        latent_channels, groups = config.get("latent_channels", 4), config.get("norm_num_groups", 32)
        types = {*config.get("down_block_types", ()), *config.get("up_block_types", ())}
        if types - {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
            raise ValueError(f"level types {sorted(types)}: only DownEncoderBlock2D and UpDecoderBlock2D are known")
        self.scaling_factor: float = config.get("scaling_factor") or 0.18215  # older files lack it and mean this
        self.downscale = 2 ** (len(channels) - 1)  # f: pixels per latent, each way
        self.encoder = Encoder(config.get("in_channels", 3), latent_channels, channels, depth, groups)
        self.decoder = Decoder(config.get("out_channels", 3), latent_channels, channels, depth, groups)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B,3,H,W] in [-1,1] -> mean and log-variance of the latents, [B,4,H/f,W/f] each, unscaled."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents [B,4,h,w] -> images [B,3,f h,f w], about [-1,1] but not clamped."""
        return self.decoder(self.post_quant_conv(latents))
