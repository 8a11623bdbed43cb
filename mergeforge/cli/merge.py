"""mergeforge merge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from mergeforge.cli import _options
from mergeforge.cli._options import merge_options
from mergeforge.core.parameters import Parameter
from mergeforge.methods import METHODS

F = TypeVar("F", bound=Callable[..., Any])
_SETTINGS = ("dtype", "out_dtype", "tokenizer_source", "chat_template", "random_seed")  # recipe keys, as options
_COMMON = ("density", "epsilon", "gamma", "lambda", "normalize", "t")  # parameters that --help lists
_OUTPUT_SETTINGS = ("gguf", "shard_size")


def _method_parameters() -> dict[str, Parameter]:
    """The parameters of all methods, each once, but for the weight, which stands behind the name of an input."""
    return {
        name: parameter
        for method in METHODS.values()
        for name, parameter in method.parameters.items()
        if name not in ("weight", "int8_mask")
    }


def _parameter_options(command: F) -> F:
    """An option for every parameter of a method (decorator)."""
    for name, parameter in sorted(_method_parameters().items(), reverse=True):
        methods = [method for method in METHODS if name in METHODS[method].parameters]
        option, key = name.replace("_", "-"), f"parameter_{name}"
        about: dict[str, Any] = {"help": f"Of {', '.join(methods)}.", "hidden": name not in _COMMON}
        if parameter.kind == "bool":
            command = click.option(f"--{option}/--no-{option}", key, default=None, **about)(command)
        else:
            command = click.option(f"--{option}", key, metavar="VALUE", **about)(command)
    return command


@click.command()
@click.option("--base", metavar="MODEL", help="Base model. [default: the one that the adapters were trained on]")
@click.option("--adapter", "adapters", multiple=True, metavar="ADAPTER[:WEIGHT]", help="An adapter (repeatable).")
@click.option("--model", "models", multiple=True, metavar="MODEL[:WEIGHT]", help="A model (repeatable).")
@click.option("--method", metavar="NAME", help="Merge method. [default, for adapters: fold, their weighted sum]")
@click.option("--dtype", metavar="DTYPE", help="What is written: bfloat16, float16 or float32. [default: the base's]")
@click.option("--out-dtype", metavar="DTYPE", hidden=True)
@click.option("--gguf", multiple=True, metavar="TYPE", help="Also write a GGUF file of this type (repeatable).")
@click.option("--no-safetensors", is_flag=True, help="Write only GGUF.")
@click.option("--shard-size", metavar="SIZE", help="Maximum size of one safetensors file. [default: 5GB]")
@click.option("--tokenizer-source", metavar="NAME", help="union, base or a model: maps different vocabularies.")
@click.option("--chat-template", metavar="NAME", help="auto, the name of a template, or a Jinja template.")
@click.option("--random-seed", type=int, metavar="N", help="Seed of the random masks of dare and della.")
@_parameter_options
@merge_options
@_options.fresh
@_options.overwrite
@_options.plan_only
@click.option("--print-recipe", is_flag=True, help="Print the recipe as YAML, and do nothing else.")
def merge(*, fresh: bool, overwrite: bool, plan_only: bool, print_recipe: bool, **options: Any) -> None:
    """Merge adapters into their base model, or models with one another, without a recipe.

    ADAPTER and MODEL are folders or Hub repo ids, with an optional @revision. A WEIGHT is a number, or several for a
    gradient over the layers (0.2,0.8); without it, the weight is 1.

    Every parameter of a method (`mergeforge list methods`) is an option: --select-topk 0.5 for select_topk. Its value
    is a number, or a YAML list of numbers for a gradient.

    \b
    Examples:
      mergeforge merge --adapter ./lora --out merged
      mergeforge merge --base org/base --adapter ./lora --gguf q4_k_m -o merged
      mergeforge merge --adapter ./a:0.6 --adapter ./b:0.4 --method ties \\
          --density 0.5 --out merged
      mergeforge merge --model ./x --model org/y --base ./x --method slerp \\
          --t 0.5 --out merged
    """
    recipe = _recipe(options)
    if print_recipe:
        from mergeforge.cli._recipe import read_recipe

        click.echo(read_recipe(recipe, options["sets"]).to_yaml(), nl=False)
    elif plan_only:
        from mergeforge.cli.plan import show_plan

        show_plan(recipe, **options)
    else:
        from mergeforge.cli.run import run_recipe

        run_recipe(recipe, fresh=fresh, overwrite=overwrite, **options)


def _recipe(options: dict[str, Any]) -> dict[str, Any]:
    """The recipe that the options describe; takes its options out of them."""
    from mergeforge.recipe.parts import recipe_of

    base, method = options.pop("base"), options.pop("method")
    models, adapters = (_weighted_inputs(options.pop(name)) for name in ("models", "adapters"))
    if models and not method:
        raise click.UsageError("models need --method: linear, slerp, ties, ... (`mergeforge list methods`)")
    if not models and not adapters:
        raise click.UsageError("nothing to merge: give --adapter or --model")
    parameters = {name: options.pop(f"parameter_{name}") for name in _method_parameters()}
    output = {name: options.pop(name) for name in _OUTPUT_SETTINGS}
    settings = {name: options.pop(name) for name in _SETTINGS}
    settings |= {"gguf": list(output["gguf"]), "shard_size": output["shard_size"], "path": options.pop("out")}
    settings["safetensors"] = False if options.pop("no_safetensors") else None
    options["out"] = None
    return recipe_of(
        base,
        [name for name, _ in models],
        [name for name, _ in adapters],
        [weight for _, weight in (*models, *adapters)],
        METHODS,
        method,
        {name: _value(value) for name, value in parameters.items() if value is not None},
        {name: value for name, value in settings.items() if value not in (None, [])},
        (*_OUTPUT_SETTINGS, "path", "safetensors"),
    )


def _value(value: Any) -> Any:
    from mergeforge.recipe.yaml_reader import scalar

    return scalar(value) if isinstance(value, str) else value


def _weighted_inputs(texts: Sequence[str]) -> list[tuple[str, Any]]:
    return [weighted_input(text) for text in texts]


def weighted_input(text: str) -> tuple[str, Any]:
    """Split NAME:WEIGHT; the weight is None if there is none.

    A colon may also be part of a path (C:\\models), of an address (https://host:80) or of a file that exists.
    """
    name, _, end = text.rpartition(":")
    is_port = "://" in name and "/" not in name.partition("://")[2]
    if not name or is_port or _exists(text):
        return text, None
    try:
        numbers = [float(number) for number in end.split(",")]
    except ValueError:
        if _exists(name):
            raise click.UsageError(f"{text}: {end!r} is not a weight") from None
        return text, None
    return name, numbers[0] if len(numbers) == 1 else numbers


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, the home of an unknown user, a NUL
        return False
