"""TrainPlan: a run with every setting resolved and its data tokenized, before any weight is read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.checkpoints.checkpoint import read_json
from mergeforge.checkpoints.names import CONV1D_MODELS
from mergeforge.checkpoints.rope import scale_positions
from mergeforge.data import Prepared, load_tokenizer, prepare
from mergeforge.data.counts import refuse_many_skips
from mergeforge.data.pipeline import OnProgress
from mergeforge.errors import OutputError, RecipeError, SourceError
from mergeforge.hub.download import fetch
from mergeforge.operations.synthetic_models import ModelShape, write_model
from mergeforge.train import environment, preflight
from mergeforge.train.adapter_kinds import check_options
from mergeforge.train.auto_config import LengthStats, Machine, ResolvedSettings, resolve_settings
from mergeforge.train.gpus import PlannedGPU, find_gpu
from mergeforge.train.model_stats import ModelStats, empty_model, stats_of
from mergeforge.train.packing import pack_rows
from mergeforge.train.run_folder import RunFolder
from mergeforge.train.schedule import Schedule, make_schedule
from mergeforge.train.settings import TrainSettings, read

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE, CONFIG = "sample:tiny", "config.json"
TINY = ModelShape(256, 704, 4, 4, 2, 320)  # 3 M parameters, untrained: learns the samples in seconds on a CPU
TINY_STD = 256**-0.5  # of its weights: layers keep the magnitude of their input, so adapters alone can teach it


@dataclass(frozen=True)
class TrainPlan:
    """What will be trained, on what data, with which settings, on which device.

    `base`: the base model's name in adapter_config.json and merge.yaml; `config_folder`: the base's config and
    tokenizer, without weights. `trained`: the number of weights that are trained.
    """

    settings: TrainSettings
    folder: RunFolder
    base: str
    revision: str | None
    config_folder: Path
    tokenizer: PreTrainedTokenizerBase
    new_tokens: tuple[int, ...]
    data: Prepared
    stats: ModelStats
    machine: Machine
    resolved: ResolvedSettings
    devices: int = 1
    trained: int = 0
    gpu: PlannedGPU | None = None  # a GPU that is not in this machine: the plan cannot be run
    scaled_config: Mapping[str, Any] | None = None  # the base's config.json with scaled positions

    @property
    def uses_base_template(self) -> bool:
        """Whether the chat template is the one that the base came with."""
        return not self.data.template or self.data.template == getattr(self.tokenizer, "chat_template", None)

    @property
    def weighted(self) -> bool:
        """Whether training rows have different weights in the loss."""
        smallest, largest = self.data.train.weight_range()
        return smallest != largest

    @property
    def stored_transposed(self) -> bool:
        """Whether the base stores transposed weights, as GPT-2 does: its files do not determine its NF4 form."""
        config = json.loads((self.config_folder / CONFIG).read_text(encoding="utf-8"))
        return config.get("model_type") in CONV1D_MODELS

    def packs(self, *, packed: bool) -> list[list[int]]:
        """The indices of the examples of each training sequence."""
        lengths, answers = self.data.train.lengths, self.settings.answers
        if packed:
            return self._packed(lengths)
        return [list(range(first, first + answers)) for first in range(0, len(lengths), answers)]

    def validation_packs(self, *, packed: bool) -> list[list[int]]:
        """The indices of the examples of each validation sequence; without packing, the longest come first."""
        assert self.data.validation is not None
        lengths, answers = self.data.validation.lengths, self.settings.answers
        if packed:
            return self._packed(lengths)
        rows = [list(range(first, first + answers)) for first in range(0, len(lengths), answers)]
        return sorted(rows, key=lambda row: -max(int(lengths[index]) for index in row))

    def _packed(self, lengths: Any) -> list[list[int]]:
        try:
            return pack_rows(lengths, self.resolved.setup.seq_len, answers=self.settings.answers)
        except ValueError as error:
            hint = "set a larger seq_len, or pack: false"
            raise RecipeError(f"both answers of a row must fit into a packed sequence: {error}", hint=hint) from None

    def schedule(self, sequences: int) -> Schedule:
        """The schedule of a run over this many sequences."""
        rows = len(self.data.train) // self.settings.answers
        return make_schedule(
            self.settings, sequences, rows, self.resolved.setup.micro_batch, self.resolved.epochs, self.devices
        )


@dataclass(frozen=True)
class _Base:
    """The base's name, its Hub commit, and the folder with its config and tokenizer."""

    name: str
    revision: str | None
    config_folder: Path


@dataclass(frozen=True)
class _Model:
    """What the model without weights says. The fields are those of TrainPlan."""

    stats: ModelStats
    trained: int
    scaled_config: Mapping[str, Any] | None


