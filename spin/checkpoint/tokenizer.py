"""The folder tokenizer/ of a checkpoint: vocab.json and merges.txt, or tokenizer.json alone."""

from pathlib import Path

from spin.checkpoint.tensors import first_five
from spin.infra.errors import InputError
from spin.infra.files import atomic_write, read_json, read_text, write_json
from spin.text import BOS, EOS, Tokenizer


# ---- Reading -------------------------------------------------------------------------------------
def read_tokenizer(folder: Path, length: int = 77) -> Tokenizer:
    """Return the tokenizer of a folder, or CLIP's own if there is none.

    length: tokens per prompt

    Raises InputError if it is not a tokenizer like CLIP's.
    """
    merges, vocab = read_merges_and_vocab(folder)
    try:
        tokenizer = Tokenizer(merges, read_pad_token(folder), length)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: not a tokenizer like CLIP's: {error}") from None
    if vocab is not None and vocab != tokenizer.vocab:
        tokens = sorted(vocab.keys() | tokenizer.vocab.keys())
        different = [token for token in tokens if vocab.get(token) != tokenizer.vocab.get(token)]
        message = "its vocabulary does not follow from its merges, as CLIP's does"
        raise InputError(f"{folder}: {message}: {first_five(different)}")
    return tokenizer


def read_merges_and_vocab(folder: Path) -> tuple[list[str] | None, dict[str, int] | None]:
    """Return a tokenizer's merges, "a b" each, and its vocabulary, or None for both."""
    if (folder / "merges.txt").exists() or (folder / "vocab.json").exists():
        lines = read_text(folder / "merges.txt").split("\n")
        if lines[0].startswith("#version"):
            lines = lines[1:]
        # An empty line, such as the last one, would count as a merge and shift the ids of the
        # special tokens.
        merges = [line for line in lines if line.strip()]
        return merges, read_json(folder / "vocab.json")

    path = folder / "tokenizer.json"
    if path.exists():
        content = read_json(path)
        try:
            model = content["model"]
            # newer versions write ["a", "b"], older ones "a b"
            merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
            return merges, model["vocab"]
        except (KeyError, TypeError):
            raise InputError(f"{path}: no model.vocab and model.merges as CLIP's has") from None

    return None, None


def read_pad_token(folder: Path) -> str:
    """Return the token that fills short prompts; the end token if the folder does not say."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if not (folder / name).exists():
            continue
        token = read_json(folder / name).get("pad_token")
        if isinstance(token, dict):
            return token["content"]
        if token is not None:
            return token
    return EOS


# ---- Writing -------------------------------------------------------------------------------------
def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    write_json(folder / "vocab.json", tokenizer.vocab)
    with atomic_write(folder / "merges.txt") as temporary:
        # no newline at the end: it would count as a merge
        lines = ["#version: 0.2", *tokenizer.merges]
        temporary.write_text("\n".join(lines), encoding="utf-8")

    special_tokens = {
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": EOS,
        "pad_token": tokenizer.pad_token,
    }
    config = dict(special_tokens)
    config["tokenizer_class"] = "CLIPTokenizer"
    config["model_max_length"] = tokenizer.length  # without it, diffusers pads to 1e30 tokens
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special_tokens)
