"""The plan of a merge: inputs, output files, and the work on every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mergeforge.core.messages import warnings_in
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.io.aux_files import AuxFiles
from mergeforge.io.file_layout import Layout, OutputFile
from mergeforge.lora.combine import Combination
from mergeforge.native import bindings
from mergeforge.planner.batches import Batch, batch_per_file, one_batch, peak_disk
from mergeforge.planner.fp8 import stored_infos
from mergeforge.planner.gguf import GGUFPlan
from mergeforge.planner.inputs import Inputs
from mergeforge.planner.tiling import TensorPlan, peak_memory
from mergeforge.recipe import Recipe
from mergeforge.tensors.budget import Budget


@dataclass(frozen=True)
class Plan:
    """A whole merge, decided from headers alone: what is read, computed and written, and in how much memory.

    summaries: what is done to each output tensor, in words. checkpoint: the safetensors files. aux_files: the files
    beside the weights. notes: what the user should know about the result before the merge runs, warnings among them.
    fingerprint: a hash of everything that decides output bytes. strict: whether warnings are errors. combination: the
    one adapter that the recipe's adapters are combined into, if it asks for one. has_output: whether `out` is the
    user's; a plan without an output folder cannot be run. `print(plan)` shows it as a page.
    """

    recipe: Recipe
    inputs: Inputs
    out: Path
    budget: Budget
    tensor_plans: tuple[TensorPlan, ...]
    summaries: Mapping[str, str]
    checkpoint: Layout
    ggufs: tuple[GGUFPlan, ...]
    config: Mapping[str, Any] | None
    aux_files: AuxFiles
    notes: tuple[str, ...]
    fingerprint: str
    allow_nonfinite: bool
    strict: bool
    combination: Combination | None = None
    has_output: bool = True

    def __str__(self) -> str:
        from mergeforge.planner.describe import plan_page

        return plan_page(self)

    def __repr__(self) -> str:
        return f"<Plan: {self.recipe.method_name} to {self.out}, {len(self.tensor_plans)} tensors>"

    @property
    def peak(self) -> int:
        """The most working memory in bytes that the tiles, or combining adapters, can take."""
        combining = max((module.nbytes for module in self.combination.sums), default=0) if self.combination else 0
        return max(peak_memory(self.tensor_plans, self.budget) + self.budget.remote_cache, combining)

    @property
    def needs_torch(self) -> bool:
        """Whether torch computes any tensor; those that are copied, or merged in C from file to file, do without."""
        return any(tensor_plan.backend.needs_torch for tensor_plan in self.tensor_plans)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Those of the notes that say that the result is probably not what the user meant."""
        return warnings_in(self.notes)

    @property
    def machine_notes(self) -> tuple[str, ...]:
        """What the user should know about this machine; neither the receipt nor the model card holds it."""
        merges = any(tensor_plan.backend.lacks_library for tensor_plan in self.tensor_plans)
        in_blocks = any(tensor.quant_type.block > 1 for gguf in self.ggufs for tensor in gguf.tensors)
        quantizes = in_blocks and self.budget.device == "cpu" and not bindings.is_available()
        work = " and ".join(["merges"] * merges + ["quantizes"] * quantizes)
        return (f"torch {work}, more slowly: the C library {bindings.why_unavailable()}",) if work else ()

    @property
    def nbytes_read(self) -> int:
        """Bytes of the inputs' weights, each file counted once."""
        return sum(checkpoint.nbytes for checkpoint in self.inputs.checkpoints)

    @property
    def nbytes_streamed(self) -> int:
        """Bytes of the inputs' weights that are remote and read in ranges."""
        return sum(checkpoint.nbytes for checkpoint in self.inputs.checkpoints if checkpoint.is_remote)

    @property
    def files(self) -> dict[str, OutputFile]:
        """Every file of weights by name."""
        layouts = [self.checkpoint, *(gguf.layout for gguf in self.ggufs)]
        return {name: file for layout in layouts for name, file in layout.files.items()}

    @property
    def gguf_models(self) -> tuple[GGUFPlan, ...]:
        """The GGUF outputs that hold the model itself, not its towers."""
        return tuple(gguf for gguf in self.ggufs if not gguf.is_mmproj)

    @property
    def gguf_names(self) -> tuple[str, ...]:
        """The file of every GGUF model, or the first one of its splits."""
        return tuple(gguf.first_file for gguf in self.gguf_models)

    @property
    def mmproj_names(self) -> tuple[str, ...]:
        """The files of the towers."""
        return tuple(gguf.first_file for gguf in self.ggufs if gguf.is_mmproj)

    @property
    def nbytes_written(self) -> int:
        """Bytes of all files of weights."""
        return sum(file.nbytes for file in self.files.values())

    @property
    def streams(self) -> bool:
        """Whether each finished file is uploaded to the Hub and removed here while the merge runs."""
        return self.recipe.output.publish is not None and self.recipe.output.publish.stream

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        """Groups of tensors that run one after the other: one group, or one per file where files are streamed."""
        files = tuple(self.files)
        return batch_per_file(self.tensor_plans, files) if self.streams else (one_batch(self.tensor_plans, files),)

    @property
    def disk(self) -> int:
        """The most bytes of weights that are on the disk at once."""
        sizes = {name: file.nbytes for name, file in self.files.items()}
        return peak_disk(self.batches, sizes) if self.streams else sum(sizes.values())

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The tensors of the safetensors files, in the order of the files."""
        infos = {tensor_plan.info.name: tensor_plan.info for tensor_plan in self.tensor_plans}
        stored = {info.name: info for info in stored_infos(infos, self.recipe.output.fp8)}
        return tuple(stored[name] for name in self.checkpoint.extents)
