"""ResolvedSettings: a value for every setting that train.yaml leaves at `auto`.

Starts from what trains fastest and applies memory fallbacks in a fixed order until the estimate fits the device. Each
fallback that was needed is a note.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from mergeforge.core.sizes import format_size
from mergeforge.errors import BudgetError, RecipeError
from mergeforge.train.batch_tokens import largest_batch
from mergeforge.train.estimate import MemoryEstimate, estimate_memory
from mergeforge.train.low_rank import RANK
from mergeforge.train.model_stats import ModelStats
from mergeforge.train.objectives import KTO, OBJECTIVES
from mergeforge.train.settings import LoraOptions, TrainSettings
from mergeforge.train.training_setup import TrainingSetup

LONGEST_AUTO = 2048  # tokens; a longer seq_len must be set explicitly
LENGTH_MULTIPLE = 64  # an automatic seq_len is a multiple of this
CHUNK, SMALL_CHUNK = 1024, 256  # rows of logits at once
LARGE = 20_000_000_000  # parameters from which a lower learning rate is usual (QLoRA's README: 33B and 65B)


@dataclass(frozen=True)
class Machine:
    """The device that trains: its name in torch, the bytes that may be used, and the dtype to compute in."""

    device: str
    memory: int
    dtype: str

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class LengthStats:
    """Tokens per sequence of the training data: 95th and 99th percentile and maximum; the number of rows.

    `answers`: the sequences of a row.
    """

    p95: int
    p99: int
    longest: int
    rows: int
    answers: int = 1


@dataclass(frozen=True)
class ResolvedSettings:
    """Settings without any `auto`, which fit the device. `notes`: the fallbacks that were needed, and remarks."""

    setup: TrainingSetup
    pack: bool
    lr: float
    epochs: float
    dtype: str
    device: str
    estimate: MemoryEstimate
    notes: tuple[str, ...] = field(default=())

    def from_manifest(self, before: Mapping[str, Any], epochs: float) -> ResolvedSettings:
        """The settings that a resumed run began with (`dataclasses.asdict` of them).

        They are not resolved again, because the free memory may differ by now.
        """
        setup = {_FORMER_KEYS.get(key, key): value for key, value in (before.get("setup") or before["way"]).items()}
        setup["lora"] = LoraOptions(**_with_tuples(setup["lora"]))
        unchanged = {key: before[key] for key in ("pack", "lr", "dtype")}
        return replace(self, setup=TrainingSetup(**setup), epochs=epochs, **unchanged)


# keys of a setup in the run.json of versions up to 0.1
_FORMER_KEYS = {"micro": "micro_batch", "width": "dtype_bytes", "on_card": "on_gpu"}


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with JSON's lists turned into tuples."""
    return {key: tuple(item) if isinstance(item, list) else item for key, item in values.items()}


# setup -> (a setup that needs less memory, a note on what it costs); None where it saves nothing more
MemoryFallback = Callable[[TrainingSetup], "tuple[TrainingSetup, str] | None"]


