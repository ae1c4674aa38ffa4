"""Files of prompts."""

import json
from pathlib import Path

from spin.infra.errors import InputError
from spin.infra.files import read_text
from spin.infra.metadata import as_text


def read_prompts(path: str | Path) -> list[str]:
    """Return the prompts in a file.

    .txt: one per line. .jsonl: one per line, a string or an object with `prompt`, `text` or
    `caption`. .json: a list of such strings or objects.
    Raises InputError if the file holds anything else, or no prompt.
    """
    path = Path(path).expanduser()
    text = read_text(path)
    prompts = []
    try:
        for position, entry in parse_entries(text, path.suffix):
            prompts.append(parse_prompt(entry, position))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a list of prompts ({error})") from None
    if not prompts:
        raise InputError(f"{path}: holds no prompts")
    return prompts


def parse_entries(text: str, suffix: str) -> list[tuple[str, object]]:
    """Return where each entry of a file of prompts stands, and the entry.

    Raises ValueError for another kind of file.
    """
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            lines.append((f"line {number}", line.strip()))
    if suffix in ("", ".txt"):
        return lines
    if suffix == ".jsonl":
        return [(position, parse_json_line(line, position)) for position, line in lines]
    if suffix == ".json":
        entries = json.loads(text)
        if not isinstance(entries, list):
            raise ValueError("the top-level value is not a list")
        return [(f"entry {number}", entry) for number, entry in enumerate(entries, start=1)]
    raise ValueError("the file name must end in .txt, .json or .jsonl")


def parse_json_line(line: str, position: str):
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{position} is not JSON: {error.msg}") from None


def parse_prompt(entry, position: str) -> str:
    """Return the prompt that an entry is or holds. Raises ValueError for anything else.

    Of an object it is the first of `prompt`, `text` and `caption` that is there and not null. Its
    other keys are ignored, but for a negative prompt, without which it would be another image.
    """
    prompt = entry
    if isinstance(entry, dict):
        refuse_negative_prompt(entry, position)
        given = [entry[key] for key in ("prompt", "text", "caption") if entry.get(key) is not None]
        if not given:
            raise ValueError(f"no prompt, text or caption in {position}")
        prompt = given[0]
    try:
        return as_text(prompt)
    except ValueError as error:
        raise ValueError(f"the prompt in {position} is {error}") from None


def refuse_negative_prompt(entry: dict, position: str) -> None:
    """Raise ValueError if an entry has a negative prompt, under whichever of its usual keys."""
    for key, value in entry.items():
        if "negative" in key.lower() and isinstance(value, str) and value.strip():
            raise ValueError(
                f"{position} has a {key}, which is not read; --negative-prompt gives one for all"
            )
