"""mergeforge train."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from mergeforge.cli import _options
from mergeforge.core.messages import warnings_in, without_warnings
from mergeforge.core.sizes import format_size
from mergeforge.errors import RecipeError
from mergeforge.train.progress import duration

if TYPE_CHECKING:
    from mergeforge.train.plan import TrainPlan
    from mergeforge.train.post_training import PostTrainingResult
    from mergeforge.train.resume import Resume
    from mergeforge.train.run import Trained
    from mergeforge.train.settings import PostTraining


class _TrainCommand(click.Command):
    """`train`, and `train sweep` as a command of its own."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args[:1] == ["sweep"]:
            from mergeforge.cli.sweep import sweep

            return sweep.make_context(f"{info_name} sweep", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


@dataclass(frozen=True)
class _Options:
    """The command line of `train`."""

    config: str | None
    out: str | None
    sets: tuple[str, ...]
    device: str
    plan_only: bool
    gpu: str | None
    price_per_hour: float | None
    resume: str
    extend_epochs: float
    allow_skips: bool
    overwrite: bool
    then: str | None
    fail_if_worse: bool
    memory: str | None
    as_json: bool
    quiet: bool

    @property
    def start(self) -> Resume:
        """Where the run starts."""
        from mergeforge.train.resume import Resume

        return Resume(self.resume, self.extend_epochs, self.overwrite)


@click.command(cls=_TrainCommand)
@click.argument("config", required=False)
@click.option("--out", metavar="DIR", help="The run's folder; overrides `output`.")
@_options.set_keys
@_options.device
@click.option("--plan", "plan_only", is_flag=True, help="Show data, memory, time and cost; train nothing.")
@click.option("--gpu", metavar="NAME|SIZE", help="With --plan: plan for a GPU that is not here (4090, T4, 8GB, ...).")
@click.option("--price-per-hour", type=float, metavar="PRICE", help="Price of the machine, for the plan's cost.")
@click.option(
    "--resume",
    default="auto",
    metavar="auto|never|PATH",
    help="Start from the newest checkpoint, from the beginning, or from this checkpoint.",
    show_default=True,
)
@click.option("--extend-epochs", type=float, default=0.0, metavar="N", help="Train a finished run for N more epochs.")
@click.option("--allow-skips", is_flag=True, help="Train even if more than 10 % of the rows are skipped.")
@click.option("--overwrite", is_flag=True, help="Replace a finished run.")
@click.option(
    "--then",
    metavar="STEPS",
    help="What to do after training: merge, gguf, publish (comma-separated); adds to `after`.",
)
@click.option("--fail-if-worse", is_flag=True, help="Exit with 1, and merge nothing, if the verdict is worse.")
@click.option("--memory", metavar="SIZE", help="Working memory of the merge after training, e.g. 2GiB.")
@_options.as_json
@_options.quiet
def train(**arguments: Any) -> int:
    """Train an adapter (QLoRA, LoRA, DoRA) or a whole model, as CONFIG says.

    If it is interrupted or killed, run the same command again to resume. Without CONFIG, --then uses the newest
    finished run in runs/. `mergeforge train sweep` searches for good settings. Training needs transformers, peft and
    accelerate.

    \b
    Examples:
      mergeforge train recipes/train-demo.yaml
      mergeforge train train.yaml --plan
      mergeforge train train.yaml --plan --gpu 8GB
      mergeforge train train.yaml --then merge,gguf
      mergeforge train --then merge
      torchrun --nproc-per-node 2 -m mergeforge train train.yaml
    """
    from mergeforge.train import environment
    from mergeforge.train.resume import check_resume

    options = _Options(**arguments)
    _check_options(options)
    options = replace(options, quiet=options.quiet or not environment.is_main())
    plan = _make_plan(options)
    after = _steps_after(plan, options)
    check_resume(plan.folder, options.start)
    if options.plan_only:
        return _show_only_plan(plan, options)
    if after.publish:
        from mergeforge.hub.publish import check_access

        check_access(after.publish["repo"])  # now, so that a missing token does not waste the training
    if not options.quiet:
        _show_plan(plan)
    trained = _train(plan, after, options)
    if trained.interrupted:
        _echo(f"Interrupted after step {trained.steps}. Run the same command again to resume.")
        return 130
    return _finish(plan, trained, after, options)


def _check_options(options: _Options) -> None:
    """Raise RecipeError for options that contradict each other or have no meaning."""
    from mergeforge.tensors.budget import make_budget

    if not 0 <= options.extend_epochs < math.inf:
        raise RecipeError(f"--extend-epochs must be a finite number of at least 0, not {options.extend_epochs:g}")
    if options.gpu and not options.plan_only:
        raise RecipeError(
            "--gpu plans for a GPU that is not here", hint="add --plan; --device names one of this machine"
        )
    if options.config is None and not options.then:
        raise RecipeError("give the train.yaml of the run", hint="`mergeforge recipes cp train-demo` writes one")
    make_budget(options.memory, "cpu")  # now, so that a mistake in --memory does not waste the training


def _make_plan(options: _Options) -> TrainPlan:
    """The plan of the run that CONFIG describes; without CONFIG, of the newest finished one."""
    from mergeforge.cli import _progress
    from mergeforge.train import environment, run_folder
    from mergeforge.train.plan import make_plan
    from mergeforge.train.resume import refuse_finished
    from mergeforge.train.settings import read as read_settings

    sets = (*options.sets, "allow_skips=true") if options.allow_skips else options.sets
    sets = (*sets, f"output={options.out}") if options.out is not None else sets
    with environment.main_first():
        settings = read_settings(options.config or run_folder.newest_run().settings(), sets)
        if not (options.plan_only or options.then or settings.after.merge):
            refuse_finished(run_folder.RunFolder(settings.output), options.start)
        with _progress.row_count(_progress.console(), quiet=options.quiet) as on_progress:
            plan = make_plan(settings, device=options.device, gpu=options.gpu, on_progress=on_progress)
    if options.fail_if_worse and plan.data.validation is None:
        raise RecipeError("--fail-if-worse needs validation data", hint="add val: 0.1 to train.yaml")
    return plan


def _steps_after(plan: TrainPlan, options: _Options) -> PostTraining:
    """What to do after training: `after`, and what --then adds. Raises RecipeError and SourceError."""
    from mergeforge.train import post_training, preflight

    after, trains_adapter = plan.settings.after, plan.settings.trains_adapter
    if options.then:
        after = post_training.steps_from_names(after, options.then, trains_adapter=trains_adapter)
    preflight.check_post_training(after, plan.config_folder, trains_adapter=trains_adapter)
    return after


def _show_only_plan(plan: TrainPlan, options: _Options) -> int:
    if not options.quiet:
        _show_plan(plan)
        _show_estimates(plan, options.price_per_hour)
    if options.as_json:
        click.echo(json.dumps(_plan_as_json(plan), default=str))
    return 0


def _train(plan: TrainPlan, after: PostTraining, options: _Options) -> Trained:
    """Train, unless the run is finished and only the steps after it are asked for."""
    from mergeforge.train import run

    starts_again = options.overwrite or options.extend_epochs
    if after.any_step and not starts_again and (trained := run.trained_before(plan)):
        return trained
    with _progress_bar(plan, quiet=options.quiet) as listener:
        return run.train(plan, options.start, [listener])


def _finish(plan: TrainPlan, trained: Trained, after: PostTraining, options: _Options) -> int:
    """Run the steps after training and show the result; 1 if --fail-if-worse refuses it."""
    from mergeforge.train import environment, post_training

    result = post_training.PostTrainingResult()
    is_refused = options.fail_if_worse and trained.verdict is not None and trained.verdict.is_worse
    if environment.is_main() and not is_refused:
        result = post_training.run_post_training(
            plan, after, memory=options.memory, on_message=lambda text: None if options.quiet else _echo(text)
        )
    if not options.quiet:
        _show_result(trained, result)
    if options.as_json and environment.is_main():
        entries = asdict(trained) | {"folder": trained.folder.root, "followed": asdict(result)}
        click.echo(json.dumps(entries, default=str))
    return 1 if is_refused else 0


def _plan_as_json(plan: TrainPlan) -> dict[str, Any]:
    entries = {"choices": asdict(plan.resolved), "counts": plan.data.counts.as_dict()}
    return entries | {"parameters": plan.stats.parameters, "gpu": plan.gpu.label if plan.gpu else None}


def _show_plan(plan: TrainPlan) -> None:
    """Print the plan on stderr: data, model, resolved settings and the fallbacks that memory made necessary."""
    from mergeforge.train.environment import describe_machine
    from mergeforge.train.objectives import SFT

    counts, resolved, setup = plan.data.counts, plan.resolved, plan.resolved.setup
    method = plan.settings.method if plan.settings.trains_adapter else "full training"
    size = f"{plan.stats.parameters / 1e6:,.0f} M parameters"
    method += f" ({plan.settings.objective})" if plan.settings.objective != SFT else ""
    _echo(f"{method} of {plan.base} ({size}) on {plan.gpu.label if plan.gpu else describe_machine(plan.machine)}")
    has_skipped = counts.empty + counts.too_long + counts.bad
    skipped = f" ({counts.empty} empty, {counts.too_long} too long, {counts.bad} bad)" if has_skipped else ""
    held_out = len(plan.data.validation) // plan.settings.answers if plan.data.validation else 0
    validation = f", {held_out} of them for validation" if held_out else ""
    trained = f"{counts.trained:,} of {counts.tokens:,} tokens are trained on"
    _echo(f"data     {counts.used} of {counts.rows} rows{skipped}{validation}; {trained}")
    for row in counts.skipped:
        _echo(f"  skipped {row.place}: {row.text}")
    for decision in plan.data.decisions:
        if decision.unused:
            _echo(f"  not used from {decision.source}: {', '.join(decision.unused)}")
    for note in without_warnings(plan.data.notes):
        _echo(f"  {note}")
    for warning in warnings_in(plan.data.notes):
        _echo(f"warning: {warning}")
    packs = plan.packs(packed=resolved.pack)
    schedule = plan.schedule(len(packs))
    sequences = f"{len(packs)} sequences of at most {setup.seq_len} tokens{', packed' if resolved.pack else ''}"
    batch = f"{schedule.micro_batch} x {schedule.accumulation_steps} per step"
    _echo(f"steps    {schedule.total_steps} in {schedule.epochs:.3g} epochs: {sequences}, {batch}")
    modules = len(plan.stats.adapted(setup.lora))
    kind = plan.settings.adapter.type if plan.settings.adapter else f"rank {setup.lora.r}"
    adapter = f"{kind} on {modules} modules, " if plan.settings.trains_adapter else ""
    _echo(f"training {adapter}learning rate {resolved.lr:g}, {setup.optimizer}")
    _echo(f"memory   about {format_size(resolved.estimate.total)}")
    for note in resolved.notes:
        _echo(f"  {note}")


def _show_estimates(plan: TrainPlan, price: float | None) -> None:
    """Print memory by part, time, and cost where a price is given."""
    from mergeforge.train.estimate import estimate_seconds

    resolved = plan.resolved
    for name, size in resolved.estimate.parts.items():
        _echo(f"  {format_size(size):>9}  {name}")
    schedule = plan.schedule(len(plan.packs(packed=resolved.pack)))
    tokens = int(plan.data.counts.tokens * schedule.epochs)
    speed, source = None, "this device's speed at matrix products"
    if plan.gpu:
        speed, source = plan.gpu.operations_per_second, plan.gpu.source
    dtype = resolved.dtype
    seconds = estimate_seconds(plan.stats, resolved.setup, tokens, device=resolved.device, dtype=dtype, speed=speed)
    _echo(f"time     about {duration(seconds)} (estimated from {source})")
    if price is not None:
        _echo(f"cost     about {seconds / 3600 * price:.2f} at {price:g} an hour")


def _echo(line: str) -> None:
    click.echo(line, err=True)


@contextmanager
def _progress_bar(plan: TrainPlan, *, quiet: bool) -> Iterator[Any]:
    """A listener that shows metrics: a bar on a terminal, occasional lines elsewhere."""
    from mergeforge.cli import _progress
    from mergeforge.train.progress import ProgressLines

    if quiet:
        yield lambda line: None
        return
    total = plan.schedule(len(plan.packs(packed=plan.resolved.pack))).total_steps
    console = _progress.console()
    if not console.is_terminal:
        yield ProgressLines(total)
        return
    with _progress.step_bar(total, console) as listener:
        yield listener


def _show_result(trained: Trained, result: PostTrainingResult) -> None:
    losses = [("loss", trained.loss), ("validation loss", trained.validation_loss)]
    numbers = ", ".join(f"{name} {loss:.4f}" for name, loss in losses if loss is not None)
    peak = format_size(trained.peak_memory)
    _echo(f"trained {trained.steps} steps in {duration(trained.seconds)}: {numbers}; peak memory {peak}")
    if trained.stopped_early:
        _echo("stopped early: the validation loss no longer improved (early_stop)")
    for line in trained.verdict.lines() if trained.verdict else ():
        _echo(f"  {line}")
    _echo(f"wrote {trained.result} and {trained.folder.report}")
    if result.merged:
        names = "".join(f", {path.name}" for path in result.ggufs)
        _echo(f"merged into {result.merged} (base_numerics: {result.base_numerics}){names}")
    elif result.ggufs:
        _echo("wrote " + ", ".join(map(str, result.ggufs)))
    elif trained.folder.recipe.exists():
        _echo(f"next: mergeforge run {trained.folder.recipe}")