def resolve_settings(
    settings: TrainSettings,
    stats: ModelStats,
    lengths: LengthStats,
    machine: Machine,
    examples: Sequence[int] | Any = (),
) -> ResolvedSettings:
    """Resolve every `auto`. Raises BudgetError, with the estimate by part, when nothing fits.

    examples: the tokens of each training example. With them, the estimate for a CPU is for the largest batch that they
    make; otherwise, and on a GPU, where a full batch is tried before training, it is for a full batch.
    """
    if settings.seq_len and settings.seq_len > stats.max_positions:
        text = f"seq_len: {settings.seq_len} is more than the model's maximum of {stats.max_positions} tokens"
        hint = f"set seq_len: {stats.max_positions}, or use a model with a longer context"
        if stats.rope == "default":
            factor = math.ceil(settings.seq_len / stats.max_positions)
            hint += f", or stretch its positions: rope_scaling: {{type: yarn, factor: {factor}}}"
        raise RecipeError(text, hint=hint)

    def estimate_for(setup: TrainingSetup) -> MemoryEstimate:
        if machine.on_gpu or not len(examples):
            return estimate_memory(stats, setup)
        packed = _is_packed(settings, lengths, setup.seq_len)
        return estimate_memory(stats, setup, largest_batch(examples, settings, setup, packed=packed))

    setup, notes = _fastest_setup(settings, stats, lengths, machine), _notes(settings, stats, machine)
    estimate = estimate_for(setup)
    for fallback in _memory_fallbacks(settings, lengths, machine):
        note = ""
        while estimate.total > machine.memory and (smaller := fallback(setup)):
            setup, note = smaller
            estimate = estimate_for(setup)
        notes += [note] if note else []
    if estimate.total > machine.memory:
        raise _does_not_fit(estimate, machine)
    return ResolvedSettings(
        setup=setup,
        pack=_is_packed(settings, lengths, setup.seq_len),
        lr=settings.lr if settings.lr is not None else _lr(settings, stats),
        epochs=settings.epochs if settings.epochs is not None else _epochs(settings, lengths.rows),
        dtype=machine.dtype,
        device=machine.device,
        estimate=estimate,
        notes=tuple(notes),
    )


def _is_packed(settings: TrainSettings, lengths: LengthStats, seq_len: int) -> bool:
    """As the file says; otherwise, whether a sequence usually holds several rows, and all answers of any row."""
    if settings.pack is not None:
        return settings.pack
    fits = lengths.answers == 1 or lengths.longest * lengths.answers <= seq_len
    return fits and lengths.p95 * lengths.answers * 2 <= seq_len


def _fastest_setup(settings: TrainSettings, stats: ModelStats, lengths: LengthStats, machine: Machine) -> TrainingSetup:
    """The setup to start from: what the file sets, and otherwise what is fastest."""
    memory, lora = settings.memory, settings.lora
    seq_len = settings.seq_len or _seq_len(stats, lengths, settings)
    return TrainingSetup(
        method="lora" if settings.method == "dora" else settings.method,
        lora=lora if lora.r else replace(lora, r=16),
        seq_len=seq_len,
        micro_batch=settings.micro_batch or min(8 if machine.on_gpu else 4, settings.batch_size),
        optimizer=settings.optimizer or "adamw",
        dtype_bytes=4 if machine.dtype == "fp32" else 2,
        ce_chunk=CHUNK if memory.ce_chunk is None else memory.ce_chunk,
        checkpointing=machine.on_gpu if memory.checkpointing is None else memory.checkpointing,
        offload=bool(memory.offload_activations),
        embed_on_cpu=bool(memory.embed_on_cpu),
        on_gpu=machine.on_gpu,
        answers=1 if _is_packed(settings, lengths, seq_len) else lengths.answers,
        extra_passes=OBJECTIVES[settings.objective].extra_passes,
        optimizer_rank=settings.optimizer_options.get("rank", RANK),
    )


def _seq_len(stats: ModelStats, lengths: LengthStats, settings: TrainSettings) -> int:
    """Long enough for the longest row; where rows are short and may be packed, for several."""
    longest = lengths.longest * (lengths.answers if settings.pack else 1)
    length = longest if settings.pack is False else max(longest, min(8 * lengths.p95 * lengths.answers, 1024))
    return max(8, min(_round_up(length), LONGEST_AUTO, stats.max_positions))


def _round_up(length: int) -> int:
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def _memory_fallbacks(settings: TrainSettings, lengths: LengthStats, machine: Machine) -> Iterator[MemoryFallback]:
    """The fallbacks in the order in which they are tried. What the file sets is not changed."""
    memory = settings.memory
    if settings.micro_batch is None:
        yield partial(_smaller_batch, smallest=2 if settings.objective == KTO else 1)
    if memory.checkpointing is None:
        yield _checkpointing
    if settings.optimizer is None and machine.on_gpu:
        yield _paged_optimizer
    if memory.ce_chunk is None:
        yield _smaller_chunk
    if settings.seq_len is None:
        for percent, longest in ((99, lengths.p99), (95, lengths.p95)):
            length = _round_up(longest)
            answers = 1 if _is_packed(settings, lengths, length) else lengths.answers
            yield partial(_shorter_sequences, length=length, answers=answers, percent=percent)
    if memory.embed_on_cpu is None and machine.on_gpu and settings.method != "full":
        yield _embedding_on_cpu
    if memory.offload_activations is None and machine.on_gpu:
        yield _offload
    if settings.lora.r is None and settings.trains_adapter and settings.adapter is None:
        yield _smaller_rank


