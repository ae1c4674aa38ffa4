"""The folder tokenizer/ of a checkpoint.

    vocab.json, merges.txt    the vocabulary
    tokenizer.json            the vocabulary again, or in place of the two
    tokenizer_config.json     special tokens, length
    special_tokens_map.json   special tokens
    added_tokens.json         tokens beyond the vocabulary, which are refused

Where the files disagree, the one that transformers obeys counts.
"""

from pathlib import Path

from spin.checkpoint.tensors import first_five
from spin.infra.errors import InputError
from spin.infra.files import atomic_write, read_json, read_text, write_json
from spin.text import BOS, EOS, Tokenizer

# Settings that must have this value if they are there. Any other value would give other ids.
EXPECTED = {
    "bos_token": BOS,
    "eos_token": EOS,
    "unk_token": EOS,
    "padding_side": "right",
    "truncation_side": "right",
    "split_special_tokens": False,  # would read a written-out special token as plain text
}

# the files that may be read
FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)

# From here on, a model_max_length says that there is no limit: transformers writes 1e30.
NO_LIMIT = 10**20


# ---- Reading -------------------------------------------------------------------------------------
def clip_tokenizer(text_config: dict) -> Tokenizer:
    """Return CLIP's own tokenizer, which pads as a text tower was trained.

    text_config: the tower's config
    """
    return Tokenizer(None, usual_pad_token(text_config), max_length(text_config))


def usual_pad_token(text_config: dict) -> str:
    """Return "!" for OpenCLIP's tower, in SD-2.x, and the end token for OpenAI's, in SD-1.x.

    The activation tells them apart, as it does when they run.
    """
    return "!" if text_config.get("hidden_act") == "gelu" else EOS


def max_length(text_config: dict) -> int:
    """Return how many tokens a text tower has positions for."""
    return text_config.get("max_position_embeddings", 77)


def read_tokenizer(folder: Path, text_config: dict) -> Tokenizer:
    """Return the tokenizer of a folder, or CLIP's own vocabulary if it holds none.

    text_config: of the text tower that the tokenizer belongs to

    Raises InputError if it is not a tokenizer like CLIP's, or if tokens were added to it.
    """
    whole = read_json_if_any(folder / "tokenizer.json")
    merges, vocab = read_merges_and_vocab(folder, whole)
    # A vocabulary without a pad token is padded with the end token, as in transformers. Without a
    # vocabulary there is no rule of transformers: pad as the text tower was trained.
    default_pad_token = usual_pad_token(text_config) if vocab is None else EOS
    try:
        settings = read_settings(folder, whole)
        pad_token = token_text(settings.get("pad_token", default_pad_token))
        length = read_length(settings, max_length(text_config))
        tokenizer = Tokenizer(merges, pad_token, length)
        added = read_added_tokens(folder, whole, settings)
    except InputError:  # a ValueError, too, but its message is ready
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: not a tokenizer like CLIP's: {error}") from None

    check_added_tokens(added, pad_token, folder)
    if vocab is not None:
        check_vocab(vocab, tokenizer, folder)
    return tokenizer


def check_added_tokens(added: list[str], pad_token: str, folder: Path) -> None:
    """Raise InputError if a token was added to CLIP's."""
    foreign = [token for token in added if token not in (BOS, EOS, pad_token)]
    if foreign:
        message = f"has special or added tokens besides CLIP's ({first_five(foreign)})"
        advice = "as after textual inversion, which is not supported: use the model without them"
        raise InputError(f"{folder}: {message}, {advice}")


def check_vocab(vocab: dict[str, int], tokenizer: Tokenizer, folder: Path) -> None:
    """Raise InputError unless a stored vocabulary is the one that the tokenizer's merges make."""
    if vocab != tokenizer.vocab:
        tokens = sorted(vocab.keys() | tokenizer.vocab.keys())
        different = [token for token in tokens if vocab.get(token) != tokenizer.vocab.get(token)]
        message = "its vocabulary does not follow from its merges, as CLIP's does"
        raise InputError(f"{folder}: {message}: {first_five(different)}")


