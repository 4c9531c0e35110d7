"""The rules of the building: floors, circles, sizes, sentences and words."""

import ast
import importlib
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "smollm_jax"

# From the ground up: a package, what it may import beside itself, and its budget of lines: today's number, which
# falls with each simplification. A new capability raises one, with a reason in the commit message.
HOUSE = {
    "runtime": ("", 1_030),
    "config": ("runtime", 1_021),
    "tokenizer": ("runtime", 869),
    "model": ("config runtime", 738),
    "data": ("tokenizer config runtime", 2_186),
    "distributed": ("config runtime", 576),
    "kernels": ("model config runtime", 1_191),
    "hf": ("model tokenizer config runtime", 1_941),
    "checkpoint": ("distributed runtime", 784),
    "generation": ("kernels model config runtime", 1_449),
    "runs": ("hf checkpoint data tokenizer config runtime", 1_461),
    "evaluation": ("runs generation kernels model tokenizer config runtime", 667),
    "training": (
        "evaluation runs generation kernels checkpoint data distributed model tokenizer config runtime",
        3_046,
    ),
    "serving": ("runs generation hf model tokenizer config runtime", 4_025),
    "planning": ("training kernels distributed model config runtime", 546),
    "cli": (
        "planning training evaluation serving runs generation hf checkpoint distributed tokenizer config runtime",
        1_300,
    ),
    "api": ("training serving runs generation distributed tokenizer config runtime", 548),
}
CORE, CORE_BUDGET, BUDGET = ("config", "model", "data", "training"), 6_991, 23_469
LONGEST_FILE, LONGEST_FUNCTION = 300, 60
OUTSIDE = ("serve.py", "train_jax.py", "smollm_jax/__init__.py", "smollm_jax/__main__.py")
HEAVY = {  # packages that one place alone imports, at any depth
    "orbax": ("checkpoint",),
    "gradio": ("serving",),
    "fastapi": ("serving",),
    "torch": ("hf", "serving"),
    "transformers": ("hf", "serving"),
    "datasets": ("data", "runtime"),
    "lm_eval": ("evaluation",),
    "llama_cpp": ("serving",),
    "pyarrow": ("data",),
    "huggingface_hub": ("data", "hf", "runtime", "tokenizer"),
}
WITHOUT_JAX = ("runtime", "config", "tokenizer", "data", "hf", "checkpoint", "runs", "cli")
WORDS = (
    "that of", "those of", "those that", "so-manieth", "in words", "plain form", "who asks", "is to be met",
    "taken back", "what it came to", "comes to the",
)  # fmt: skip


def modules():
    return sorted(PACKAGE.glob("*/*.py"))


def lines(path):
    return len(path.read_text().splitlines())


def imports(path):
    """Our own modules that a file imports, lazily and for type checking too, with the line of each."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            if node.module == PACKAGE.name and [alias.name for alias in node.names] == ["__version__"]:
                continue  # a number, of no floor
            inner = [name for name in names if (ROOT / f"{name.replace('.', '/')}.py").exists()]
            yield from ((name, node.lineno) for name in inner or [node.module])
        elif isinstance(node, ast.Import):
            yield from ((a.name, node.lineno) for a in node.names if a.name.split(".")[0] == PACKAGE.name)


def test_every_package_has_its_place_and_every_module_a_package():
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(HOUSE)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}


def test_imports_go_down():
    for path in modules():
        home = path.parent.name
        for name, line in imports(path):
            package = name.split(".")[1]
            allowed = {home, *HOUSE[home][0].split()}
            assert package in allowed, (
                f"{path.relative_to(ROOT)}:{line} imports {name}; {home} may import {allowed}"
            )


def test_no_package_may_import_a_later_one():
    seen = set()
    for package, (allowed, _) in HOUSE.items():
        assert set(allowed.split()) <= seen, package
        seen.add(package)


def test_imports_go_in_no_circle():
    graph = {}
    for path in modules():
        name = f"{PACKAGE.name}.{path.parent.name}.{path.stem}"
        graph[name] = {other for other, _ in imports(path)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("library", HEAVY)
def test_a_heavy_library_has_one_door(library):
    pattern = re.compile(rf"^\s*(?:from|import) {library}\b", re.MULTILINE)
    homes = {path.parent.name for path in modules() if pattern.search(path.read_text())}
    assert homes <= set(HEAVY[library]), homes


@pytest.mark.parametrize("package", HOUSE)
def test_a_package_keeps_its_budget_and_says_what_it_is_for(package):
    budget = HOUSE[package][1]
    size = sum(map(lines, (PACKAGE / package).glob("*.py")))
    assert size <= budget, f"{package} has {size} lines, its budget is {budget}"
    docstring = ast.get_docstring(ast.parse((PACKAGE / package / "__init__.py").read_text()))
    assert docstring
    assert docstring.split("\n\n")[0].rstrip().endswith(".")


def test_the_whole_keeps_its_budget():
    size = {package: sum(map(lines, (PACKAGE / package).glob("*.py"))) for package in HOUSE}
    assert sum(size[package] for package in CORE) <= CORE_BUDGET
    assert sum(size.values()) + sum(lines(ROOT / name) for name in OUTSIDE) <= BUDGET


def test_no_file_and_no_function_is_longer_than_can_be_read():
    for path in [*modules(), *(ROOT / name for name in OUTSIDE)]:
        assert lines(path) <= LONGEST_FILE, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                assert size <= LONGEST_FUNCTION, f"{path}: {node.name} has {size} lines"


@pytest.mark.parametrize("package", HOUSE)
def test_public_names_are_there(package):
    module = importlib.import_module(f"{PACKAGE.name}.{package}")
    for name in getattr(module, "__all__", ()):
        assert hasattr(module, name), name
        assert not (PACKAGE / package / f"{name}.py").exists(), f"{name} hides the module of that name"


def test_light_packages_import_without_jax():
    light = [path for path in modules() if path.parent.name in WITHOUT_JAX]
    program = "; ".join(f"import smollm_jax.{path.parent.name}.{path.stem}" for path in light)
    program += "; import sys; heavy = {'jax', 'flax', 'torch', 'gradio'} & set(sys.modules)"
    program += "; assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_ten_phrases_stay_away():
    """The worst of what made the English hard: see CONTRIBUTING.md."""
    found = []
    for path in [
        *modules(),
        *(ROOT / name for name in OUTSIDE),
        *map(Path, (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))),
    ]:
        text = " ".join(path.read_text().split()).lower()
        found += [f"{path.relative_to(ROOT)}: {words}" for words in WORDS if re.search(rf"\b{words}\b", text)]
    assert not found, found


def test_test_files_have_names_of_their_own():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
