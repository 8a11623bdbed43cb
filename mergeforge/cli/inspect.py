"""mergeforge inspect."""

from __future__ import annotations

import json
from typing import Any

import click

from mergeforge.cli import _options
from mergeforge.core.sizes import format_size
from mergeforge.errors import format_list


@click.command()
@click.argument("path")
@_options.allow_pickle
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="List every tensor.")
def inspect(path: str, allow_pickle: bool, as_json: bool, verbose: bool) -> None:
    """Show what a checkpoint, an adapter or a GGUF file holds; reads headers and config only.

    \b
    Examples:
      mergeforge inspect ./model
      mergeforge inspect ./adapters/legal -v
    """
    from mergeforge import api

    summary = api.inspect(path, allow_pickle=allow_pickle)
    if as_json:
        click.echo(json.dumps(summary, default=str))
        return
    tensors = summary["tensors"]
    click.echo(f"{summary['kind']} {path}")
    click.echo(f"{len(tensors)} tensors, {summary['parameters']:,} parameters, {format_size(summary['bytes'])}")
    for dtype, nbytes in summary["bytes_by_dtype"].items():
        click.echo(f"  {dtype:6} {format_size(nbytes)}")
    for sentence in summary.get("in_words", ()):
        click.echo(f"- {sentence}")
    for name, value in summary["config"].items():
        click.echo(f"  {name}: {_abridged(value)}")
    for tensor in tensors if verbose else ():
        click.echo(f"  {tensor['name']}  {tensor['dtype']} {tensor['shape']}")


def _abridged(value: Any) -> str:
    if isinstance(value, list) and len(value) > 12:
        return format_list(map(str, value), 12)
    text = str(value)
    return text if len(text) <= 160 else text[:160] + "..."
