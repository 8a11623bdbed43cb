"""mergeforge demo."""

from __future__ import annotations

from pathlib import Path

import click

from mergeforge.errors import OutputError

ADAPTERS = {"loan": (8, 0.4), "underwriting": (16, 0.4), "fraud": (4, 0.2)}  # rank and weight in the recipe


@click.command()
@click.argument("folder", default="mergeforge-demo")
def demo(folder: str) -> None:
    """Make a small model and three adapters in FOLDER, merge them, write a GGUF, and verify the result.

    Needs no network and takes less than a minute.

    \b
    Examples:
      mergeforge demo
      mergeforge demo some-folder
    """
    root = Path(folder)
    if root.exists() and any(root.iterdir()) and not (root / "demo.yaml").is_file():
        raise OutputError(f"{root} is not empty", hint="name a new folder: mergeforge demo DIR")
    click.echo(f"making a model of 8 M parameters and three adapters in {root}", err=True)
    from mergeforge import api
    from mergeforge.cli import _progress
    from mergeforge.operations.synthetic_models import model_shape, write_adapter, write_model

    shape = model_shape("demo")
    base = write_model(root / "base", shape)
    for seed, (name, (rank, _)) in enumerate(ADAPTERS.items(), start=1):
        write_adapter(root / name, shape, str(base), rank=rank, alpha=2 * rank, seed=seed)
    recipe = root / "demo.yaml"
    recipe.write_text(_recipe(root), encoding="utf-8")
    plan = api.plan(recipe)
    to = _progress.console()
    _progress.show_plan(plan, to)
    for _ in _progress.watch(plan, api.iter_run(plan, fresh=True, overwrite=True), to):
        pass
    verdict = api.verify(plan.out, deep=True)
    if not verdict.ok:
        raise AssertionError("\n".join(verdict.problems))
    click.echo(f"merged into {plan.out}: {verdict.tensors} tensors verified, {verdict.recomputed} recomputed")
    click.echo(f"next: mergeforge inspect {plan.out / next(iter(plan.ggufs[0].layout.files))}")
    click.echo(f"      mergeforge diff {base} {plan.out}")
    click.echo(f"      edit {recipe}, then: mergeforge run {recipe} --overwrite")


def _recipe(root: Path) -> str:
    lines = [
        "# Three adapters folded into a base model with weights.",
        f"base_model: {root / 'base'}",
        "adapters:",
        *(f"  - adapter: {root / name}\n    weight: {weight}" for name, (_, weight) in ADAPTERS.items()),
        "output:",
        f"  path: {root / 'merged'}",
        "  gguf: [q4_k_m]",
    ]
    return "\n".join(lines) + "\n"
