"""mergeforge verify, inspect and diff."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from mergeforge.core.sizes import show_size
from mergeforge.errors import SourceError, listing


@click.command()
@click.argument("folder")
@click.option("--deep", is_flag=True, help="Compute a sample of tensors from the inputs again.")
@click.option("--all", "everything", is_flag=True, help="With --deep: all tensors, not a sample.")
@click.option("--engine", is_flag=True, help="Load each GGUF in llama.cpp and compare it with transformers.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
def verify(folder: str, deep: bool, everything: bool, engine: bool, as_json: bool) -> None:
    """Check that FOLDER holds what its receipt says: sizes, headers, every tensor's checksum.

    \b
    mergeforge verify merged --deep
    mergeforge verify merged --engine
    """
    from mergeforge.operations import verify as verifying

    verdict = verifying.verify(folder, deep=deep or everything, everything=everything)
    if as_json:
        click.echo(json.dumps({"ok": verdict.ok} | asdict(verdict)))
    if not verdict.ok:
        more = "\n".join(f"  {problem}" for problem in verdict.problems[:20])
        rest = f"\n  and {len(verdict.problems) - 20} more" if len(verdict.problems) > 20 else ""
        raise SourceError(f"{folder} is not what its receipt says:\n{more}{rest}", hint="run the merge again")
    if not as_json:
        again = f", {verdict.recomputed} computed again" if verdict.recomputed else ""
        click.echo(f"{folder}: {verdict.tensors} tensors in {verdict.files} files are as the receipt says{again}")
    if engine:
        _compare_in_engine(folder)


def _compare_in_engine(folder: str) -> None:
    from mergeforge.operations.verify import in_engine

    found = in_engine(folder)
    for one in found:
        first = "same" if one.same_first else "another"
        numbers = f"largest difference {one.largest:.4f}, KL {one.divergence:.2g}, {first} likeliest token"
        click.echo(f"{one.file}: {numbers}", err=True)
    if bad := [one.file for one in found if not one.ok]:
        raise SourceError(f"{listing(bad)}: further from transformers than its type explains")


@click.command()
@click.argument("path")
@click.option("--allow-pickle", is_flag=True, help="Read .bin weights, with torch's weights_only loader.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="List every tensor.")
def inspect(path: str, allow_pickle: bool, as_json: bool, verbose: bool) -> None:
    """Show what is in a checkpoint, an adapter or a GGUF: headers and config only.

    \b
    mergeforge inspect ./model
    mergeforge inspect ./adapters/legal -v
    """
    from mergeforge.operations import inspect as comparing

    facts = comparing.inspect(path, allow_pickle=allow_pickle)
    if as_json:
        click.echo(json.dumps(facts, default=str))
        return
    click.echo(f"{facts['kind']} {path}")
    click.echo(f"{len(facts['tensors'])} tensors, {facts['parameters']:,} parameters, {show_size(facts['bytes'])}")
    for dtype, nbytes in facts["bytes_by_dtype"].items():
        click.echo(f"  {dtype:6} {show_size(nbytes)}")
    for sentence in facts.get("in_words", ()):
        click.echo(f"- {sentence}")
    for name, value in facts["config"].items():
        click.echo(f"  {name}: {_short(value)}")
    if verbose:
        for tensor in facts["tensors"]:
            click.echo(f"  {tensor['name']}  {tensor['dtype']} {tensor['shape']}")


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--allow-pickle", is_flag=True, help="Read .bin weights, with torch's weights_only loader.")
@click.option("--json", "as_json", is_flag=True, help="Print every tensor as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="List equal tensors too.")
@click.pass_context
def diff(ctx: click.Context, a: str, b: str, allow_pickle: bool, as_json: bool, verbose: bool) -> int:
    """Compare two checkpoints tensor by tensor; exit code 0: the same, 1: different.

    \b
    mergeforge diff ./base ./merged
    """
    from mergeforge.operations import inspect as comparing

    found = list(comparing.differences(a, b, allow_pickle=allow_pickle))
    different = [one for one in found if not one.same]
    if as_json:
        click.echo(json.dumps([asdict(one) for one in found]))
        return int(bool(different))
    for one in found if verbose else different:
        numbers = f"  relative {one.relative:.3g}, largest {one.largest:.3g}" if one.relative else ""
        click.echo(f"{one.name}: {one.what}{numbers}")
    click.echo(f"{len(found) - len(different)} of {len(found)} tensors are the same")
    return int(bool(different))


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 12:
        return listing(map(str, value), 12)
    text = str(value)
    return text if len(text) <= 160 else text[:160] + "..."
