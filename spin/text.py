"""Prompts -> token ids -> text context: CLIP's byte-pair encoding and CLIP's text tower.

Both come from open_clip. It is imported when one of them is built, since that takes seconds.
"""

import gzip
import re
import tempfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spin.infra.devices import copy_to_device

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"

# what byte-pair encoding takes for a word: an English ending, letters, one digit, or other signs
WORD = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """CLIP's lower-cased byte-pair encoding. tokenizer(prompts) -> ids, int64 [B,length].

    merges:    the pairs to merge, "a b" each, by descending priority; None for CLIP's own 48,894.
               They determine the ids: 256 bytes, 256 bytes that end a word, one token per merge,
               start, end.
    pad_token: fills the row after the end token: the end token itself in SD-1.x (id 49407), "!"
               in SD-2.x (id 0)
    length:    tokens of a row. Longer prompts are cut.

    Raises ValueError if the pad token is not in the vocabulary.
    """

    def __init__(self, merges: list[str] | None = None, pad_token: str = EOS, length: int = 77):
        self.bpe = make_bpe(merges)
        self.merges = [" ".join(pair) for pair in self.bpe.bpe_ranks]
        self.vocab = dict(self.bpe.encoder)
        # the special tokens have other names in open_clip than in checkpoints
        self.vocab[BOS] = self.vocab.pop("<start_of_text>")
        self.vocab[EOS] = self.vocab.pop("<end_of_text>")
        if pad_token not in self.vocab:
            raise ValueError(f"pad token {pad_token!r} is not in the tokenizer's vocabulary")
        self.pad_token = pad_token
        self.length = length
        # A special token that is written out in a prompt stands for itself. So does the pad token,
        # as in transformers: "!" under SD-2.x.
        specials = sorted({BOS, EOS, pad_token})
        self.special_pattern = re.compile("(" + "|".join(map(re.escape, specials)) + ")")

    def encode(self, prompt: str) -> list[int]:
        """Return the ids of one prompt, without start, end and padding, and uncut."""
        ids = []
        for i, part in enumerate(self.special_pattern.split(prompt)):
            is_special = i % 2 == 1  # split() alternates between text and special tokens
            if is_special:
                ids.append(self.vocab[part])
            else:
                ids += self.bpe.encode(part)
        return ids

    def count_cut(self, prompts: Iterable[str]) -> int:
        """Return how many prompts are longer than a row, so that __call__ cuts words off."""
        room = self.length - 2  # without start and end
        count = 0
        for prompt in prompts:
            # A token holds at least one byte: short prompts need no encoding.
            num_bytes = len(clean_text(prompt).encode())
            if num_bytes > room and len(self.encode(prompt)) > room:
                count += 1
        return count

    def __call__(self, prompts: list[str]) -> Tensor:
        ids = torch.full((len(prompts), self.length), self.vocab[self.pad_token])
        for row, prompt in zip(ids, prompts):
            words = self.encode(prompt)[: self.length - 2]
            tokens = [self.vocab[BOS], *words, self.vocab[EOS]]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids


def make_bpe(merges: list[str] | None):
    """Return open_clip's SimpleTokenizer, but with the text cleaning and words of transformers."""
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.tokenizer import re as regex  # the package `regex`, which knows \p{L}

    if merges is None:
        bpe = SimpleTokenizer()
    else:
        # SimpleTokenizer takes merges from a gzipped file only, and skips its first line. A newline
        # at the end would count as one more merge.
        lines = "\n".join(["#version: 0.2", *merges])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "merges.txt.gz")
            path.write_bytes(gzip.compress(lines.encode()))
            bpe = SimpleTokenizer(str(path))
    bpe.clean_fn = clean_text
    # open_clip's pattern ignores case, and takes a written-out <start_of_text> for its start token
    bpe.pat = regex.compile(WORD)
    return bpe


def clean_text(text: str) -> str:
    """Normalize text as transformers' CLIPTokenizer does: NFC, lower case. WORD skips spaces."""
    composed = unicodedata.normalize("NFC", text)
    # letter by letter: lower() of a whole string looks at a letter's neighbors (Greek final sigma)
    return "".join(letter.lower() for letter in composed)


