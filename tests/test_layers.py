"""The package is built in floors: a module imports only its own package and what lies below it.

Read from the source, so that imports inside functions count too. Imports under TYPE_CHECKING do not.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mergeforge"
FLOORS = (
    {
        "errors",
        "registry",
        "parameters",
        "native",
        "tensors",
        "sizes",
        "disk",
        "side_files",
        "checksums",
        "keyvalues",
    },
    {
        "methods",
        "adapters",
        "recipe",
        "layout",
        "budget",
        "hub",
        "remote",
        "quants",
        "architectures",
        "vocab",
        "metadata",
        "tokenizer",
        "factoring",
        "dequantising",
    },
    {"sources", "sinks", "journal", "data"},
    {"planning", "random_model", "joining", "summing"},
    {
        "computing",
        "measuring",
        "explaining",
        "running",
        "workspace",
        "receipt",
        "card",
        "verifying",
        "comparing",
        "engine",
        "exporting",
        "extracting",
        "publishing",
        "parting",
        "shipping",
        "examining",
    },
    {"evaluating", "chatting"},
    {"train"},
    {"cli", "progress", "__main__", "api"},
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# Between modules of one floor. Each has one direction; test_no_circles sees to it.
ALLOWED = {
    ("registry", "errors"),
    ("disk", "errors"),
    ("hub", "remote"),
    ("planning", "joining"),
    ("planning", "summing"),
    ("computing", "measuring"),
    ("comparing", "explaining"),
    ("receipt", "measuring"),
    ("running", "card"),
    ("running", "receipt"),
    ("running", "workspace"),
    ("running", "computing"),
    ("running", "shipping"),
    ("shipping", "publishing"),
    ("shipping", "workspace"),
    ("verifying", "computing"),
    ("verifying", "publishing"),
    ("verifying", "workspace"),
    ("verifying", "engine"),
    ("exporting", "running"),
    ("chatting", "evaluating"),
    ("__main__", "cli"),
    ("cli", "progress"),
}
HEAVY = {"torch", "numpy", "transformers", "peft", "safetensors", "huggingface_hub", "gguf"}
MODULES = sorted(PACKAGE.rglob("*.py"))
STEPS = PACKAGE / "train" / "steps"  # needs the extra `train`, and says so at its modules' heads
LIGHT = [path for path in MODULES if STEPS not in path.parents]


def top(path: Path) -> str:
    """The top-level module or package that a file belongs to; "" for the package's own __init__."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imports(tree: ast.AST, *, inside_functions: bool = True) -> Iterator[tuple[str, str, int]]:
    """(module, name, line) of every import that is carried out; name is "" for a plain import."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from ((str(node.module), alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from imports(ast.Module(node.orelse, []), inside_functions=inside_functions)
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(node, inside_functions=inside_functions)


def own_imports(path: Path) -> Iterator[tuple[str, int]]:
    """The top-level modules of mergeforge that a file imports."""
    for module, name, line in imports(ast.parse(path.read_text())):
        if module == "mergeforge":
            yield name, line
        elif module.startswith("mergeforge."):
            yield module.split(".")[1], line


def test_every_module_has_a_floor() -> None:
    assert {top(path) for path in MODULES} - {""} == set(FLOOR)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    me = top(path)
    for other, line in own_imports(path):
        place = f"{path.name}, line {line}: {me} imports {other}"
        assert me, f"{place}: the package loads its names on first use"
        assert other in FLOOR, place
        assert other == me or FLOOR[other] < FLOOR[me] or (me, other) in ALLOWED, place


def test_what_is_allowed_is_needed() -> None:
    used = {(top(path), other) for path in MODULES for other, _ in own_imports(path)}
    assert used >= ALLOWED


def test_no_circles() -> None:
    assert not ALLOWED & {(two, one) for one, two in ALLOWED}


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_heavy_at_module_level(path: Path) -> None:
    for module, _, line in imports(ast.parse(path.read_text()), inside_functions=False):
        assert module.split(".")[0] not in HEAVY, f"{path.name}, line {line}: {module}"


def test_importing_everything_loads_nothing_heavy() -> None:
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in LIGHT]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
    code += f"assert not {HEAVY} & sys.modules.keys(), {HEAVY} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
