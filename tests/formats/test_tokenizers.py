"""Tokenizers: which file counts where two disagree, what is refused, and the ids of prompts.

The order of precedence is what transformers 4.57 and 5.24 were seen to do.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import DATA, write_json

from spin.checkpoint import load_pipeline, save_pipeline
from spin.checkpoint.tokenizer import read_tokenizer
from spin.infra.errors import InputError
from spin.text import BOS, EOS, Tokenizer

MERGES = ["a </w>", "r e", "re d</w>"]  # a vocabulary of 517
PROMPT = "a red fox!"

# all that is asked of a text tower's config
OPENAI = {"hidden_act": "quick_gelu", "max_position_embeddings": 77}  # SD-1.x
OPEN_CLIP = {"hidden_act": "gelu", "max_position_embeddings": 77}  # SD-2.x

CONFIG = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
ADDED = "added_tokens.json"
WHOLE = "tokenizer.json"

# how transformers 4.34 and newer list the special tokens in tokenizer_config.json
LISTED = {
    "49406": {"content": BOS, "normalized": True, "special": True},
    "49407": {"content": EOS, "normalized": True, "special": True},
}


@pytest.fixture(scope="module")
def small_tokenizer() -> Tokenizer:
    return Tokenizer(MERGES)


@pytest.fixture
def small_folder(small_tokenizer, tmp_path) -> Path:
    """The folder tokenizer/ with vocab.json and merges.txt, to be added to."""
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]))
    write_json(tmp_path / "vocab.json", small_tokenizer.vocab)
    return tmp_path


def whole_tokenizer(tokenizer: Tokenizer, **changes) -> dict:
    """Return the contents of tokenizer.json."""
    return {"model": {"vocab": tokenizer.vocab, "merges": tokenizer.merges}, **changes}


def pad_token(folder: Path, text_config: dict = OPENAI) -> str:
    return read_tokenizer(folder, text_config).pad_token


def assert_refused(folder: Path, expected: str) -> None:
    """Assert that reading ends in one line that holds `expected` and names the folder."""
    with pytest.raises(InputError) as error:
        read_tokenizer(folder, OPENAI)
    message = str(error.value)
    assert expected in message
    assert message.startswith(str(folder))
    assert "\n" not in message


# -----------------------------------------------------------------------------
# the vocabulary


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_vocabulary_is_read_from_vocab_and_merges(end, small_tokenizer, small_folder):
    with open(small_folder / "merges.txt", "a") as file:
        file.write(end)
    ids = read_tokenizer(small_folder, OPENAI)([PROMPT])
    assert torch.equal(ids, small_tokenizer([PROMPT]))


@pytest.mark.parametrize("merges", [MERGES, [merge.split() for merge in MERGES]])
def test_a_vocabulary_is_read_from_tokenizer_json_alone(merges, small_tokenizer, tmp_path):
    content = {"model": {"vocab": small_tokenizer.vocab, "merges": merges}}
    write_json(tmp_path / WHOLE, content)
    ids = read_tokenizer(tmp_path, OPENAI)([PROMPT])
    assert torch.equal(ids, small_tokenizer([PROMPT]))


def test_a_vocabulary_may_be_stated_twice_if_both_are_the_same(small_tokenizer, small_folder):
    write_json(small_folder / WHOLE, whole_tokenizer(small_tokenizer))
    ids = read_tokenizer(small_folder, OPENAI)([PROMPT])
    assert torch.equal(ids, small_tokenizer([PROMPT]))


@pytest.mark.parametrize("merges", [MERGES[:2], MERGES[::-1]])
def test_two_vocabularies_that_differ_are_refused(merges, small_folder):
    """transformers 4 reads vocab.json, transformers 5 tokenizer.json."""
    write_json(small_folder / WHOLE, whole_tokenizer(Tokenizer(merges)))
    assert_refused(small_folder, "tokenizer.json: differs from vocab.json and merges.txt")


def test_a_vocabulary_that_its_merges_do_not_make_is_refused(small_tokenizer, small_folder):
    vocab = dict(small_tokenizer.vocab)
    vocab["re"] = 900
    write_json(small_folder / "vocab.json", vocab)
    assert_refused(small_folder, "its vocabulary does not follow from its merges")


def test_ids_follow_from_the_merges():
    tokenizer = Tokenizer(MERGES, length=8)
    vocab = tokenizer.vocab
    assert [vocab["re"], vocab["red</w>"], vocab[BOS], vocab[EOS]] == [513, 514, 515, 516]

    tokens = [BOS, "a</w>", "red</w>", "f", "o", "x</w>", "!</w>", EOS]
    assert tokenizer([PROMPT]).tolist() == [[vocab[token] for token in tokens]]

    [long_row] = tokenizer([PROMPT * 3]).tolist()
    assert len(long_row) == 8
    assert long_row[-1] == vocab[EOS]


@pytest.mark.parametrize(
    "file, content",
    [
        (WHOLE, {"model": None}),
        (WHOLE, {"model": {"vocab": {}, "merges": [1, 2]}}),
        (WHOLE, {"model": {"vocab": ["a", "b"], "merges": []}}),
        (CONFIG, {"pad_token": {}}),
        (CONFIG, {"pad_token": ["!"]}),
        (CONFIG, {"pad_token": "no such token"}),
        (CONFIG, {"added_tokens_decoder": ["!"]}),
        (ADDED, {"": 5}),
        ("vocab.json", {"a": 0}),  # without its merges
    ],
)
def test_impossible_tokenizers_are_refused(file, content, tmp_path):
    write_json(tmp_path / file, content)
    assert_refused(tmp_path, "")


# -----------------------------------------------------------------------------
# the pad token: which file counts


@pytest.mark.parametrize("file", [CONFIG, SPECIAL])
@pytest.mark.parametrize("token", ["!", {"content": "!", "lstrip": False}])
def test_each_file_can_state_the_pad_token(file, token, small_folder):
    write_json(small_folder / file, {"pad_token": token})
    assert pad_token(small_folder) == "!"


@pytest.mark.parametrize("first, second", [("!", EOS), (EOS, "!")])
def test_the_pad_token_of_special_tokens_map_wins(first, second, small_folder):
    """The published files of SD-2.x differ: "!" in the map, the end token in the config."""
    write_json(small_folder / SPECIAL, {"pad_token": first})
    write_json(small_folder / CONFIG, {"pad_token": second})
    assert pad_token(small_folder) == first


@pytest.mark.parametrize("file", [CONFIG, SPECIAL])
def test_a_setting_that_is_null_states_nothing(file, small_folder):
    [other] = {CONFIG, SPECIAL} - {file}
    write_json(small_folder / file, {"pad_token": None, "unk_token": None, "padding_side": None})
    assert pad_token(small_folder) == EOS
    write_json(small_folder / other, {"pad_token": "!"})
    assert pad_token(small_folder) == "!"
    for path in (small_folder / "vocab.json", small_folder / "merges.txt", small_folder / other):
        path.unlink()
    assert pad_token(small_folder, OPEN_CLIP) == "!"


def test_a_config_that_lists_its_tokens_by_id_wins_over_the_map(small_folder):
    """So in transformers since 4.34. Older versions, which did not write such lists, differ."""
    write_json(small_folder / SPECIAL, {"pad_token": "!"})
    write_json(small_folder / CONFIG, {"pad_token": EOS, "added_tokens_decoder": LISTED})
    assert pad_token(small_folder) == EOS


def test_a_pad_token_that_lost_is_plain_text(small_folder):
    write_json(small_folder / SPECIAL, {"pad_token": EOS})
    write_json(small_folder / CONFIG, {"pad_token": "!"})
    tokenizer = read_tokenizer(small_folder, OPENAI)
    assert tokenizer.encode("!") == [tokenizer.vocab["!</w>"]]


def test_the_padding_section_of_tokenizer_json_states_no_pad_token(small_tokenizer, tmp_path):
    padding = {"direction": "Right", "pad_id": 0, "pad_token": "!"}
    write_json(tmp_path / WHOLE, whole_tokenizer(small_tokenizer, padding=padding))
    assert pad_token(tmp_path) == EOS


@pytest.mark.parametrize("text_config", [OPENAI, OPEN_CLIP])
def test_a_vocabulary_without_a_pad_token_is_padded_with_the_end_token(text_config, small_folder):
    assert pad_token(small_folder, text_config) == EOS


def test_without_a_tokenizer_it_is_clips_own_and_pads_as_the_tower_was_trained(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        assert read_tokenizer(folder, OPENAI)(["a"])[0, -1] == 49407
        assert read_tokenizer(folder, OPEN_CLIP)(["a"])[0, -1] == 0
        assert read_tokenizer(folder, {})(["a"]).tolist() == Tokenizer()(["a"]).tolist()


def test_a_folder_like_sd_2_without_its_tokenizer_pads_like_the_single_file(
    tiny2_folder, tmp_path, assert_same_pipelines
):
    folder = Path(shutil.copytree(tiny2_folder, tmp_path / "model"))
    shutil.rmtree(folder / "tokenizer")
    pipe = load_pipeline(folder)
    assert pipe.text_encoder.tokenizer.pad_token == "!"
    assert_same_pipelines(pipe, load_pipeline(tiny2_folder))


def test_a_promoted_model_states_the_same_pad_token_in_both_files(model_copy, tmp_path):
    write_json(model_copy / "tokenizer" / SPECIAL, {"pad_token": "!"})
    write_json(model_copy / "tokenizer" / CONFIG, {"pad_token": EOS, "model_max_length": 77})
    save_pipeline(load_pipeline(model_copy), tmp_path / "saved")
    for file in (SPECIAL, CONFIG):
        saved = json.loads((tmp_path / "saved/tokenizer" / file).read_text())
        assert saved["pad_token"] == "!"
    assert load_pipeline(tmp_path / "saved").text_encoder.tokenizer(["a"])[0, -1] == 0


# -----------------------------------------------------------------------------
# other special tokens and settings


@pytest.mark.parametrize("file", [CONFIG, SPECIAL])
@pytest.mark.parametrize("key", ["bos_token", "eos_token", "unk_token"])
def test_other_special_tokens_than_clips_are_refused(key, file, small_folder):
    write_json(small_folder / file, {key: {"content": "!"}})
    assert_refused(small_folder, f"{key} is '!', must be '<|")


def test_a_special_token_that_the_map_corrects_is_accepted(small_folder):
    write_json(small_folder / CONFIG, {"eos_token": "</s>"})
    write_json(small_folder / SPECIAL, {"eos_token": EOS})
    assert pad_token(small_folder) == EOS


@pytest.mark.parametrize(
    "key, value",
    [("padding_side", "left"), ("truncation_side", "left"), ("split_special_tokens", True)],
)
def test_settings_that_would_give_other_ids_are_refused(key, value, small_folder):
    write_json(small_folder / CONFIG, {key: value})
    assert_refused(small_folder, f"{key} is {value!r}, must be ")


@pytest.mark.parametrize("section", ["padding", "truncation"])
def test_tokenizer_json_may_pad_and_cut_at_the_right_only(section, small_tokenizer, tmp_path):
    content = whole_tokenizer(small_tokenizer)
    content[section] = {"direction": "Right"}
    write_json(tmp_path / WHOLE, content)
    assert pad_token(tmp_path) == EOS
    content[section] = {"direction": "Left"}
    write_json(tmp_path / WHOLE, content)
    assert_refused(tmp_path, f"{section}_side is 'left', must be 'right'")


def test_the_files_of_every_version_of_transformers_are_accepted(small_tokenizer, tmp_path):
    listed = [{"id": 515, "content": BOS}, {"id": 516, "content": EOS}, {"id": 0, "content": "!"}]
    write_json(tmp_path / WHOLE, whole_tokenizer(small_tokenizer, added_tokens=listed))
    write_json(tmp_path / ADDED, {})
    write_json(tmp_path / SPECIAL, {"bos_token": {"content": BOS}, "pad_token": "!"})
    config = {
        "bos_token": {"content": BOS, "__type": "AddedToken"},
        "unk_token": EOS,
        "pad_token": "!",
        "added_tokens_decoder": {**LISTED, "0": {"content": "!"}},
        "additional_special_tokens": [],
        "add_bos_token": False,
        "add_prefix_space": False,
        "do_lower_case": True,
    }
    write_json(tmp_path / CONFIG, config)
    assert pad_token(tmp_path) == "!"


# -----------------------------------------------------------------------------
# length


@pytest.mark.parametrize("config", [{}, {"model_max_length": None}, {"model_max_length": 10**30}])
def test_without_a_length_prompts_are_as_long_as_the_tower_reads(config, small_folder):
    write_json(small_folder / CONFIG, config)
    for positions in (77, 32):
        text_config = {"max_position_embeddings": positions}
        assert read_tokenizer(small_folder, text_config).length == positions


def test_a_shorter_length_is_obeyed_and_saved(model_copy, tmp_path):
    write_json(model_copy / "tokenizer" / CONFIG, {"model_max_length": 70})
    pipe = load_pipeline(model_copy).freeze()
    assert pipe.encode_prompts(["a " * 100]).shape == (1, 70, 32)
    save_pipeline(pipe, tmp_path / "saved")
    assert load_pipeline(tmp_path / "saved").text_encoder.tokenizer.length == 70


@pytest.mark.parametrize("length", [78, 512, 2, 0, -1, "77", 77.0, [77]])
def test_lengths_that_the_tower_cannot_read_are_refused(length, small_folder):
    write_json(small_folder / CONFIG, {"model_max_length": length})
    assert_refused(small_folder, f"model_max_length is {length!r}, the text encoder has 77")


# -----------------------------------------------------------------------------
# added tokens, as by textual inversion


@pytest.mark.parametrize(
    "file, content",
    [
        (ADDED, {"<cat-toy>": 49408}),
        (ADDED, {EOS: 49407, "<cat-toy>": 49408}),
        (CONFIG, {"added_tokens_decoder": {**LISTED, "49408": {"content": "<cat-toy>"}}}),
        (CONFIG, {"additional_special_tokens": ["<cat-toy>"]}),
        (CONFIG, {"extra_special_tokens": [{"content": "<cat-toy>"}]}),
        (CONFIG, {"extra_special_tokens": {"<cat-toy>": "<cat-toy>"}}),
        (CONFIG, {"image_token": "<cat-toy>"}),
        (SPECIAL, {"additional_special_tokens": ["<cat-toy>"]}),
        (SPECIAL, {"cls_token": {"content": "<cat-toy>"}}),
    ],
)
def test_added_tokens_are_refused(file, content, small_folder):
    write_json(small_folder / file, content)
    assert_refused(small_folder, "special or added tokens besides CLIP's (<cat-toy>), as after")


def test_tokens_added_in_tokenizer_json_are_refused(small_tokenizer, small_folder):
    listed = [{"id": 516, "content": EOS}, {"id": 517, "content": "<cat-toy>", "special": False}]
    write_json(small_folder / WHOLE, whole_tokenizer(small_tokenizer, added_tokens=listed))
    assert_refused(small_folder, "(<cat-toy>)")


def test_tokens_added_to_the_vocabulary_are_refused(small_tokenizer, small_folder):
    write_json(small_folder / "vocab.json", {**small_tokenizer.vocab, "<cat-toy>": 517})
    assert_refused(small_folder, "does not follow from its merges, as CLIP's does: <cat-toy>")


@pytest.mark.parametrize("vocab_size", [49407, 49409, 49408 + 8])
def test_more_or_fewer_embeddings_than_tokens_are_refused(vocab_size, model_copy):
    path = model_copy / "text_encoder/config.json"
    write_json(path, json.loads(path.read_text()) | {"vocab_size": vocab_size})
    with pytest.raises(InputError, match=f"text_encoder: {vocab_size} embeddings for 49408 tokens"):
        load_pipeline(model_copy)


# -----------------------------------------------------------------------------
# prompts


@pytest.mark.parametrize("pad_token, column", [(EOS, "sd1_ids"), ("!", "sd2_ids")])
def test_ids_of_odd_prompts_are_those_of_transformers(pad_token, column):
    """Written-out special tokens, letters without case, spaces of every kind, 60 random strings."""
    tokenizer = Tokenizer(pad_token=pad_token)
    for row in json.loads((DATA / "special_tokens.json").read_text()):
        assert tokenizer.encode(row["prompt"]) == row[column], ascii(row["prompt"])


def test_open_clips_names_of_special_tokens_are_plain_text():
    tokenizer = Tokenizer()
    for prompt in ("<start_of_text>", "a <end_of_text> b", "<START_OF_TEXT>"):
        assert not {49406, 49407} & set(tokenizer.encode(prompt))
    assert tokenizer.encode(f"a {EOS}") == [320, 49407]


@pytest.mark.parametrize("prompt", ["a lone \ud800", "\udcff"])
def test_a_prompt_with_a_lone_surrogate_is_refused(prompt):
    with pytest.raises(UnicodeEncodeError):
        Tokenizer()([prompt])
    with pytest.raises(UnicodeEncodeError):
        Tokenizer().count_cut([prompt])


def test_prompts_that_are_cut_are_counted():
    tokenizer = Tokenizer()
    prompts = ["a " * 75, "a " * 76, "a" * 76, "!" * 300, EOS * 75, EOS * 76, "", "a " * 500]
    lengths = [len(tokenizer.encode(prompt)) for prompt in prompts]
    assert lengths[:2] == [75, 76]
    assert tokenizer.count_cut(iter(prompts)) == sum(length > 75 for length in lengths) == 3
    assert Tokenizer(pad_token="!").count_cut(["!" * 75, "!" * 76, "!" * 77]) == 2


def test_a_shorter_tokenizer_cuts_more_prompts():
    prompts = ["a b c", "a b c d", "a b c d e"]
    assert Tokenizer(length=6).count_cut(prompts) == 1
    assert Tokenizer(length=5).count_cut(prompts) == 2
    assert Tokenizer(length=77).count_cut(prompts) == 0
