"""Every method on numbers that one can check by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.method_blocks import combine, of_scan

from mergeforge.methods import METHODS, Block

UNWEIGHTED = {
    "slerp",
    "passthrough",
    "karcher",
    "sce",
    "ram",
    "ramplus_tl",
    "model_stock",
    "nearswap",
    "arcee_fusion",
}
# their statistics are float sums, whose last bits depend on the blocks
SUMS = {
    "slerp",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "nuslerp",
    "multislerp",
    "karcher",
    "sce",
    "model_stock",
}


def equal(value: torch.Tensor, expected: Any) -> None:
    assert torch.equal(value, torch.tensor(expected, dtype=value.dtype)), value.tolist()


def near(value: torch.Tensor, expected: Any) -> None:
    torch.testing.assert_close(value, torch.tensor(expected, dtype=value.dtype), rtol=1e-6, atol=1e-7)


def test_registered_methods_and_what_they_declare() -> None:
    assert set(METHODS) >= {
        "linear",
        "passthrough",
        "slerp",
        "task_arithmetic",
        "fold",
        "ties",
        "dare_linear",
        "dare_ties",
        "nuslerp",
        "multislerp",
        "karcher",
        "della",
        "della_linear",
        "breadcrumbs",
        "breadcrumbs_ties",
        "sce",
        "ram",
        "ramplus_tl",
        "model_stock",
        "nearswap",
        "arcee_fusion",
    }
    assert METHODS["fold"] == replace(METHODS["task_arithmetic"], name="fold", reduce=METHODS["fold"].reduce)
    without_base = {"linear", "passthrough", "karcher", "nuslerp", "multislerp"}
    assert {name for name in METHODS if METHODS[name].needs_base} == set(METHODS) - without_base
    assert {name for name in METHODS if METHODS[name].optional_base} == {"nuslerp", "multislerp"}
    two = {"slerp", "nuslerp", "nearswap", "arcee_fusion"}
    assert {name for name in METHODS if METHODS[name].inputs == (2, 2)} == two
    assert {name for name in METHODS if METHODS[name].base_is_input} == two - {"nuslerp"}
    assert METHODS["model_stock"].inputs[0] == 2
    assert METHODS["slerp"].inputs == (2, 2)
    assert METHODS["passthrough"].inputs == (1, 1)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_has_a_description(name: str) -> None:
    method = METHODS[name]
    assert method.description.endswith(".")
    assert method.scratch_blocks >= 0
    assert all(parameter.kind in ("float", "bool") for parameter in method.parameters.values())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_weight_is_required(name: str) -> None:
    if name in UNWEIGHTED:
        assert "weight" not in METHODS[name].parameters
    else:
        assert METHODS[name].parameters["weight"].required


@pytest.mark.parametrize("name", ["slerp", "nearswap"])
def test_t_is_required(name: str) -> None:
    assert METHODS[name].parameters["t"].required


# linear


def test_linear_divides_by_the_sum_of_the_weights() -> None:
    equal(combine("linear", [[1.0, 2.0], [5.0, -2.0]], weight=[1.0, 3.0]), [4.0, -1.0])


def test_linear_without_normalize_is_a_sum() -> None:
    equal(combine("linear", [[1.0, 2.0], [5.0, -2.0]], weight=[1.0, 3.0], normalize=False), [16.0, -4.0])


def test_linear_returns_a_single_input_unchanged() -> None:
    equal(combine("linear", [[1.0, 2.0]], weight=[4.0]), [1.0, 2.0])


def test_linear_rounds_once_for_each_product() -> None:
    """A fused multiply-add: 1 + 2**-24 * (1 + 2**-23) does not lose the product's last bit."""
    one = 1 + 2.0**-23
    equal(combine("linear", [[1.0], [one]], weight=[1.0, 2.0**-24], normalize=False), [one])


