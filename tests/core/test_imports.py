"""The rules of the code's structure: who may import what, and what nothing in spin/ does."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

# A module imports from its own folder and from lines above its own. An entry is a module, or a
# folder with all its modules.
LEVELS = [
    ["spin.infra"],
    ["spin.loss", "spin.scheduler", "spin.data", "spin.config", "spin.layers", "spin.toy"],
    ["spin.unet", "spin.vae", "spin.text"],
    ["spin.step", "spin.checkpoint"],
    ["spin.sampler"],
    ["spin.pairs"],
    ["spin.eval"],
    ["train", "sample", "evaluate"],
]
SCRIPTS = LEVELS[-1]

PACKAGES = {"torch", "numpy", "safetensors", "PIL", "tqdm", "open_clip", "huggingface_hub"}
NEVER = {"torchvision", "transformers", "diffusers", "matplotlib"}
MAY_COMPARE = ROOT / "tests" / "real_weights.py"  # with diffusers, where it is installed

LIBRARY_FILES = sorted(ROOT.glob("spin/**/*.py"))
SCRIPT_FILES = sorted(ROOT.glob("*.py"))
TUTORIAL_FILES = sorted(ROOT.glob("tutorial/**/*.py"))
TEST_FILES = sorted(ROOT.glob("tests/**/*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def module_name(path: Path) -> str:
    """Return "spin.infra.run" for spin/infra/run.py, and "spin.infra" for its __init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


def modules_of_statement(node: ast.AST) -> set[str]:
    """Return the modules that a statement imports, as dotted names; empty for other statements.

    "from spin import toy" gives "spin.toy".
    """
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "a relative import"
        if node.module in ("spin", "tutorial", "tests"):
            return {f"{node.module}.{alias.name}" for alias in node.names}
        return {node.module}
    return set()


def imports(path: Path) -> set[str]:
    """Return every module that a file imports, at its top or inside a function."""
    modules = set()
    for node in ast.walk(parse(path)):
        modules |= modules_of_statement(node)
    return modules


def entry_of(module: str) -> str:
    """Return the entry of LEVELS that a module belongs to."""
    for entries in LEVELS:
        for entry in entries:
            if module == entry or module.startswith(entry + "."):
                return entry
    raise AssertionError(f"{module} is missing in LEVELS")


def level_of(entry: str) -> int:
    for level, entries in enumerate(LEVELS):
        if entry in entries:
            return level
    raise AssertionError(f"{entry} is missing in LEVELS")


def top_level_packages(path: Path) -> set[str]:
    return {module.split(".")[0] for module in imports(path)}


@pytest.mark.parametrize("path", LIBRARY_FILES + SCRIPT_FILES, ids=module_name)
def test_imports_go_down_only(path):
    if module_name(path) == "spin":
        assert not imports(path)
        return
    importer = entry_of(module_name(path))
    for module in imports(path):
        if module.split(".")[0] in ("spin", *SCRIPTS, "tutorial", "tests"):
            imported = entry_of(module)
            is_below = level_of(imported) < level_of(importer)
            assert is_below or imported == importer, f"{module_name(path)} imports {module}"


def test_scripts_do_not_import_each_other():
    for script in SCRIPTS:
        others = set(SCRIPTS) - {script}
        assert not imports(ROOT / f"{script}.py") & others


def test_the_miniature_world_is_imported_by_scripts_tutorial_and_eval_alone():
    """The method knows no toy: it is a checkpoint and a data set like any other."""
    for path in LIBRARY_FILES:
        folder = path.relative_to(ROOT).parts[1]
        if folder not in ("toy", "eval"):
            assert not any(module.startswith("spin.toy") for module in imports(path)), path


def test_the_miniature_world_imports_infra_alone():
    for path in ROOT.glob("spin/toy/**/*.py"):
        for module in imports(path):
            if module.startswith("spin."):
                assert module.startswith(("spin.infra", "spin.toy")), path


def test_no_packages_but_the_agreed_ones():
    for path in LIBRARY_FILES + SCRIPT_FILES:
        packages = top_level_packages(path) - set(sys.stdlib_module_names)
        assert packages <= PACKAGES | {"spin"}, path


def test_some_packages_are_imported_nowhere():
    for path in LIBRARY_FILES + SCRIPT_FILES + TUTORIAL_FILES + TEST_FILES:
        refused = NEVER - {"diffusers"} if path == MAY_COMPARE else NEVER
        assert not top_level_packages(path) & refused, path


def test_tests_import_nothing_from_other_tests():
    """What several need is in helpers.py."""
    for path in TEST_FILES:
        for module in imports(path):
            assert not module.startswith(("test_", "tests", "conftest")), path


def test_open_clip_is_imported_late():
    """Importing it takes seconds, which --help should not."""
    for path in LIBRARY_FILES + SCRIPT_FILES:
        for statement in parse(path).body:
            for module in modules_of_statement(statement):
                assert module.split(".")[0] != "open_clip", path


def test_every_folder_of_code_is_a_package_that_is_installed():
    folders = {path.parent for path in LIBRARY_FILES}
    for folder in folders:
        assert (folder / "__init__.py").exists(), folder
    [line] = [
        line
        for line in (ROOT / "pyproject.toml").read_text().splitlines()
        if line.startswith("packages = ")
    ]
    listed = ast.literal_eval(line.removeprefix("packages = "))
    assert len(listed) == len(set(listed))
    assert set(listed) == {".".join(folder.relative_to(ROOT).parts) for folder in folders}


# -----------------------------------------------------------------------------
# what nothing in spin/ does


def calls(path: Path) -> list[str]:
    """Return the functions that a file calls, as they are written: "torch.cat", "print"."""
    nodes = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
    return [ast.unparse(node.func) for node in nodes]


def test_nothing_prints():
    """But for `distributed.print0`, which is the one place where a line reaches the terminal."""
    for path in LIBRARY_FILES:
        called = calls(path)
        assert "print" not in called, path
        if module_name(path) != "spin.infra.distributed":
            assert "tqdm.write" not in called, path


def test_nothing_parses_arguments():
    """But for infra/cli.py, the scripts' helpers."""
    for path in LIBRARY_FILES:
        if module_name(path) != "spin.infra.cli":
            assert "argparse" not in imports(path), path
            assert "sys.argv" not in path.read_text(), path


def test_no_function_takes_the_scripts_args():
    for path in LIBRARY_FILES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.arguments):
                parameters = [*node.posonlyargs, *node.args, *node.kwonlyargs]
                assert "args" not in [parameter.arg for parameter in parameters], path


SEEDS_A_GLOBAL_GENERATOR = {
    "torch.manual_seed",
    "torch.seed",
    "torch.random.manual_seed",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
    "np.random.seed",
    "numpy.random.seed",
    "random.seed",
}


def test_nothing_seeds_a_global_generator():
    for path in LIBRARY_FILES + SCRIPT_FILES:
        assert not SEEDS_A_GLOBAL_GENERATOR & set(calls(path)), path
        assert "random" not in imports(path), path  # Python's own
