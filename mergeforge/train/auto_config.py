"""Choices: everything that train.yaml leaves `auto`, decided from the model, the data and the device's memory.

It starts from what trains fastest and gives things up in a fixed order until the estimate fits. Each step is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mergeforge.core.sizes import format_size
from mergeforge.errors import BudgetError, RecipeError
from mergeforge.train.memory_estimate import MemoryEstimate, TrainingSetup, estimate_memory
from mergeforge.train.model_stats import ModelStats
from mergeforge.train.settings import LoraOptions, TrainSettings

LONGEST = 2048  # of `seq_len: auto`; a longer one is asked for by name
SHORTEST = 64
CHUNK, SMALL_CHUNK = 1024, 256  # rows of logits at once
LARGE = 20_000_000_000  # parameters from which a lower learning rate is usual (QLoRA's README: 33B and 65B)


@dataclass(frozen=True)
class Machine:
    """The device that trains: torch's name, bytes that may be used, computing dtype."""

    device: str
    memory: int
    dtype: str

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class LengthStats:
    """Tokens of the data's rows: of 95 and 99 of 100, and of the longest; how many rows."""

    p95: int
    p99: int
    longest: int
    rows: int


@dataclass(frozen=True)
class ResolvedSettings:
    """A way that fits, with what was given up for it."""

    setup: TrainingSetup
    pack: bool
    lr: float
    epochs: float
    dtype: str
    device: str
    estimate: MemoryEstimate
    notes: tuple[str, ...] = field(default=())

    def from_manifest(self, before: Mapping[str, Any], epochs: float) -> ResolvedSettings:
        """The settings that a resumed run began with (`dataclasses.asdict` of them): free memory may differ by now."""
        setup = {_FORMER_KEYS.get(key, key): value for key, value in (before.get("setup") or before["way"]).items()}
        setup["lora"] = LoraOptions(**_tuples(setup["lora"]))
        unchanged = {key: before[key] for key in ("pack", "lr", "dtype")}
        return replace(self, setup=TrainingSetup(**setup), epochs=epochs, **unchanged)


