"""The layers of the package, as CONTRIBUTING.md lists them: imports go down only, and never round in a circle.

Read from the source, so imports inside functions count too. Imports under TYPE_CHECKING do not run, and do not count.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from support.paths import PACKAGE, ROOT

MAX_BOXES = 30  # files and folders at the package's top
MAX_LINES = 400  # of a file
HEAVY = {"torch", "transformers", "peft", "safetensors", "huggingface_hub", "gguf", "pyarrow"}
LOOP = PACKAGE / "train" / "loop"  # needs the training packages, and imports them at its modules' heads
FILES = sorted(PACKAGE.rglob("*.py"))
LIGHT = [path for path in FILES if LOOP not in path.parents]


def layers() -> list[list[str]]:
    """The list in CONTRIBUTING.md, highest layer first: `a, b > c > d`, boxes of one layer separated by commas."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = re.search(r"```layers\n(.*?)```", text, re.DOTALL)
    assert found, "CONTRIBUTING.md has no block ```layers"
    return [[name.strip() for name in layer.split(",")] for layer in found[1].replace("\n", " ").split(">")]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def box(module: str) -> str:
    """What stands at the package's top and holds a module; "" for the package itself."""
    return [*module.split("."), ""][1]


def imports(tree: ast.AST, *, inside_functions: bool = True) -> Iterator[tuple[str, int]]:
    """(module or module.name, line) of every import that runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from imports(ast.Module(node.orelse, []), inside_functions=inside_functions)
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(node, inside_functions=inside_functions)


def own_imports(path: Path) -> Iterator[tuple[str, int]]:
    """The modules of mergeforge that a file imports; a name imported from a package counts as the package."""
    for name, line in imports(ast.parse(path.read_text(encoding="utf-8"))):
        if name.split(".")[0] == "mergeforge":
            yield (name if name in MODULES else name.rpartition(".")[0]), line


GRAPH = {module: {other for other, _ in own_imports(path)} - {module} for module, path in MODULES.items()}


def cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or not (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in graph.get(module, ()):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            group = []
            while not group or group[-1] != module:
                group.append(stack.pop())
            if len(group) > 1:
                groups.append(sorted(group))

    for module in graph:
        if module not in index:
            visit(module)
    return groups


def test_every_box_has_a_layer() -> None:
    boxes = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert boxes - {"__init__", "__main__", "__pycache__"} == {name for layer in layers() for name in layer}


def test_the_top_of_the_package_is_short() -> None:
    boxes = [path.name for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "py.typed")]
    assert len(boxes) <= MAX_BOXES, sorted(boxes)
    assert {name for name in boxes if name.endswith(".py")} == {"__init__.py", "__main__.py", "api.py", "errors.py"}


def test_imports_go_down() -> None:
    depth = {name: number for number, layer in enumerate(layers()) for name in layer}
    upward = [
        f"{path.relative_to(ROOT)}:{line}: {box(module)} imports {other}"
        for module, path in MODULES.items()
        for other, line in own_imports(path)
        if box(module) not in ("__main__", box(other))
        and not (box(module) and depth[box(module)] < depth.get(box(other), -1))
    ]
    assert not upward, "\n".join(upward)


def test_no_file_imports_itself_in_a_circle() -> None:
    assert not cycles(GRAPH)


def test_a_circle_is_found() -> None:
    """A circle of three files, of which one package's __init__ is no part."""
    assert cycles({"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set()}) == [["a", "b", "c"]]


def test_a_class_name_means_one_class() -> None:
    places = defaultdict(list)
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_no_module_is_named_by_a_gerund() -> None:
    """Modules are named by nouns or verbs; these words in -ing are nouns of the field."""
    nouns = {
        "embedding",
        "mapping",
        "packing",
        "pairing",
        "pooling",
        "rounding",
        "sampling",
        "supertuning",
        "tiling",
        "training",
        "tuning",
    }
    last_words = {str(path.relative_to(PACKAGE)): path.stem.rpartition("_")[2] for path in FILES}
    assert not {name for name, word in last_words.items() if word.endswith("ing") and word not in nouns}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_of_readable_length(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_heavy_at_module_level(path: Path) -> None:
    for name, line in imports(ast.parse(path.read_text(encoding="utf-8")), inside_functions=False):
        assert name.split(".")[0] not in HEAVY, f"{path.name}, line {line}: {name}"


def test_importing_everything_loads_nothing_heavy() -> None:
    names = [name for name, path in MODULES.items() if path in LIGHT and not name.endswith("__main__")]
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
    code += f"assert not {HEAVY} & sys.modules.keys(), {HEAVY} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
