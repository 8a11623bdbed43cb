"""What eval, compare and eval --smoke print for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mergeforge.eval import Comparison, ConfidenceInterval, Evaluation, SmokeResult
    from mergeforge.eval.divergence import Divergence
    from mergeforge.eval.smoke_test import Agreement

MAX_CHARS = 400  # of a text in a sample
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CONTROL_CHARACTERS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
COLORS = {"worse": "red", "better": "green"}


def show_evaluation(evaluation: Evaluation, metrics: Mapping[str, float]) -> None:
    """The numbers line by line, then the samples."""
    _show_counts(evaluation)
    metric_lines = [(name, f"{value:.2f} over {len(evaluation.samples)} answers") for name, value in metrics.items()]
    for line in _aligned([*_facts(evaluation), *metric_lines]):
        click.echo(line)
    for sample in evaluation.samples:
        click.echo(f"\n--- row {sample.row + 1}: {_shorten(sample.prompt, end=True)}")
        click.echo(f"expected: {_shorten(sample.expected.strip())}")
        click.echo(f"answered: {_shorten(sample.answer.text.strip())}  [{sample.answer.ended}]")


def show_divergences(divergences: Sequence[Divergence]) -> None:
    """A table with one row per model, and what its columns mean."""
    head = ("model", "KL divergence", "99 %", "same top token", "perplexity", "ratio")
    rows = [
        (
            one.model,
            f"{one.kl_divergence:.5f} ± {one.kl_error:.5f}",
            f"{one.quantile(0.99):.4f}",
            f"{one.agreement:.2%}",
            f"{one.perplexity:.3f}",
            f"{one.ratio:.4f}",
        )
        for one in divergences
    ]
    for line in _aligned([head, *rows]):
        click.echo(line)
    first = divergences[0]
    about = f"Against {first.reference} (perplexity {first.reference_perplexity:.3f}) over {first.tokens} tokens"
    click.echo(f"{about}; KL divergence per token in nats.")


def show_comparison(comparison: Comparison, metrics: Sequence[Mapping[str, float]]) -> None:
    """A table with one row per model, then samples side by side."""
    _show_counts(comparison.evaluations[0])
    intervals = [None, *comparison.intervals]
    names = list(metrics[0]) if metrics else []
    last = f"{comparison.measure} compared with A"
    head = ("", "model", "NLL", "perplexity", "bits/byte", "accuracy", "tok/s", *names, last)
    rows = [
        (
            letter,
            evaluation.model,
            *_columns(evaluation),
            *(f"{values[name]:.2f}" for name in names),
            _difference(interval),
        )
        for letter, evaluation, values, interval in zip(
            LETTERS, comparison.evaluations, metrics, intervals, strict=False
        )
    ]
    first, *lines = _aligned([head, *rows])
    click.echo(first)
    for line, interval in zip(lines, intervals, strict=True):
        click.secho(line, fg=COLORS.get(interval.verdict) if interval else None)
    click.echo(f"{comparison.rows} rows; lower is better, except for accuracy; intervals: paired bootstrap, 95 %")
    for note in comparison.notes:
        click.echo(f"note: {note}", err=True)
    _show_samples(comparison)


def _show_samples(comparison: Comparison) -> None:
    for index, first in enumerate(comparison.evaluations[0].samples):
        click.echo(f"\n--- {_shorten(first.prompt, end=True)}")
        click.echo(f"expected: {_shorten(first.expected.strip())}")
        for letter, evaluation in zip(LETTERS, comparison.evaluations, strict=False):
            if index < len(evaluation.samples):
                answer = evaluation.samples[index].answer
                click.echo(f"{letter}: {_shorten(answer.text.strip())}  [{answer.ended}]")


def show_smoke(results: Sequence[SmokeResult], agreements: Sequence[Agreement]) -> None:
    """Each model's verdict and answers, and how far they agree."""
    for result in results:
        click.secho("ok    " if result.ok else "FAILS ", fg="green" if result.ok else "red", bold=True, nl=False)
        click.echo(f"{result.model} ({result.kind})" if result.kind else result.model)
        for failure in result.failures:
            click.echo(f"      {failure.check}: {failure.why}")
        for prompt, answer in zip(result.prompts, result.answers, strict=True):
            click.echo(f"      > {_shorten(prompt)}")
            click.echo(f"        {_shorten(answer.text.strip())}  [{answer.ended}, {answer.tokens} tokens]")
    for pair in agreements:
        same = f"{pair.same} of {pair.prompts} answers are equal"
        click.echo(f"{pair.other} compared with {pair.one}: {same}, {pair.share:.0%} of the text before they diverge")


def sample_dicts(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The samples, for JSON."""
    return [
        {
            "row": sample.row,
            "prompt": sample.prompt,
            "expected": sample.expected,
            "answer": sample.answer.text,
            "tokens": sample.answer.tokens,
            "ended": sample.answer.ended,
        }
        for sample in evaluation.samples
    ]


def _facts(evaluation: Evaluation) -> list[tuple[str, str]]:
    facts = [
        ("model", f"{evaluation.model} ({evaluation.kind})"),
        ("rows", f"{len(evaluation.rows)}, with {evaluation.tokens} answer tokens" + _left_out(evaluation)),
        ("NLL", f"{_format_number(evaluation.nll)} nats per token"),
        ("perplexity", _format_number(evaluation.perplexity)),
        ("bits per byte", _format_number(evaluation.bits_per_byte)),
        ("token accuracy", f"{evaluation.accuracy:.2%}"),
        ("reading", f"{evaluation.speed:,.0f} tokens/s, {evaluation.seconds:.1f} s"),
    ]
    if evaluation.samples:
        speed = f"{evaluation.answer_speed:,.1f} tokens/s, first token after {evaluation.first_token:.3f} s"
        facts.append(("generation", speed))
    return facts


def _left_out(evaluation: Evaluation) -> str:
    return f"; {evaluation.left_out} rows left out (too long, or without scored tokens)" if evaluation.left_out else ""


def _show_counts(evaluation: Evaluation) -> None:
    """On stderr: how the rows were rendered, and which ones could not be used."""
    counts = evaluation.counts
    if counts is None:
        return
    click.echo(f"template: {evaluation.template}" if evaluation.template else "rows are plain text", err=True)
    skipped = [f"{getattr(counts, kind)} {kind.replace('_', ' ')}" for kind in ("bad", "empty", "too_long")]
    missing = counts.rows - counts.used
    if missing:
        click.echo(f"{missing} of {counts.rows} rows are not scored ({', '.join(skipped)}):", err=True)
        for row in counts.skipped[:5]:
            click.echo(f"  {row.place}: {row.text}", err=True)


def _columns(evaluation: Evaluation) -> tuple[str, ...]:
    numbers = [_format_number(value) for value in (evaluation.nll, evaluation.perplexity, evaluation.bits_per_byte)]
    return (*numbers, f"{evaluation.accuracy:.2%}", f"{evaluation.speed:,.0f}")


def _difference(interval: ConfidenceInterval | None) -> str:
    if interval is None:
        return ""
    return f"{interval.difference:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]  {interval.verdict}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns; long lines are left to the terminal."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def printable(text: str) -> str:
    """A text without terminal control characters (colors, window title, cursor)."""
    return text.translate(_CONTROL_CHARACTERS)


def _format_number(value: float) -> str:
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def _shorten(text: str, *, end: bool = False) -> str:
    """The start or the end of a text, in one line."""
    line = printable(text).replace("\n", "\\n")
    if len(line) <= MAX_CHARS:
        return line
    return f"...{line[-MAX_CHARS:]}" if end else f"{line[:MAX_CHARS]}..."
