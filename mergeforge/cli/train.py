"""mergeforge train."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from mergeforge.core.sizes import format_size
from mergeforge.errors import RecipeError

if TYPE_CHECKING:
    from mergeforge.train.plan import TrainPlan
    from mergeforge.train.run import Trained


@click.command()
@click.argument("config", required=False)
@click.option("--out", metavar="DIR", help="The run's folder, over `output`.")
@click.option("--set", "sets", multiple=True, metavar="PATH=VALUE", help="Override a key of the file (repeatable).")
@click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.", show_default=True)
@click.option("--plan", "only_plan", is_flag=True, help="Show data, memory, time and cost, and train nothing.")
@click.option("--price-per-hour", type=float, metavar="PRICE", help="Of the machine, for the plan's cost.")
@click.option("--resume", default="auto", metavar="auto|never|PATH", help="Where to go on.", show_default=True)
@click.option("--extend-epochs", type=float, default=0.0, metavar="N", help="Train a finished run on.")
@click.option("--overwrite", is_flag=True, help="Throw a finished run in the folder away.")
@click.option("--then", metavar="STEPS", help="merge,gguf,publish: what follows, besides the file's `after`.")
@click.option("--memory", metavar="SIZE", help="Working memory of the merge that follows.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def train(
    config: str | None,
    *,
    out: str | None,
    sets: tuple[str, ...],
    device: str,
    only_plan: bool,
    price_per_hour: float | None,
    resume: str,
    extend_epochs: float,
    overwrite: bool,
    then: str | None,
    memory: str | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Train an adapter (QLoRA, LoRA, DoRA) or a whole model, as CONFIG says. Needs the extra `train`.

    Without CONFIG, --then goes on from the newest finished run of runs/.

    \b
    mergeforge train recipes/train-demo.yaml
    mergeforge train train.yaml --plan
    mergeforge train train.yaml --then merge,gguf
    mergeforge train --then merge
    torchrun --nproc-per-node 2 -m mergeforge train train.yaml
    """
    if extend_epochs < 0:
        raise RecipeError("--extend-epochs must not be negative")
    if config is None and not then:
        raise RecipeError("which run? give its train.yaml", hint="`mergeforge recipes cp train-demo` writes one")
    from mergeforge.train import distributed, post_training, run, run_folder
    from mergeforge.train import plan as planning
    from mergeforge.train.resume import Resume

    quiet = quiet or not distributed.is_main()
    with distributed.main_first():
        source = config or run_folder.newest_run().settings()
        plan = planning.make_plan(source, sets=sets, out=out, device=device)
    after = post_training.steps_from_names(plan.settings.after, then) if then else plan.settings.after
    if after.publish and not only_plan:
        from mergeforge.hub.publish import check_access

        check_access(after.publish["repo"])  # before the work, not after it
    if not quiet:
        _show(plan, price_per_hour, whole=only_plan)
    if only_plan:
        if as_json:
            click.echo(json.dumps(_plan_facts(plan), default=str))
        return 0
    trained = None if overwrite or extend_epochs or not after.merge else run.trained_before(plan)
    if trained is None:
        with _bar(plan, quiet=quiet) as listener:
            trained = run.train(plan, Resume(resume, extend_epochs, overwrite), [listener])
    if trained.interrupted:
        click.echo(f"interrupted after step {trained.steps}; the same command goes on from there", err=True)
        return 130
    followed = post_training.PostTrainingResult()
    if distributed.is_main():
        followed = post_training.run_post_training(
            plan, after, memory=memory, tell=lambda line: None if quiet else click.echo(line, err=True)
        )
    if not quiet:
        _tell(trained, followed)
    if as_json and distributed.is_main():
        click.echo(
            json.dumps(asdict(trained) | {"folder": trained.folder.root, "followed": asdict(followed)}, default=str)
        )
    return 0


def _plan_facts(plan: TrainPlan) -> dict[str, Any]:
    return {"choices": asdict(plan.resolved), "counts": plan.data.counts.as_dict(), "parameters": plan.stats.parameters}


