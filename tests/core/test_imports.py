"""Who may import what: a module imports from levels below its own, nobody imports a foreign package."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LEVELS = [
    ["scheduler", "loss", "blocks", "toy", "stats", "run", "ranks", "original", "blip"],
    ["unet", "vae", "text", "data", "viz"],
    ["weights", "sampler", "step"],
    ["pairs", "rewards"],
    ["judge"],
    ["report"],
    ["cost"],
    ["train", "sample", "evaluate"],
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
PACKAGES = {"torch", "numpy", "safetensors", "PIL", "tqdm", "open_clip", "huggingface_hub", "spin"}
FILES = [path for path in [*ROOT.glob("spin/*.py"), *ROOT.glob("*.py")] if path.stem != "__init__"]


def imports(path: Path) -> set[str]:
    """Every module that the file imports, anywhere in it, as a dotted name; "from spin import x" gives "spin.x"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"spin.{alias.name}" for alias in node.names} if node.module == "spin" else {node.module}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_point_downwards(path):
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("spin.")}
    above = {name for name in ours if LEVEL[name] >= LEVEL[path.stem]}
    assert not above, f"{path.name} of level {LEVEL[path.stem]} imports {above}"
    packages = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
    assert packages <= PACKAGES


def test_scripts_do_not_import_each_other():
    for script in LEVELS[-1]:
        assert not imports(ROOT / f"{script}.py") & set(LEVELS[-1])


def test_only_scripts_parse_arguments_and_print():
    for path in ROOT.glob("spin/*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert "print" not in {getattr(call, "id", None) for call in calls}, path
        assert "argparse" not in imports(path), path


def test_open_clip_is_imported_late():
    """Importing it takes seconds, which --help should not."""
    for path in FILES:
        tree = ast.parse(path.read_text())
        top = {ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)}
        assert not any("open_clip" in line for line in top), path
