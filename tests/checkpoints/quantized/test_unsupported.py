"""Unsupported quantization is refused before a weight is read; unquantized tensors stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoint_values import Tensors, opened, values
from support.quantized_cases import FORMATS

from mergeforge.errors import SourceError
from mergeforge.tensors.stored import StoredTensor

WEIGHT = torch.linspace(-1, 1, 32 * 64).view(32, 64).bfloat16()


def stored(kind: str, **changes: Any) -> tuple[Tensors, dict[str, Any]]:
    tensors, _, settings = FORMATS[kind](WEIGHT)
    return {f"m.{leaf}": value for leaf, value in tensors.items()}, {"quantization_config": settings | changes}


def refused(folder: Path, tensors: Tensors, config: dict[str, Any], match: str) -> SourceError:
    with pytest.raises(SourceError, match=match) as caught:
        opened(folder, tensors, config)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("method", ["hqq", "aqlm", "quanto", "torchao", "bitnet"])
def test_refuses_unsupported_methods(method: str, tmp_path: Path) -> None:
    config = {"text_config": {"quantization_config": {"quant_method": method}}}
    error = refused(tmp_path, {"m.weight": WEIGHT}, config, f"quantized with '{method}'")
    assert "16-bit" in error.hint


@pytest.mark.parametrize(
    ("kind", "missing"),
    [("nf4", "m.weight.absmax"), ("gptq", "m.qzeros"), ("awq", "m.scales"), ("packed", "m.weight_scale")],
)
def test_names_a_missing_tensor_of_a_group(kind: str, missing: str, tmp_path: Path) -> None:
    tensors, config = stored(kind)
    del tensors[missing]
    refused(tmp_path, tensors, config, f"lacks {missing}")


def test_refuses_fp8_without_a_scale(tmp_path: Path) -> None:
    tensors, config = stored("fp8 channel")
    del tensors["m.weight_scale"]
    refused(tmp_path, tensors, config, "has no scale")


def test_refuses_scales_of_the_wrong_shape(tmp_path: Path) -> None:
    tensors, config = stored("fp8 block")
    tensors["m.weight_scale_inv"] = torch.ones(3, 7)
    refused(tmp_path, tensors, config, "fits no block")


def test_refuses_layouts_for_a_single_gpu_kernel(tmp_path: Path) -> None:
    refused(tmp_path / "a", *stored("gptq", checkpoint_format="marlin"), "layout 'marlin'")
    refused(tmp_path / "b", *stored("awq", version="gemv"), "layout 'gemv'")


def test_refuses_three_bits(tmp_path: Path) -> None:
    tensors = {
        "m.qweight": torch.zeros(6, 32, dtype=torch.int32),
        "m.qzeros": torch.zeros(4, 3, dtype=torch.int32),
        "m.scales": torch.ones(4, 32),
    }
    refused(tmp_path, tensors, {"quantization_config": {"quant_method": "gptq", "bits": 3}}, "3 bits")


def test_names_leftover_packed_tensors(tmp_path: Path) -> None:
    tensors, config = stored("gptq")
    tensors["n.weight_packed.absmax"] = torch.ones(4)
    refused(tmp_path, tensors, config, "n.weight_packed.absmax belong to no supported quantized weight")


def test_refuses_int8_in_a_gpu_tile_order(tmp_path: Path) -> None:
    tensors, config = stored("int8")
    tensors["m.weight_format"] = torch.ones((), dtype=torch.uint8)
    refused(tmp_path, tensors, config, "tile order")


def test_refuses_transposed_weights_of_gpt2(tmp_path: Path) -> None:
    tensors, config = stored("nf4")
    refused(tmp_path, tensors, config | {"model_type": "gpt2"}, "quantized gpt2 weights are stored transposed")


def test_refuses_a_broken_quant_state(tmp_path: Path) -> None:
    tensors, config = stored("nf4")
    tensors["m.weight.quant_state.bitsandbytes__nf4"] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    refused(tmp_path, tensors, config, "is not a JSON object")


def test_unquantized_tensors_stay_as_they_are(tmp_path: Path) -> None:
    """Modules that were not converted stay stored tensors with their dtypes."""
    tensors, config = stored("nf4")
    tensors = {"a.weight": WEIGHT, **tensors, "z.weight": WEIGHT.half()}
    checkpoint = opened(tmp_path, tensors, config)
    assert isinstance(checkpoint.tensors["a.weight"], StoredTensor)
    assert checkpoint.tensors["z.weight"].info.dtype == "F16"


def test_drops_a_quantization_config_without_quantized_tensors(tmp_path: Path) -> None:
    """A merged model whose config still has load_in_4bit: the settings are dropped, with a note."""
    config = {"quantization_config": {"load_in_4bit": True}, "hidden_size": 64}
    checkpoint = opened(tmp_path, {"m.weight": WEIGHT}, config)
    assert checkpoint.config == {"hidden_size": 64}
    assert "no tensor is" in checkpoint.warnings[0]


def test_drops_scales_of_activations(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, *stored("fp8 tensor"))
    assert list(checkpoint.tensors) == ["m.weight"]
    assert any("1 scales of activations" in note for note in checkpoint.warnings)


def test_an_unquantized_checkpoint_stays_the_same(tmp_path: Path) -> None:
    config = {"hidden_size": 64, "torch_dtype": "bfloat16"}
    checkpoint = opened(tmp_path, {"m.weight": WEIGHT, "m.counter": torch.ones(3, dtype=torch.int64)}, config)
    assert checkpoint.config == config
    assert not checkpoint.warnings


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "gone": lambda value: None,
    "empty": lambda value: value.flatten()[:0],
    "flat": lambda value: value.flatten(),
    "half": lambda value: value.flatten()[: value.numel() // 2],
    "bytes": lambda value: value.contiguous().view(-1).view(torch.uint8),
    "wide": lambda value: value.to(torch.int64),
    "float": lambda value: value.to(torch.float32),
    "stacked": lambda value: torch.stack([value, value]),
    "one": lambda value: value.flatten()[:1],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_groups_raise_source_errors_or_can_be_read(kind: str, change: str, tmp_path: Path) -> None:
    """Damage each tensor of a group: opening raises SourceError, or the group can still be computed."""
    intact, config = stored(kind)
    for name in intact:
        damaged = {**intact, name: CHANGES[change](intact[name])}
        tensors = {key: value for key, value in damaged.items() if value is not None}
        try:
            checkpoint = opened(tmp_path, tensors, config)
        except SourceError:
            continue
        for tensor in checkpoint.tensors.values():
            if not isinstance(tensor, StoredTensor):
                values(tensor, rows=1)