def read_merges_and_vocab(
    folder: Path, whole: dict
) -> tuple[list[str] | None, dict[str, int] | None]:
    """Return a tokenizer's merges, "a b" each, and its vocabulary, or None for both.

    whole: the contents of tokenizer.json

    Raises InputError if the two places differ: which of them counts depends on the version of
    transformers.
    """
    stated = []
    if (folder / "merges.txt").exists() or (folder / "vocab.json").exists():
        lines = read_text(folder / "merges.txt").split("\n")
        if lines[0].startswith("#version"):
            lines = lines[1:]
        # An empty line, such as the last one, would count as a merge and shift the ids of the
        # special tokens.
        merges = [line for line in lines if line.strip()]
        stated.append((merges, read_json(folder / "vocab.json")))

    path = folder / "tokenizer.json"
    if path.exists():
        try:
            model = whole["model"]
            # newer versions write ["a", "b"], older ones "a b"
            merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
            stated.append((merges, dict(model["vocab"])))
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{path}: no model.vocab and model.merges as CLIP's has") from None

    if len(stated) == 2 and stated[0] != stated[1]:
        message = "differs from vocab.json and merges.txt; delete those that are wrong"
        raise InputError(f"{path}: {message}")
    return stated[0] if stated else (None, None)


def read_settings(folder: Path, whole: dict) -> dict:
    """Return what a tokenizer's files say besides its vocabulary.

    whole: the contents of tokenizer.json. Only the sides at which it pads and cuts are used, as in
           transformers.

    special_tokens_map.json overrides tokenizer_config.json, unless the latter lists its tokens by
    id (added_tokens_decoder): transformers 4.34 and later, which write such lists, then ignore the
    former. A setting that is null states nothing.

    Raises ValueError if a setting has another value than in EXPECTED.
    """
    settings = {}
    for part in ("padding", "truncation"):
        if whole.get(part) is not None:
            settings[f"{part}_side"] = whole[part]["direction"].lower()
    settings.update(read_stated(folder / "tokenizer_config.json"))
    if "added_tokens_decoder" not in settings:
        settings.update(read_stated(folder / "special_tokens_map.json"))

    for key, expected in EXPECTED.items():
        value = token_text(settings.get(key, expected))
        if value != expected:
            raise ValueError(f"{key} is {value!r}, must be {expected!r}")
    return settings


def read_length(settings: dict, positions: int) -> int:
    """Return how many tokens a prompt is padded and cut to.

    positions: as many as the text tower has, which is the length if the settings state none

    Raises ValueError if it is not a number of tokens that the tower can read.
    """
    length = settings.get("model_max_length")
    is_number = isinstance(length, (int, float))
    if length is None or (is_number and length >= NO_LIMIT):
        return positions
    if not isinstance(length, int) or not 2 < length <= positions:
        message = f"model_max_length is {length!r}, the text encoder has {positions} positions"
        raise ValueError(message)
    return length


def read_added_tokens(folder: Path, whole: dict, settings: dict) -> list[str]:
    """Return the tokens that the files list besides the vocabulary, special ones and others."""
    added = []
    for key, value in settings.items():
        # not a switch such as add_bos_token
        if key.endswith("_token") and isinstance(value, (str, dict)):
            added.append(value)
    added += settings.get("additional_special_tokens") or []
    added += settings.get("extra_special_tokens") or []
    added += settings.get("added_tokens_decoder", {}).values()
    added += read_json_if_any(folder / "added_tokens.json")
    added += whole.get("added_tokens") or []
    return [str(token_text(token)) for token in added]


def token_text(token: str | dict) -> str:
    """Return the text of a token, which may be stated as an object with its properties."""
    if isinstance(token, dict):
        return token["content"]
    return token


def read_stated(path: Path) -> dict:
    """Return the settings in a file that are not null; {} if there is no such file."""
    return {key: value for key, value in read_json_if_any(path).items() if value is not None}


def read_json_if_any(path: Path) -> dict:
    """Return the JSON object in a file, or an empty one if there is no such file."""
    if not path.exists():
        return {}
    return read_json(path)


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
