"""The UNet of Stable Diffusion 1.x, 2.x and XL: noised latents, timesteps, context -> prediction.

The prediction is the noise eps, or the velocity v, as the checkpoint's scheduler says. Attribute
names are those of diffusers' UNet2DConditionModel, so checkpoints load without renaming a tensor.
Shapes in comments are SD-1.5's at 512 px: latents [B,4,64,64], context [B,77,768], and blocks of
320, 640, 1280 and 1280 channels. SDXL has the same layers, but several transformer blocks in a row,
and a context with one more row, which joins the timestep: see `PooledAndSizesEmbedding`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spin.layers import (
    Attention,
    Conv2d,
    Downsample2D,
    ResnetBlock2D,
    Upsample2D,
    check_block_types,
)

NUM_TOKENS = 77  # of a prompt for SDXL, whose context has one row more

# block types of config.json -> does the block attend to the text?
DOWN_BLOCK_TYPES = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
UP_BLOCK_TYPES = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}


# ---- Timesteps -----------------------------------------------------------------------------------
def timestep_embedding(
    t: Tensor, channels: int, flip_sin_to_cos: bool, freq_shift: float
) -> Tensor:
    """Return sinusoids of t [B] at frequencies spaced geometrically from 1 to 1/10000.

    flip_sin_to_cos: put the cosines before the sines, as Stable Diffusion does.
    The result is [B,channels] float32.
    """
    half = channels // 2
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) / (half - freq_shift)
    frequencies = torch.exp(-math.log(10000) * exponents)
    angles = t.float()[:, None] * frequencies
    if flip_sin_to_cos:
        return torch.cat([angles.cos(), angles.sin()], dim=1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sinusoids(t: Tensor, channels: int, config: dict) -> Tensor:
    """Return `timestep_embedding` with the settings of a UNet's config."""
    flip_sin_to_cos = config.get("flip_sin_to_cos", True)
    return timestep_embedding(t, channels, flip_sin_to_cos, config.get("freq_shift", 0))


class TimestepEmbedding(nn.Module):
    """Sinusoids -> the embedding that every residual block adds. [B,320] -> [B,1280]."""

    def __init__(self, channels: int, temb_channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels, temb_channels)
        self.linear_2 = nn.Linear(temb_channels, temb_channels)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(inputs)))


class PooledAndSizesEmbedding(TimestepEmbedding):
    """SDXL's other inputs -> what is added to the timestep's embedding. [B,2048] -> [B,1280].

    They are the last row of the context, so that whatever handles contexts handles them, too:
    1280 numbers of pooled text, then NUM_SIZES sizes in pixels, then zeros. The sizes are height
    and width of the original image, top and left of what was cut from it, and height and width of
    the image to be made.
    """

    NUM_SIZES = 6

    def __init__(self, config: dict, temb_channels: int):
        in_channels = config["projection_class_embeddings_input_dim"]
        super().__init__(in_channels, temb_channels)
        self.config = config
        self.size_channels = config["addition_time_embed_dim"]  # sinusoids of each size
        self.pooled_channels = in_channels - self.NUM_SIZES * self.size_channels
        used = self.pooled_channels + self.NUM_SIZES
        if not self.NUM_SIZES < used <= config["cross_attention_dim"]:
            raise ValueError(
                f"projection_class_embeddings_input_dim is {in_channels}: pooled text of "
                f"{self.pooled_channels} channels and {self.NUM_SIZES} sizes must fit into a row "
                "of the context"
            )

    def forward(self, row: Tensor) -> Tensor:
        pooled = row[:, : self.pooled_channels]
        sizes = row[:, self.pooled_channels :][:, : self.NUM_SIZES]
        waves = sinusoids(sizes.flatten(), self.size_channels, self.config)  # [6B,256]
        waves = waves.view(len(row), -1).to(row.dtype)  # [B,1536]
        return super().forward(torch.cat([pooled, waves], dim=1))


