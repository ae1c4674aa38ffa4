"""The names of tensors in published checkpoints -> their names here.

TEXT_NAMES, CLIP_NAMES and BLIP_NAMES are for networks from open_clip and torch, whose tensors have
names of their own. `expand_names` writes such a table out as a name map, by which `fuse` and
`unfuse` translate tensors. The other tables hold parts of names.
"""

import torch
from torch import Tensor

# (published names, our name) per tensor of ours. Several published tensors are the rows of ours.
NameMap = list[tuple[list[str], str]]

# In the tables below, {p} stands for weight and bias, {i}, {t} and {v} stand for a layer's number.
# torch keeps the projections to queries, keys and values in one matrix, checkpoints in three:
FUSED = {
    "{qkv}": ["q", "k", "v"],
    "{query}": ["query", "key", "value"],
}

# transformers' CLIPTextModel, without its prefix "text_model." -> open_clip's TextTransformer
TEXT_NAMES = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers.{i}.layer_norm1.{p}": "transformer.resblocks.{i}.ln_1.{p}",
    "encoder.layers.{i}.self_attn.{qkv}_proj.{p}": "transformer.resblocks.{i}.attn.in_proj_{p}",
    "encoder.layers.{i}.self_attn.out_proj.{p}": "transformer.resblocks.{i}.attn.out_proj.{p}",
    "encoder.layers.{i}.layer_norm2.{p}": "transformer.resblocks.{i}.ln_2.{p}",
    "encoder.layers.{i}.mlp.fc1.{p}": "transformer.resblocks.{i}.mlp.c_fc.{p}",
    "encoder.layers.{i}.mlp.fc2.{p}": "transformer.resblocks.{i}.mlp.c_proj.{p}",
    "final_layer_norm.{p}": "ln_final.{p}",
}

# beside them in CLIPTextModelWithProjection, SDXL's second tower
PROJECTION_NAMES = {
    "text_projection.weight": "text_projection",  # transposed, too
}

# transformers' CLIPModel, but for its text tower -> open_clip's CLIP
CLIP_NAMES = {
    "logit_scale": "logit_scale",
    "text_projection.weight": "text_projection",  # transposed, too
    "visual_projection.weight": "visual.proj",  # transposed, too
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.{p}": "visual.ln_pre.{p}",  # [sic]
    "vision_model.encoder.layers.{i}.layer_norm1.{p}": "visual.transformer.resblocks.{i}.ln_1.{p}",
    "vision_model.encoder.layers.{i}.self_attn.{qkv}_proj.{p}": (
        "visual.transformer.resblocks.{i}.attn.in_proj_{p}"
    ),
    "vision_model.encoder.layers.{i}.self_attn.out_proj.{p}": (
        "visual.transformer.resblocks.{i}.attn.out_proj.{p}"
    ),
    "vision_model.encoder.layers.{i}.layer_norm2.{p}": "visual.transformer.resblocks.{i}.ln_2.{p}",
    "vision_model.encoder.layers.{i}.mlp.fc1.{p}": "visual.transformer.resblocks.{i}.mlp.c_fc.{p}",
    "vision_model.encoder.layers.{i}.mlp.fc2.{p}": (
        "visual.transformer.resblocks.{i}.mlp.c_proj.{p}"
    ),
    "vision_model.post_layernorm.{p}": "visual.ln_post.{p}",
}

# ImageReward's BLIP -> spin/eval/blip.py, which is made of torch's own transformer layers
BLIP_NAMES = {
    # the head's five linear layers, multiplied out
    "head.{p}": "head.{p}",
    # the vision transformer, {v}
    "blip.visual_encoder.cls_token": "cls_token",
    "blip.visual_encoder.pos_embed": "pos_embed",
    "blip.visual_encoder.patch_embed.proj.{p}": "patch_embed.{p}",
    "blip.visual_encoder.blocks.{v}.norm1.{p}": "blocks.{v}.norm1.{p}",
    "blip.visual_encoder.blocks.{v}.attn.qkv.{p}": "blocks.{v}.self_attn.in_proj_{p}",
    "blip.visual_encoder.blocks.{v}.attn.proj.{p}": "blocks.{v}.self_attn.out_proj.{p}",
    "blip.visual_encoder.blocks.{v}.norm2.{p}": "blocks.{v}.norm2.{p}",
    "blip.visual_encoder.blocks.{v}.mlp.fc1.{p}": "blocks.{v}.linear1.{p}",
    "blip.visual_encoder.blocks.{v}.mlp.fc2.{p}": "blocks.{v}.linear2.{p}",
    "blip.visual_encoder.norm.{p}": "norm.{p}",
    # BERT, {t}: its embeddings
    "blip.text_encoder.embeddings.word_embeddings.weight": "word_embeddings.weight",
    "blip.text_encoder.embeddings.position_embeddings.weight": "position_embeddings.weight",
    "blip.text_encoder.embeddings.LayerNorm.{p}": "embeddings_norm.{p}",
    # attention to the prompt
    "blip.text_encoder.encoder.layer.{t}.attention.self.{query}.{p}": (
        "layers.{t}.self_attn.in_proj_{p}"
    ),
    "blip.text_encoder.encoder.layer.{t}.attention.output.dense.{p}": (
        "layers.{t}.self_attn.out_proj.{p}"
    ),
    "blip.text_encoder.encoder.layer.{t}.attention.output.LayerNorm.{p}": "layers.{t}.norm1.{p}",
    # attention to the image, whose channels differ: torch keeps these weights apart
    "blip.text_encoder.encoder.layer.{t}.crossattention.self.query.weight": (
        "layers.{t}.multihead_attn.q_proj_weight"
    ),
    "blip.text_encoder.encoder.layer.{t}.crossattention.self.key.weight": (
        "layers.{t}.multihead_attn.k_proj_weight"
    ),
    "blip.text_encoder.encoder.layer.{t}.crossattention.self.value.weight": (
        "layers.{t}.multihead_attn.v_proj_weight"
    ),
    "blip.text_encoder.encoder.layer.{t}.crossattention.self.{query}.bias": (
        "layers.{t}.multihead_attn.in_proj_bias"
    ),
    "blip.text_encoder.encoder.layer.{t}.crossattention.output.dense.{p}": (
        "layers.{t}.multihead_attn.out_proj.{p}"
    ),
    "blip.text_encoder.encoder.layer.{t}.crossattention.output.LayerNorm.{p}": (
        "layers.{t}.norm2.{p}"
    ),
    # the feed-forward layers
    "blip.text_encoder.encoder.layer.{t}.intermediate.dense.{p}": "layers.{t}.linear1.{p}",
    "blip.text_encoder.encoder.layer.{t}.output.dense.{p}": "layers.{t}.linear2.{p}",
    "blip.text_encoder.encoder.layer.{t}.output.LayerNorm.{p}": "layers.{t}.norm3.{p}",
}