def _smaller_batch(setup: TrainingSetup, smallest: int) -> tuple[TrainingSetup, str] | None:
    half = setup.micro_batch // 2
    note = f"micro-batch of {half}, with more gradient accumulation"
    return (replace(setup, micro_batch=half), note) if half >= smallest else None


def _checkpointing(setup: TrainingSetup) -> tuple[TrainingSetup, str] | None:
    note = "activations are recomputed in the backward pass (a third more time)"
    return None if setup.checkpointing else (replace(setup, checkpointing=True), note)


def _paged_optimizer(setup: TrainingSetup) -> tuple[TrainingSetup, str] | None:
    note = "the optimizer state is 8-bit and paged: it can move to host memory"
    return (replace(setup, optimizer="paged_adamw_8bit"), note) if setup.optimizer == "adamw" else None


def _smaller_chunk(setup: TrainingSetup) -> tuple[TrainingSetup, str] | None:
    note = f"the loss is computed from {SMALL_CHUNK} rows of logits at a time"
    return None if setup.ce_chunk == SMALL_CHUNK else (replace(setup, ce_chunk=SMALL_CHUNK), note)


def _shorter_sequences(
    setup: TrainingSetup, length: int, answers: int, percent: int
) -> tuple[TrainingSetup, str] | None:
    note = f"sequences of {length} tokens, long enough for {percent} % of the rows"
    return None if length >= setup.seq_len else (replace(setup, seq_len=length, answers=answers), note)


def _embedding_on_cpu(setup: TrainingSetup) -> tuple[TrainingSetup, str] | None:
    note = "the input embedding stays in host memory"
    return None if setup.embed_on_cpu else (replace(setup, embed_on_cpu=True), note)


def _offload(setup: TrainingSetup) -> tuple[TrainingSetup, str] | None:
    note = "activations are kept in host memory (slower)"
    return None if setup.offload else (replace(setup, offload=True, checkpointing=True), note)


def _smaller_rank(setup: TrainingSetup) -> tuple[TrainingSetup, str] | None:
    rank = (setup.lora.r or 16) // 2
    return None if rank < 4 else (replace(setup, lora=replace(setup.lora, r=rank)), f"adapters of rank {rank}")


def _notes(settings: TrainSettings, stats: ModelStats, machine: Machine) -> list[str]:
    notes = []
    if stats.expert_stacks and settings.method == "qlora":
        notes.append("the experts are not linear modules: they stay in 16 bit")
    if settings.method == "qlora" and not machine.on_gpu:
        notes.append("on a CPU, 4 bit saves memory but no time")
    return notes


def _lr(settings: TrainSettings, stats: ModelStats) -> float:
    """QLoRA's README: 2e-4, and 1e-4 for 33B and 65B; a tenth of that for full training, and for preferences."""
    lr = 2e-5 if settings.method == "full" else 1e-4 if stats.parameters > LARGE else 2e-4
    return lr / 10 if OBJECTIVES[settings.objective].is_preference else lr


def _epochs(settings: TrainSettings, rows: int) -> float:
    if OBJECTIVES[settings.objective].is_preference:
        return 1
    return 3 if rows < 5000 else 2 if rows < 20_000 else 1


def _does_not_fit(estimate: MemoryEstimate, machine: Machine) -> BudgetError:
    parts = "\n".join(f"  {format_size(size):>9}  {name}" for name, size in estimate.parts.items())
    free = format_size(machine.memory)
    text = f"training needs about {format_size(estimate.total)}, but {machine.device} has {free}:\n{parts}"
    hint = "use a smaller model, a shorter seq_len or a lower lora.r; memory.budget sets how much may be used"
    return BudgetError(text, hint=hint)
