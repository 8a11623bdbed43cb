"""mergeforge eval."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from mergeforge.cli import _eval_options
from mergeforge.errors import RecipeError, SourceError

if TYPE_CHECKING:
    from mergeforge.eval import SmokeResult


@click.command("eval")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@_eval_options.eval_options
@click.option("--smoke", "smoke_test", is_flag=True, help="Let each MODEL answer a few prompts, and check the answers.")
@click.option("--prompts", metavar="FILE", help="With --smoke: use these prompts, one per line.")
@click.option("--card", "update_card", is_flag=True, help="Also write the result into MODEL's card (README.md).")
@click.option("--against", metavar="MODEL", help="Compare predictions with this model's over a text: --data FILE.txt.")
@click.option("--chunk", type=click.IntRange(16), metavar="N", help="With --against: tokens of a chunk. [default: 512]")
@click.option("--lm-eval", "tasks", metavar="TASKS", help="Run tasks of lm-evaluation-harness, separated by commas.")
def evaluate(
    models: tuple[str, ...],
    *,
    smoke_test: bool,
    prompts: str | None,
    update_card: bool,
    tasks: str | None,
    against: str | None,
    chunk: int | None,
    **options: Any,
) -> int:
    """Measure how well MODEL predicts the answers in a data set.

    MODEL is a folder, a PEFT adapter, a Hub repo or a GGUF file. Perplexity and token accuracy are per token of the
    answers; bits per byte are per byte of their text, so models with different vocabularies can be compared. --smoke
    asks a few prompts instead, and exits with 1 if a check fails. --against measures what quantizing costs: the KL
    divergence from the predictions of the unquantized model, over a text, as llama-perplexity does.

    \b
    Examples:
      mergeforge eval merged --data valid.jsonl --samples 3 --card
      mergeforge eval runs/new/adapter --data valid.jsonl --quantize nf4 --json
      mergeforge eval merged/merged-Q4_K_M.gguf --against merged --data text.txt
      mergeforge eval --smoke merged merged/merged-Q4_K_M.gguf --stop '</output>'
    """
    if update_card and (smoke_test or tasks or against):
        raise RecipeError("--card records only the results of --data", hint="omit --card")
    if sum(map(bool, (smoke_test, tasks, against))) > 1:
        raise RecipeError("--smoke, --against and --lm-eval exclude each other", hint="run them one after the other")
    if smoke_test:
        return _run_smoke_test(models, prompts, options)
    if against:
        return _compare_distributions(models, against, chunk, options)
    if chunk:
        raise RecipeError("--chunk needs --against MODEL", hint="omit it")
    if len(models) > 1:
        raise RecipeError("eval takes one model", hint="`mergeforge compare A B --data FILE` compares several")
    if tasks:
        return _run_lm_eval(models[0], [task.strip() for task in tasks.split(",") if task.strip()], options)
    return _evaluate(models[0], options, update_card=update_card)


def _evaluate(name: str, options: Mapping[str, Any], *, update_card: bool) -> int:
    """Score the rows of --data."""
    from mergeforge import eval
    from mergeforge.cli._eval_tables import sample_dicts, show_evaluation
    from mergeforge.eval.card_results import model_card_path, write_result
    from mergeforge.eval.text_metrics import read_metrics, text_metrics

    metrics = read_metrics(options["metrics"], bertscore_model=options["bertscore_model"])
    settings = _eval_options.data_settings(options)
    if update_card:
        model_card_path(name)  # fails before the work, not after it
    with _eval_options.progress_bars(options["quiet"]) as start_progress:
        result = eval.evaluate(
            name,
            settings,
            progress=start_progress(name),
            **_eval_options.evaluation_arguments(options, metrics),
        )
    scores = text_metrics(result.samples, metrics, bertscore_model=options["bertscore_model"])
    if options["as_json"]:
        click.echo(json.dumps(result.as_dict() | {"metrics": scores, "samples": sample_dicts(result)}))
    else:
        show_evaluation(result, scores)
    if update_card:
        click.echo(f"wrote the result into {write_result(result, options['path'])}", err=True)
    return 0


def _run_smoke_test(models: tuple[str, ...], path: str | None, options: Mapping[str, Any]) -> int:
    """Let every model answer the prompts; returns 1 if a check fails."""
    from mergeforge import eval
    from mergeforge.cli._eval_tables import show_smoke
    from mergeforge.eval.smoke_test import PROMPTS, could_not_run, read_prompts

    prompts = read_prompts(path) if path else PROMPTS

    def run(name: str) -> SmokeResult:
        try:
            model = eval.open_model(name, **_eval_options.open_arguments(options), template=options["template"])
            return eval.smoke(model, prompts, _eval_options.greedy_sampling(options), system=options["system"])
        except SourceError as error:
            return could_not_run(name, error)

    results = [run(name) for name in models]
    answered = [result for result in results if result.answers]
    agreements = [eval.agreement(answered[0], other) for other in answered[1:]]
    ok = all(result.ok for result in results)
    if options["as_json"]:
        facts = {"ok": ok, "models": [result.as_dict() for result in results]}
        click.echo(json.dumps(facts | {"agreement": [asdict(agreement) for agreement in agreements]}))
    else:
        show_smoke(results, agreements)
    return 0 if ok else 1


def _compare_distributions(models: tuple[str, ...], against: str, chunk: int | None, options: Mapping[str, Any]) -> int:
    """Measure every model against one, over the text that --data names."""
    from mergeforge import eval
    from mergeforge.cli._eval_tables import show_divergences
    from mergeforge.eval.divergence import CONTEXT, compare_distributions, read_text

    if not options["path"]:
        raise RecipeError("--against needs a text", hint="--data FILE.txt")
    text, context, limit = read_text(options["path"]), chunk or CONTEXT, options["limit"]
    arguments = _eval_options.open_arguments(options)
    reference = eval.open_model(against, **arguments)
    results = []
    with _eval_options.progress_bars(options["quiet"]) as start_progress:
        for name in models:
            progress = start_progress(name)
            model = eval.open_model(name, **arguments)
            results.append(
                compare_distributions(model, reference, text, context=context, limit=limit, progress=progress)
            )
    if options["as_json"]:
        click.echo(json.dumps([result.as_dict() for result in results]))
    else:
        show_divergences(results)
    return 0


def _run_lm_eval(name: str, tasks: list[str], options: Mapping[str, Any]) -> int:
    from mergeforge import eval
    from mergeforge.eval.backend import require
    from mergeforge.eval.lm_eval import run_tasks

    require("lm_eval")  # fails before a model is loaded
    model = eval.open_model(name, **_eval_options.open_arguments(options))
    results = run_tasks(model, tasks, limit=options["limit"], batch=options["batch"] or 8)
    if options["as_json"]:
        click.echo(json.dumps({"model": name, "lm_eval": results}))
        return 0
    for task, measures in results.items():
        for measure, value in measures.items():
            click.echo(f"{task}  {measure}  {value:.4g}")
    return 0
