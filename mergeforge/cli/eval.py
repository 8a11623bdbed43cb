"""mergeforge eval and mergeforge compare."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from mergeforge.errors import RecipeError, SourceError, did_you_mean

if TYPE_CHECKING:
    from mergeforge.data import DataSettings
    from mergeforge.eval import Sampling, Smoke
    from mergeforge.eval.evaluate import Progress

SAMPLES, METRIC_SAMPLES = 3, 50  # answers that are shown, and that text metrics are taken of, unless --samples says


def _data_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How rows are read and rendered, as in `mergeforge data`; how models are opened; how they answer."""
    options = [
        click.option("--data", "path", metavar="FILE", help="Rows: file, folder, glob, hf://owner/name, sample:chat."),
        click.option("--format", "form", default="auto", metavar="NAME", help="Of the rows; auto detects it."),
        click.option("--columns", multiple=True, metavar="ROLE=COLUMN", help="Name a column (repeatable)."),
        click.option("--template", default="auto", metavar="NAME", help="Chat template: auto, a name, a .jinja file."),
        click.option("--system", metavar="TEXT", help="System message of conversations that have none."),
        click.option("--loss-on", default="assistant", metavar="WHAT", help="assistant (default), last, all."),
        click.option("--seq-len", type=click.IntRange(8), metavar="N", help="Leave longer rows out (8192)."),
        click.option("--limit", type=click.IntRange(1), metavar="N", help="So many rows, the same ones every time."),
        click.option("--batch", type=click.IntRange(1), metavar="N", help="Rows at a time; by the device."),
        click.option("--samples", type=click.IntRange(0), metavar="N", help="Answers to give and show. (3)"),
        click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True, help="Of one answer."),
        click.option("--stop", multiple=True, metavar="TEXT", help="An answer ends before this text (repeatable)."),
        click.option("--metrics", default="", metavar="NAMES", help="Of the answers: bleu,chrf,rouge (extra metrics)."),
        click.option("--base", metavar="MODEL", help="An adapter's base, where it lies elsewhere."),
        click.option("--tokenizer", metavar="FOLDER", help="Where it does not lie with the model."),
        click.option("--quantise", default="none", metavar="none|nf4", help="nf4: load in 4 bits (bitsandbytes)."),
        click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps."),
        click.option("--context", type=click.IntRange(64), default=4096, metavar="N", help="A GGUF file answers in.",
                     show_default=True),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."),
        click.option("-q", "--quiet", is_flag=True, help="No progress."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.command("eval")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@_data_options
@click.option("--smoke", "only_smoke", is_flag=True, help="Let MODELs answer a few prompts and check the answers.")
@click.option("--prompts", metavar="FILE", help="With --smoke: other prompts, one a line.")
@click.option("--card", "noted", is_flag=True, help="Put the result into MODEL's card (README.md) as well.")
@click.option("--lm-eval", "tasks", metavar="TASKS", help="Tasks of lm-evaluation-harness, by commas (extra eval).")
def evaluate(
    models: tuple[str, ...], *, only_smoke: bool, prompts: str | None, noted: bool, tasks: str | None, **asked: Any
) -> int:
    """How well MODEL predicts the answers of a data set: a folder, a PEFT adapter, a Hub repo or a GGUF file.

    Perplexity and token accuracy count the answers' tokens, bits per byte the bytes of their text, so that models of
    different vocabularies can be compared. --smoke asks a few prompts instead and ends with 1 if a check fails.

    \b
    mergeforge eval merged --data valid.jsonl --samples 3 --card
    mergeforge eval runs/new/adapter --data valid.jsonl --quantise nf4 --json
    mergeforge eval --smoke adapter merged merged/merged-Q4_K_M.gguf --stop '</output>'
    """
    if noted and (only_smoke or tasks):
        raise RecipeError("--card notes the measures of --data alone", hint="leave out --card")
    if only_smoke:
        return _smoke(models, prompts, asked)
    if len(models) > 1:
        raise RecipeError("eval takes one model", hint="mergeforge compare A B --data FILE sets them side by side")
    if tasks:
        return _harness(models[0], [task.strip() for task in tasks.split(",") if task.strip()], asked)
    from mergeforge import eval
    from mergeforge.cli._eval_tables import sample_dicts, show_evaluation
    from mergeforge.eval.card_results import card_of, note_in_card
    from mergeforge.eval.text_metrics import read_metrics, text_metrics

    metrics, settings = read_metrics(asked["metrics"]), _settings(asked)
    if noted:
        card_of(models[0])  # before the work
    with _progress(asked["quiet"]) as begin:
        found = eval.evaluate(
            models[0],
            settings,
            limit=asked["limit"],
            batch=asked["batch"],
            samples=_samples(asked, metrics),
            sampling=_greedy(asked),
            progress=begin(models[0]),
            **_opening(asked),
        )
    measured = text_metrics(found.samples, metrics)
    if asked["as_json"]:
        click.echo(json.dumps(found.as_dict() | {"metrics": measured, "samples": sample_dicts(found)}))
    else:
        show_evaluation(found, measured)
    if noted:
        click.echo(f"noted in {note_in_card(found, asked['path'])}", err=True)
    return 0


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="A B...")
@_data_options
@click.option("--margin", type=click.FloatRange(0), default=0.0, metavar="X", help="Smaller differences are none.")
@click.option("--fail-if-worse", is_flag=True, help="End with 1 if a model is worse than A beyond chance.")
def compare(models: tuple[str, ...], *, margin: float, fail_if_worse: bool, **asked: Any) -> int:
    """Set models side by side on the same rows; differences to A come with 95 % intervals (paired bootstrap).

    An adapter alone is compared with its base, which takes no second model in memory.

    \b
    mergeforge compare base merged --data valid.jsonl --fail-if-worse
    mergeforge compare runs/new/adapter --data valid.jsonl --limit 200
    mergeforge compare merged merged/merged-Q4_K_M.gguf --data valid.jsonl
    """
    from mergeforge import eval
    from mergeforge.cli._eval_tables import sample_dicts, show_comparison
    from mergeforge.eval.text_metrics import read_metrics, text_metrics

    metrics, settings = read_metrics(asked["metrics"]), _settings(asked)
    with _progress(asked["quiet"]) as begin:
        found = eval.compare(
            models,
            settings,
            limit=asked["limit"],
            batch=asked["batch"],
            samples=_samples(asked, metrics),
            sampling=_greedy(asked),
            margin=margin,
            tell=begin,
            **_opening(asked),
        )
    measured = [text_metrics(one.samples, metrics) for one in found.evaluations]
    if asked["as_json"]:
        facts = found.as_dict()
        for model, one, texts in zip(facts["models"], found.evaluations, measured, strict=True):
            model |= {"metrics": texts, "samples": sample_dicts(one)}
        click.echo(json.dumps(facts))
    else:
        show_comparison(found, measured)
    if fail_if_worse and found.worse:
        click.echo(f"worse than {found.evaluations[0].model}: {', '.join(found.worse)}", err=True)
        return 1
    return 0