def test_linear_keeps_float64() -> None:
    first, second = torch.tensor([1.0], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    merged = combine("linear", [first, second], weight=[0.1, 0.3], normalize=False)
    assert merged.dtype == torch.float64
    assert merged.item() == pytest.approx(0.7, rel=1e-15)


@pytest.mark.parametrize("weight", [[1.0, -1.0], [0.0, 0.0], [0.1, 0.2, -0.3]])
def test_linear_refuses_weights_that_sum_to_zero(weight: list[float]) -> None:
    with pytest.raises(ValueError, match="sum to zero"):
        METHODS["linear"].check_parameters({"weight": weight, "normalize": True})
    METHODS["linear"].check_parameters({"weight": weight, "normalize": False})


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_one_weight_for_each_input_is_required(name: str) -> None:
    parameters = {parameter.name: parameter.default for parameter in METHODS[name].parameters.values()}
    parameters |= {"weight": [1.0], "density": [1.0, 1.0]} if "density" in parameters else {"weight": [1.0]}
    prepared = METHODS[name].prepare(of_scan(lambda visit, sample=0: iter(()), 0), parameters)
    with pytest.raises(ValueError, match="zip"):
        METHODS[name].merge_block([torch.ones(2, 1), torch.ones(2, 1)], prepared, Block("w", 0, 0), parameters)


# passthrough


def test_passthrough() -> None:
    equal(combine("passthrough", [[1.0, -2.0]]), [1.0, -2.0])
    equal(combine("passthrough", [[1.0, -2.0]], scale=[0.5]), [0.5, -1.0])
    equal(combine("passthrough", [[1.0, -2.0]], scale=[0.0]), [0.0, -0.0])


# slerp


def test_slerp_at_a_right_angle() -> None:
    half = math.sqrt(0.5)
    near(combine("slerp", [[1.0, 0.0], [0.0, 1.0]], t=0.5), [half, half])
    near(combine("slerp", [[2.0, 0.0], [0.0, 1.0]], t=1 / 3), [2 * math.sin(math.pi / 3), 0.5])


@pytest.mark.parametrize("other", [[0.0, 1.0], [1.0, 1.0], [-1.0, 0.0], [2.0, 0.001], [0.0, 0.0]])
def test_slerp_at_t_0_and_1_returns_the_models(other: list[float]) -> None:
    equal(combine("slerp", [[1.0, 0.0], other], t=0.0), [1.0, 0.0])
    equal(combine("slerp", [[1.0, 0.0], other], t=1.0), other)


def test_slerp_of_parallel_tensors_is_linear() -> None:
    equal(combine("slerp", [[1.0, 2.0], [3.0, 6.0]], t=0.25), [1.5, 3.0])
    equal(combine("slerp", [[1.0, 2.0], [-1.0, -2.0]], t=0.25), [0.5, 1.0])


def test_slerp_of_zeros() -> None:
    near(combine("slerp", [[0.0, 0.0], [0.0, 0.0]], t=0.3), [0.0, 0.0])
    near(combine("slerp", [[0.0, 0.0], [1.0, 0.0]], t=0.5), [0.0 + math.sin(math.pi / 4), 0.0])


def test_slerp_uses_the_angle_of_the_whole_tensor() -> None:
    """Blocks of one element would be parallel; the tensors are at a right angle."""
    near(combine("slerp", [[1.0, 0.0], [0.0, 1.0]], t=0.5, size=1), [math.sqrt(0.5), math.sqrt(0.5)])


@pytest.mark.parametrize("count", [1, 3])
def test_slerp_needs_exactly_two_models(count: int) -> None:
    with pytest.raises(ValueError, match="unpack"):
        combine("slerp", [[1.0]] * count, t=0.5)


# task vectors


def test_task_arithmetic() -> None:
    deltas = [[1.0, -1.0], [3.0, 5.0]]
    equal(combine("task_arithmetic", deltas, weight=[0.5, 2.0]), [6.5, 9.5])
    equal(combine("fold", deltas, weight=[1.0, 1.0]), [4.0, 4.0])
    equal(combine("task_arithmetic", deltas, weight=[0.5, 1.5], normalize=True), [2.5, 3.5])
    equal(combine("task_arithmetic", deltas, weight=[0.5, 2.0], lambda_=2.0), [13.0, 19.0])
    equal(combine("task_arithmetic", deltas, weight=[0.5, 2.0], int8_mask=True), [6.5, 9.5])


def test_weights_that_sum_to_zero_divide_by_one() -> None:
    equal(combine("task_arithmetic", [[1.0, 2.0], [3.0, 8.0]], weight=[-1.0, 1.0], normalize=True), [2.0, 6.0])
    equal(combine("task_arithmetic", [[1.0], [1.0]], weight=[-1.0, 1.0], normalize=True), [0.0])


def test_sign_consensus_sum() -> None:
    """Element 0: both agree; 1: minus wins; 2: they cancel, so plus; 3: one is zero; 4: all are."""
    deltas = [[1.0, 1.0, 2.0, 0.0, 0.0], [3.0, -4.0, -2.0, -6.0, 0.0]]
    equal(combine("ties", deltas, weight=[1.0, 1.0]), [2.0, -4.0, 2.0, -6.0, 0.0])
    equal(combine("ties", deltas, weight=[1.0, 1.0], normalize=False), [4.0, -4.0, 2.0, -6.0, 0.0])
    # the weights vote as well: 3 * 1 against 0.5 * 4, and divide
    equal(combine("ties", deltas, weight=[3.0, 0.5]), [4.5 / 3.5, 1.0, 2.0, -6.0, 0.0])


def test_ties() -> None:
    """Half of four elements: the two largest of each; then signs."""
    deltas = [[4.0, -3.0, 1.0, 0.5], [1.0, 2.0, -5.0, 0.25]]
    #  trimmed [4, -3, 0, 0] and [0, 2, -5, 0]: sums 4, -1, -5, 0
    equal(combine("ties", deltas, weight=[1.0, 1.0], density=0.5), [4.0, -3.0, -5.0, 0.0])
    equal(combine("ties", deltas, weight=[1.0, 3.0], density=0.5), [4.0, 2.0, -5.0, 0.0])
    equal(combine("ties", deltas, weight=[1.0, 3.0], density=0.5, normalize=False), [4.0, 6.0, -15.0, 0.0])
    equal(combine("ties", deltas, weight=[1.0, 1.0], density=0.5, lambda_=0.5), [2.0, -1.5, -2.5, 0.0])
    equal(combine("ties", deltas, weight=[1.0, 1.0]), [2.5, -3.0, -5.0, 0.375])


def test_ties_with_one_density_per_input() -> None:
    deltas = [[4.0, -3.0, 1.0, 0.5], [1.0, 2.0, -5.0, 0.25]]
    equal(combine("ties", deltas, weight=[1.0, 1.0], density=[0.25, 1.0]), [2.5, 2.0, -5.0, 0.25])


def test_ties_rescales_to_the_l1_norm() -> None:
    """8.5 of mass, 7 kept."""
    merged = combine("ties", [[4.0, -3.0, 1.0, 0.5]], weight=[1.0], density=0.5, rescale=True)
    near(merged, [4 * 8.5 / 7, -3 * 8.5 / 7, 0.0, 0.0])


def test_ties_keeps_at_least_one_element() -> None:
    equal(combine("ties", [[1.0, -3.0, 2.0]], weight=[1.0], density=0.01), [0.0, -3.0, 0.0])


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_ties_keeps_the_first_of_equal_magnitudes(size: int) -> None:
    delta = [1.0, -2.0, 2.0, -2.0, 2.0, 3.0, 0.0, 2.0]
    equal(combine("ties", [delta], weight=[1.0], density=0.5, size=size), [0.0, -2.0, 2.0, -2.0, 0.0, 3.0, 0.0, 0.0])
    rescaled = combine("ties", [delta], weight=[1.0], density=0.5, size=size, rescale=True)
    near(rescaled, [one * 14 / 9 for one in (0.0, -2.0, 2.0, -2.0, 0.0, 3.0, 0.0, 0.0)])


@pytest.mark.parametrize("name", ["ties", "dare_linear", "dare_ties"])
def test_zeros_stay_zeros(name: str) -> None:
    equal(combine(name, [torch.zeros(5), torch.zeros(5)], weight=[1.0, 1.0], density=0.5), [0.0] * 5)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_at_density_1_keeps_everything(name: str) -> None:
    deltas = [[4.0, -3.0, 1.0], [1.0, 2.0, 3.0]]
    expected = [5.0, -1.0, 4.0] if name == "dare_linear" else [5.0, -3.0, 4.0]
    equal(combine(name, deltas, weight=[1.0, 1.0]), expected)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_restores_the_l1_norm(name: str, density: float) -> None:
    delta = torch.randn(20_000, generator=torch.Generator().manual_seed(3))
    kept = combine(name, [delta], weight=[1.0], density=density, size=4096)
    share = int((kept != 0).sum()) / len(delta)
    assert abs(share - density) < 4 * math.sqrt(density * (1 - density) / len(delta))
    assert float(kept.double().abs().sum()) == pytest.approx(float(delta.double().abs().sum()), rel=1e-6)
    ratio = (kept / delta)[kept != 0]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    plain = combine(name, [delta], weight=[1.0], density=density, rescale=False, size=4096)
    assert torch.equal(plain, torch.where(kept != 0, delta, 0.0))


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"passthrough"}))
@pytest.mark.parametrize("size", [16, 48, 1000])
def test_result_does_not_depend_on_the_block_size(name: str, size: int) -> None:
    """Any cut gives the same numbers; what is summed up over blocks, to its last bits."""
    deltas = [torch.randn(1000, generator=torch.Generator().manual_seed(seed)).round(decimals=1) for seed in (1, 2)]
    given: dict[str, Any] = {"t": 0.3, "weight": [0.4, 0.7], "density": 0.4}
    whole = combine(name, deltas, **given)
    torch.testing.assert_close(combine(name, deltas, size=size, **given), whole, rtol=1e-6, atol=1e-6)
    if name not in SUMS:
        assert torch.equal(combine(name, deltas, size=size, **given), whole)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"passthrough", "slerp"}))
def test_float64_inputs_give_a_float64_result(name: str) -> None:
    deltas = [torch.randn(300, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (1, 2)]
    merged = combine(name, deltas, weight=[0.4, 0.7], density=0.4, t=0.3)
    assert merged.dtype == torch.float64
    single = combine(name, [one.float() for one in deltas], weight=[0.4, 0.7], density=0.4, t=0.3)
    torch.testing.assert_close(merged.float(), single, rtol=1e-5, atol=1e-6)
    assert not torch.equal(merged, single.double())


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"passthrough"}))
def test_nan_reaches_the_output(name: str) -> None:
    """It reaches the output, where the run refuses it, or is refused while learning."""
    deltas = [torch.ones(64), torch.ones(64)]
    deltas[1][7] = float("nan")
    given: dict[str, Any] = {"t": 0.3, "weight": [0.4, 0.7], "density": 0.4}
    merged = combine(name, deltas, **given)
    assert bool(merged[7].isnan())
