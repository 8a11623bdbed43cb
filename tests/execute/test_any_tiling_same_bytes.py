"""Output bytes depend only on the recipe and the inputs: not on memory, threads, tiles or shards."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from hypothesis import given, settings
from hypothesis import strategies as st

import mergeforge
from mergeforge.core import tensor_info
from mergeforge.core.tensor_info import DTYPES, TensorInfo, Tile, blocks, split_into_tiles, torch_dtype
from mergeforge.methods import METHODS
from mergeforge.native import bindings
from mergeforge.operations.synthetic_models import ModelShape, write_adapter, write_model
from mergeforge.planner import tiling
from mergeforge.tensors import budget
from mergeforge.writers.safetensors import lay_out, split_into_shards

SHAPE = ModelShape(hidden=64, intermediate=176, layers=1, heads=4, kv_heads=2, vocab=320)
BLOCK = 4096  # elements, so that these small tensors have up to five blocks
PARAMETERS = {"density": 0.4, "t": 0.3, "rescale": True, "scale": 0.7, "lambda": 1.2}

Merge = Callable[..., bytes]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed in range(4):
        write_model(folder / f"m{seed}", SHAPE, seed=seed, near=0 if seed else None)
        write_adapter(folder / f"l{seed}", SHAPE, str(folder / "m0"), rank=4, seed=seed)
    return folder


def recipe(folder: Path, method: str, kind: str) -> dict[str, Any]:
    definition = METHODS[method]
    count = min(3, definition.inputs[1])
    value: dict[str, Any] = {"merge_method": method, "dtype": "float32", "random_seed": 5}
    value["parameters"] = {name: PARAMETERS[name] for name in definition.parameters if name in PARAMETERS}
    if kind == "adapters" or definition.needs_base:
        value["base_model"] = str(folder / "m0")
    if kind == "adapters":
        value["adapters"] = [
            {"adapter": str(folder / f"l{index}")}
            | ({"weight": 0.2 * index} if "weight" in definition.parameters else {})
            for index in range(1, count + 1)
        ]
    else:
        own = {"weight"} & set(definition.parameters)
        names = range(1, count + 1 - definition.base_is_input)
        value["models"] = [
            {"model": str(folder / f"m{index}"), "parameters": dict.fromkeys(own, 0.2 * index)} for index in names
        ]
    return value


@pytest.fixture(scope="module")
def merge(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Merge:
    folder, counter = tmp_path_factory.mktemp("out"), itertools.count()

    @cache
    def min_memory(method: str, kind: str, in_c: bool) -> int:
        """The memory that one worker needs when every tile is a single block (torch needs more than the C library)."""
        plan = mergeforge.plan(recipe(models, method, kind), out=folder / "planned", device="cpu", threads=1)
        plans = [tiling.plan_tensor(one.tensor, one.info, one.encoders, 0, one.backend) for one in plan.tensor_plans]
        assert any(len(tensor_plan.tiles) > 1 for tensor_plan in plans)
        return max(one.staging_nbytes for one in plans) + max(one.scratch_nbytes for one in plans)

    def run(
        method: str,
        kind: str,
        extra_memory: int | None = None,
        threads: int = 1,
        tile: int = 1 << 20,
        in_c: bool = True,
    ) -> bytes:
        out = folder / str(next(counter))
        with pytest.MonkeyPatch.context() as patch:
            if not in_c:
                patch.setattr(bindings, "is_available", lambda: False)
            patch.setattr(tensor_info, "BLOCK_ELEMENTS", BLOCK)
            patch.setattr(tiling, "TILE_NBYTES", tile)
            patch.setattr(tiling, "FROM_FILES_NBYTES", tile)
            patch.setattr(budget, "MIN_MEMORY", 1)
            memory = 1 << 30 if extra_memory is None else threads * (min_memory(method, kind, in_c) + extra_memory)
            plan = mergeforge.plan(recipe(models, method, kind), out=out, memory=memory, threads=threads, device="cpu")
            assert plan.peak <= memory
            mergeforge.merge(plan.recipe, out=out, memory=memory, threads=threads, device="cpu")
        written = (out / "model.safetensors").read_bytes()
        shutil.rmtree(out)
        return written

    return run


@pytest.fixture(scope="module")
def unlimited(merge: Merge) -> Merge:
    """The same merge with plenty of memory and one worker."""
    return cache(merge)


@pytest.mark.parametrize("kind", ["models", "adapters"])
@pytest.mark.parametrize("method", sorted(METHODS))
@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    extra_memory=st.integers(0, 400_000), threads=st.integers(1, 4), tile=st.sampled_from([1, 20_000, 70_000, 1 << 20])
)
def test_bytes_do_not_depend_on_memory_threads_or_tiles(
    merge: Merge, unlimited: Merge, method: str, kind: str, extra_memory: int, threads: int, tile: int
) -> None:
    assert merge(method, kind, extra_memory, threads, tile) == unlimited(method, kind)


@pytest.mark.parametrize("kind", ["models", "adapters"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_bytes_do_not_change_with_one_block_per_tile(merge: Merge, unlimited: Merge, method: str, kind: str) -> None:
    assert merge(method, kind, 0, 2, 1) == unlimited(method, kind)


@pytest.mark.needs_kernels
@pytest.mark.parametrize("extra_memory", [None, 0])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_torch_and_the_c_library_write_the_same_bytes(
    merge: Merge, unlimited: Merge, method: str, extra_memory: int | None
) -> None:
    """With memory for whole tensors, and with memory for one block."""
    assert merge(method, "models", extra_memory, 2, 1, in_c=False) == unlimited(method, "models")


@pytest.mark.parametrize("count", [60, 70, 150])
def test_many_models_fit_their_staging_buffer(tmp_path: Path, count: int) -> None:
    """Every allocation in the buffer is aligned, which costs most for small tensors of odd size."""
    entries = []
    for number in range(count):
        folder = tmp_path / f"m{number}"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        safetensors.torch.save_file(
            {"w": torch.full((33,), float(number)), "v": torch.ones(7, 3)}, folder / "model.safetensors"
        )
        entries.append({"model": str(folder), "parameters": {"weight": 1.0}})
    out = mergeforge.merge({"merge_method": "linear", "models": entries}, out=tmp_path / "out", device="cpu", threads=1)
    merged = safetensors.torch.load_file(out / "model.safetensors")
    assert merged["w"].tolist() == [(count - 1) / 2] * 33
    assert merged["v"].tolist() == [[1.0] * 3] * 7


# splitting into tiles

SHAPES = st.lists(st.integers(0, 40), max_size=4).map(tuple)


@settings(max_examples=200, deadline=None)
@given(
    shape=SHAPES | st.tuples(st.integers(1, 1 << 40), st.integers(1, 1 << 20)),
    dtype=st.sampled_from(sorted(DTYPES)),
    share=st.floats(0, 1),
)
def test_tiles_and_blocks_cover_a_tensor(shape: tuple[int, ...], dtype: str, share: float) -> None:
    info = TensorInfo("w", dtype, shape)
    assert info.rows * info.columns == info.numel
    if math.prod(shape) > 1 << 30:
        info = TensorInfo("w", dtype, (min(shape[0], 1 << 12), shape[1]))
    tiles = split_into_tiles(info, max(1, int(share * info.rows)))
    covered = [range(*block) for tile in tiles for block in blocks(tile, info)]
    assert covered == [range(*block) for block in blocks(Tile("w", 0, info.rows), info)]
    assert sum(map(len, covered)) == info.rows
    assert all(len(rows) == info.block_rows for rows in covered[:-1])


# layout

TORCH = {name: torch_dtype(name) for name in ("F64", "F32", "BF16", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL")}
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
INFOS = st.lists(
    st.builds(TensorInfo, NAMES, st.sampled_from(sorted(TORCH)), st.lists(st.integers(0, 5), max_size=3).map(tuple)),
    unique_by=lambda info: info.name,
    max_size=8,
)


def tensor(info: TensorInfo, seed: int) -> torch.Tensor:
    dtype = TORCH[info.dtype]
    assert dtype is not None
    high = 2 if info.dtype == "BOOL" else 256
    raw = torch.randint(0, high, (info.nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).view(info.shape)


@settings(max_examples=150, deadline=None)
@given(infos=INFOS)
def test_writes_the_same_file_as_safetensors(infos: list[TensorInfo]) -> None:
    values = {info.name: tensor(info, seed) for seed, info in enumerate(infos)}
    layout = lay_out(infos, 1 << 30)
    (file,) = layout.files.values()
    written = bytearray(file.nbytes)
    written[: len(file.header)] = file.header
    for name, value in values.items():
        extent = layout.extents[name]
        data = value.contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""
        assert len(data) == extent.nbytes
        written[extent.offset : extent.offset + extent.nbytes] = data
    assert bytes(written) == safetensors.torch.save(values, {"format": "pt"})


@settings(max_examples=150, deadline=None)
@given(infos=INFOS, shard_size=st.integers(1, 600))
def test_every_byte_belongs_to_one_tensor(infos: list[TensorInfo], shard_size: int) -> None:
    layout = lay_out(infos, shard_size)
    assert layout.extents.keys() == {info.name for info in infos}
    for name, file in layout.files.items():
        offset = len(file.header)
        assert offset % 8 == 0
        extents = [extent for extent in layout.extents.values() if extent.file == name]
        for extent in sorted(extents, key=lambda extent: (extent.offset, extent.nbytes)):
            assert extent.offset == offset
            offset += extent.nbytes
        assert offset == file.nbytes
    assert layout.nbytes == sum(file.nbytes for file in layout.files.values())


@settings(max_examples=150, deadline=None)
@given(infos=INFOS.filter(bool), shard_size=st.integers(1, 600))
def test_splits_into_the_same_shards_as_huggingface_hub(infos: list[TensorInfo], shard_size: int) -> None:
    reference = split_state_dict_into_shards_factory(
        {info.name: info for info in infos},  # type: ignore[arg-type]
        get_storage_size=lambda info: info.nbytes,  # type: ignore[attr-defined]
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    shards = [[info.name for info in shard] for shard in split_into_shards(infos, shard_size)]
    assert shards == list(reference.filename_to_tensors.values())
    layout = lay_out(infos, shard_size)
    assert list(layout.files) == list(reference.filename_to_tensors)
    assert {name: extent.file for name, extent in layout.extents.items()} == reference.tensor_to_filename
