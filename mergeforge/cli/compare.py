"""mergeforge compare."""

from __future__ import annotations

import json
from typing import Any

import click

from mergeforge.cli import _eval_options


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="A B...")
@_eval_options.eval_options
@click.option(
    "--margin",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    metavar="X",
    help="Treat differences below X as ties.",
)
@click.option("--fail-if-worse", is_flag=True, help="Exit with 1 if a model is significantly worse than A.")
def compare(models: tuple[str, ...], *, margin: float, fail_if_worse: bool, **options: Any) -> int:
    """Compare models on the same rows. Differences from A come with 95 % intervals (paired bootstrap).

    A single adapter is compared with its own base, without a second model in memory.

    \b
    Examples:
      mergeforge compare base merged --data valid.jsonl --fail-if-worse
      mergeforge compare runs/new/adapter --data valid.jsonl --limit 200
      mergeforge compare merged merged/merged-Q4_K_M.gguf --data valid.jsonl
    """
    from mergeforge import eval
    from mergeforge.cli._eval_tables import sample_dicts, show_comparison
    from mergeforge.eval.text_metrics import read_metrics, text_metrics

    metrics = read_metrics(options["metrics"], bertscore_model=options["bertscore_model"])
    settings = _eval_options.data_settings(options)
    with _eval_options.progress_bars(options["quiet"]) as start_progress:
        comparison = eval.compare(
            models,
            settings,
            margin=margin,
            start_progress=start_progress,
            **_eval_options.evaluation_arguments(options, metrics),
        )
    scores = [
        text_metrics(evaluation.samples, metrics, bertscore_model=options["bertscore_model"])
        for evaluation in comparison.evaluations
    ]
    if options["as_json"]:
        facts = comparison.as_dict()
        for model, evaluation, metric_values in zip(facts["models"], comparison.evaluations, scores, strict=True):
            model |= {"metrics": metric_values, "samples": sample_dicts(evaluation)}
        click.echo(json.dumps(facts))
    else:
        show_comparison(comparison, scores)
    if fail_if_worse and comparison.worse:
        click.echo(f"worse than {comparison.evaluations[0].model}: {', '.join(comparison.worse)}", err=True)
        return 1
    return 0
