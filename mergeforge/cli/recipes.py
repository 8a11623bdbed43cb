"""mergeforge demo, init, recipes, list and schema."""

from __future__ import annotations

import json
import site
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from mergeforge.errors import OutputError, RecipeError, did_you_mean

SUMMARY = "# "  # a recipe's first comment line says what it is for


@click.command()
@click.argument("folder", default="mergeforge-demo")
def demo(folder: str) -> None:
    """Make a small model and three adapters in FOLDER, merge them, write GGUF too, and verify the result.

    Needs no network and takes under a minute.

    \b
    mergeforge demo
    """
    root = Path(folder)
    if root.exists() and any(root.iterdir()) and not (root / "demo.yaml").is_file():
        raise OutputError(f"{root} is not empty", hint="name a new folder: mergeforge demo DIR")
    click.echo(f"making a model of 8 M parameters and three adapters in {root}", err=True)
    from mergeforge.cli import _progress
    from mergeforge.execute import executor
    from mergeforge.operations import synthetic_models, verify
    from mergeforge.planner import make_plan

    shape = synthetic_models.shape_named("demo")
    base = synthetic_models.write_model(root / "base", shape)
    for seed, (name, rank) in enumerate({"loan": 8, "underwriting": 16, "fraud": 4}.items(), start=1):
        synthetic_models.write_adapter(root / name, shape, str(base), rank=rank, alpha=2 * rank, seed=seed)
    recipe = root / "demo.yaml"
    recipe.write_text(_demo_recipe(root), encoding="utf-8")
    plan = make_plan(recipe)
    to = _progress.console()
    _progress.show_plan(plan, to)
    for _ in _progress.watch(plan, executor.run(plan, fresh=True, overwrite=True), to):
        pass
    verdict = verify.verify(plan.out, deep=True)
    if not verdict.ok:
        raise AssertionError("\n".join(verdict.problems))
    click.echo(f"merged into {plan.out}: {verdict.tensors} tensors verified, {verdict.recomputed} computed again")
    click.echo(f"next: mergeforge inspect {plan.out / next(iter(plan.ggufs[0].layout.files))}")
    click.echo(f"      mergeforge diff {base} {plan.out}")
    click.echo(f"      edit {recipe}, then: mergeforge run {recipe} --overwrite")


def _demo_recipe(root: Path) -> str:
    weights = {"loan": 0.4, "underwriting": 0.4, "fraud": 0.2}
    lines = [
        "# Three adapters folded into a base with weights.",
        f"base_model: {root / 'base'}",
        "adapters:",
        *(f"  - adapter: {root / name}\n    weight: {weight}" for name, weight in weights.items()),
        "output:",
        f"  path: {root / 'merged'}",
        "  gguf: [q4_k_m]",
    ]
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("file", default="recipe.yaml")
@click.option(
    "--template",
    default="three_adapters",
    metavar="NAME",
    help="A name from `mergeforge recipes ls`.",
    show_default=True,
)
def init(file: str, template: str) -> None:
    """Write a commented recipe to start from.

    \b
    mergeforge init --template ties recipe.yaml
    """
    _copy(template, Path(file))


@click.group()
def recipes() -> None:
    """The recipes that come with the package.

    \b
    mergeforge recipes ls
    mergeforge recipes show ties
    mergeforge recipes cp ties recipe.yaml
    """


@recipes.command("ls")
def recipes_ls() -> None:
    """List names and what each is for."""
    for name, path in shipped().items():
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        click.echo(f"{name:18} {first.removeprefix(SUMMARY)}")


@recipes.command("show")
@click.argument("name")
def recipes_show(name: str) -> None:
    """Print a recipe."""
    click.echo(_shipped(name).read_text(encoding="utf-8"), nl=False)


@recipes.command("cp")
@click.argument("name")
@click.argument("file", default="")
def recipes_cp(name: str, file: str) -> None:
    """Copy a recipe to FILE (default: its own name)."""
    _copy(name, Path(file or f"{name}.yaml"))


