"""mergeforge schema."""

from __future__ import annotations

import json

import click


@click.command()
@click.option("--train", is_flag=True, help="The schema of train.yaml instead.")
def schema(train: bool) -> None:
    """Print the JSON Schema of recipes, for completion and checks in editors.

    \b
    Examples:
      mergeforge schema > mergeforge.schema.json
      mergeforge schema --train > train.schema.json
    """
    from mergeforge import recipe
    from mergeforge.train import keys

    click.echo(json.dumps(keys.json_schema() if train else recipe.json_schema(), indent=2))
