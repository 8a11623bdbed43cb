"""Stages: each document of a recipe, resolved. The result of an earlier document is a model like any other.

No stage but the last is written: its LazyTensors are computed wherever a later stage reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mergeforge.adapters.open import Adapter
from mergeforge.checkpoints.ties import model_ties
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.errors import RecipeError
from mergeforge.io.aux_files import AuxFile, AuxFiles
from mergeforge.io.remote import RemoteSession
from mergeforge.planner.adapter_positions import with_adapter_positions
from mergeforge.planner.aux_files import aux_files
from mergeforge.planner.base_of_adapters import with_base_of_adapters
from mergeforge.planner.classification_head import new_classification_head
from mergeforge.planner.compatibility import check_inputs
from mergeforge.planner.compose import MergeGraph, compose
from mergeforge.planner.custom_code import without_missing_code
from mergeforge.planner.input_warnings import input_warnings
from mergeforge.planner.inputs import Inputs, IntermediateModel, Opener
from mergeforge.planner.layer_replication import replicate_layers
from mergeforge.planner.model_tensors import ModelTensors, model_tensors
from mergeforge.planner.output_config import config_json
from mergeforge.planner.stacked_config import stacked_config
from mergeforge.planner.tokenizer import (
    merged_models,
    output_chat_template,
    plan_output_tokenizer,
    remap_models,
    with_output_tokenizer,
)
from mergeforge.recipe import OUT_DTYPES, Recipe
from mergeforge.tensors.alias import AliasTensor
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tokenizer import TokenizerPlan, with_chat_template


@dataclass(frozen=True)
class Stage:
    """One document, resolved: its inputs, output tensors, their dtypes as written, its config and the files beside."""

    recipe: Recipe
    inputs: Inputs
    graph: MergeGraph
    infos: Mapping[str, TensorInfo]
    config: dict[str, Any] | None
    files: AuxFiles
    notes: tuple[str, ...]


def resolve_stages(recipe: Recipe, *, allow_pickle: bool = False, session: RemoteSession | None = None) -> Stage:
    """Resolve a recipe, the documents that it uses first. `session`: how remote inputs are read.

    Raises RecipeError (also where documents use each other in a circle) or SourceError.
    """
    stream = any(document.stream_inputs for document in (recipe, *recipe.stages))
    opener = Opener(replicate_layers, allow_pickle=allow_pickle, session=session, stream=stream)
    return _resolve(recipe, {str(stage.name): stage for stage in recipe.stages}, opener, ())


def _resolve(recipe: Recipe, documents: Mapping[str, Recipe], opener: Opener, path: tuple[str, ...]) -> Stage:
    """Resolve one document; `path`: the names of the documents that led to it."""
    recipe = with_base_of_adapters(recipe, opener)
    entries = [*([recipe.base_model] if recipe.base_model else []), *recipe.named_models]
    for name in dict.fromkeys(entry.model.path for entry in entries):
        if name in path:
            raise RecipeError(f"the document {name!r} uses its own result", hint=" -> ".join([*path, name]))
        if name in documents and name not in opener.intermediate_models:
            stage = _resolve(documents[name], documents, opener, (*path, name))
            opener.intermediate_models[name] = _intermediate_model(name, stage)
    return _resolve_stage(recipe, opener.open(recipe))


def _resolve_stage(recipe: Recipe, inputs: Inputs) -> Stage:
    mismatches = check_inputs(recipe, inputs, merged_models(recipe, inputs))
    models = _model_tensors(inputs, recipe.base_numerics)
    tokenizer = plan_output_tokenizer(recipe, inputs, models)
    graph = compose(recipe, inputs, remap_models(tokenizer, inputs, models) if tokenizer else models)
    infos = _output_infos(recipe, graph, inputs)
    files, config, notes = _files_and_config(recipe, inputs, tokenizer)
    config, about_positions = with_adapter_positions(config, _adapters_of_result(inputs))
    notes += about_positions
    if head := new_classification_head(config, _adapters_of_result(inputs), infos):
        tensors = {name: tensor for name, tensor in graph.tensors.items() if name not in head.left_out}
        graph, infos = replace(graph, tensors=tensors), {name: infos[name] for name in tensors}
        config, notes = head.config(config), [*notes, head.note]
    ties = model_ties(inputs.reference_model.checkpoint)
    config_out = config_json(recipe, config, infos, ties, untied=graph.untied and not ties.keeps_flag)
    if config_out and graph.layer_stacks:
        config_out = stacked_config(config_out, graph.layer_stacks)
    warnings = [*mismatches, *input_warnings(recipe, inputs, files)]
    notes = [*recipe.notes, *inputs.notes, *graph.notes, *notes, *warnings]
    return Stage(recipe, inputs, graph, infos, config_out, files, tuple(notes))


def _adapters_of_result(inputs: Inputs) -> list[Adapter]:
    """The adapters that are folded into the reference model."""
    return [opened.adapter for opened in (*inputs.adapters, *inputs.reference_model.adapters)]


def _files_and_config(
    recipe: Recipe, inputs: Inputs, tokenizer: TokenizerPlan | None
) -> tuple[Mapping[str, AuxFile], Mapping[str, Any], list[str]]:
    """The files beside the weights, the reference model's config, and notes, with the output's tokenizer in them."""
    files, notes = aux_files(inputs, are_written=recipe.output.safetensors)
    config = inputs.reference_model.checkpoint.config
    if tokenizer:
        files, config = with_output_tokenizer(tokenizer, inputs.reference_model, files)
        notes = [*(note for note in notes if not note.startswith("tokenizer files")), *tokenizer.notes]
    if template := output_chat_template(recipe, inputs):
        files = with_chat_template(files, template)
    config, files, about_code = without_missing_code(config, files, inputs.reference_model.label)
    notes += about_code if recipe.output.safetensors else []
    return files, config, notes


def _model_tensors(inputs: Inputs, numerics: str) -> dict[str, ModelTensors]:
    """The tensors of every model, by the model's label."""
    models = {model.label: model_tensors(model, (), numerics) for model in inputs.models}
    if inputs.base:
        models[inputs.base.label] = model_tensors(inputs.base, inputs.adapters, numerics)
    return models


def _output_infos(recipe: Recipe, graph: MergeGraph, inputs: Inputs) -> dict[str, TensorInfo]:
    """Each output tensor as it is written: in out_dtype, else dtype, else its own dtype in the reference model."""
    asked = recipe.out_dtype or recipe.dtype
    out_dtype = OUT_DTYPES[asked] if asked else None
    reference = inputs.reference_model.checkpoint.tensors
    floats = [tensor.info for tensor in reference.values() if tensor.info.is_float]
    most_common = max(
        {info.dtype for info in floats},
        key=lambda dtype: sum(info.nbytes for info in floats if info.dtype == dtype),
        default="F32",
    )
    infos = {}
    for name, tensor in graph.tensors.items():
        own = reference[name].info.dtype if name in reference else most_common
        dtype = tensor.info.dtype if not tensor.info.is_float else out_dtype or own
        infos[name] = tensor.info.with_dtype(dtype)
    return infos


def _intermediate_model(name: str, stage: Stage) -> IntermediateModel:
    """A stage as a model: its values unrounded, its dtypes as they would be written."""
    tensors: dict[str, LazyTensor] = {
        tensor_name: tensor
        if tensor.info == stage.infos[tensor_name]
        else AliasTensor(tensor, stage.infos[tensor_name])
        for tensor_name, tensor in stage.graph.tensors.items()
    }
    return IntermediateModel(name, stage.inputs, tensors, stage.config or {}, stage.files, stage.notes)
