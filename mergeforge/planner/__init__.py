"""Planning: a recipe and the headers of its inputs become a Plan.

    parse         the recipe (mergeforge.recipe)
    open          every model and adapter, headers only (inputs.py)
    resolve       each document: its models' tensors (model_tensors.py), every output tensor as a LazyTensor
                  (output_tensors.py, compose.py), config and tokenizer (stages.py, aux_files.py, tokenizer.py)
    lay out       every output file, and the encoders that write it (outputs.py)
    tile          every tensor, within the memory given (tiling.py)

Each step takes the value of the step before it and the part of the recipe that it needs. Whatever is wrong is an error
here, before any weight is read or any byte is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergeforge.errors import strict_error
from mergeforge.gguf.file_types import ALIASES, FILE_TYPES
from mergeforge.io.remote import RemoteSession
from mergeforge.lora.combine import Combination, folded_terms, plan_combination
from mergeforge.methods import METHODS
from mergeforge.planner.batches import Batch
from mergeforge.planner.describe import plan_as_json, plan_page, tensor_summaries
from mergeforge.planner.fingerprint import NUMERICS, fingerprint
from mergeforge.planner.options import Options
from mergeforge.planner.output_folder import (
    WORK,
    check_disk,
    check_output_folder,
    check_output_is_named,
    existing_folder,
    output_folder,
)
from mergeforge.planner.outputs import plan_outputs
from mergeforge.planner.plan import Plan
from mergeforge.planner.stages import Stage, resolve_stages
from mergeforge.planner.tiling import TensorPlan, plan_tiles
from mergeforge.recipe import Recipe, read
from mergeforge.tensors.budget import MAX_REMOTE_CACHE, Budget, make_budget

__all__ = [
    "NUMERICS",
    "WORK",
    "Batch",
    "Options",
    "Plan",
    "RecipeLike",
    "TensorPlan",
    "check_disk",
    "existing_folder",
    "make_plan",
    "plan_as_json",
    "plan_page",
    "read_recipe",
]

RecipeLike = str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]] | Recipe


def read_recipe(source: RecipeLike, sets: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check it against the known merge methods and GGUF types. Raises RecipeError."""
    return read(source, METHODS, tuple(sets), (*FILE_TYPES, *ALIASES))


def make_plan(
    source: RecipeLike, options: Options | None = None, *, needs_output: bool = True, **keywords: Any
) -> Plan:
    """Plan a merge; reads headers only. `keywords` are fields of Options.

    needs_output: refuse a merge without an output folder, which can be planned but not run.

    Raises RecipeError, SourceError (with `strict`, also for warnings), BudgetError or OutputError.
    """
    options = (options or Options()).changed("make_plan", keywords)
    recipe = _recipe_with_overrides(source, options)
    if needs_output:
        check_output_is_named(recipe, options.out)
    out = output_folder(recipe, options.out)
    budget = make_budget(options.memory, options.device, options.threads)
    remote_cache = min(budget.memory // 8, MAX_REMOTE_CACHE)
    stage = resolve_stages(recipe, allow_pickle=options.allow_pickle, session=RemoteSession(remote_cache))
    if stage.inputs.streamed:
        budget = replace(budget, remote_cache=2 * remote_cache)  # as much again for ranges in flight
    recipe = stage.recipe
    outputs = plan_outputs(recipe.output, stage, recipe.output.name or out.absolute().name, budget.device)
    tensor_plans, budget = plan_tiles(stage.graph.tensors, stage.infos, outputs.encoders, budget)
    check_output_folder(out, stage.inputs)
    plan = Plan(
        recipe=recipe,
        inputs=stage.inputs,
        out=out,
        has_output=bool(options.out or recipe.output.path),
        budget=budget,
        tensor_plans=tuple(tensor_plans),
        summaries=tensor_summaries(tensor_plans, stage.graph),
        checkpoint=outputs.checkpoint,
        ggufs=outputs.ggufs,
        config=outputs.config,
        aux_files=stage.files if recipe.output.safetensors else {},
        notes=tuple(dict.fromkeys([*stage.notes, *outputs.notes])),
        fingerprint=fingerprint(recipe, stage.inputs, outputs.layouts, budget),
        allow_nonfinite=options.allow_nonfinite,
        strict=options.strict,
        combination=_combination(recipe, stage, budget),
    )
    if plan.strict and plan.warnings:
        raise strict_error(plan.warnings)
    return plan


def _recipe_with_overrides(source: RecipeLike, options: Options) -> Recipe:
    recipe = read_recipe(source, options.sets)
    overrides = options.overrides(recipe)
    return recipe if overrides == options.sets else read_recipe(source, overrides)


def _combination(recipe: Recipe, stage: Stage, budget: Budget) -> Combination | None:
    """The adapter that the recipe's adapters are combined into, if it asks for one."""
    output = recipe.output.adapter
    if output is None or stage.inputs.base is None:
        return None
    adapters, base = [opened.adapter for opened in stage.inputs.adapters], stage.inputs.base.checkpoint
    terms = folded_terms(stage.graph.tensors, base, adapters)
    return plan_combination(
        adapters, terms, base, rank=output.rank, energy=output.energy, dtype=output.dtype, memory=budget.memory
    )
