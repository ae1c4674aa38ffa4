"""Every line of the tutorial holds: code runs, quotes are verbatim, commands work, names exist.

```python             run, in order, all blocks of a chapter in one namespace
```output             what the python block before it printed, exactly
```output about       the same, with every number within one unit of its last digit shown
```python file=PATH   a verbatim piece of that file
```console            its lines "$ python ..." are run

A python block with no output block after it prints nothing.
"""

import importlib
import io
import re
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spin import toy
from tutorial import figures

ROOT = Path(__file__).parent.parent.parent
CHAPTERS = sorted(ROOT.glob("tutorial/*.md"))
EVIDENCE = [ROOT / "tutorial/evidence" / name for name in ("README.md", "earlier_world.md")]
PAGES = [ROOT / "README.md", *CHAPTERS, *EVIDENCE]

# indent, language, file, body
FENCE = re.compile(
    r"^( *)```(\w*(?: about)?)(?: file=(\S+))?\n(.*?)^\1```$", re.MULTILINE | re.DOTALL
)
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]\d+)?")
NAME = re.compile(r"`((?:spin|train)(?:\.(?!py`)\w+)+)`")
LINK = re.compile(r"\]\(([^):]*?)(?:#([^)]+))?\)")


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def curated_set(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("curated") / "toy-curated"
    toy.write_curated_set(folder)
    return folder


@pytest.mark.parametrize("chapter", CHAPTERS, ids=page_name)
def test_chapter(chapter, curated_set, tmp_path, monkeypatch):
    # relative paths such as runs/ land in tmp_path
    for name in ("spin", "tests", "tutorial", "train.py", "sample.py", "evaluate.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "toy-curated").symlink_to(curated_set)  # writing it takes seconds
    monkeypatch.chdir(tmp_path)

    text = chapter.read_text()
    namespace: dict = {}
    printed = ""  # by the python block before, until an output block has shown it
    for fence in FENCE.finditer(text):
        indent, language, file, indented_body = fence.groups()
        body = re.sub(f"^{indent}", "", indented_body, flags=re.MULTILINE)  # fences inside a list
        line = text.count("\n", 0, fence.start()) + 2
        where = f"{chapter.name} line {line}"
        if language.startswith("output"):
            check_output(printed, body, exact=language == "output", where=where)
            printed = ""
            continue
        assert printed == "", f"{where}: the block before it printed {printed!r}"
        if file is not None:
            assert body in (ROOT / file).read_text(), f"{where}: not a verbatim piece of {file}"
        elif language == "python":
            padding = "\n" * (line - 1)  # so that a traceback names the chapter's line
            with redirect_stdout(io.StringIO()) as stdout:
                exec(compile(padding + body, str(chapter), "exec"), namespace)
            printed = stdout.getvalue()
        elif language == "console":
            for command in re.findall(r"^\$ python (.*)$", body, re.MULTILINE):
                monkeypatch.setattr(sys, "argv", command.split())
                run_script(sys.argv[0], where)
    assert printed == "", f"{chapter.name}: its last block printed {printed!r}"


def check_output(printed: str, shown: str, exact: bool, where: str) -> None:
    """Compare what a block printed with what the chapter shows of it."""
    if exact:
        assert printed == shown, f"{where}: it printed\n{printed}"
        return
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split(), (
        f"{where}: it printed\n{printed}"
    )
    for actual, expected in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        unit = unit_of_last_digit(expected)
        difference = abs(float(actual) - float(expected))
        assert difference <= 1.001 * unit, f"{where}: {actual}, not {expected}"


def unit_of_last_digit(number: str) -> float:
    """Return what the last digit counts: 0.01 of "0.35", 1 of "120", 1e-5 of "1.2e-04"."""
    mantissa, _, exponent = number.partition("e")
    decimals = len(mantissa.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - decimals)


@pytest.mark.parametrize(
    "printed, shown, exact, is_right",
    [
        ("loss 0.693\n", "loss 0.693\n", True, True),
        ("loss 0.694\n", "loss 0.693\n", True, False),
        ("loss 0.694\n", "loss 0.693\n", False, True),
        ("loss 0.695\n", "loss 0.693\n", False, False),
        ("loss -0.693\n", "loss 0.693\n", False, False),
        ("1.3e-04  2\n", "1.2e-04 2\n", False, True),
        ("1.3e-03  2\n", "1.2e-04 2\n", False, False),
        ("loss 0.693 0.1\n", "loss 0.693\n", False, False),
        ("gain 0.693\n", "loss 0.693\n", False, False),
    ],
)
def test_outputs_are_compared(printed, shown, exact, is_right):
    if is_right:
        check_output(printed, shown, exact, "here")
        return
    with pytest.raises(AssertionError, match="here"):
        check_output(printed, shown, exact, "here")


def run_script(script: str, where: str) -> None:
    """Run a script as `python SCRIPT` does, but in this process, which has imported torch."""
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    assert end.value.code == 0, f"{where}: {script} ended with {end.value.code}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_names_exist(page):
    prose = FENCE.sub("", page.read_text())
    for name in NAME.findall(prose):
        assert exists(name), f"{page.name}: there is no {name}"


def exists(name: str) -> bool:
    """Whether a dotted name is a module or an attribute of one."""
    module, _, attribute = name.rpartition(".")
    try:
        if hasattr(importlib.import_module(module), attribute):
            return True
        importlib.import_module(name)
        return True
    except ImportError:
        return False


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page):
    prose = FENCE.sub("", page.read_text())
    for path, heading in LINK.findall(prose):
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {path} does not exist"
        if heading:
            assert heading in anchors(target), f"{page.name}: {path} has no heading #{heading}"


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    prose = FENCE.sub("", page.read_text())
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose, re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(words.replace(" ", "-"))
    return found


def read_pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=float)