def _smoke(models: tuple[str, ...], path: str | None, asked: Mapping[str, Any]) -> int:
    """Every model answers the prompts; 1 when a check fails."""
    from mergeforge import eval
    from mergeforge.cli._eval_tables import show_smoke
    from mergeforge.eval.smoke_test import PROMPTS, failed, read_prompts

    prompts = read_prompts(path) if path else PROMPTS

    def one(name: str) -> Smoke:
        try:
            model = eval.open_model(name, **_opening(asked), template=asked["template"])
            return eval.smoke(model, prompts, _greedy(asked), system=asked["system"])
        except SourceError as error:
            return failed(name, error)

    found = [one(name) for name in models]
    ran = [one for one in found if one.answers]
    agreements = [eval.agreement(ran[0], other) for other in ran[1:]]
    if asked["as_json"]:
        facts = {"ok": all(one.ok for one in found), "models": [one.as_dict() for one in found]}
        click.echo(json.dumps(facts | {"agreement": [asdict(one) for one in agreements]}))
    else:
        show_smoke(found, agreements)
    return 0 if all(one.ok for one in found) else 1


def _harness(name: str, tasks: list[str], asked: Mapping[str, Any]) -> int:
    from mergeforge import eval
    from mergeforge.eval.extras import extra
    from mergeforge.eval.lm_eval import run_tasks

    extra("lm_eval", "eval")  # before a model is loaded
    model = eval.open_model(name, **_opening(asked))
    found = run_tasks(model, tasks, limit=asked["limit"], batch=asked["batch"] or 8)
    if asked["as_json"]:
        click.echo(json.dumps({"model": name, "lm_eval": found}))
        return 0
    for task, measures in found.items():
        for measure, value in measures.items():
            click.echo(f"{task}  {measure}  {value:.4g}")
    return 0


def _settings(asked: Mapping[str, Any]) -> DataSettings:
    """The rows that the options name. Raises RecipeError."""
    from mergeforge.data.settings import FORMATS, LOSS_ON, DataSettings, DataSource

    if not asked["path"]:
        raise RecipeError("--data FILE is missing: the rows to score", hint="--data sample:chat is a data set to try")
    for name, known in (("form", FORMATS), ("loss_on", LOSS_ON)):
        if asked[name] not in known:
            option = {"form": "--format", "loss_on": "--loss-on"}[name]
            hint = did_you_mean(asked[name], known) or ", ".join(known)
            raise RecipeError(f"{option} {asked[name]} is not known", hint=hint)
    source = DataSource(asked["path"], asked["form"], dict(_pair(one) for one in asked["columns"]))
    return DataSettings(
        sources=(source,),
        template=asked["template"],
        system=asked["system"],
        loss_on=asked["loss_on"],
        seq_len=asked["seq_len"],
    )


def _pair(written: str) -> tuple[str, str]:
    role, equals, column = written.partition("=")
    if not equals or not role or not column:
        raise RecipeError(f"--columns {written}: write ROLE=COLUMN, such as response=answer")
    return role.strip(), column.strip()


def _opening(asked: Mapping[str, Any]) -> dict[str, Any]:
    return {name: asked[name] for name in ("base", "tokenizer", "quantise", "device", "context")}


def _greedy(asked: Mapping[str, Any]) -> Sampling:
    from mergeforge.eval import Sampling

    return Sampling(max_tokens=asked["max_tokens"], temperature=0, top_p=1, stop=asked["stop"])


def _samples(asked: Mapping[str, Any], metrics: tuple[str, ...]) -> int:
    given: int | None = asked["samples"]
    return given if given is not None else METRIC_SAMPLES if metrics else SAMPLES


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], Progress | None]]:
    """A bar on stderr for each model; none where nobody looks."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mergeforge.cli._progress import console

    to = console()
    if quiet or not to.is_terminal:
        yield lambda name: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=to, transient=True) as bar:

        def begin(name: str) -> Callable[[int, int], object]:
            task = bar.add_task(name, total=None)
            return lambda done, total: bar.update(task, completed=done, total=total)

        yield begin
