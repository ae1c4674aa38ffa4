"""Prompts -> token ids -> context, with the text tower and the byte-pair encoding of open_clip, which is imported when
one of them is built: that takes seconds."""

import gzip
import json
import re
import tempfile
import unicodedata
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# Published names of tensors -> those in a network of ours, of CLIP's text tower (without "text_model."), of the rest of
# CLIP, and of BLIP. {p}: weight and bias; {i}, {t}, {v}: a layer; {qkv}, {query}: three that are the rows of one.
TABLES = json.loads((Path(__file__).parent / "checkpoint" / "names.json").read_text())
STACKED = {"qkv": "qkv", "query": ("query", "key", "value")}
Names = list[tuple[list[str], str]]  # (published names, the one of ours that has them as its rows)


class Tokenizer:
    """CLIP's lower-cased byte-pair encoding: prompts -> ids, cut to `length` and padded with `pad_token`: in SD-1.x the
    end token (49407), in SD-2.x "!" (0). merges: the pairs in order of rank, "a b" each; None for CLIP's own 48,894.
    Ids follow from the merges: 256 bytes, 256 bytes that end a word, one token a merge, start, end."""

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
        # written out in a prompt, these stand for themselves; the pad token too, as in transformers: "!" under SD-2.x
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
    """CLIP's text tower up to its final norm: forward(prompts, B of them) -> context [B,77,D]. config: transformers'
    text_encoder/config.json; sizes come from it. ValueError for an activation it does not know."""

    def __init__(self, config: dict, tokenizer: Tokenizer):
        super().__init__()
        from open_clip.transformer import QuickGELU, TextTransformer

        self.config, self.tokenizer = dict(config), tokenizer
        activations = {"quick_gelu": QuickGELU, "gelu": nn.GELU}  # OpenAI's tower, and OpenCLIP's in SD-2.x
        if (activation := config.get("hidden_act", "quick_gelu")) not in activations:
            raise ValueError(f"hidden_act is {activation!r}: only {' and '.join(activations)} are known")
        sizes = {"context_length": config.get("max_position_embeddings", 77), "vocab_size": config["vocab_size"]}
        sizes |= {"width": config["hidden_size"], "heads": config["num_attention_heads"]}
        sizes |= {"layers": config["num_hidden_layers"], "mlp_ratio": config["intermediate_size"] / sizes["width"]}
        # output_dim: no projection, the UNet reads the tokens themselves
        self.tower = TextTransformer(**sizes, act_layer=activations[activation], output_dim=None)
        self.names = names("text", i=sizes["layers"])  # a checkpoint's
        self.tower.attn_mask = None  # made where it is used: a buffer that no checkpoint holds cannot be loaded

    def forward(self, prompts: list[str]) -> Tensor:
        return self.encode_ids(self.tokenizer(prompts).to(self.tower.positional_embedding.device))

    def encode_ids(self, ids: Tensor) -> Tensor:
        """ids [B,77] -> [B,77,D]. Each token sees those before it, so padding reaches no real token."""
        tower = self.tower
        x = tower.token_embedding(ids) + tower.positional_embedding[: ids.shape[1]]
        mask = torch.full((ids.shape[1],) * 2, float("-inf"), device=ids.device).triu(1).to(x.dtype)
        return tower.ln_final(tower.transformer(x, attn_mask=mask))


def names(table: str, **layers: int) -> Names:
    """Of every tensor: a table written out. layers: how many, under each of its letters."""
    found, ranges = [], {"p": ("weight", "bias")} | {letter: range(n) for letter, n in layers.items()}
    for theirs, ours in TABLES[table].items():
        letters = [letter for letter in ranges if f"{{{letter}}}" in ours]
        stacked = next((kind for kind in STACKED if f"{{{kind}}}" in theirs), None)
        for values in product(*(ranges[letter] for letter in letters)):
            place = dict(zip(letters, values))
            rows = [{stacked: part} for part in STACKED[stacked]] if stacked else [{}]
            found.append(([theirs.format(**place, **row) for row in rows], ours.format(**place)))
    return found


def stack(tensors: dict[str, Tensor], names: Names) -> dict[str, Tensor]:
    """A checkpoint's tensors -> ours."""
    parts = {ours: [tensors[name] for name in theirs] for theirs, ours in names}
    return {name: torch.cat(of) if len(of) > 1 else of[0] for name, of in parts.items()}


def unstack(state: dict[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Our tensors -> a checkpoint's: `stack` backwards. What is missing there is missing here."""
    found = [(theirs, state[ours]) for theirs, ours in names if ours in state]
    parts = [(theirs, tensor.chunk(len(theirs)) if len(theirs) > 1 else [tensor]) for theirs, tensor in found]
    return {name: part for theirs, of in parts for name, part in zip(theirs, of)}
