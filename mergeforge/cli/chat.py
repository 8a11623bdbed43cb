"""mergeforge chat."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergeforge.cli import _eval_options
from mergeforge.errors import MergeforgeError, RecipeError

if TYPE_CHECKING:
    from mergeforge.eval import ModelBackend, Sampling
    from mergeforge.eval.chat import Chat


@click.command()
@click.argument("model")
@click.option("--system", metavar="TEXT", default="", help="System message.")
@click.option("--preset", metavar="NAME", help="creative, precise or long; the options below override it.")
@click.option("--temperature", type=float, metavar="X", help="0: always the most likely token. [default: 0.7]")
@click.option(
    "--top-p",
    type=float,
    metavar="X",
    help="Sample from the most likely tokens, up to this total. [default: 0.95]",
)
@click.option("--top-k", type=int, metavar="N", help="Sample from the N most likely tokens; 0: all. [default: 0]")
@click.option("--max-tokens", type=int, metavar="N", help="Maximum length of an answer. [default: 512]")
@click.option("--repetition-penalty", type=float, metavar="X", help="Above 1: repeat less. [default: 1]")
@click.option("--seed", type=int, metavar="N", help="Make the answers reproducible.")
@_eval_options.stop
@click.option("--prompt", metavar="TEXT", help="Answer this message, print only the answer, and exit.")
@click.option("--demo", is_flag=True, help="Answer a few built-in prompts, and exit.")
@click.option("--compare-base", is_flag=True, help="Answer with the adapter, then with its base alone.")
@_eval_options.template
@_eval_options.open_options
def chat(
    model: str,
    *,
    system: str,
    preset: str | None,
    prompt: str | None,
    demo: bool,
    compare_base: bool,
    base: str | None,
    quantize: str,
    template: str,
    device: str,
    context: int,
    **sampling_options: Any,
) -> int:
    """Talk to MODEL: a folder, a PEFT adapter, a Hub repo or a GGUF file.

    In the chat, /help lists the commands. Ctrl-C stops an answer, Ctrl-D quits. A GGUF file needs xllamacpp.

    \b
    Examples:
      mergeforge chat merged --preset precise
      mergeforge chat runs/new/adapter --compare-base
      mergeforge chat merged/merged-Q4_K_M.gguf --prompt "What is a merge?"
    """
    from mergeforge import eval
    from mergeforge.eval.chat import DEMO, Chat

    sampling = _sampling(preset, sampling_options)
    if sys.stderr.isatty():
        click.echo(f"loading {model} ...", err=True)
    opened = eval.open_model(model, base=base, quantize=quantize, device=device, context=context, template=template)
    chats = [Chat(backend, sampling, system, _show_note) for backend in _models(opened, compare_base)]
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a console without Unicode must not end the conversation
    if prompt is not None:
        _answer_once(chats, prompt)
    elif demo:
        for line in DEMO:
            click.secho(f"> {line}", bold=True)
            _answer_once(chats, line)
    else:
        _talk(chats)
    return 0


def _sampling(preset: str | None, options: Mapping[str, Any]) -> Sampling:
    from mergeforge import eval

    sampling = eval.preset(preset) if preset else eval.Sampling()
    return replace(sampling, **{name: value for name, value in options.items() if value not in (None, ())})


def _models(opened: ModelBackend, compare_base: bool) -> list[ModelBackend]:
    from mergeforge.eval import TransformersModel

    if not compare_base:
        return [opened]
    if not isinstance(opened, TransformersModel) or opened.kind != "adapter":
        raise RecipeError(f"{opened.name} is not an adapter: there is no base to compare it with")
    return [opened, opened.base()]


def _answer_once(chats: list[Chat], text: str) -> None:
    """Answer one message on its own; Ctrl-C ends the command."""
    if _answer(chats, text):
        raise KeyboardInterrupt
    for chat in chats:
        chat.turns.clear()


def _talk(chats: list[Chat]) -> None:
    """Answer lines until the input ends."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        click.echo(f"{chats[0].model.name} - /help lists the commands, Ctrl-D quits", err=True)
    for line in _lines(is_terminal):
        try:
            if line == "/exit":
                break
            if line == "/regen":
                interrupted = _answer(chats, None)
            elif line.startswith("/") and not line.startswith("//"):
                click.echo(_run_command(chats, line), err=True)
                continue
            else:
                interrupted = _answer(chats, line.removeprefix("/") if line.startswith("//") else line)
        except MergeforgeError as error:
            hint = f" ({error.command_hint})" if error.command_hint else ""
            click.echo(f"{error}{hint}", err=True)
            continue
        if interrupted and not is_terminal:
            raise KeyboardInterrupt


def _run_command(chats: list[Chat], line: str) -> str:
    """Run a slash command in each conversation; the base's is saved to a file of its own."""
    from mergeforge.eval.chat import run_slash_command

    command, _, name = line.partition(" ")
    if command != "/save" or not name.strip():
        outputs = [run_slash_command(chat, line) for chat in chats]
        return outputs[0]
    file = Path(name.strip())
    files = [file, *(file.with_name(f"{file.stem}-base{file.suffix}") for _ in chats[1:])]
    return "\n".join(run_slash_command(chat, f"/save {file}") for chat, file in zip(chats, files, strict=True))


def _answer(chats: list[Chat], text: str | None) -> bool:
    """Answer with each model (None: the last message again); returns whether Ctrl-C stopped one."""
    interrupted = False
    for chat in chats:
        if len(chats) > 1:
            click.secho(f"[{chat.model.kind}] ", bold=True, nl=False)
        answer = chat.regenerate(_show_text) if text is None else chat.send(text, _show_text)
        click.echo()
        if answer.ended == "interrupted":
            interrupted = True
            _show_note("stopped")
        if answer.ended == "context":
            _show_note("the answer was cut: the context is full; use /reset")
        if answer.ended == "length":
            _show_note(f"the answer was cut: max_tokens is {chat.sampling.max_tokens}")
    return interrupted


def _lines(is_terminal: bool) -> Iterator[str]:
    """Typed or piped lines, without empty ones."""
    if not is_terminal:
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and history
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo()
            continue
        if line:
            yield line


def _show_text(piece: str) -> None:
    from mergeforge.cli._eval_tables import printable

    click.echo(printable(piece) if sys.stdout.isatty() else piece, nl=False)


def _show_note(text: str) -> None:
    click.echo(f"[{text}]", err=True)