def make_plan(
    source: str | Path | Mapping[str, Any] | TrainSettings,
    *,
    sets: tuple[str, ...] = (),
    out: str | None = None,
    device: str = "auto",
    devices: int | None = None,
    on_progress: OnProgress | None = None,
    gpu: str | None = None,
) -> TrainPlan:
    """Plan a run: read the data, the tokenizer and the model's configuration, and resolve every setting.

    on_progress: called with the number of rows that were read.
    gpu: plan for a GPU that is not here, by name or size (gpus.py).

    Raises a MergeforgeError for mistakes in the settings or the data, an unknown model, or too little memory.
    """
    if out is not None:
        sets = (*sets, f"output={out}")
    settings = source if isinstance(source, TrainSettings) else read(source, sets)
    environment.check_packages(quantize=settings.method == "qlora", track=settings.track, optimizer=settings.optimizer)
    if settings.adapter:
        check_options(settings.adapter)
    folder = RunFolder(settings.output)
    planned = find_gpu(gpu) if gpu else None
    machine = _machine(settings, device, planned)
    base = _find_base(settings, folder)
    preflight.check_post_training(settings.after, base.config_folder, trains_adapter=settings.trains_adapter)
    tokenizer = load_tokenizer(str(base.config_folder))
    new_tokens = _add_tokens(tokenizer, settings.added_tokens)
    model = _inspect_model(settings, base, new_tokens, len(tokenizer), on_disk=not planned)
    with folder.lock() if environment.is_main() else contextlib.nullcontext():
        data, resolved = _fit_to_memory(settings, tokenizer, folder, model.stats, machine, on_progress)
    return TrainPlan(
        settings=settings,
        folder=folder,
        base=base.name,
        revision=base.revision,
        config_folder=base.config_folder,
        tokenizer=tokenizer,
        new_tokens=new_tokens,
        data=data,
        stats=model.stats,
        machine=machine,
        resolved=resolved,
        devices=devices or environment.process_count(),
        trained=model.trained,
        gpu=planned,
        scaled_config=model.scaled_config,
    )


def _machine(settings: TrainSettings, device: str, planned: PlannedGPU | None) -> Machine:
    """This machine, or the one that is planned for. Raises RecipeError for settings that it cannot run."""
    if planned:
        machine = planned.machine(settings.dtype, settings.memory.budget)
    else:
        machine = environment.find_machine(settings, device)
    preflight.check_device(settings, machine)
    return machine


def _inspect_model(
    settings: TrainSettings, base: _Base, new_tokens: tuple[int, ...], vocabulary: int, *, on_disk: bool
) -> _Model:
    """Build the model without weights, and check that it can be trained as the settings say.

    on_disk: whether the weights and the free disk space matter, as they do for a run on this machine.
    """
    model = empty_model(str(base.config_folder), settings.attention)
    preflight.check_causal(model, base.name)
    stats, scaled_config = stats_of(model), None
    if scaling := preflight.rope_scaling(settings, stats):
        scaled_config = scale_positions(read_json(base.config_folder / CONFIG), scaling, stats.max_positions)
        stats = replace(stats, max_positions=scaling.longest(stats.max_positions), rope=scaling.type)
    if Path(base.name).exists() and on_disk:
        preflight.check_base(base.config_folder, settings, stats)
    if settings.loss:
        preflight.check_loss(settings.loss, stats.vocabulary)
    preflight.check_optimizer(model, settings)
    trained = preflight.check_adapter(model, settings, new_tokens, vocabulary)
    if on_disk:
        preflight.check_disk(settings, trained)
    return _Model(stats, trained, scaled_config)


def _find_base(settings: TrainSettings, folder: RunFolder) -> _Base:
    """The base that `model` names. Raises SourceError, and OutputError where the run would be written into it."""
    if settings.model == SAMPLE:
        if not (folder.base / CONFIG).is_file():
            write_model(folder.base, TINY, seed=settings.seed, std=TINY_STD)
        return _Base(str(folder.base), None, folder.base)
    if settings.model.startswith("sample:"):
        raise SourceError(f"there is no sample model {settings.model}", hint=f"use {SAMPLE}")
    name, _, revision = settings.model.partition("@")
    local = fetch(name, revision or None, ())
    if not local.path.is_dir() or not (local.path / CONFIG).is_file():
        hint = "give a model's folder, with its config.json"
        raise SourceError(f"{settings.model} has no config.json", hint=hint)
    if local.path.resolve() == settings.output.resolve():
        raise OutputError(f"the output {settings.output} is the base model's folder", hint="choose another output")
    return _Base(name, local.revision, local.path)


def _add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: tuple[str, ...]) -> tuple[int, ...]:
    """Add the special tokens that the vocabulary lacks, and return their ids."""
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in tokens if token not in vocabulary]
    tokenizer.add_tokens(missing, special_tokens=True)
    ids = tokenizer.get_vocab()
    return tuple(ids[token] for token in missing)


def _fit_to_memory(
    settings: TrainSettings,
    tokenizer: PreTrainedTokenizerBase,
    folder: RunFolder,
    stats: ModelStats,
    machine: Machine,
    on_progress: OnProgress | None = None,
) -> tuple[Prepared, ResolvedSettings]:
    """The tokenized data and settings that fit it; `too_long` applies to rows longer than the resolved seq_len."""
    options: dict[str, Any] = {"extra_key": "\n".join(settings.added_tokens), "on_progress": on_progress}
    data = prepare(settings.data, tokenizer, folder.data, **options)
    resolved = resolve_settings(settings, stats, length_stats(data, settings.answers), machine, data.train.lengths)
    seq_len = resolved.setup.seq_len
    if int(data.train.lengths.max()) > seq_len:
        shorter = replace(settings.data, seq_len=seq_len)
        data = prepare(shorter, tokenizer, folder.data, **options)
        lengths = length_stats(data, settings.answers)
        resolved = resolve_settings(replace(settings, seq_len=seq_len), stats, lengths, machine, data.train.lengths)
    if not settings.allow_skips:
        refuse_many_skips(data.counts)
    preflight.check_weights(settings, data.train.weight_range())
    return data, resolved


def length_stats(data: Prepared, answers: int = 1) -> LengthStats:
    """The lengths of the training examples, of which a row has `answers`."""
    import numpy as np

    lengths = np.asarray(data.train.lengths)
    p95, p99, longest = (int(np.quantile(lengths, fraction, method="higher")) for fraction in (0.95, 0.99, 1.0))
    return LengthStats(p95, p99, longest, len(lengths) // answers, answers)