# ---- Attention to the text -----------------------------------------------------------------------
class GEGLU(nn.Module):
    """A linear layer, half of whose output gates the other half (arXiv 2002.05202)."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two linear layers that treat each token by itself."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.Sequential(
            GEGLU(channels, 4 * channels),
            nn.Identity(),  # a dropout in diffusers: no weights, but it takes up the number 1
            nn.Linear(4 * channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Tokens [B,N,C] attend to each other (attn1), then to the context [B,77,D] (attn2)."""

    def __init__(self, channels: int, heads: int, context_channels: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2D(nn.Module):
    """Transformer blocks whose tokens are the pixels of a feature map. [B,C,H,W] -> [B,C,H,W].

    depth: blocks in a row; 1 except in SDXL
    use_linear: the projections are stored as linear layers (SD-2.x), not as 1x1 convolutions
    (SD-1.x). They compute the same.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        depth: int,
        context_channels: int,
        groups: int,
        use_linear: bool,
    ):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)  # the residual blocks have 1e-5
        self.proj_in = self.make_projection(channels, use_linear)
        self.transformer_blocks = nn.ModuleList()
        for _ in range(depth):
            self.transformer_blocks.append(TransformerBlock(channels, heads, context_channels))
        self.proj_out = self.make_projection(channels, use_linear)

    @staticmethod
    def make_projection(channels: int, use_linear: bool) -> nn.Module:
        if use_linear:
            return nn.Linear(channels, channels)
        return Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B,320,64,64] -> [B,4096,320]
        # F.linear chooses its kernel for a transposed view by whether the weights need a gradient:
        # the policy's tokens would be rounded differently from the opponent's.
        tokens = tokens.contiguous()
        tokens = self.project(self.proj_in, tokens)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        tokens = self.project(self.proj_out, tokens)
        return x + tokens.transpose(1, 2).reshape(x.shape)  # [B,4096,320] -> [B,320,64,64]

    @staticmethod
    def project(projection: nn.Module, tokens: Tensor) -> Tensor:
        """Apply a linear layer or a 1x1 convolution to tokens [B,N,C]."""
        weight = projection.weight.flatten(1)  # [C,C,1,1] or [C,C] -> [C,C]
        return F.linear(tokens, weight, projection.bias)


# ---- Blocks --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class CommonSettings:
    """What all blocks of a UNet have in common."""

    temb_channels: int
    context_channels: int
    groups: int  # of every group norm
    eps: float  # of the residual blocks' group norms
    use_linear: bool  # see Transformer2D

    def resnet(self, in_channels: int, channels: int) -> ResnetBlock2D:
        return ResnetBlock2D(in_channels, channels, self.groups, self.eps, self.temb_channels)

    def transformer(self, channels: int, heads: int, depth: int) -> Transformer2D:
        return Transformer2D(
            channels, heads, depth, self.context_channels, self.groups, self.use_linear
        )


class Layers(nn.Module):
    """Base class of all blocks.

    recomputes: whether training stores only what each layer reads, and recomputes the rest in the
        backward pass: less memory, a quarter more work.
    """

    recomputes = False

    def run(self, layer: Callable, *inputs) -> Tensor:
        """Return layer(*inputs), whose activations are recomputed if that is switched on."""
        if self.recomputes and torch.is_grad_enabled():
            # no layer draws random numbers, so that there is no state to restore
            return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
        return layer(*inputs)


class Block(Layers):
    """The layers at one resolution: residual blocks, each followed by attention if it `attends`.

    in_channels: channels that each layer reads, one entry per layer
    channels:    channels that every layer returns
    depth:       transformer blocks of each attention
    """

    def __init__(
        self,
        in_channels: list[int],
        channels: int,
        heads: int,
        depth: int,
        attends: bool,
        common: CommonSettings,
    ):
        super().__init__()
        self.channels = channels
        self.attends = attends
        self.resnets = nn.ModuleList()
        for layer_channels in in_channels:
            self.resnets.append(common.resnet(layer_channels, channels))
        if attends:
            self.attentions = nn.ModuleList()
            for _ in in_channels:
                self.attentions.append(common.transformer(channels, heads, depth))
        self.downsamplers = nn.ModuleList()  # one or none
        self.upsamplers = nn.ModuleList()  # one or none

    def layer(self, i: int, x: Tensor, temb: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[i](x, temb)
        if self.attends:
            x = self.attentions[i](x, context)
        return x


class DownBlock(Block):
    """Layers, then a downsampling, except in the last block."""

    def add_downsampler(self, padding: int) -> None:
        self.downsamplers.append(Downsample2D(self.channels, padding))

    def forward(self, x: Tensor, temb: Tensor, context: Tensor) -> list[Tensor]:
        """Return the skip connections: each layer's output, then the downsampler's.

        The last one is the block's output.
        """
        outputs = []
        for i in range(len(self.resnets)):
            x = self.run(self.layer, i, x, temb, context)
            outputs.append(x)
        for downsampler in self.downsamplers:
            outputs.append(downsampler(x))
        return outputs


class MidBlock(Layers):
    """Two residual blocks with attention between them, at the lowest resolution."""

    def __init__(self, channels: int, heads: int, depth: int, common: CommonSettings):
        super().__init__()
        self.resnets = nn.ModuleList()
        for _ in range(2):
            self.resnets.append(common.resnet(channels, channels))
        self.attentions = nn.ModuleList([common.transformer(channels, heads, depth)])

    def forward(self, x: Tensor, temb: Tensor, context: Tensor) -> Tensor:
        x = self.run(self.resnets[0], x, temb)
        x = self.run(self.attentions[0], x, context)
        return self.run(self.resnets[1], x, temb)


class UpBlock(Block):
    """Layers that read a skip connection each, then an upsampling, except in the last block."""

    def add_upsampler(self) -> None:
        self.upsamplers.append(Upsample2D(self.channels))

    def forward(
        self,
        x: Tensor,
        skips: list[Tensor],
        upsample_size: tuple[int, int] | None,
        temb: Tensor,
        context: Tensor,
    ) -> Tensor:
        """Return the block's output.

        skips:         the skip connections, one per layer
        upsample_size: height and width of the output; None in the last block
        """
        for i, skip in enumerate(skips):
            x = self.run(self.layer_with_skip, i, x, skip, temb, context)
        for upsampler in self.upsamplers:
            x = upsampler(x, upsample_size)
        return x

    def layer_with_skip(
        self, i: int, x: Tensor, skip: Tensor, temb: Tensor, context: Tensor
    ) -> Tensor:
        # here, and not in forward, so that the concatenation is recomputed and not stored
        return self.layer(i, torch.cat([x, skip], dim=1), temb, context)


# ---- The network ---------------------------------------------------------------------------------
class UNet(nn.Module):
    """UNet2DConditionModel of SD-1.x, SD-2.x and SDXL.

    config: the contents of diffusers' unet/config.json, which fixes every size.
    Raises ValueError for an unknown block type, for lists of different lengths, and for inputs
    beside the text that are not SDXL's.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config = dict(config)
        # latent height and width that the network was trained at: one number for both, or two
        default_size = 64 if config.get("addition_embed_type") is None else 128  # SDXL
        self.sample_size: int | list[int] = config.get("sample_size") or default_size
        check_sample_size(self.sample_size)

        channels = config["block_out_channels"]
        num_layers = config.get("layers_per_block", 2)  # of a down block
        heads = heads_per_block(config)
        depths = depth_per_block(config)
        check_lists(config)
        last = len(channels) - 1
        common = CommonSettings(
            temb_channels=4 * channels[0],
            context_channels=config["cross_attention_dim"],
            groups=config.get("norm_num_groups", 32),
            eps=config.get("norm_eps", 1e-5),
            use_linear=config.get("use_linear_projection", False),
        )

        self.conv_in = Conv2d(config.get("in_channels", 4), channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], common.temb_channels)
        self.add_embedding: PooledAndSizesEmbedding | None = None
        if config.get("addition_embed_type") is not None:
            self.add_embedding = PooledAndSizesEmbedding(config, common.temb_channels)

        self.down_blocks = nn.ModuleList()
        skip_channels = [channels[0]]  # of each skip connection in order; the first is conv_in's
        in_channels = channels[0]
        for i, block_type in enumerate(config["down_block_types"]):
            layer_channels = [in_channels] + [channels[i]] * (num_layers - 1)
            attends = DOWN_BLOCK_TYPES[block_type]
            block = DownBlock(layer_channels, channels[i], heads[i], depths[i], attends, common)
            skip_channels += [channels[i]] * num_layers
            if i < last:
                block.add_downsampler(config.get("downsample_padding", 1))
                skip_channels.append(channels[i])
            self.down_blocks.append(block)
            in_channels = channels[i]

        self.mid_block = MidBlock(channels[-1], heads[-1], depths[-1], common)

        # The up blocks mirror the down blocks, with one more layer each, because conv_in and the
        # downsamplers left skip connections, too.
        self.up_blocks = nn.ModuleList()
        up_channels = channels[::-1]
        up_heads = heads[::-1]
        up_depths = depths[::-1]
        in_channels = up_channels[0]
        for i, block_type in enumerate(config["up_block_types"]):
            x_channels = [in_channels] + [up_channels[i]] * num_layers
            layer_channels = [width + skip_channels.pop() for width in x_channels]
            attends = UP_BLOCK_TYPES[block_type]
            block = UpBlock(
                layer_channels, up_channels[i], up_heads[i], up_depths[i], attends, common
            )
            if i < last:
                block.add_upsampler()
            self.up_blocks.append(block)
            in_channels = up_channels[i]

        self.conv_norm_out = nn.GroupNorm(common.groups, channels[0], common.eps)
        self.conv_out = Conv2d(channels[0], config.get("out_channels", 4), 3, padding=1)

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """Return the prediction [B,4,h,w] at noised latents [B,4,h,w].

        timesteps: [B] or 0-d. context: [B,77,D], or [B,78,D] with SDXL's added row. Raises
        ValueError if SDXL's lacks that row.
        """
        t = timesteps.expand(len(latents))
        waves = sinusoids(t, self.conv_in.out_channels, self.config)
        temb = self.time_embedding(waves.to(latents.dtype))  # [B,1280]
        if self.add_embedding is not None:
            if context.shape[1] != NUM_TOKENS + 1:
                raise ValueError(
                    f"context of {context.shape[1]} rows: SDXL's has a row more than its tokens, "
                    f"{NUM_TOKENS + 1}: see Pipeline.encode_prompts"
                )
            temb = temb + self.add_embedding(context[:, -1])
            context = context[:, :-1].contiguous()  # as in Transformer2D

        x = self.conv_in(latents)  # [B,320,64,64]
        skips = [x]
        # -> [B,320,32,32] -> [B,640,16,16] -> [B,1280,8,8] -> [B,1280,8,8]
        for block in self.down_blocks:
            outputs = block(x, temb, context)
            skips += outputs
            x = outputs[-1]

        x = self.mid_block(x, temb, context)

        # -> [B,1280,16,16] -> [B,1280,32,32] -> [B,640,64,64] -> [B,320,64,64]
        for block in self.up_blocks:
            block_skips = [skips.pop() for _ in block.resnets]  # the last skip is read first
            # Upsample to the next skip's size. It is not twice this block's if the downsampler had
            # to round half of an odd size.
            upsample_size = skips[-1].shape[-2:] if skips else None
            x = block(x, block_skips, upsample_size, temb, context)

        return self.conv_out(F.silu(self.conv_norm_out(x)))

    @property
    def checkpoint_activations(self) -> bool:
        """Whether training recomputes activations, see `Layers`. It can be set."""
        return self.mid_block.recomputes

    @checkpoint_activations.setter
    def checkpoint_activations(self, enabled: bool) -> None:
        for block in [*self.down_blocks, self.mid_block, *self.up_blocks]:
            block.recomputes = enabled


