"""Every line of the tutorial: its code runs, its quotes are verbatim, its commands work, the names it gives exist.

```python             run, in order, in one namespace a chapter
```python file=PATH   a verbatim piece of that file
```console            its lines "$ python ..." are run
"""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tutorial import figures

ROOT = Path(__file__).parent.parent.parent
CHAPTERS = sorted(ROOT.glob("tutorial/*.md"))
FENCE = re.compile(r"^( *)```(\w+)(?: file=(\S+))?\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"`((?:spin|train)(?:\.(?!py`)\w+)+)`")


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_chapter(chapter, tmp_path, monkeypatch):
    text = chapter.read_text()
    for name in ("spin", "tests", "tutorial", "train.py", "sample.py", "evaluate.py"):  # runs/ lands in tmp_path
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for fence in FENCE.finditer(text):
        indent, language, file, body = fence.groups()
        body = re.sub(f"^{indent}", "", body, flags=re.MULTILINE)  # a fence inside a list is indented
        line = text.count("\n", 0, fence.start()) + 2
        where = f"{chapter.name} line {line}"
        if file:
            assert body in (ROOT / file).read_text(), f"{where}: not a verbatim piece of {file}"
        elif language == "python":
            padded = "\n" * (line - 1) + body  # so that a traceback names the chapter's line
            exec(compile(padded, str(chapter), "exec"), namespace)
        elif language == "console":
            for command in re.findall(r"^\$ python (.*)$", body, re.MULTILINE):
                result = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True)
                assert result.returncode == 0, f"{where}: $ python {command}\n{result.stderr}"


@pytest.mark.parametrize("page", [*CHAPTERS, ROOT / "README.md"], ids=lambda path: path.stem)
def test_names_and_links_exist(page):
    text = FENCE.sub("", page.read_text())
    for name in NAME.findall(text):
        module, _, attribute = name.rpartition(".")
        if module == "spin":
            importlib.import_module(name)
        else:
            assert hasattr(importlib.import_module(module), attribute), f"{page.name}: there is no {name}"
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), f"{page.name}: {link} is not there"


@pytest.mark.parametrize("name", [*figures.FIGURES, *figures.EVIDENCE])
def test_figures_are_those_that_the_code_draws(name, tmp_path):
    figures.main([name, "--out", str(tmp_path)])
    remade, committed = (np.asarray(Image.open(folder / f"{name}.png").convert("RGB"), dtype=float) for folder in
                         (tmp_path, figures.FOLDER))  # fmt: skip
    assert remade.shape == committed.shape
    assert np.abs(remade - committed).mean() < 2  # of 255: another processor rounds otherwise


def test_figures_are_small_and_used():
    paths = list(figures.FOLDER.iterdir())
    assert max(path.stat().st_size for path in paths) <= 100_000
    assert sum(path.stat().st_size for path in paths) <= 1_500_000
    pages = "".join(page.read_text() for page in [*ROOT.glob("tutorial/**/*.md"), ROOT / "README.md"])
    assert all(path.name in pages for path in paths)


def test_there_is_a_tutorial():
    assert CHAPTERS and all(FENCE.search(chapter.read_text()) for chapter in CHAPTERS)
