"""The Python interface: the commands that work on models and adapters, as functions.

Options are keyword arguments named as the command line's: `--memory 2GiB` is `memory="2GiB"`. Raises MergeforgeError's
subclasses for everything that a user can get wrong, and TypeError for an argument that a function does not have or that
has the wrong type.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat

from mergeforge.core.messages import OnMessage
from mergeforge.core.tensor_info import Tile
from mergeforge.errors import RecipeError
from mergeforge.methods import METHODS
from mergeforge.operations import merge as merging
from mergeforge.planner import Options, Plan, RecipeLike, make_plan
from mergeforge.planner.options import as_list, refuse_unknown
from mergeforge.recipe import json_schema
from mergeforge.recipe.parts import recipe_of

if TYPE_CHECKING:
    from mergeforge.hub.publish import Publication
    from mergeforge.operations.diff import TensorDifference
    from mergeforge.operations.merge import RunResult
    from mergeforge.operations.verify import Verdict

_OPTIONS = [field.name for field in fields(Options)]


def plan(recipe: RecipeLike, **options: Any) -> Plan:
    """Plan a merge from a recipe file, a dict, a list of dicts (its documents) or a Recipe; reads headers only.

    options: out, sets, memory, device, threads, stream_inputs, stream_to_hub, allow_pickle, allow_nonfinite, strict
    (Options explains them). Nothing is written; `print(plan)` shows what run() would do.
    """
    return make_plan(recipe, Options.of("mergeforge.plan", options), needs_output=False)


def run(
    merge: Plan | RecipeLike,
    *,
    fresh: bool = False,
    overwrite: bool = False,
    on_message: OnMessage = lambda _: None,
    **options: Any,
) -> RunResult:
    """Do a merge, given its Plan or its recipe (with plan()'s options); resumes an interrupted run of the same merge.

    fresh: discard an unfinished run. overwrite: replace a finished merge. on_message: called with a line per upload.
    """
    plan_ = _planned("mergeforge.run", merge, options)
    return merging.run(plan_, fresh=fresh, overwrite=overwrite, on_message=on_message)


def iter_run(
    merge: Plan | RecipeLike,
    *,
    fresh: bool = False,
    overwrite: bool = False,
    on_message: OnMessage = lambda _: None,
    **options: Any,
) -> Iterator[Tile]:
    """The same as run(), tile by tile: yields each tile when it is written. The merge is done when it is exhausted."""
    plan_ = _planned("mergeforge.iter_run", merge, options)
    return merging.iter_run(plan_, fresh=fresh, overwrite=overwrite, on_message=on_message)


def merge(
    recipe: RecipeLike | None = None,
    *,
    base_model: str | Path | None = None,
    models: Sequence[str | Path] = (),
    adapters: Sequence[str | Path] = (),
    weights: Sequence[float] = (),
    method: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    fresh: bool = False,
    overwrite: bool = False,
    **keywords: Any,
) -> Path:
    """Merge in one call, from a recipe or from its parts; returns the output folder.

    weights: of `models`, then of `adapters`, in order (default: 1 each). method: the recipe's merge_method.
    keywords: any other key of a recipe or of its `output` (dtype="bfloat16", gguf=["q4_k_m"], tokenizer_source="union",
    shard_size="2GB", ...), and plan()'s options. With a recipe, its keys cannot be given a second time.
    """
    options = {name: value for name, value in keywords.items() if name in _OPTIONS}
    settings = {name: value for name, value in keywords.items() if name not in _OPTIONS}
    recipe_keys, output_keys = _recipe_keys()
    refuse_unknown("mergeforge.merge", settings, [*_MERGE_ARGUMENTS, *_OPTIONS, *recipe_keys, *output_keys])
    models = _items("models", models, str | PathLike, "paths or repo ids")
    adapters = _items("adapters", adapters, str | PathLike, "paths or repo ids")
    weights = _items("weights", weights, SupportsFloat, "numbers")
    if not isinstance(parameters, Mapping | None):
        raise TypeError(f"mergeforge.merge(): parameters must be a dict, not {type(parameters).__name__}")
    if recipe is None:
        numbers = [float(weight) for weight in weights]
        recipe = recipe_of(base_model, models, adapters, numbers, METHODS, method, parameters, settings, output_keys)
    elif base_model or models or adapters or weights or method or parameters or settings:
        raise RecipeError("give a recipe or its parts, not both")
    plan_ = make_plan(recipe, Options.of("mergeforge.merge", options))
    return merging.run(plan_, fresh=fresh, overwrite=overwrite).folder


def verify(out: str | Path, *, deep: bool = False, everything: bool = False) -> Verdict:
    """Check a finished merge against its receipt: sizes, headers and every tensor's checksum.

    deep: also recompute a sample of tensors from the inputs; everything: recompute all. Raises SourceError if there is
    no receipt; the Verdict lists all other problems.
    """
    from mergeforge.operations import verify as verification

    return verification.verify(out, deep=deep or everything, everything=everything)


def inspect(path: str | Path, *, allow_pickle: bool = False) -> dict[str, Any]:
    """What a checkpoint, an adapter or a GGUF file holds: kind, config, and every tensor's dtype, shape and size.

    Reads headers only. Raises SourceError for any other path.
    """
    from mergeforge.operations import inspect as inspection

    return inspection.inspect(str(path), allow_pickle=allow_pickle)


def diff(a: str | Path, b: str | Path, *, allow_pickle: bool = False) -> list[TensorDifference]:
    """Compare two checkpoints tensor by tensor; one entry for each tensor of either, `same` where they are equal."""
    from mergeforge.operations.diff import differences

    return list(differences(str(a), str(b), allow_pickle=allow_pickle))


def convert_from_gguf(
    file: str | Path,
    *,
    out: str | Path | None = None,
    dtype: str | None = None,
    shard_size: str | None = None,
    fresh: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Write a GGUF file as a Hugging Face folder: safetensors, config and tokenizer; returns the folder.

    out: the folder (default: the model's name, in the current folder). dtype: of all tensors; by default quantized ones
    become float16, and the others stay as they are. options: plan()'s. Raises SourceError for a file that is no whole
    model of a known architecture.
    """
    from mergeforge.operations.convert_model import conversion_recipe, default_folder

    recipe = conversion_recipe(str(file), dtype, shard_size)
    planned = Options.of("mergeforge.convert_from_gguf", options | {"out": out or default_folder(str(file))})
    return merging.run(make_plan(recipe, planned), fresh=fresh, overwrite=overwrite).folder


def convert_to_gguf(
    model: str | Path,
    types: str | Sequence[str] | None = None,
    *,
    out: str | Path | None = None,
    base: str | Path | None = None,
    adapters: Mapping[str | Path, float] | None = None,
    allow_requantize: bool = False,
    keep_split: bool = False,
    metadata: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    converter: str | None = None,
    fresh: bool = False,
    overwrite: bool = False,
    memory: str | int | None = None,
    device: str = "auto",
    threads: int | None = None,
    allow_pickle: bool = False,
    **settings: Any,
) -> list[Path]:
    """Write a model (a folder, Hub repo or GGUF file) or a LoRA adapter as GGUF; returns the files.

    types: by default q8_0, of a GGUF file what it has, of an adapter f32. out: a folder (default: NAME-GGUF), or the
    file if there is one type. base: the adapter's base model (default: as its adapter_config.json says).
    adapters (weights by adapter: GGUF LoRAs, or adapters of `base`, folded in first), allow_requantize, keep_split,
    metadata (values by key) and chat_template are for GGUF files. settings: imatrix, tensor_types, output_tensor_type,
    token_embedding_type, pure, split_max_size, pre, as in a recipe's output.gguf, and mmproj (a type). converter:
    "official" or a llama.cpp tree, whose converter then reads the model.
    """
    from mergeforge.operations import convert_gguf as gguf_conversion
    from mergeforge.operations.convert_lora import convert_lora, is_adapter
    from mergeforge.operations.requantize_gguf import is_gguf_file, plan_gguf
    from mergeforge.planner.requantize import Requantization

    refuse_unknown("mergeforge.convert_to_gguf", settings, list(gguf_conversion.SETTINGS))
    options = Options(memory=memory, device=device, threads=threads, allow_pickle=allow_pickle)
    types = as_list("mergeforge.convert_to_gguf", "types", types or ())
    target = None if out is None else str(out)
    if is_adapter(str(model)) or (base and not is_gguf_file(str(model))):
        return convert_lora(str(model), str(base or ""), types, target, allow_pickle=allow_pickle, overwrite=overwrite)
    if converter:
        from mergeforge.operations.official_converter import convert_officially, plan_official, remove_file

        planned = plan_official(converter, str(model), types, target, settings, options, overwrite=overwrite)
        files = convert_officially(planned, fresh=fresh, overwrite=overwrite)
        remove_file(planned)
        return files
    texts = [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in (metadata or {}).items()
    ]
    folds = tuple((str(adapter), float(weight)) for adapter, weight in (adapters or {}).items())
    named_base = None if base is None else str(base)
    request = Requantization(allow_requantize, keep_split, tuple(texts), chat_template, folds, named_base)
    conversion = plan_gguf(str(model), types, target, settings, request, options, overwrite=overwrite)
    deque(gguf_conversion.convert(conversion, fresh=fresh, overwrite=overwrite), maxlen=0)
    return conversion.files


def extract_lora(tuned: str | Path, *, base: str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """Write the difference of a fine-tuned model and its base as a PEFT LoRA adapter; returns the report.

    options: rank, energy, svd, embeddings, save_rest, include, exclude, dtype, memory, device, threads, allow_pickle,
    overwrite (plan_extraction explains them). The report, also in OUT/extraction.json, has every module's error.
    """
    from mergeforge.lora import extract

    refuse_unknown("mergeforge.extract_lora", options, list(signature(extract.plan_extraction).parameters)[3:])
    return extract.extract_lora(str(tuned), str(base), out, **options)


def combine_adapters(
    base_model: str | Path,
    adapters: Sequence[str | Path],
    *,
    out: str | Path,
    weights: Sequence[float] = (),
    rank: int | None = None,
    energy: float | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Write the weighted sum of LoRA adapters of one base as one adapter; returns its folder.

    Exact unless truncated to `rank`, or to the `energy` share of the squared change (PEFT: add_weighted_adapter).
    options: plan()'s memory, device, threads, allow_pickle.
    """
    refuse_unknown("mergeforge.combine_adapters", options, ["memory", "device", "threads", "allow_pickle", "fresh"])
    adapter = {"rank": rank, "energy": energy, "dtype": dtype}
    return merge(
        base_model=base_model,
        adapters=adapters,
        weights=weights,
        adapter={key: value for key, value in adapter.items() if value is not None},
        safetensors=False,
        out=out,
        overwrite=overwrite,
        **options,
    )


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str = "main",
    gguf: str = "beside",
    dry_run: bool = False,
    on_message: OnMessage = lambda _: None,
) -> tuple[Publication, ...]:
    """Upload a finished folder to the Hub as one commit; uploads only the files that changed.

    gguf: "beside" keeps GGUF files in the same repo, "apart" puts them into REPO_ID-GGUF. Returns what was uploaded,
    removed and kept in each repo; with dry_run, what would be.
    """
    from mergeforge.hub import publish as hub_publish
    from mergeforge.hub.split_gguf_repo import publications

    with publications(folder, repo_id, revision=revision, private=private, gguf=gguf, dry_run=dry_run) as planned:
        for publication in planned:
            for uploaded in () if dry_run else hub_publish.publish(publication):
                on_message(f"uploaded {uploaded}")
        return planned


_MERGE_ARGUMENTS = (
    *("recipe", "base_model", "models", "adapters", "weights", "method", "parameters"),
    *("fresh", "overwrite"),
)


def _planned(function: str, merge: Plan | RecipeLike, options: Mapping[str, Any]) -> Plan:
    if not isinstance(merge, Plan):
        return make_plan(merge, Options.of(function, options))
    if options:
        raise TypeError(f"{function}() takes options with a recipe; a Plan already has its own")
    return merge


def _recipe_keys() -> tuple[list[str], list[str]]:
    """The keys of a recipe, and those of its `output`."""
    properties = json_schema()["properties"]
    return list(properties), list(properties["output"]["properties"])


def _items(argument: str, values: Any, kind: Any, description: str) -> list[Any]:
    """The items of a list argument of merge(). Raises TypeError for an item of another kind."""
    items = as_list("mergeforge.merge", argument, values)
    for item in items:
        if not isinstance(item, kind):
            raise TypeError(f"mergeforge.merge(): {argument} must be {description}, not {item!r}")
    return items
