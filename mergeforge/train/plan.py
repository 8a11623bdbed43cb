"""TrainPlan: a run that is wholly decided, with its data tokenised, before a weight is read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.checkpoints.names import CONV1D_MODELS
from mergeforge.data import Prepared, load_tokenizer, prepare
from mergeforge.errors import OutputError, SourceError
from mergeforge.hub.download import fetch
from mergeforge.operations.synthetic_models import ModelShape, write_model
from mergeforge.train import distributed, requirements
from mergeforge.train.auto_config import LengthStats, Machine, ResolvedSettings, resolve_settings
from mergeforge.train.model_stats import ModelStats, model_stats
from mergeforge.train.packing import pack
from mergeforge.train.run_folder import RunFolder
from mergeforge.train.schedule import Schedule, make_schedule
from mergeforge.train.settings import TrainSettings, read

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = "sample:tiny"
TINY = ModelShape(256, 704, 4, 4, 2, 320)  # 3 M parameters, untrained: learns the samples in seconds on a CPU
TINY_STD = 256**-0.5  # of its weights: what goes in comes out as large, so that adapters alone can teach it


@dataclass(frozen=True)
class TrainPlan:
    """What will be trained, on what, how, where. `small`: config and tokenizer of the base, no weights."""

    settings: TrainSettings
    folder: RunFolder
    base: str  # as adapter_config.json and merge.yaml name it
    revision: str | None
    is_generated: Path
    tokenizer: PreTrainedTokenizerBase
    new_tokens: tuple[int, ...]
    data: Prepared
    stats: ModelStats
    machine: Machine
    resolved: ResolvedSettings
    devices: int = 1

    @property
    def template_is_own(self) -> bool:
        """Whether the chat template is the one that the base came with."""
        return not self.data.template or self.data.template == getattr(self.tokenizer, "chat_template", None)

    @property
    def stored_transposed(self) -> bool:
        """Whether the base is one of GPT-2's kind, whose NF4 form cannot be told from its files."""
        config = json.loads((self.is_generated / "config.json").read_text(encoding="utf-8"))
        return config.get("model_type") in CONV1D_MODELS

    def packs(self, *, packed: bool) -> list[list[int]]:
        """Rows of each training sequence."""
        lengths = self.data.train.lengths
        return pack(lengths, self.resolved.setup.seq_len) if packed else [[row] for row in range(len(lengths))]

    def validation_packs(self, *, packed: bool) -> list[list[int]]:
        """Rows of each validation sequence; the longest first where each has its own."""
        assert self.data.validation is not None
        lengths = self.data.validation.lengths
        if packed:
            return pack(lengths, self.resolved.setup.seq_len)
        return [[row] for row in sorted(range(len(lengths)), key=lambda row: -int(lengths[row]))]

    def schedule(self, sequences: int) -> Schedule:
        """Steps of a run over so many sequences."""
        rows = len(self.data.train)
        return make_schedule(
            self.settings, sequences, rows, self.resolved.setup.micro_batch, self.resolved.epochs, self.devices
        )


def make_plan(
    source: str | Path | Mapping[str, Any] | TrainSettings,
    *,
    sets: tuple[str, ...] = (),
    out: str | None = None,
    device: str = "auto",
    devices: int | None = None,
) -> TrainPlan:
    """Decide a run: reads the data, the tokenizer and the model's configuration.

    Raises MergeforgeError's children: settings, data, a model that is not known, memory that does not suffice.
    """
    if out is not None:
        sets = (*sets, f"output={out}")
    settings = source if isinstance(source, TrainSettings) else read(source, sets)
    requirements.check_packages(quantise=settings.method == "qlora", track=settings.track)
    folder = RunFolder(settings.output)
    base, revision, small = _base(settings, folder)
    tokenizer = load_tokenizer(str(small))
    new_tokens = _add_tokens(tokenizer, settings.added_tokens)
    machine = requirements.machine(settings, device)
    facts = model_stats(str(small))
    with folder.lock() if distributed.is_main() else contextlib.nullcontext():
        data, choices = _fit_to_memory(settings, tokenizer, folder, facts, machine)
    return TrainPlan(
        settings,
        folder,
        base,
        revision,
        small,
        tokenizer,
        new_tokens,
        data,
        facts,
        machine,
        choices,
        devices or distributed.process_count(),
    )


def _base(settings: TrainSettings, folder: RunFolder) -> tuple[str, str | None, Path]:
    """The base's name, its Hub commit, and where its config and tokenizer lie."""
    if settings.model == SAMPLE:
        if not (folder.base / "config.json").is_file():
            write_model(folder.base, TINY, seed=settings.seed, std=TINY_STD)
        return str(folder.base), None, folder.base
    if settings.model.startswith("sample:"):
        raise SourceError(f"there is no {settings.model}", hint=SAMPLE)
    name, _, revision = settings.model.partition("@")
    local = fetch(name, revision or None, ())
    if not local.path.is_dir() or not (local.path / "config.json").is_file():
        hint = "give the folder of a model, with its config.json"
        raise SourceError(f"{settings.model} has no config.json", hint=hint)
    if local.path.resolve() == settings.output.resolve():
        raise OutputError(f"{settings.output} is the base model", hint="name another output")
    return name, local.revision, local.path


def _add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: tuple[str, ...]) -> tuple[int, ...]:
    """Special tokens that the vocabulary lacks are added; the ids of those that were."""
    known = tokenizer.get_vocab()
    missing = [token for token in tokens if token not in known]
    tokenizer.add_tokens(missing, special_tokens=True)
    ids = tokenizer.get_vocab()
    return tuple(ids[token] for token in missing)


def _fit_to_memory(
    settings: TrainSettings,
    tokenizer: PreTrainedTokenizerBase,
    folder: RunFolder,
    facts: ModelStats,
    machine: Machine,
) -> tuple[Prepared, ResolvedSettings]:
    """The data, and choices that fit it: rows longer than the chosen length are treated as `too_long` says."""
    data = prepare(settings.data, tokenizer, folder.data, extra_key="\n".join(settings.added_tokens))
    choices = resolve_settings(settings, facts, lengths_of(data), machine)
    if int(data.train.lengths.max()) > choices.setup.seq_len:
        shorter = replace(settings.data, seq_len=choices.setup.seq_len)
        data = prepare(shorter, tokenizer, folder.data, extra_key="\n".join(settings.added_tokens))
        choices = resolve_settings(replace(settings, seq_len=choices.setup.seq_len), facts, lengths_of(data), machine)
    return data, choices


def lengths_of(data: Prepared) -> LengthStats:
    """The lengths of the training rows."""
    import numpy as np

    lengths = np.asarray(data.train.lengths)
    p95, p99, longest = (int(np.quantile(lengths, share, method="higher")) for share in (0.95, 0.99, 1.0))
    return LengthStats(p95, p99, longest, len(lengths))
