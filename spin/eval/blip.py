"""BLIP as ImageReward has it: a vision transformer, and a BERT that reads the prompt while it looks at the picture.
Architecture: arXiv 2201.12086; as a reward: arXiv 2304.05977. The blocks are torch's own; names.json has the published
names of their tensors."""

import re
import unicodedata

import torch
from torch import Tensor, nn

LENGTH = 35  # tokens of a prompt, the first and the last included
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's answers on what it was trained on


class ImageReward(nn.Module):
    """How much people would like a picture for a prompt: about 0 +- 1. vision, text: sizes, as in scorers.json."""

    def __init__(self, vision: dict, text: dict):
        super().__init__()
        seen, said, patch = vision["hidden_size"], text["hidden_size"], vision["patch_size"]
        self.patch_embed = nn.Conv2d(3, seen, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, seen))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (vision["image_size"] // patch) ** 2, seen))
        self.blocks = stack(nn.TransformerEncoderLayer, vision, 1e-6, norm_first=True)
        self.norm = nn.LayerNorm(seen, eps=1e-6)

        self.word_embeddings = nn.Embedding(text["vocab_size"], said)
        self.position_embeddings = nn.Embedding(text["max_position_embeddings"], said)
        self.embeddings_norm = nn.LayerNorm(said, eps=1e-12)
        self.layers = stack(nn.TransformerDecoderLayer, text, 1e-12)
        heads = text["num_attention_heads"]
        for layer in self.layers:  # its second attention looks at the picture
            layer.multihead_attn = nn.MultiheadAttention(said, heads, kdim=seen, vdim=seen, batch_first=True)
        self.head = nn.Linear(said, 1)

    def look(self, images: Tensor) -> Tensor:
        """[B,3,H,W], normalised -> image tokens [B,1+HW/P^2,D]."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def read(self, ids: Tensor, image_tokens: Tensor) -> Tensor:
        """ids [B,L], 0 where there is no token -> the first token's state, [B,D]."""
        x = self.embeddings_norm(self.word_embeddings(ids) + self.position_embeddings.weight[: ids.shape[1]])
        for layer in self.layers:
            x = layer(x, image_tokens, tgt_key_padding_mask=ids == 0)
        return x[:, 0]

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """-> rewards [B]."""
        return (self.head(self.read(ids, self.look(images)))[:, 0] - MEAN) / STD


def stack(kind: type[nn.Module], config: dict, eps: float, **more) -> nn.ModuleList:
    """Of torch's transformer layers, with exact GELU and without dropout."""
    sizes = {"d_model": config["hidden_size"], "nhead": config["num_attention_heads"], "layer_norm_eps": eps}
    sizes |= {"dim_feedforward": config["intermediate_size"], "activation": "gelu", "dropout": 0.0}
    return nn.ModuleList([kind(**sizes, **more, batch_first=True) for _ in range(config["num_hidden_layers"])])


class WordPiece:
    """BERT's lower-cased tokenizer: prompts -> ids [B,LENGTH], padded with 0. vocab: the lines of its vocab.txt.
    Accents are dropped; punctuation and Chinese characters are words of their own. A word is cut, from the left, into
    the longest pieces there are, all but the first marked with ##; where that fails it is [UNK]. ValueError for a
    vocabulary without BERT's special tokens."""

    SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # written out in a prompt, they stand for themselves

    def __init__(self, vocab: list[str]):
        self.ids = {token: i for i, token in enumerate(vocab)}
        if missing := [token for token in self.SPECIAL if token not in self.ids]:
            raise ValueError(f"lacks {', '.join(missing)}")

    def __call__(self, prompts: list[str]) -> Tensor:
        ids = torch.zeros((len(prompts), LENGTH), dtype=torch.long)
        for row, prompt in zip(ids, prompts):
            pieces = [piece for word in self.words(prompt) for piece in self.pieces(word)]
            pieces = ["[CLS]", *pieces[: LENGTH - 2], "[SEP]"]
            row[: len(pieces)] = torch.tensor([self.ids[piece] for piece in pieces])
        return ids

    def words(self, prompt: str) -> list[str]:
        found = []
        for part in re.split(r"(\[(?:PAD|UNK|CLS|SEP|MASK)\])", prompt):
            text = [c for c in part if c in "\t\n\r" or unicodedata.category(c)[0] != "C" and c != "\ufffd"]
            text = "".join(f" {c} " if "IDEOGRAPH" in unicodedata.name(c, "") else c for c in text)
            text = [c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn"]
            spaced = "".join(f" {c} " if punctuation(c) else c for c in text).split()
            found += [part] if part in self.SPECIAL else spaced
        return found

    def pieces(self, word: str) -> list[str]:
        found, at = [], 0
        while at < len(word) <= 100:
            cuts = ((end, "##" * (at > 0) + word[at:end]) for end in range(len(word), at, -1))
            at, piece = next(((end, piece) for end, piece in cuts if piece in self.ids), (len(word), None))
            found.append(piece)
        return found if found and None not in found else ["[UNK]"]


def punctuation(c: str) -> bool:
    return unicodedata.category(c)[0] == "P" or c in "$+<=>^`|~"
