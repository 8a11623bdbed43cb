"""mergeforge gguf."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from mergeforge.errors import RecipeError


@click.command()
@click.argument("model")
@click.option("--type", "types", multiple=True, metavar="TYPE", help="q4_k_m, q8_0, f16, ... (repeatable; q8_0).")
@click.option("--out", metavar="FILE_OR_DIR", help="Default: the folder NAME-GGUF.")
@click.option("--imatrix", metavar="FILE", help="An importance matrix (GGUF or .dat).")
@click.option("--tensor-type", "tensor_types", multiple=True, metavar="NAME=TYPE", help="For tensors so named.")
@click.option("--output-tensor-type", metavar="TYPE", help="For output.weight.")
@click.option("--token-embedding-type", metavar="TYPE", help="For token_embd.weight.")
@click.option("--pure", is_flag=True, help="Every tensor in the main type.")
@click.option("--split-max-size", metavar="SIZE", help="Largest size of one file, e.g. 4GB.")
@click.option("--pre", metavar="NAME", help="The pre-tokenizer, where the tokenizer's structure does not tell.")
@click.option("--memory", metavar="SIZE", help="Working memory, e.g. 2GiB.")
@click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.", show_default=True)
@click.option("--threads", type=int, metavar="N", help="Workers.")
@click.option("--allow-pickle", is_flag=True, help="Read .bin weights, with torch's weights_only loader.")
@click.option("--fresh", is_flag=True, help="Throw an unfinished run away and start over.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@click.option("--plan", "only_plan", is_flag=True, help="Show what would be written, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("-v", "--verbose", is_flag=True, help="Print the whole plan first.")
def gguf(
    model: str,
    *,
    types: tuple[str, ...],
    out: str | None,
    tensor_types: tuple[str, ...],
    fresh: bool,
    overwrite: bool,
    only_plan: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    memory: str | None,
    device: str,
    threads: int | None,
    allow_pickle: bool,
    **settings: Any,
) -> None:
    """Write MODEL (a folder or Hub repo) as GGUF, quantised in the same pass.

    \b
    mergeforge gguf ./merged --type q4_k_m --type q8_0
    mergeforge gguf org/model --type q4_k_m --out model.gguf --memory 1GiB
    """
    started = time.monotonic()
    asked = {key: value for key, value in settings.items() if value}
    if tensor_types:
        asked["tensor_types"] = dict(_pair(one) for one in tensor_types)
    from mergeforge.cli import _progress
    from mergeforge.core.sizes import show_size
    from mergeforge.operations import convert_gguf

    options = {"memory": memory, "device": device, "threads": threads, "allow_pickle": allow_pickle}
    options["overwrite"] = overwrite
    planned = convert_gguf.plan_export(model, types or ("q8_0",), out, asked, **options)
    to = _progress.console()
    if only_plan or verbose:
        _progress.show_plan(planned.plan, to)
    elif not quiet:
        _progress.show_notes(planned.plan, to)
    if only_plan:
        return
    tiles = convert_gguf.export(planned, fresh=fresh, overwrite=overwrite)
    for _ in _progress.watch(planned.plan, tiles, to, quiet=quiet):
        pass
    seconds = time.monotonic() - started
    files = {str(path): path.stat().st_size for path in planned.files}
    if as_json:
        click.echo(json.dumps({"files": files, "seconds": round(seconds, 3)}))
    elif not quiet:
        for path, size in files.items():
            to.print(f"wrote {path} ({show_size(size)}) in {seconds:.1f} s", markup=False)


def _pair(written: str) -> tuple[str, str]:
    name, equals, kind = written.rpartition("=")
    if not equals or not name or not kind:
        raise RecipeError(f"--tensor-type {written}: write NAME=TYPE, such as attn_v=q6_k")
    return name, kind