# keys of a setup in the run.json of versions up to 0.1
_FORMER_KEYS = {"micro": "micro_batch", "width": "dtype_bytes", "on_card": "on_gpu"}


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lists, as JSON has them, as the tuples that they were."""
    return {key: tuple(item) if isinstance(item, list) else item for key, item in values.items()}


MemoryFallback = Callable[
    [TrainingSetup], "tuple[TrainingSetup, str] | None"
]  # a smaller way and what it costs; None: nothing more to give


def resolve_settings(
    settings: TrainSettings, facts: ModelStats, lengths: LengthStats, machine: Machine
) -> ResolvedSettings:
    """The choices. Raises BudgetError, with the estimate by part, when nothing fits."""
    if settings.seq_len and settings.seq_len > facts.longest:
        text = f"seq_len: the model knows positions for {facts.longest} tokens, not {settings.seq_len}"
        raise RecipeError(text, hint=f"seq_len: {facts.longest}, or a model for longer texts")
    way, notes = _first(settings, facts, lengths, machine), _notes(settings, facts, machine)
    for give_up in _memory_fallbacks(settings, lengths, machine):
        note = ""
        while estimate_memory(facts, way).total > machine.memory and (smaller := give_up(way)):
            way, note = smaller
        notes += [note] if note else []
    if estimate_memory(facts, way).total > machine.memory:
        raise _does_not_fit(facts, way, machine)
    return ResolvedSettings(
        setup=way,
        pack=settings.pack if settings.pack is not None else lengths.p95 * 2 <= way.seq_len,
        lr=settings.lr if settings.lr is not None else _lr(settings, facts),
        epochs=settings.epochs if settings.epochs is not None else _epochs(lengths.rows),
        dtype=machine.dtype,
        device=machine.device,
        estimate=estimate_memory(facts, way),
        notes=tuple(notes),
    )


def _first(settings: TrainSettings, facts: ModelStats, lengths: LengthStats, machine: Machine) -> TrainingSetup:
    """The way to begin with: what the file says, and for the rest what is fastest."""
    memory, lora = settings.memory, settings.lora
    width = 4 if machine.dtype == "fp32" else 2
    return TrainingSetup(
        method="lora" if settings.method == "dora" else settings.method,
        lora=lora if lora.r else replace(lora, r=16),
        seq_len=settings.seq_len or _seq_len(facts, lengths, settings),
        micro_batch=settings.micro_batch or min(8 if machine.on_gpu else 4, settings.batch_size),
        optimizer=settings.optimizer or "adamw",
        dtype_bytes=width,
        ce_chunk=CHUNK if memory.ce_chunk is None else memory.ce_chunk,
        checkpointing=machine.on_gpu if memory.checkpointing is None else memory.checkpointing,
        offload=bool(memory.offload_activations),
        embed_on_cpu=bool(memory.embed_on_cpu),
        on_gpu=machine.on_gpu,
    )


def _seq_len(facts: ModelStats, lengths: LengthStats, settings: TrainSettings) -> int:
    """Room for the longest row; where rows are short and may be packed, for several."""
    wanted = lengths.longest if settings.pack is False else max(lengths.longest, min(8 * lengths.p95, 1024))
    wanted = -(-wanted // SHORTEST) * SHORTEST
    return max(8, min(wanted, LONGEST, facts.longest))


def _memory_fallbacks(settings: TrainSettings, lengths: LengthStats, machine: Machine) -> Iterator[MemoryFallback]:
    """What may be given up, in this order; what the file sets stays."""
    memory = settings.memory
    if settings.micro_batch is None:
        yield _smaller_batch
    if memory.checkpointing is None:
        yield _checkpointing
    if settings.optimizer is None and machine.on_gpu:
        yield _paged_optimizer
    if memory.ce_chunk is None:
        yield _smaller_chunk
    if settings.seq_len is None:
        yield lambda way: _shorter(way, lengths.p99, "99")
        yield lambda way: _shorter(way, lengths.p95, "95")
    if memory.embed_on_cpu is None and machine.on_gpu and settings.method != "full":
        yield _embedding_on_cpu
    if memory.offload_activations is None and machine.on_gpu:
        yield _offload
    if settings.lora.r is None and settings.trains_adapter:
        yield _smaller_rank


def _smaller_batch(way: TrainingSetup) -> tuple[TrainingSetup, str] | None:
    if way.micro_batch == 1:
        return None
    return replace(
        way, micro_batch=way.micro_batch // 2
    ), f"{way.micro_batch // 2} sequence(s) a pass, with more passes for a step"


def _checkpointing(way: TrainingSetup) -> tuple[TrainingSetup, str] | None:
    note = "activations are computed again in the backward pass (a third more time)"
    return None if way.checkpointing else (replace(way, checkpointing=True), note)


def _paged_optimizer(way: TrainingSetup) -> tuple[TrainingSetup, str] | None:
    note = "the optimizer's state is kept in 8 bit, in pages that may leave the card"
    return None if way.optimizer != "adamw" else (replace(way, optimizer="paged_adamw_8bit"), note)


def _smaller_chunk(way: TrainingSetup) -> tuple[TrainingSetup, str] | None:
    note = f"the loss is computed {SMALL_CHUNK} rows of logits at a time"
    return None if way.ce_chunk == SMALL_CHUNK else (replace(way, ce_chunk=SMALL_CHUNK), note)


def _shorter(way: TrainingSetup, most: int, share: str) -> tuple[TrainingSetup, str] | None:
    length = -(-most // SHORTEST) * SHORTEST
    note = f"sequences of {length} tokens, which hold {share} % of the rows"
    return None if length >= way.seq_len else (replace(way, seq_len=length), note)


def _embedding_on_cpu(way: TrainingSetup) -> tuple[TrainingSetup, str] | None:
    note = "the input embedding stays in host memory"
    return None if way.embed_on_cpu else (replace(way, embed_on_cpu=True), note)


def _offload(way: TrainingSetup) -> tuple[TrainingSetup, str] | None:
    note = "activations are kept in host memory (slower)"
    return None if way.offload else (replace(way, offload=True, checkpointing=True), note)


def _smaller_rank(way: TrainingSetup) -> tuple[TrainingSetup, str] | None:
    rank = (way.lora.r or 16) // 2
    return None if rank < 4 else (replace(way, lora=replace(way.lora, r=rank)), f"adapters of rank {rank}")


def _notes(settings: TrainSettings, facts: ModelStats, machine: Machine) -> list[str]:
    notes = []
    if facts.stacks and settings.method == "qlora":
        notes.append("its experts are no linear modules: they stay in 16 bit")
    if settings.method == "qlora" and not machine.on_gpu:
        notes.append("4 bit on a CPU saves memory, not time")
    return notes


def _lr(settings: TrainSettings, facts: ModelStats) -> float:
    """QLoRA's README: 2e-4, and 1e-4 for 33B and 65B; full training a tenth."""
    if settings.method == "full":
        return 2e-5
    return 1e-4 if facts.parameters > LARGE else 2e-4


def _epochs(rows: int) -> float:
    return 3 if rows < 5000 else 2 if rows < 20_000 else 1


def _does_not_fit(facts: ModelStats, way: TrainingSetup, machine: Machine) -> BudgetError:
    found = estimate_memory(facts, way)
    parts = "\n".join(f"  {format_size(size):>9}  {name}" for name, size in found.parts.items())
    text = f"training takes about {format_size(found.total)}, and {machine.device} has {format_size(machine.memory)}:\n{parts}"
    hint = "a smaller model, a shorter seq_len, or a lower lora.r; memory.budget says how much may be used"
    return BudgetError(text, hint=hint)
