"""mergeforge train sweep."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergeforge.cli import _options

if TYPE_CHECKING:
    from mergeforge.train.sweep import SweepResult, TrialResult


@click.command("sweep")
@click.argument("config")
@_options.device
@click.option("--then", metavar="STEPS", help="What to do with the best run: merge, gguf, publish (comma-separated).")
@click.option("--memory", metavar="SIZE", help="Working memory of the merge at the end, e.g. 2GiB.")
@_options.as_json
@_options.quiet
def sweep(config: str, *, device: str, then: str | None, memory: str | None, as_json: bool, quiet: bool) -> int:
    """Train many times with other values of some keys, as CONFIG says, and keep the best run.

    CONFIG names a train.yaml, the keys to vary with their ranges, and the number of trials. Optuna chooses the values
    and ends hopeless runs. Run the same command again to resume; started once for each GPU (--device cuda:1), the
    processes share the trials. Needs optuna.

    \b
    Examples:
      mergeforge train sweep sweep.yaml
      mergeforge train sweep sweep.yaml --then merge,gguf
    """
    from mergeforge.tensors.budget import make_budget
    from mergeforge.train import post_training
    from mergeforge.train.plan import make_plan
    from mergeforge.train.sweep import run_sweep
    from mergeforge.train.sweep_settings import read_sweep

    settings = read_sweep(Path(config))
    shared = settings.shared_settings()
    after = post_training.steps_from_names(shared.after, then, trains_adapter=shared.trains_adapter) if then else None
    make_budget(memory, "cpu")  # now, so that a mistake does not waste the runs
    show = (lambda result: None) if quiet else (lambda result: _show_trial(result, settings.trials))
    result = run_sweep(settings, device=device, on_trial=show)
    followed = post_training.PostTrainingResult()
    if after and result.best_settings and not result.interrupted:
        followed = post_training.run_post_training(make_plan(result.best_settings, device=device), after, memory=memory)
    if not quiet:
        _show_result(result)
    if as_json:
        click.echo(json.dumps(asdict(result) | {"followed": asdict(followed)}, default=str))
    return 130 if result.interrupted else 0 if result.best else 1


def _show_trial(result: TrialResult, trials: int) -> None:
    from mergeforge.train.sweep_report import format_value

    values = ", ".join(f"{key} {format_value(value)}" for key, value in result.values.items())
    loss = "" if result.loss is None else f" validation loss {result.loss:.4f}"
    state = "" if result.state == "complete" else f" {result.state}"
    why = f": {result.why}" if result.why else ""
    click.echo(f"trial {result.number} of {trials}: {values}:{state}{loss}{why}", err=True)


def _show_result(result: SweepResult) -> None:
    if result.interrupted:
        click.echo("Interrupted. Run the same command again to resume.", err=True)
    elif not result.best:
        click.echo(f"no trial was completed: see {result.report}", err=True)
    if result.best:
        click.echo(f"best: trial {result.best.number}, validation loss {result.best.loss:.4f}", err=True)
        click.echo(f"wrote {result.best.folder} and {result.report}", err=True)
        click.echo(f"next: mergeforge train {result.best_settings} --then merge", err=True)
