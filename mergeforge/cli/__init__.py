"""The command line: one module per command. Only here is anything printed; each command imports what it needs."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from types import FrameType
from typing import Any

import click

from mergeforge.cli._suggestions import unknown_command, unknown_option
from mergeforge.cli._text import say
from mergeforge.errors import MergeforgeError, out_of_memory

# command -> (module, function, one line for the list), so that --help imports no command
COMMANDS = {
    "run": ("run", "run", "Merge models and adapters as a recipe says; resumes an interrupted run."),
    "merge": ("merge", "merge", "Merge models and adapters named on the command line, without a recipe."),
    "plan": ("plan", "plan", "Show what run would do; reads headers only."),
    "verify": ("verify", "verify", "Check a finished merge against its receipt."),
    "gguf": ("gguf", "gguf", "Write a finished model as GGUF, quantized in one pass."),
    "convert": ("convert", "convert", "Write a GGUF file as a Hugging Face folder with safetensors."),
    "inspect": ("inspect", "inspect", "Show what a checkpoint, an adapter or a GGUF file holds."),
    "diff": ("diff", "diff", "Compare two checkpoints tensor by tensor."),
    "extract-lora": ("extract_lora", "extract_lora", "Write the difference of two models as a LoRA adapter."),
    "publish": ("publish", "publish", "Upload a finished folder to the Hub, only the files that changed."),
    "train": ("train", "train", "Train a QLoRA, LoRA or DoRA adapter, or a whole model."),
    "data": ("data", "data", "Preview, count, split and build training data."),
    "eval": ("eval", "evaluate", "Measure how well a model predicts the answers in a data set."),
    "compare": ("compare", "compare", "Compare models on the same rows, with confidence intervals."),
    "chat": ("chat", "chat", "Talk to a model, an adapter or a GGUF file."),
    "demo": ("demo", "demo", "Make a small model and adapters, merge and verify them."),
    "init": ("init", "init", "Write a recipe to start from."),
    "recipes": ("recipes", "recipes", "List, show or copy the recipes that come with mergeforge."),
    "list": ("list", "list_names", "List merge methods, adapter types, GGUF architectures or types."),
    "schema": ("schema", "schema", "Print the JSON Schema of recipes, for editors."),
    "doctor": ("doctor", "doctor", "Show versions, devices and disk speed, for bug reports."),
}


class _Commands(click.Group):
    """A group that imports a command when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS]  # `list` is a module here: the command's

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, function, _ = COMMANDS[name]
        command: click.Command = getattr(importlib.import_module(f"mergeforge.cli.{module}"), function)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, _, summary) in COMMANDS.items()])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS:
            raise unknown_command(args[0], COMMANDS)
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mergeforge")
def cli() -> None:
    """Merge language models and LoRA adapters without loading them, within a memory limit that you set.

    \b
    Examples:
      mergeforge demo                            a first merge, in a minute
      mergeforge merge --adapter ./lora -o out   fold an adapter into its base
      mergeforge plan recipe.yaml                show what would be done
      mergeforge run recipe.yaml --memory 2GiB   do it
      mergeforge train train.yaml                train an adapter
    """


def run_command(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code (mergeforge/errors.py lists them)."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        result = cli.main(arguments, prog_name="mergeforge", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Abort:
        return _interrupted()
    except KeyboardInterrupt:
        return _interrupted()
    except click.ClickException as error:
        _show_usage_error(error)
        return 2
    except MergeforgeError as error:
        show_error(error)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that closing stdout is quiet
        return 1
    except OSError as error:
        show_error(_system_error(error))
        return 1
    except (MemoryError, RuntimeError) as error:
        budget_error = out_of_memory(error)
        if budget_error is None:
            raise
        show_error(budget_error)
        return budget_error.exit_code


def _system_error(error: OSError) -> MergeforgeError:
    """An error of the system where none was expected, such as too many open files."""
    text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return MergeforgeError(text, hint="fix that, then run the same command again")


def show_error(error: MergeforgeError) -> None:
    """Print what is wrong and what to do, on stderr."""
    say("error: ", str(error), "red")
    if error.command_hint:
        say("hint:  ", error.command_hint, "yellow")


def _show_usage_error(error: click.ClickException) -> None:
    """Print how the command is used, and what is wrong."""
    if isinstance(error, click.UsageError) and error.ctx:
        click.echo(error.ctx.get_usage(), err=True)
    text = unknown_option(error) if isinstance(error, click.NoSuchOption) else error.format_message()
    say("error: ", text, "red")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _interrupted() -> int:
    click.echo("Interrupted. Run the same command again to resume.", err=True)
    return 130