# Parts of names in a VAE's attention: of older diffusers, as in the published SD-1.5 -> today's.
OLD_VAE_NAMES = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}

# The three tables below lead from diffusers' names to those of the original single-file layout.

# beginnings of names in the UNet, outside of its down and up blocks, whose numbers are computed
ORIGINAL_UNET_NAMES = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",  # 1 is an activation
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",  # 1 is an activation
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",  # 1 is an activation
}

# layers of the UNet's residual blocks; the numbers between them are activations and a dropout
ORIGINAL_RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

# parts of names in the VAE, replaced from the first to the last
ORIGINAL_VAE_NAMES = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.attentions.0.to_q": "mid.attn_1.q",
    "mid_block.attentions.0.to_k": "mid.attn_1.k",
    "mid_block.attentions.0.to_v": "mid.attn_1.v",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
    ".resnets.": ".block.",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
}


def replace_parts(name: str, table: dict[str, str]) -> str:
    """Return `name` with every key of `table` replaced by its value, from the first to the last."""
    for part, replacement in table.items():
        name = name.replace(part, replacement)
    return name


def text_names(config: dict, projects: bool = False) -> NameMap:
    """Return the names of a text tower's tensors.

    config:   the contents of its config.json
    projects: whether it has a projection
    """
    table = {**TEXT_NAMES, **PROJECTION_NAMES} if projects else TEXT_NAMES
    return expand_names(table, i=config["num_hidden_layers"])


def transpose_projection(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a text tower's tensors by transformers' names, with the projection transposed.

    It multiplies from the left in transformers, and from the right in open_clip.
    """
    transposed = dict(tensors)
    for name in PROJECTION_NAMES:
        if name in tensors:
            transposed[name] = tensors[name].T.contiguous()  # equal bits from either layout
    return transposed


def add_text_prefix(name: str) -> str:
    """Return the name that transformers stores a tensor of a text tower under."""
    return name if name in PROJECTION_NAMES else f"text_model.{name}"


def expand_names(table: dict[str, str], **layers: int) -> NameMap:
    """Expand a table into one entry per tensor of the network.

    layers: the number of layers that each letter of the table stands for, for example i=12
    """
    replacements = {"{p}": ["weight", "bias"]}
    for letter, count in layers.items():
        replacements["{" + letter + "}"] = [str(number) for number in range(count)]

    pairs = list(table.items())
    for placeholder, values in replacements.items():
        pairs = expand_placeholder(pairs, placeholder, values)
    return [(expand_fused(published), ours) for published, ours in pairs]


def expand_placeholder(
    pairs: list[tuple[str, str]], placeholder: str, values: list[str]
) -> list[tuple[str, str]]:
    """Replace each pair of names that holds `placeholder` by one pair per value."""
    expanded = []
    for published, ours in pairs:
        if placeholder not in ours:
            expanded.append((published, ours))
            continue
        for value in values:
            pair = (published.replace(placeholder, value), ours.replace(placeholder, value))
            expanded.append(pair)
    return expanded


def expand_fused(published: str) -> list[str]:
    """Return the names behind a published one: three for queries, keys and values, else itself."""
    for placeholder, parts in FUSED.items():
        if placeholder in published:
            return [published.replace(placeholder, part) for part in parts]
    return [published]


def fuse(tensors: dict[str, Tensor], names: NameMap) -> dict[str, Tensor]:
    """Return a checkpoint's tensors under our names, rows of the same tensor put together."""
    fused = {}
    for published, ours in names:
        parts = [tensors[name] for name in published]
        fused[ours] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return fused


def unfuse(state: dict[str, Tensor], names: NameMap) -> dict[str, Tensor]:
    """Return our tensors under their published names: the inverse of `fuse`.

    Tensors that are missing in `state` are missing in the result; those not in `names` as well.
    """
    tensors = {}
    for published, ours in names:
        if ours not in state:
            continue
        if len(published) == 1:
            tensors[published[0]] = state[ours]
        else:
            tensors.update(zip(published, state[ours].chunk(len(published))))
    return tensors
