"""The command line. The only place that prints or exits; each command imports what it needs."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from types import FrameType
from typing import Any

import click

from mergeforge.errors import MergeforgeError, out_of_memory

# command -> (module, function, one line for the list), so that --help imports no command
COMMANDS = {
    "run": ("run", "run", "Do a merge; goes on by itself where an interrupted run stopped."),
    "plan": ("run", "plan", "Show what run would do; reads headers only."),
    "verify": ("verify", "verify", "Check a finished merge against its receipt."),
    "gguf": ("gguf", "gguf", "Write a finished model as GGUF, quantised in one pass."),
    "inspect": ("verify", "inspect", "Show what is in a checkpoint, an adapter or a GGUF."),
    "diff": ("verify", "diff", "Compare two checkpoints tensor by tensor."),
    "extract-lora": ("extract_lora", "extract_lora", "Write the difference of two models as a LoRA adapter."),
    "publish": ("publish", "publish", "Publish a finished folder on the Hub: one commit, only what is missing."),
    "train": ("train", "train", "Train a QLoRA, LoRA or DoRA adapter, or a whole model."),
    "data": ("data", "data", "Look at training data, split it, build it."),
    "eval": ("eval", "evaluate", "Measure how well a model predicts the answers of a data set."),
    "compare": ("eval", "compare", "Set models side by side on the same rows, with intervals."),
    "chat": ("chat", "chat", "Talk to a model, an adapter or a GGUF file."),
    "demo": ("recipes", "demo", "Make a small model and adapters on the spot, merge and verify them."),
    "init": ("recipes", "init", "Write a recipe to start from."),
    "recipes": ("recipes", "recipes", "List, show or copy the recipes that come with the package."),
    "list": ("recipes", "list_names", "List merge methods, adapter kinds, GGUF architectures or types."),
    "schema": ("recipes", "schema", "Print the JSON Schema of a recipe, for editors."),
    "doctor": ("doctor", "doctor", "What this machine can do: what to paste into a bug report."),
}


class _Commands(click.Group):
    """A group whose commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, function, _ = COMMANDS[name]
        command: click.Command = getattr(importlib.import_module(f"mergeforge.cli.{module}"), function)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, _, about) in COMMANDS.items()])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS:
            from mergeforge.errors import did_you_mean

            raise click.UsageError(f"there is no command '{args[0]}'. {did_you_mean(args[0], COMMANDS)}".strip())
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mergeforge")
def cli() -> None:
    """Merge language models and adapters in the memory that you name.

    \b
    mergeforge demo                      a first merge, in under a minute
    mergeforge plan recipe.yaml          what would be done
    mergeforge run recipe.yaml --memory 2GiB
    mergeforge train train.yaml          an adapter of your own
    """


def run_command(arguments: list[str] | None = None) -> int:
    """Run a command; the exit code (mergeforge/errors.py lists them)."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        result = cli.main(arguments, prog_name="mergeforge", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Abort:
        return _interrupted()
    except KeyboardInterrupt:
        return _interrupted()
    except click.ClickException as error:
        error.show()
        return 2
    except MergeforgeError as error:
        tell_error(error)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that closing stdout is quiet
        return 1
    except OSError as error:
        tell_error(_refused(error))
        return 1
    except (MemoryError, RuntimeError) as error:
        told = out_of_memory(error)
        if told is None:
            raise
        tell_error(told)
        return told.exit_code


def _refused(error: OSError) -> MergeforgeError:
    """What the system refused at a place that did not expect it, such as too many open files."""
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return MergeforgeError(what, hint="run the same command again once that is mended")


def tell_error(error: MergeforgeError) -> None:
    """What is wrong, and what to do, on stderr."""
    click.secho("error: ", fg="red", bold=True, nl=False, err=True)
    click.echo(str(error), err=True)
    if error.hint:
        click.secho("hint:  ", fg="yellow", nl=False, err=True)
        click.echo(error.hint, err=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _interrupted() -> int:
    click.echo("interrupted; what is finished stays, run the same command again to go on", err=True)
    return 130