class TextEncoder(nn.Module):
    """CLIP's text tower up to its final norm. text_encoder(prompts) -> context [B,77,D].

    config: the contents of transformers' text_encoder/config.json, which fixes every size.
    projects: whether the tower has a projection of the whole prompt, as SDXL's second has.
    Raises ValueError for an unknown activation.
    """

    def __init__(self, config: dict, tokenizer: Tokenizer, projects: bool = False):
        super().__init__()
        from open_clip.transformer import QuickGELU, TextTransformer

        self.config = dict(config)
        self.tokenizer = tokenizer

        activations = {
            "quick_gelu": QuickGELU,  # OpenAI's tower, in SD-1.x
            "gelu": nn.GELU,  # OpenCLIP's tower, in SD-2.x
        }
        activation = config.get("hidden_act", "quick_gelu")
        if activation not in activations:
            allowed = " or ".join(activations)
            raise ValueError(f"hidden_act is {activation!r}, must be {allowed}")

        self.tower = TextTransformer(
            context_length=config.get("max_position_embeddings", 77),
            vocab_size=config["vocab_size"],
            width=config["hidden_size"],
            heads=config["num_attention_heads"],
            layers=config["num_hidden_layers"],
            mlp_ratio=config["intermediate_size"] / config["hidden_size"],
            act_layer=activations[activation],
            # without a projection, the UNet reads the tokens alone
            output_dim=config["projection_dim"] if projects else None,
        )
        # Made in encode_ids instead: no checkpoint holds this buffer, so it cannot be loaded.
        self.tower.attn_mask = None

    def forward(self, prompts: list[str]) -> Tensor:
        return self.encode_ids(self.tokenize(prompts))

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Return token ids [B,77] on the tower's device."""
        return copy_to_device(self.tokenizer(prompts), self.tower.positional_embedding.device)

    def encode_ids(self, ids: Tensor) -> Tensor:
        """Return the context [B,77,D] of token ids [B,77]."""
        _, last = self.hidden_states(ids)
        return self.tower.ln_final(last)

    def hidden_states(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the last layer reads and what it returns, [B,77,D] each, without final norm.

        Attention is causal, so that padding, which comes last, affects no real token.
        """
        tower = self.tower
        length = ids.shape[1]
        x = tower.token_embedding(ids) + tower.positional_embedding[:length]
        mask = torch.full((length, length), float("-inf"), device=ids.device)
        mask = mask.triu(1).to(x.dtype)  # -inf above the diagonal, else 0
        before_last = x
        for layer in tower.transformer.resblocks:
            before_last = x
            x = layer(x, attn_mask=mask)
        return before_last, x


def encode_for_sdxl(
    first: TextEncoder, second: TextEncoder, prompts: list[str | None], sizes: Tensor
) -> Tensor:
    """Return SDXL's context [B,78,2048]: the tokens of two towers, and the row of other inputs.

    first, second: CLIP ViT-L (768 channels) and OpenCLIP ViT-bigG (1280)
    prompts: None is no prompt, whose text is all zeros; "" is encoded like any other
    sizes: [B,6], see `spin.unet.PooledAndSizesEmbedding`, which reads the last row

    A text encoder whose weights are in lower precision rounds the sizes, as in diffusers. In
    bfloat16, multiples of 8 up to 2048 are exact. Raises ValueError for sizes of another shape.
    """
    if sizes.shape != (len(prompts), 6):
        raise ValueError(f"sizes {list(sizes.shape)}: must be [{len(prompts)},6], a row per prompt")
    texts = [prompt or "" for prompt in prompts]
    tokens, _ = first.hidden_states(first.tokenize(texts))
    ids = second.tokenize(texts)
    more_tokens, last = second.hidden_states(ids)
    # the end token, whose id is the largest, has seen the whole prompt
    end = last[torch.arange(len(ids), device=ids.device), ids.argmax(dim=1)]
    pooled = second.tower.ln_final(end) @ second.tower.text_projection

    tokens = torch.cat([tokens, more_tokens], dim=2)  # [B,77,2048]
    is_prompt = torch.tensor([prompt is not None for prompt in prompts])
    is_prompt = copy_to_device(is_prompt, ids.device)[:, None]
    pooled = pooled.where(is_prompt, 0)
    tokens = tokens.where(is_prompt[:, :, None], 0)
    sizes = copy_to_device(sizes, ids.device)
    row = torch.cat([pooled.to(tokens.dtype), sizes.to(tokens.dtype)], dim=1)  # [B,1286]
    row = F.pad(row, (0, tokens.shape[2] - row.shape[1]))  # [B,2048]
    return torch.cat([tokens, row[:, None]], dim=1)
