"""Files of prompts: .txt, .json and .jsonl."""

import pytest

from spin.data import read_prompts
from spin.infra.errors import InputError


@pytest.mark.parametrize(
    "name, text",
    [
        ("p.txt", "one\n\n two \n"),
        ("p.txt", "\ufeffone\ntwo"),  # a byte order mark
        ("p", "one\ntwo\n"),
        ("p.json", '["one", {"prompt": "two"}]'),
        ("p.jsonl", '"one"\n"two"\n'),
        ("p.jsonl", '{"text": "one"}\n{"caption": "two", "id": 3}\n'),
    ],
)
def test_prompts_are_read_in_every_format(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path / name) == ["one", "two"]
    assert read_prompts(str(tmp_path / name)) == ["one", "two"]


def test_prompt_comes_before_text_and_text_before_caption(tmp_path):
    entries = '[{"text": "b", "prompt": "a", "caption": "c"}, {"caption": "e", "text": "d"}]'
    (tmp_path / "p.json").write_text(entries)
    assert read_prompts(tmp_path / "p.json") == ["a", "d"]


@pytest.mark.parametrize(
    "name, text",
    [
        ("p.txt", "\n"),
        ("p.json", "[]"),
        ("p.json", "[1]"),
        ("p.jsonl", '{"words": "one"}'),
        ("p.jsonl", '{"text": 1}'),
        ("p.json", "{"),
        ("p.json", '"a cat"'),
        ("p.json", '{"prompt": "a cat"}'),
        ("p.json", '["a cat", "a lone \\ud800"]'),
        ("p.json", "[" * 100_000),
    ],
    ids=range(10),
)
def test_a_file_without_prompts_is_refused_in_one_line(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=rf"/{name}: ") as error:
        read_prompts(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("p.txt", "\n", "holds no prompts"),
        ("p.jsonl", '{"Prompt": "one"}', "not a list of prompts .no prompt, text or caption."),
        ("p.tsv", "Prompt\tCategory\n", "the file name must end in .txt, .json or .jsonl"),
        ("p.json", '{"prompt": "a cat"}', "the top-level value is not a list"),
    ],
)
def test_the_refusal_says_what_is_wrong(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / name)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="p.txt: no such file"):
        read_prompts(tmp_path / "p.txt")
