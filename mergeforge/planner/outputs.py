"""The output files of a merge: their layouts, and the encoders that write every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeforge.gguf.pooling import read_pooling
from mergeforge.io.file_layout import Layout
from mergeforge.planner.fp8 import checkpoint_encoders, quantization_config, stored_infos
from mergeforge.planner.gguf import GGUFInputs, GGUFPlan, gguf_config, plan_ggufs
from mergeforge.planner.inputs import Inputs
from mergeforge.planner.stages import Stage
from mergeforge.recipe import Output
from mergeforge.writers import safetensors
from mergeforge.writers.encoder import TensorEncoder

NO_CHECKPOINT = Layout({}, {})


@dataclass(frozen=True)
class Outputs:
    """Every output file, laid out.

    encoders: by tensor, in the order of the checkpoint's files; tensors that no file takes are absent. config: what
    config.json holds, or None where none is written.
    """

    checkpoint: Layout
    ggufs: tuple[GGUFPlan, ...]
    encoders: Mapping[str, list[TensorEncoder]]
    config: Mapping[str, Any] | None
    notes: tuple[str, ...]

    @property
    def layouts(self) -> list[Layout]:
        return [self.checkpoint, *(gguf.layout for gguf in self.ggufs)]


def plan_outputs(output: Output, stage: Stage, name: str, device: str) -> Outputs:
    """Lay out the safetensors and GGUF files of a resolved stage. `name`: the model's name in GGUF files.

    Raises SourceError or RecipeError where the model cannot be written as asked.
    """
    config = stage.config
    if config is not None and output.fp8:
        config = config | {"quantization_config": quantization_config(stage.infos, config.get("model_type"))}
    checkpoint = NO_CHECKPOINT
    if output.safetensors:
        checkpoint = safetensors.lay_out(stored_infos(stage.infos, output.fp8), output.shard_size)
    ggufs, gguf_encoders, notes = plan_ggufs(output, _gguf_inputs(output, stage, name, device))
    encoders = checkpoint_encoders(stage.infos, checkpoint)
    for tensor in stage.infos:
        if gguf_encoders[tensor]:
            encoders.setdefault(tensor, []).extend(gguf_encoders[tensor])
    return Outputs(checkpoint, tuple(ggufs), encoders, config if output.safetensors else None, tuple(notes))


def _gguf_inputs(output: Output, stage: Stage, name: str, device: str) -> GGUFInputs:
    reference = stage.inputs.reference_model.checkpoint
    config = gguf_config(stage.config, reference, stage.graph.tensors) if output.gguf else stage.config
    files = {**stage.files, **_model_card(stage.inputs)}
    pooling = read_pooling(reference.folder) if output.gguf else None
    return GGUFInputs(name, config, stage.infos, files, device, pooling)


def _model_card(inputs: Inputs) -> dict[str, Path]:
    """The card of a model that is converted, not merged: its GGUF takes name, license and tags from there."""
    card = inputs.reference_model.checkpoint.folder / "README.md"
    converts = len(inputs.all_models) == 1 and not inputs.opened_adapters and len(inputs.stored_models) == 1
    return {card.name: card} if converts and card.is_file() else {}