@click.command("list")
@click.argument("kind", type=click.Choice(["methods", "adapters", "architectures", "quants"]))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def list_names(kind: str, as_json: bool) -> None:
    """List merge methods with their parameters, adapter kinds, GGUF architectures or types.

    \b
    mergeforge list methods
    mergeforge list quants
    """
    lists = {"methods": _methods, "adapters": _adapters, "architectures": _architectures, "quants": _quants}
    rows = lists[kind]()
    if as_json:
        click.echo(json.dumps(rows))
        return
    for row in rows:
        click.echo(f"{row['name']:18} {row['about']}")
        if row.get("parameters"):
            click.echo(f"{'':18} {', '.join(row['parameters'])}")


@click.command()
@click.option("--train", is_flag=True, help="Of train.yaml instead.")
def schema(train: bool) -> None:
    """Print the JSON Schema of a recipe, for editors.

    \b
    mergeforge schema > mergeforge.schema.json
    mergeforge schema --train > train.schema.json
    """
    from mergeforge import recipe
    from mergeforge.train import keys

    click.echo(json.dumps(keys.json_schema() if train else recipe.json_schema(), indent=2))


def _methods() -> list[dict[str, Any]]:
    from mergeforge.methods import METHODS

    rows = []
    for name in METHODS:
        entry = METHODS[name]
        parameters = [
            f"{one.name} (required)" if one.required else f"{one.name} = {_shown(one.default)}"
            for one in entry.parameters.values()
        ]
        rows.append({"name": name, "about": entry.about, "parameters": parameters})
    return rows


def _adapters() -> list[dict[str, Any]]:
    from mergeforge.adapters.peft.kind import KINDS
    from mergeforge.adapters.peft.unsupported import REFUSED

    about = "LoRA, rsLoRA, DoRA; rank and alpha patterns, biases, embeddings, modules_to_save, trained tokens"
    rows = [{"name": "LORA", "about": about}]
    rows += [{"name": name, "about": KINDS[name].about} for name in KINDS]
    return rows + [{"name": name, "about": f"refused: {reason}"} for name, reason in REFUSED.items()]


def _architectures() -> list[dict[str, Any]]:
    from mergeforge.gguf.architectures import ARCHITECTURES

    return [{"name": name, "about": ARCHITECTURES[name].__module__.rpartition(".")[2]} for name in ARCHITECTURES]


def _quants() -> list[dict[str, Any]]:
    from mergeforge.gguf.file_types import FILE_TYPES
    from mergeforge.gguf.quantize import QUANT_TYPES

    rows = []
    for name, mix in FILE_TYPES.items():
        kind = QUANT_TYPES[mix.default]
        about = f"mostly {kind.name}, {kind.nbytes * 8 / kind.block:g} bits a weight; as "
        rows.append({"name": name, "about": about + ("llama-quantize" if mix.quantizer else "the converter")})
    return rows


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "none" if value is None else f"{value:g}"


def shipped() -> Mapping[str, Path]:
    """The package's recipes by name: in a checkout, or where pip put them."""
    here = Path(__file__).resolve().parents[2] / "recipes"
    installed = [Path(root) / "share" / "mergeforge" / "recipes" for root in (sys.prefix, site.getuserbase())]
    for folder in (here, *installed):
        if found := {path.stem: path for path in sorted(folder.glob("*.yaml"))}:
            return found
    return {}


def _shipped(name: str) -> Path:
    found = shipped()
    if name not in found:
        hint = did_you_mean(name, found) or "known: " + ", ".join(found)
        raise RecipeError(f"there is no recipe called '{name}'", hint=hint)
    return found[name]


def _copy(name: str, target: Path) -> None:
    text = _shipped(name).read_text(encoding="utf-8")
    if target.exists():
        raise OutputError(f"{target} exists", hint="name another file")
    target.write_text(text, encoding="utf-8")
    click.echo(f"wrote {target}; edit its paths, then: mergeforge plan {target}")