@pytest.mark.parametrize("name", figures.FIGURES)
def test_figures_are_those_that_the_code_draws(name, tmp_path):
    figures.main([name, "--out", str(tmp_path)])
    assert is_same_figure(tmp_path / f"{name}.png", figures.FOLDER / f"{name}.png")


def is_same_figure(remade: Path, committed: Path) -> bool:
    """Whether at most 5 of 10,000 pixels differ by what an eye sees.

    Other processors round otherwise, so a line may be a little elsewhere.
    """
    remade_pixels = read_pixels(remade)
    committed_pixels = read_pixels(committed)
    if remade_pixels.shape != committed_pixels.shape:
        return False
    differs = np.abs(remade_pixels - committed_pixels).max(axis=2) > 64
    return differs.mean() <= 5e-4


def test_a_figure_of_other_numbers_is_noticed(tmp_path, monkeypatch):
    pooled = figures.pooled
    monkeypatch.setattr(figures, "pooled", lambda values: pooled(values * 0.9))
    figures.main(["gains", "--out", str(tmp_path)])
    assert not is_same_figure(tmp_path / "gains.png", figures.FOLDER / "gains.png")
    def unbounded(*errors_and_gap, beta):
        return figures.spin_loss(*errors_and_gap[:4], beta)

    monkeypatch.setattr(figures, "spin_bounded_loss", unbounded)
    figures.main(["push_line", "--out", str(tmp_path)])
    assert not is_same_figure(tmp_path / "push_line.png", figures.FOLDER / "push_line.png")


def test_figures_are_small_and_used():
    paths = list(figures.FOLDER.iterdir())
    assert max(path.stat().st_size for path in paths) <= 100_000
    assert sum(path.stat().st_size for path in paths) <= 1_500_000
    text = "".join(page.read_text() for page in PAGES)
    assert [path.name for path in paths if path.name not in text] == []


def test_every_figure_is_remade_by_figures_py_or_belongs_to_the_evidence():
    for path in figures.FOLDER.iterdir():
        assert path.stem in figures.FIGURES or path.stem.startswith("evidence_")


def test_there_is_a_tutorial():
    assert len(CHAPTERS) > 10
    for chapter in CHAPTERS:
        assert FENCE.search(chapter.read_text()), chapter


def test_the_readme_is_short():
    """At most 1,500 words outside code blocks and tables."""
    prose = FENCE.sub("", (ROOT / "README.md").read_text())
    lines = [line for line in prose.splitlines() if not line.startswith("|")]
    assert len(" ".join(lines).split()) <= 1500