def _show(plan: TrainPlan, price: float | None, *, whole: bool) -> None:
    """The plan on stderr: data, model, choices and what was given up; with `whole`, memory by part and time too."""
    from mergeforge.train.requirements import describe_machine

    counts, way, choices = plan.data.counts, plan.resolved.setup, plan.resolved
    what = plan.settings.method if plan.settings.trains_adapter else "all weights"
    _say(f"{what} of {plan.base} ({plan.stats.parameters / 1e6:,.0f} M parameters) on {describe_machine(plan.machine)}")
    skipped = counts.empty + counts.too_long + counts.bad
    lost = f" ({counts.empty} empty, {counts.too_long} too long, {counts.bad} bad)" if skipped else ""
    held = f", {len(plan.data.validation)} of them for validation" if plan.data.validation else ""
    trained = f"{counts.trained:,} of {counts.tokens:,} tokens trained on"
    _say(f"data     {counts.used} of {counts.rows} rows{lost}{held}; {trained}")
    for one in counts.skipped:
        _say(f"  skipped {one.place}: {one.why}")
    for note in plan.data.notes:
        _say(f"  {note}")
    packs = plan.packs(packed=choices.pack)
    schedule = plan.schedule(len(packs))
    packed = f"{len(packs)} sequences of at most {way.seq_len} tokens{', packed' if choices.pack else ''}"
    each = f"{schedule.micro_batch} x {schedule.accumulation_steps} a step"
    _say(f"steps    {schedule.total} in {schedule.epochs:.3g} epochs: {packed}, {each}")
    rank = f"rank {way.lora.r} on {len(plan.stats.adapted(way.lora))} modules, " if plan.settings.trains_adapter else ""
    _say(f"learns   {rank}rate {choices.lr:g}, {way.optimizer}")
    _say(f"memory   about {format_size(choices.estimate.total)}")
    for note in choices.notes:
        _say(f"  {note}")
    if whole:
        _whole(plan, price, int(counts.tokens * schedule.epochs))


def _whole(plan: TrainPlan, price: float | None, tokens: int) -> None:
    from mergeforge.train.time_estimate import estimate_seconds

    for name, size in plan.resolved.estimate.parts.items():
        _say(f"  {format_size(size):>9}  {name}")
    took = estimate_seconds(plan.stats, plan.resolved, tokens)
    _say(f"time     about {_duration(took)} (an estimate, from this device's speed at matrix products)")
    if price is not None:
        _say(f"cost     about {took / 3600 * price:.2f} at {price:g} an hour")


def _duration(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds > 5400
        else f"{seconds / 60:.0f} min"
        if seconds > 90
        else f"{seconds:.0f} s"
    )


def _say(line: str) -> None:
    click.echo(line, err=True)


@contextmanager
def _bar(plan: TrainPlan, *, quiet: bool) -> Iterator[Any]:
    """Something that takes metrics and shows them: a bar on a terminal, a line now and then elsewhere."""
    from mergeforge.cli import _progress

    if quiet:
        yield lambda line: None
        return
    total = plan.schedule(len(plan.packs(packed=plan.resolved.pack))).total
    with _progress.steps(total, _progress.console()) as step:
        yield lambda line: step(int(line.get("step", 0)), _words(line))


def _words(line: Mapping[str, Any]) -> str:
    """A line of metrics as a person reads it."""
    if "note" in line:
        return str(line["note"])
    if "eval_loss" in line:
        return f"validation loss {line['eval_loss']:.4f}"
    return f"loss {line['loss']:.4f}, {line['tokens_per_second']:,.0f} tokens/s, {format_size(line['memory'])}"


def _tell(trained: Trained, followed: Any) -> None:
    losses = [("loss", trained.loss), ("validation loss", trained.validation_loss)]
    numbers = ", ".join(f"{name} {loss:.4f}" for name, loss in losses if loss is not None)
    peak = format_size(trained.peak_memory)
    _say(f"trained {trained.steps} steps in {_duration(trained.seconds)}: {numbers}; peak memory {peak}")
    _say(f"wrote {trained.result} and {trained.folder.report}")
    if followed.merged:
        names = "".join(f", {path.name}" for path in followed.ggufs)
        _say(f"merged into {followed.merged} (base_numerics: {followed.base_numerics}){names}")
    elif trained.folder.recipe.exists():
        _say(f"next: mergeforge run {trained.folder.recipe}")
