"""Prompts -> token ids -> context, with the text tower and the byte-pair encoding of open_clip.

open_clip is imported when a text encoder is built: importing it takes seconds.
"""

import gzip
import re
import tempfile
import unicodedata
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


class Tokenizer:
    """CLIP's lower-cased byte-pair encoding: prompts -> ids, cut to `length` and padded with `pad_token`.

    merges: the pairs in order of rank, "a b" each; None for CLIP's own 48,894.
    pad_token: SD-1.x pads with the end token (49407), SD-2.x with "!" (0).
    Ids follow from the merges: 256 bytes, 256 bytes that end a word, one token a merge, start, end.
    """

    def __init__(self, merges: list[str] | None = None, pad_token: str = EOS, length: int = 77):
        from open_clip.tokenizer import SimpleTokenizer

        if merges is None:
            self.bpe = SimpleTokenizer()
        else:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "merges.txt.gz")  # SimpleTokenizer takes its merges from such a file alone
                path.write_bytes(gzip.compress("\n".join(["#version: 0.2", *merges]).encode()))
                self.bpe = SimpleTokenizer(str(path))
        self.bpe.clean_fn = clean
        self.merges = [" ".join(pair) for pair in self.bpe.bpe_ranks]
        self.vocab = {{"<start_of_text>": BOS, "<end_of_text>": EOS}.get(t, t): i for t, i in self.bpe.encoder.items()}
        if pad_token not in self.vocab:
            raise ValueError(f"pad token {pad_token!r} is not in the tokenizer's vocabulary")
        self.pad_token, self.length = pad_token, length
        # written out in a prompt, a special token stands for itself. The pad token counts as one, as it does in
        # transformers: under SD-2.x every "!" becomes the pad id
        self.specials = re.compile("(" + "|".join(map(re.escape, sorted({BOS, EOS, pad_token}))) + ")")

    def encode(self, prompt: str) -> list[int]:
        """The ids of one prompt, bare: no start, end, cut or padding."""
        ids = []
        for i, part in enumerate(self.specials.split(prompt)):
            ids += [self.vocab[part]] if i % 2 else self.bpe.encode(part)
        return ids

    def __call__(self, prompts: list[str]) -> Tensor:
        """int64 [B,length]."""
        ids = torch.full((len(prompts), self.length), self.vocab[self.pad_token])
        for row, prompt in zip(ids, prompts):
            tokens = [self.vocab[BOS], *self.encode(prompt)[: self.length - 2], self.vocab[EOS]]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids


def clean(text: str) -> str:
    """Composed Unicode, single spaces, lower case: what transformers' CLIPTokenizer does before it splits words."""
    return "".join(letter.lower() for letter in " ".join(unicodedata.normalize("NFC", text).split()))


class TextEncoder(nn.Module):
    """CLIP's text tower up to its final norm. config: transformers' text_encoder/config.json; sizes come from it.

    forward(prompts, B of them) -> context [B,77,D]. ValueError for an activation it does not know.
    """

    def __init__(self, config: dict, tokenizer: Tokenizer):
        super().__init__()
        from open_clip.transformer import QuickGELU, TextTransformer

        self.config, self.tokenizer = dict(config), tokenizer
        activations = {"quick_gelu": QuickGELU, "gelu": nn.GELU}  # OpenAI's tower, and OpenCLIP's in SD-2.x
        activation = config.get("hidden_act", "quick_gelu")
        if activation not in activations:
            raise ValueError(f"hidden_act is {activation!r}: only {' and '.join(activations)} are known")
        self.tower = TextTransformer(
            context_length=config.get("max_position_embeddings", 77),
            vocab_size=config["vocab_size"],
            width=config["hidden_size"],
            heads=config["num_attention_heads"],
            layers=config["num_hidden_layers"],
            mlp_ratio=config["intermediate_size"] / config["hidden_size"],
            act_layer=activations[activation],
            output_dim=None,  # no projection: the UNet reads the tokens themselves
        )
        self.tower.attn_mask = None  # made where it is used: a buffer that no checkpoint holds cannot be loaded

    def forward(self, prompts: list[str]) -> Tensor:
        return self.encode_ids(self.tokenizer(prompts).to(self.tower.positional_embedding.device))

    def encode_ids(self, ids: Tensor) -> Tensor:
        """ids [B,77] -> [B,77,D]. Each token sees those before it, so padding reaches no real token."""
        tower = self.tower
        x = tower.token_embedding(ids) + tower.positional_embedding[: ids.shape[1]]
        mask = torch.full((ids.shape[1],) * 2, float("-inf"), device=ids.device).triu(1).to(x.dtype)
        return tower.ln_final(tower.transformer(x, attn_mask=mask))


# checkpoint name (transformers' CLIPTextModel, without its prefix "text_model.") -> name in open_clip's tower
NAMES = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
# the same for layer {i}, "encoder.layers.{i}." -> "transformer.resblocks.{i}."; each name stands for .weight and .bias
LAYER_NAMES = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
# and these three are the rows of one matrix, in this order: {checkpoint name}.weight -> attn.in_proj_weight
STACKED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def names(layers: int) -> list[tuple[list[str], str]]:
    """(a checkpoint's names, the one in open_clip's tower that has them as its rows) of every tensor."""
    pairs = [([ours], theirs) for ours, theirs in NAMES.items()]
    for i, p in product(range(layers), ("weight", "bias")):
        ours, theirs = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
        pairs += [([f"{ours}{a}.{p}"], f"{theirs}{b}.{p}") for a, b in LAYER_NAMES.items()]
        pairs += [([f"{ours}{a}.{p}" for a in STACKED], f"{theirs}attn.in_proj_{p}")]
    return pairs


def to_tower(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """A checkpoint's text tensors -> open_clip's."""
    return {theirs: torch.cat([tensors[name] for name in ours]) for ours, theirs in names(layers)}


def from_tower(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """open_clip's tensors -> a checkpoint's: `to_tower` backwards. What is missing there is missing here."""
    found = [(ours, state[theirs]) for ours, theirs in names(layers) if theirs in state]
    return {name: part for ours, tensor in found for name, part in zip(ours, tensor.chunk(len(ours)))}
