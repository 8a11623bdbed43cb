"""mergeforge chat."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from mergeforge.errors import MergeforgeError, RecipeError

if TYPE_CHECKING:
    from mergeforge.eval import Answerer, Sampling
    from mergeforge.eval.chat import Chat


@click.command()
@click.argument("model")
@click.option("--system", metavar="TEXT", default="", help="A system message.")
@click.option("--preset", metavar="NAME", help="creative, precise or long; single settings go over it.")
@click.option("--temperature", type=float, metavar="X", help="0: always the likeliest token. (0.7)")
@click.option("--top-p", type=float, metavar="X", help="Draw among the likeliest tokens of this share. (0.95)")
@click.option("--top-k", type=int, metavar="N", help="Draw among so many; 0: all. (0)")
@click.option("--max-tokens", type=int, metavar="N", help="Of one answer. (512)")
@click.option("--repetition-penalty", type=float, metavar="X", help="Above 1: say less again. (1)")
@click.option("--seed", type=int, metavar="N", help="The same draws every time.")
@click.option("--stop", multiple=True, metavar="TEXT", help="An answer ends before this text (repeatable).")
@click.option("--prompt", metavar="TEXT", help="Answer this, print the answer alone, and end.")
@click.option("--demo", is_flag=True, help="Answer a few built-in prompts, and end.")
@click.option("--base", metavar="MODEL", help="An adapter's base, where it lies elsewhere.")
@click.option("--compare-base", is_flag=True, help="Answer with the adapter, then with its base alone.")
@click.option("--quantise", default="none", metavar="none|nf4", help="nf4: load in 4 bits (bitsandbytes).")
@click.option("--template", default="auto", metavar="NAME", help="Chat template: auto, a name, a .jinja file.")
@click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--context", type=click.IntRange(64), default=4096, show_default=True, help="Of a GGUF file, in tokens.")
def chat(
    model: str,
    *,
    system: str,
    preset: str | None,
    prompt: str | None,
    demo: bool,
    compare_base: bool,
    base: str | None,
    quantise: str,
    template: str,
    device: str,
    context: int,
    **drawn: Any,
) -> int:
    """Talk to MODEL: a folder, a PEFT adapter, a Hub repo (extra `train`) or a GGUF file (extra `engine`).

    /help lists what can be done meanwhile. Ctrl-C stops an answer, Ctrl-D ends.

    \b
    mergeforge chat merged --preset precise
    mergeforge chat runs/new/adapter --compare-base
    mergeforge chat merged/merged-Q4_K_M.gguf --prompt "What is a merge?"
    """
    from mergeforge import eval
    from mergeforge.eval.chat import DEMO, Chat

    sampling = _sampling(preset, drawn)
    if sys.stderr.isatty():
        click.echo(f"loading {model} ...", err=True)
    opened = eval.open_model(model, base=base, quantise=quantise, device=device, context=context, template=template)
    chats = [Chat(one, sampling, system, _note) for one in _models(opened, compare_base)]
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a console of few characters ends no conversation
    if prompt is not None:
        _once(chats, prompt)
    elif demo:
        for line in DEMO:
            click.secho(f"> {line}", bold=True)
            _once(chats, line)
    else:
        _talk(chats)
    return 0


def _sampling(preset: str | None, drawn: Mapping[str, Any]) -> Sampling:
    from mergeforge import eval

    start = eval.preset(preset) if preset else eval.Sampling()
    return replace(start, **{name: value for name, value in drawn.items() if value not in (None, ())})


def _models(opened: Answerer, compare_base: bool) -> list[Answerer]:
    from mergeforge.eval import TorchModel

    if not compare_base:
        return [opened]
    if not isinstance(opened, TorchModel) or opened.kind != "adapter":
        raise RecipeError(f"{opened.name} is no adapter, so there is no base to compare it with")
    return [opened, opened.base()]


def _once(chats: list[Chat], text: str) -> None:
    """One answer to a message by itself; Ctrl-C ends the command."""
    if _say(chats, text):
        raise KeyboardInterrupt
    for one in chats:
        one.turns.clear()


def _talk(chats: list[Chat]) -> None:
    """Lines in, answers out, until the lines end."""
    from mergeforge.eval.chat import command

    terminal = sys.stdin.isatty()
    if terminal:
        click.echo(f"{chats[0].model.name} - /help lists the commands, Ctrl-D ends", err=True)
    for line in _lines(terminal):
        try:
            if line == "/exit":
                break
            if line == "/regen":
                interrupted = _say(chats, None)
            elif line.startswith("/") and not line.startswith("//"):
                told = [command(one, line) for one in chats]
                click.echo(told[0], err=True)
                continue
            else:
                interrupted = _say(chats, line.removeprefix("/") if line.startswith("//") else line)
        except MergeforgeError as error:
            click.echo(f"{error}" + (f" ({error.hint})" if error.hint else ""), err=True)
            continue
        if interrupted and not terminal:
            raise KeyboardInterrupt


def _say(chats: list[Chat], text: str | None) -> bool:
    """Answer with each model (None: the last message again); whether Ctrl-C stopped one."""
    interrupted = False
    for one in chats:
        if len(chats) > 1:
            click.secho(f"[{one.model.kind}] ", bold=True, nl=False)
        answer = one.again(_tell) if text is None else one.say(text, _tell)
        click.echo()
        if answer.ended == "interrupted":
            interrupted = True
            _note("stopped")
        if answer.ended == "length":
            full = answer.tokens < one.sampling.max_tokens
            _note("cut: the context is full; /reset" if full else f"cut after {answer.tokens} tokens: max_tokens")
    return interrupted


def _lines(terminal: bool) -> Iterator[str]:
    """What is typed or piped, without empty lines."""
    if not terminal:
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    import contextlib

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


def _tell(piece: str) -> None:
    from mergeforge.cli._eval_tables import printable

    click.echo(printable(piece) if sys.stdout.isatty() else piece, nl=False)


def _note(text: str) -> None:
    click.echo(f"[{text}]", err=True)
