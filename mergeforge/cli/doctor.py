"""mergeforge doctor."""

from __future__ import annotations

import json

import click


@click.command()
@click.option("--folder", default=".", metavar="DIR", help="Whose disk is measured.", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def doctor(folder: str, as_json: bool) -> None:
    """Show versions, devices, memory, the disk's speed and the Hub login: what to paste into a bug report.

    \b
    mergeforge doctor
    """
    from mergeforge.operations import doctor as examining

    if as_json:
        click.echo(json.dumps(dict(examining.facts(folder))))
        return
    for what, how in examining.facts(folder):
        click.echo(f"{what:12} {how}")
