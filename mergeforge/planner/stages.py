"""Stages: each document of a recipe, decided. An earlier one's result is a model like any other.

Nothing of a stage is written: its ways are computed wherever a later stage reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergeforge.core.tensor_info import TensorInfo
from mergeforge.errors import RecipeError
from mergeforge.io.aux_files import AuxFiles
from mergeforge.io.remote import RemoteSession
from mergeforge.planner.aux_files import aux_files, config_json
from mergeforge.planner.compose import MergeGraph, compose
from mergeforge.planner.inputs import Inputs, IntermediateModel, Opener
from mergeforge.planner.layer_replication import replicated
from mergeforge.planner.model_tensors import ModelTensors, model_tensors
from mergeforge.planner.stacked_config import stacked_config
from mergeforge.planner.tokenizer import follow, map_tables, plan_tokens, template_of
from mergeforge.recipe import OUT_DTYPES, Recipe
from mergeforge.tensors.alias import AliasTensor
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tokenizer import with_chat_template


@dataclass(frozen=True)
class Stage:
    """One document: its inputs, the ways and dtypes of its tensors, its config and the files beside them."""

    recipe: Recipe
    inputs: Inputs
    graph: MergeGraph
    infos: Mapping[str, TensorInfo]
    config: dict[str, Any] | None
    files: AuxFiles
    notes: tuple[str, ...]


def resolve_stages(recipe: Recipe, *, allow_pickle: bool = False, link: RemoteSession | None = None) -> Stage:
    """Decide a recipe: the documents that it uses first. `link`: how inputs that lie elsewhere are read.

    Raises RecipeError (also where documents use one another in a circle) or SourceError.
    """
    stream = any(one.stream_inputs for one in (recipe, *recipe.stages))
    opener = Opener(replicated, allow_pickle=allow_pickle, link=link, stream=stream)
    settling = _StageResolver({str(stage.name): stage for stage in recipe.stages}, opener)
    return settling.resolve(recipe, ())


class _StageResolver:
    def __init__(self, documents: Mapping[str, Recipe], opener: Opener) -> None:
        self.documents = documents
        self.opener = opener

    def resolve(self, recipe: Recipe, above: tuple[str, ...]) -> Stage:
        entries = [*([recipe.base_model] if recipe.base_model else []), *recipe.entries]
        for name in dict.fromkeys(entry.model.path for entry in entries):
            if name in above:
                raise RecipeError(f"the document {name!r} uses its own result", hint=" -> ".join([*above, name]))
            if name in self.documents and name not in self.opener.intermediate_models:
                self.opener.intermediate_models[name] = _intermediate_model(
                    name, self.resolve(self.documents[name], (*above, name))
                )
        return _resolve_stage(recipe, self.opener.open(recipe))


def _resolve_stage(recipe: Recipe, inputs: Inputs) -> Stage:
    tables = _model_tensors(inputs, recipe.base_numerics)
    tokens = plan_tokens(recipe, inputs, tables)
    composition = compose(recipe, inputs, map_tables(tokens, inputs, tables) if tokens else tables)
    infos = _output_infos(recipe, composition, inputs)
    files, notes = aux_files(inputs)
    given = inputs.reference_model.checkpoint.config
    if tokens:
        files, given = follow(tokens, inputs.reference_model, files)
        notes = [*(note for note in notes if not note.startswith("tokenizer files")), *tokens.notes]
    if template := template_of(recipe, inputs):
        files = with_chat_template(files, template)
    config = config_json(recipe, given, infos, composition.tied)
    if config and composition.layer_stacks:
        config = stacked_config(config, composition.layer_stacks)
    return Stage(recipe, inputs, composition, infos, config, files, (*inputs.notes, *composition.notes, *notes))


def _model_tensors(inputs: Inputs, numerics: str) -> dict[str, ModelTensors]:
    """Every model's table by its label."""
    tables = {model.label: model_tensors(model, (), numerics) for model in inputs.models}
    if inputs.base:
        tables[inputs.base.label] = model_tensors(inputs.base, inputs.adapters, numerics)
    return tables


def _output_infos(recipe: Recipe, composition: MergeGraph, inputs: Inputs) -> dict[str, TensorInfo]:
    """Each output tensor as it is written: out_dtype, else dtype, else its own in the base."""
    asked = recipe.out_dtype or recipe.dtype
    wanted = OUT_DTYPES[asked] if asked else None
    donor = inputs.reference_model.checkpoint.tensors
    floats = [way.info for way in donor.values() if way.info.is_float]
    usual = max(
        {info.dtype for info in floats},
        key=lambda dtype: sum(info.nbytes for info in floats if info.dtype == dtype),
        default="F32",
    )
    infos = {}
    for name, way in composition.tensors.items():
        own = donor[name].info.dtype if name in donor else usual
        dtype = way.info.dtype if not way.info.is_float else wanted or own
        infos[name] = way.info.with_dtype(dtype)
    return infos


def _intermediate_model(name: str, stage: Stage) -> IntermediateModel:
    """A stage as a model: its values unrounded, its dtypes as they would be written."""
    tensors: dict[str, LazyTensor] = {
        tensor: way if way.info == stage.infos[tensor] else AliasTensor(way, stage.infos[tensor])
        for tensor, way in stage.graph.tensors.items()
    }
    return IntermediateModel(name, stage.inputs, tensors, stage.config or {}, stage.files, stage.notes)
