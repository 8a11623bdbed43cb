"""mergeforge doctor."""

from __future__ import annotations

import json

import click


@click.command()
@click.option("--folder", default=".", metavar="DIR", help="Measure the disk of this folder.", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def doctor(folder: str, as_json: bool) -> None:
    """Show versions, devices, memory, disk speed and the Hub login; paste this into bug reports.

    \b
    Examples:
      mergeforge doctor
      mergeforge doctor --folder /data --json
    """
    from mergeforge.operations.doctor import report

    if as_json:
        click.echo(json.dumps(dict(report(folder))))
        return
    for name, value in report(folder):
        click.echo(f"{name:14} {value}")
