"""Files of prompts: .txt, .json and .jsonl."""

import pytest

from spin.infra.errors import InputError
from spin.infra.prompts import read_prompts


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


def test_a_null_prompt_leaves_the_next_key(tmp_path):
    entries = '[{"prompt": null, "text": "a"}, {"prompt": null, "text": null, "caption": "b"}]'
    (tmp_path / "p.json").write_text(entries)
    assert read_prompts(tmp_path / "p.json") == ["a", "b"]


NEGATIVE = ['"negative_prompt": "b"', '"negativePrompt": "b"', '"Negative prompt": "b"']


@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
@pytest.mark.parametrize("pair", NEGATIVE)
def test_a_negative_prompt_is_refused_by_name_instead_of_dropped(pair, name, tmp_path):
    entry = f'{{"prompt": "a", {pair}}}'
    (tmp_path / name).write_text(f"[{entry}]" if name == "p.json" else entry)
    key = pair.split('"')[1]
    with pytest.raises(InputError, match=f"1 has a {key}, which is not read; --negative-prompt"):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize("value", ["null", '""', '" "'])
def test_a_negative_prompt_that_says_nothing_is_no_fault(value, tmp_path):
    """A table has its columns in every line. Other keys are common, and of other programs."""
    entry = f'{{"prompt": "a", "negative_prompt": {value}, "seed": 5, "id": "x"}}'
    (tmp_path / "p.jsonl").write_text(entry)
    assert read_prompts(tmp_path / "p.jsonl") == ["a"]


def test_lines_may_end_as_those_of_windows_do(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"one\r\ntwo\r\n")
    assert read_prompts(tmp_path / "p.txt") == ["one", "two"]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.txt").write_text("one\n")
    assert read_prompts("~/p.txt") == ["one"]


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
        ("p.jsonl", '"one"\n\n{"text": null}', "no prompt, text or caption in line 3"),
        ("p.jsonl", '{"prompt": ["a", "b"]}', "prompt in line 1 is a list; choose one of them"),
        ("p.jsonl", '"one"\n{"prompt": 5}', "prompt in line 2 is 5, not a string"),
        ("p.jsonl", '"one"\ntwo', "line 2 is not JSON"),
        ("p.json", '["one", null]', "prompt in entry 2 is null, not a string"),
        ("p.json", '["one", "\\ud800"]', "entry 2 is malformed: it has a lone surrogate"),
        ("p.txt", "one\nt\0w\0o\0", "line 2 is malformed: it has a NUL character"),
        ("p.txt", "version https://git-lfs.github.com/spec/v1\noid", "p.txt: a Git LFS pointer"),
    ],
)
def test_the_refusal_says_what_is_wrong(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / name)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="p.txt: no such file"):
        read_prompts(tmp_path / "p.txt")


@pytest.mark.parametrize(
    "content, reason",
    [
        ("one\ngrößer\n".encode("latin-1"), "line 2 has the byte 0xf6"),
        ("größer\n".encode("cp1252"), "line 1 has the byte 0xf6"),
        ("one\n".encode("utf-16"), "it begins as UTF-16 does"),
        ("\ufeffone\n".encode("utf-16-be"), "it begins as UTF-16 does"),
        ("日本\n".encode("shift-jis"), "line 1 has the byte 0x93"),
        (b"\x89PNG\r\n", "line 1 has the byte 0x89"),
    ],
)
@pytest.mark.parametrize("name", ["p.txt", "p.json", "p.jsonl"])
def test_a_file_that_is_not_utf_8_is_refused_with_the_reason(name, content, reason, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: not UTF-8 text .{reason}.; save it as UTF-8"):
        read_prompts(tmp_path / name)
