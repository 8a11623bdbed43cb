"""mergeforge convert."""

from __future__ import annotations

from typing import Any

import click

from mergeforge.cli import _options
from mergeforge.cli._options import merge_options


@click.command()
@click.argument("file", metavar="FILE.gguf")
@click.option(
    "--dtype", metavar="DTYPE", help="Of all tensors: float16, bfloat16, float32. [default: quantized ones in float16]"
)
@click.option("--shard-size", metavar="SIZE", help="Maximum size of one safetensors file. [default: 5GB]")
@merge_options
@_options.fresh
@_options.overwrite
@_options.plan_only
def convert(
    file: str,
    *,
    dtype: str | None,
    shard_size: str | None,
    fresh: bool,
    overwrite: bool,
    plan_only: bool,
    **options: Any,
) -> None:
    """Write a GGUF file as a Hugging Face folder: safetensors, config.json and tokenizer, rebuilt from the file.

    The file may be one of several splits. If it is interrupted, run the same command again to resume.

    \b
    Examples:
      mergeforge convert model-Q4_K_M.gguf --out model
      mergeforge convert model-00001-of-00003.gguf --out model --dtype bfloat16
    """
    from mergeforge.operations.convert_model import conversion_recipe, default_folder

    recipe = conversion_recipe(file, dtype, shard_size)
    options["out"] = options["out"] or default_folder(file)
    if plan_only:
        from mergeforge.cli.plan import show_plan

        show_plan(recipe, **options)
    else:
        from mergeforge.cli.run import run_recipe

        run_recipe(recipe, fresh=fresh, overwrite=overwrite, **options)
