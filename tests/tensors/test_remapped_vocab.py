"""RemappedVocab: rows checked by hand over every kind of tensor, its memory cost, and independence of tiles."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.paths import TESTS
from support.tiny_llamas import computed

from mergeforge.adapters.adapted_tensor import AdaptedTensor
from mergeforge.adapters.deltas import DoraDelta, LoraDelta
from mergeforge.checkpoints.checkpoint import open_checkpoint
from mergeforge.core import tensor_info
from mergeforge.errors import SourceError
from mergeforge.io.disk import DiskFile
from mergeforge.methods import METHODS
from mergeforge.tensors.alias import AliasTensor
from mergeforge.tensors.lazy import LazyTensor, Stats, StatsPass, collect_stats
from mergeforge.tensors.merged import MergedTensor
from mergeforge.tensors.remapped_vocab import INDEX_NBYTES, RemappedVocab, remap_vocab
from mergeforge.tensors.stored import StoredTensor
from mergeforge.tensors.worker import Worker
from mergeforge.tokenizer import RowSources

Peak: Any = runpy.run_path(str(TESTS / "methods" / "test_scratch_memory.py"))["Peak"]
COLUMNS = 8
BLOCK = 128  # elements: 16 rows


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_info, "BLOCK_ELEMENTS", BLOCK)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StoredTensor]:
    """Embeddings a (100 rows), b (70, bfloat16) and c (90), and factors for a LoRA of a and of c."""
    folder = tmp_path_factory.mktemp("stored")
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (100, COLUMNS), "b": (70, COLUMNS), "c": (90, COLUMNS), "bias": (100,), "wide": (50, 9)}
    shapes |= {"left": (2, 100), "right": (COLUMNS, 2), "m": (COLUMNS,), "other left": (2, 90)}
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    values["b"] = values["b"].bfloat16()
    values["m"] = values["m"].abs() + 1
    save_file(values, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return dict(open_checkpoint(folder, "one").tensors)


def picks(size: int, padding: int = 0, **sources: list[int]) -> RowSources:
    """Rows by label, the rest of `size` being none."""
    filled = {label: np.array(rows + [-1] * (size - len(rows)), dtype=np.int32) for label, rows in sources.items()}
    return RowSources(filled, np.zeros(size, dtype=np.int32), size, padding)


def rows_of(stored: StoredTensor) -> torch.Tensor:
    return stored.read_float64().float().view(stored.info.rows, -1)


def test_single_rows_means_zeros_and_padding(stored: dict[str, StoredTensor]) -> None:
    a, b, c = (rows_of(stored[name]) for name in "abc")
    tensor = remap_vocab("w", picks(6, 1, a=[3, -1, 7, -1], b=[-1, 5, 8, -1], c=[-1, -1, 9, -1, 2]), stored)
    expected = torch.stack([a[3], b[5], (a[7] + b[8] + c[9]) / 3, torch.zeros(COLUMNS), c[2]])
    out = computed(tensor)
    assert out[:5].equal(expected)
    torch.testing.assert_close(out[5], expected.mean(0), rtol=0, atol=1e-7)
    assert (tensor.info.name, tensor.info.dtype, tensor.info.shape) == ("w", "F32", (6, COLUMNS))


def test_an_unchanged_vocabulary_keeps_the_models_own_tensor(stored: dict[str, StoredTensor]) -> None:
    assert remap_vocab("w", picks(100, a=[*range(100)]), stored) is stored["a"]
    assert remap_vocab("w", picks(99, a=[*range(99)]), stored) is not stored["a"]
    assert remap_vocab("w", picks(101, 1, a=[*range(100)]), stored) is not stored["a"]


def test_remaps_a_bias_and_looks_through_an_alias(stored: dict[str, StoredTensor]) -> None:
    tensor = remap_vocab(
        "b", picks(3, x=[5, -1, 5]), {"x": AliasTensor(stored["bias"], stored["bias"].info.renamed("x"))}
    )
    assert isinstance(tensor, RemappedVocab)
    assert isinstance(tensor.origins[0].tensor, StoredTensor)
    bias = rows_of(stored["bias"])
    assert computed(tensor).flatten().tolist() == [bias[5].item(), 0, bias[5].item()]
    assert tensor.info.shape == (3,)


def test_rows_without_a_source_are_zeros(stored: dict[str, StoredTensor]) -> None:
    assert computed(remap_vocab("w", picks(3), stored)).equal(torch.zeros(3, COLUMNS))


def test_the_dtype_holds_every_source(stored: dict[str, StoredTensor]) -> None:
    assert remap_vocab("w", picks(2, b=[1, 0]), stored).info.dtype == "BF16"
    assert remap_vocab("w", picks(2, a=[-1, 1], b=[1, -1]), stored).info.dtype == "F32"


def test_consecutive_rows_are_read_at_once(stored: dict[str, StoredTensor], monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    plain = DiskFile.read_into

    def read_into(self: DiskFile, buffer: memoryview, offset: int, *, keep: bool = False) -> None:
        lengths.append(len(buffer) // (4 * COLUMNS))
        plain(self, buffer, offset, keep=keep)

    monkeypatch.setattr(DiskFile, "read_into", read_into)
    computed(remap_vocab("w", picks(90, a=[*range(40), 60, *range(50, 99)]), stored))
    assert lengths == [40, 1, 49]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"a": [0, 100]}, r"a: w has 100 rows, but its tokenizer needs 101"),
        ({"a": [0, -1], "wide": [-1, 3]}, r"wide: w is F32 \[50, 9\], which cannot be mapped"),
    ],
)
def test_names_the_model_whose_shape_does_not_fit(stored: dict[str, StoredTensor], sources: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        remap_vocab("w", picks(2, **sources), stored)


# over computed tensors


def lora(stored: dict[str, StoredTensor]) -> LazyTensor:
    """An embedding with a LoRA: no statistics, blocks of its own."""
    return AdaptedTensor(stored["a"], ((0.5, LoraDelta(stored["left"], stored["right"], True, 2.0)),))


def dora(stored: dict[str, StoredTensor]) -> LazyTensor:
    """An embedding with a DoRA: it collects the norms of all columns."""
    low = LoraDelta(stored["other left"], stored["right"], True, 2.0)
    return AdaptedTensor(stored["c"], ((1.0, DoraDelta(low, stored["m"])),))


def method(name: str, *inputs: LazyTensor, base: LazyTensor | None = None, **parameters: Any) -> LazyTensor:
    method = METHODS[name]
    values = {
        parameter.name: parameters.get(parameter.name, parameter.default) for parameter in method.parameters.values()
    }
    per_input = {
        key: [value] * len(inputs) if method.parameters[key].per_input else value for key, value in values.items()
    }
    return MergedTensor(inputs[0].info.renamed("inner"), method, inputs, (True,) * len(inputs), base, per_input, 3)


def inner(stored: dict[str, StoredTensor]) -> dict[str, LazyTensor]:
    """One tensor of each kind: stored, with a LoRA, with a DoRA, merged with a random mask and without one."""
    a = stored["a"]
    dare = method("dare_ties", lora(stored), base=a, weight=1.0, density=0.5)
    linear = method("task_arithmetic", AliasTensor(a, a.info.renamed("x")), base=a, weight=0.3)
    return {"stored": a, "lora": lora(stored), "dora": dora(stored), "dare": dare, "linear": linear}


MIXED = {
    "stored": [*range(20), *[-1] * 60],
    "lora": [*[-1] * 10, *range(99, 59, -1), *[-1] * 30],
    "dora": [*[-1] * 15, *range(0, 90, 3), *[-1] * 35],
    "dare": [*[-1] * 40, *range(60, 100), 17],
    "linear": [5, 6, 9, *[-1] * 40, *range(20, 45), 0, 99],
}


def mixed(stored: dict[str, StoredTensor], padding: int = 3) -> LazyTensor:
    return remap_vocab("w", picks(85, padding, **MIXED), inner(stored))


def test_rows_of_computed_tensors_equal_those_of_the_whole_tensors(stored: dict[str, StoredTensor]) -> None:
    wholes = {name: computed(tensor) for name, tensor in inner(stored).items()}
    expected = torch.zeros(82, COLUMNS)
    counts = torch.zeros(82, 1)
    for name, numbers in MIXED.items():
        for row, number in enumerate(numbers):
            if number >= 0:
                expected[row] += wholes[name][number]
                counts[row] += 1
    out = computed(mixed(stored))
    assert out[:82].equal(expected / counts.clamp(min=1))
    torch.testing.assert_close(out[82:], out[:82].mean(0).expand(3, -1), rtol=0, atol=1e-6)


def nested(stored: dict[str, StoredTensor]) -> LazyTensor:
    """TIES over two remapped embeddings, remapped again: statistics at every depth."""
    tensors = inner(stored)
    base = remap_vocab("w", picks(85, 3, stored=[*range(82)]), tensors)
    merged = method(
        "ties", mixed(stored), remap_vocab("w", picks(85, lora=[*range(80)]), tensors), base=base, weight=0.6
    )
    return remap_vocab(
        "w", picks(120, 2, x=[*range(80), *range(84, 50, -1)], a=[-1] * 100 + [4] * 18), {"x": merged, **stored}
    )


TENSORS = {
    "mixed": mixed,
    "nested": nested,
    "ties": lambda stored: method("ties", mixed(stored), mixed(stored, 0), base=mixed(stored), weight=0.5),
}


@pytest.fixture(scope="module")
def wholes() -> dict[str, torch.Tensor]:
    return {}


@pytest.mark.parametrize("name", TENSORS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(rows=st.integers(1, 130))
def test_result_does_not_depend_on_tiles(
    stored: dict[str, StoredTensor], wholes: dict[str, torch.Tensor], name: str, rows: int
) -> None:
    tensor = TENSORS[name](stored)
    if name not in wholes:
        wholes[name] = computed(tensor, staging=1 << 20)
    assert computed(TENSORS[name](stored), rows).equal(wholes[name])


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("rows", [16, 64, 130])
def test_staging_stays_within_the_declared_memory_cost(
    stored: dict[str, StoredTensor], monkeypatch: pytest.MonkeyPatch, name: str, rows: int
) -> None:
    """Compare the fill level of the staging buffer after every allocation with memory_cost."""
    levels: list[int] = []
    take = Worker.allocate

    def watched(self: Worker, nbytes: int) -> torch.Tensor:
        buffer = take(self, nbytes)
        levels.append(self._used - self._start)
        return buffer

    monkeypatch.setattr(Worker, "allocate", watched)
    tensor = TENSORS[name](stored)
    computed(tensor, rows, staging=1 << 20)
    highest = min(-(-tensor.info.rows // 16) * 16, max(rows // 16, 1) * 16)
    assert max(levels) <= tensor.memory_cost.row_nbytes * highest + tensor.memory_cost.fixed_nbytes


def test_temporaries_stay_within_the_declared_memory_cost(
    stored: dict[str, StoredTensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Count new tensors and arrays while a tile is loaded and its blocks are computed, except the staging buffer."""
    monkeypatch.setattr(tensor_info, "BLOCK_ELEMENTS", 1 << 19)
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(2000, 1024, generator=generator) for name in "abc"}
    save_file(values, tmp_path / "model.safetensors")
    tensors: dict[str, LazyTensor] = dict(open_checkpoint(tmp_path, "one").tensors)
    tensors["m"] = method("dare_ties", tensors["a"], tensors["b"], base=tensors["c"], weight=1.0, density=0.5)
    order = torch.randperm(2000, generator=generator).tolist()
    tensor = remap_vocab(
        "w", picks(2000, 8, a=order[:1500], b=[-1] * 900 + order[:900], m=[-1] * 400 + order[:1500]), tensors
    )
    for _ in range(2):  # the first time includes imports
        worker, stats = Worker("cpu", tensor.memory_cost.row_nbytes * 1024 + tensor.memory_cost.fixed_nbytes), Stats()
        with Peak([*values.values(), torch.from_numpy(worker._staging)]) as peak:
            collect_stats(
                tensor, StatsPass(tensor.info, [range(1024), range(1024, 2000)], worker, stats, torch.float32)
            )
            worker.clear()
            block = tensor.load(range(1024, 2000), worker, stats, torch.float32)
            for start in range(1024, 2000, 512):
                block(start, min(start + 512, 2000))
    stats_nbytes = METHODS["dare_ties"].stats_nbytes * 2
    assert peak.peak <= tensor.memory_cost.scratch_blocks * (4 << 19) + stats_nbytes + INDEX_NBYTES * 3 * 1024