def heads_per_block(config: dict) -> list[int]:
    """Return the number of attention heads of each down block, from the first to the last.

    SD-2.x lists them. In SD-1.x, "attention_head_dim": 8 is a misnomer for 8 heads, which diffusers
    keeps because published checkpoints use it.
    """
    heads = config.get("num_attention_heads")
    if heads is None:
        heads = config.get("attention_head_dim", 8)
    if isinstance(heads, int):
        return [heads] * len(config["block_out_channels"])
    return heads


def depth_per_block(config: dict) -> list[int]:
    """Return how many transformer blocks follow each other in each down block's attentions.

    That is 1 except in SDXL, which lists the numbers.
    """
    depths = config.get("transformer_layers_per_block", 1)
    if isinstance(depths, int):
        return [depths] * len(config["block_out_channels"])
    return depths


def check_sample_size(size) -> None:
    """Raise ValueError unless `size` is a positive integer or two of them."""
    numbers = size if isinstance(size, list) and len(size) == 2 else [size]
    for number in numbers:
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"sample_size is {size!r}: must be one or two positive integers")


def check_lists(config: dict) -> None:
    """Raise ValueError unless config.json's lists have one entry per block, and known ones.

    The kind of inputs beside the text, `addition_embed_type`, must be a known one, too.
    """
    lists = {
        "down_block_types": config["down_block_types"],
        "up_block_types": config["up_block_types"],
        "attention_head_dim": heads_per_block(config),
        "transformer_layers_per_block": depth_per_block(config),
    }
    added = config.get("addition_embed_type")
    if added not in (None, "text_time"):
        raise ValueError(f"addition_embed_type is {added!r}: must be None, or text_time as in SDXL")
    num_blocks = len(config["block_out_channels"])
    for key, entries in lists.items():
        if len(entries) != num_blocks:
            raise ValueError(f"{key} has {len(entries)} entries for {num_blocks} blocks")
    for depth in lists["transformer_layers_per_block"]:
        if not isinstance(depth, int) or depth < 1:  # lists and 0 in SDXLs that were cut down
            raise ValueError(f"transformer_layers_per_block has {depth!r}: must be 1 or more")
    check_block_types(config["down_block_types"], DOWN_BLOCK_TYPES)
    check_block_types(config["up_block_types"], UP_BLOCK_TYPES)
