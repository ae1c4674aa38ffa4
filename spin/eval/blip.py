"""BLIP as ImageReward uses it: a vision transformer, and a BERT that attends to the image.

Architecture: arXiv 2201.12086; as a reward: arXiv 2304.05977. The layers are torch's own;
spin/checkpoint/names.py maps the published names of their tensors.
"""

import re
import unicodedata

import torch
from torch import Tensor, nn

LENGTH = 35  # tokens of a prompt, the first and the last included

# Mean and standard deviation of the head's output on ImageReward's own training data.
MEAN = 0.16717362830052426
STD = 1.0333394966054072


class ImageReward(nn.Module):
    """Predicts how much people like an image for a prompt: about 0 +- 1.

    vision, text: sizes of the two networks, as VISION and TEXT in scorers.py.
    """

    def __init__(self, vision: dict, text: dict):
        super().__init__()
        vision_width = vision["hidden_size"]
        patch = vision["patch_size"]
        patches = (vision["image_size"] // patch) ** 2
        self.patch_embed = nn.Conv2d(3, vision_width, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, vision_width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, vision_width))
        self.blocks = make_layers(nn.TransformerEncoderLayer, vision, eps=1e-6, norm_first=True)
        self.norm = nn.LayerNorm(vision_width, eps=1e-6)

        width = text["hidden_size"]
        heads = text["num_attention_heads"]
        self.word_embeddings = nn.Embedding(text["vocab_size"], width)
        self.position_embeddings = nn.Embedding(text["max_position_embeddings"], width)
        self.embeddings_norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = make_layers(nn.TransformerDecoderLayer, text, eps=1e-12, norm_first=False)
        for layer in self.layers:  # the second attention is over image tokens, of another width
            layer.multihead_attn = nn.MultiheadAttention(
                width, heads, kdim=vision_width, vdim=vision_width, batch_first=True
            )
        self.head = nn.Linear(width, 1)

    def encode_images(self, images: Tensor) -> Tensor:
        """Return the image tokens [B,1+HW/P^2,D] of normalized images [B,3,H,W]; P: patch size."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        cls_token = self.cls_token.expand(len(patches), -1, -1)
        x = torch.cat([cls_token, patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def encode_prompts(self, ids: Tensor, image_tokens: Tensor) -> Tensor:
        """Return the first token's state [B,D] for ids [B,L]; id 0 is padding."""
        positions = self.position_embeddings.weight[: ids.shape[1]]
        x = self.embeddings_norm(self.word_embeddings(ids) + positions)
        for layer in self.layers:
            x = layer(x, image_tokens, tgt_key_padding_mask=ids == 0)
        return x[:, 0]

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """Return the rewards [B] of images [B,3,H,W] for prompts' ids [B,L]."""
        state = self.encode_prompts(ids, self.encode_images(images))
        return (self.head(state)[:, 0] - MEAN) / STD


def make_layers(
    kind: type[nn.Module], sizes: dict, eps: float, norm_first: bool
) -> nn.ModuleList:
    """Return a stack of torch's transformer layers, with exact GELU and without dropout."""
    layers = []
    for _ in range(sizes["num_hidden_layers"]):
        layer = kind(
            d_model=sizes["hidden_size"],
            nhead=sizes["num_attention_heads"],
            dim_feedforward=sizes["intermediate_size"],
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=eps,
            norm_first=norm_first,
            batch_first=True,
        )
        layers.append(layer)
    return nn.ModuleList(layers)


class WordPiece:
    """BERT's lower-cased tokenizer: prompts -> ids [B,LENGTH], padded with 0.

    Accents are dropped; punctuation and Chinese characters are words of their own.
    vocab: the lines of its vocab.txt. Raises ValueError if BERT's special tokens are not in it.
    """

    SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # a prompt may contain them, too

    def __init__(self, vocab: list[str]):
        self.ids = {token: i for i, token in enumerate(vocab)}
        missing = [token for token in self.SPECIAL if token not in self.ids]
        if missing:
            raise ValueError(f"lacks {', '.join(missing)}")

    def __call__(self, prompts: list[str]) -> Tensor:
        ids = torch.zeros((len(prompts), LENGTH), dtype=torch.long)
        for row, prompt in zip(ids, prompts):
            pieces = []
            for word in self.words(prompt):
                pieces += self.pieces(word)
            tokens = ["[CLS]", *pieces[: LENGTH - 2], "[SEP]"]
            row[: len(tokens)] = torch.tensor([self.ids[token] for token in tokens])
        return ids

    def words(self, prompt: str) -> list[str]:
        """Split a prompt into words and special tokens."""
        words = []
        for part in re.split(r"(\[(?:PAD|UNK|CLS|SEP|MASK)\])", prompt):
            if part in self.SPECIAL:
                words.append(part)
            else:
                words += split_words(part)
        return words

    def pieces(self, word: str) -> list[str]:
        """Split a word, from the left, into the longest pieces that the vocabulary has.

        All but the first are marked with "##". Return ["[UNK]"] where that fails.
        """
        if len(word) > 100:  # BERT's own limit
            return ["[UNK]"]
        pieces = []
        start = 0
        while start < len(word):
            mark = "##" if start > 0 else ""
            end = len(word)
            while end > start and mark + word[start:end] not in self.ids:
                end -= 1
            if end == start:
                return ["[UNK]"]
            pieces.append(mark + word[start:end])
            start = end
        return pieces


def split_words(text: str) -> list[str]:
    """Return the lower-cased words of a text, without accents."""
    visible = [c for c in text if not is_control(c)]
    spaced = "".join(f" {c} " if is_chinese(c) else c for c in visible)
    decomposed = unicodedata.normalize("NFD", spaced.lower())
    unaccented = [c for c in decomposed if unicodedata.category(c) != "Mn"]
    separated = "".join(f" {c} " if is_punctuation(c) else c for c in unaccented)
    return separated.split()


def is_control(c: str) -> bool:
    if c in "\t\n\r":
        return False
    return unicodedata.category(c).startswith("C") or c == "\ufffd"


def is_chinese(c: str) -> bool:
    return "IDEOGRAPH" in unicodedata.name(c, "")


def is_punctuation(c: str) -> bool:
    return unicodedata.category(c).startswith("P") or c in "$+<=>^`|~"
