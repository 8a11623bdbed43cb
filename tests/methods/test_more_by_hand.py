"""mergekit's other methods on numbers that one can check by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.method_blocks import InMemoryScan, combine
from test_by_hand import equal, near

from mergeforge.methods import METHODS, Block
from mergeforge.methods._inner_products import gram
from mergeforge.methods._mask_cache import MaskCache
from mergeforge.methods._random_mask import random_mask
from mergeforge.methods._rescale import Rescaled
from mergeforge.methods._sub_blocks import by_rows
from mergeforge.methods._thresholds import SAMPLE_BLOCKS, threshold_of_largest_fraction
from mergeforge.methods.della import drop_probability, magnitude_order, rank_mask, rank_mask_native
from mergeforge.methods.sce import sign_consensus_mean, variance, variance_scan
from mergeforge.native import bindings

HALF = math.sqrt(0.5)


def refused(name: str, match: str, **parameters: Any) -> None:
    values = {one.name: one.default for one in METHODS[name].parameters.values()} | parameters
    with pytest.raises(ValueError, match=match):
        METHODS[name].check_parameters(values)


@pytest.mark.parametrize("size", [1, 2, 100])
def test_gram(size: int) -> None:
    products = gram(InMemoryScan([torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, 1.0, 3.0])], size))
    assert products.tolist() == [[5.0, 2.0], [2.0, 10.0]]


def test_gram_of_an_empty_tensor() -> None:
    assert gram(lambda visit, sample=0: iter(())).shape == (0, 0)


# directions


def test_nuslerp() -> None:
    near(combine("nuslerp", [[1.0, 0.0], [0.0, 1.0]], weight=[1.0, 1.0]), [HALF, HALF])
    near(combine("nuslerp", [[2.0, 0.0], [0.0, 1.0]], weight=[2.0, 1.0]), [2 * math.sin(math.pi / 3), 0.5])
    equal(combine("nuslerp", [[1.0, 2.0], [2.0, 4.0]], weight=[1.0, 3.0]), [1.75, 3.5])
    equal(combine("nuslerp", [[1.0, 2.0], [-1.0, -2.0]], weight=[1.0, 3.0]), [-0.5, -1.0])
    near(combine("nuslerp", [[1.0, 0.0], [0.0, 1.0]], weight=[1.0, -1.0]), [HALF, HALF])  # weights cancel: the middle


def test_nuslerp_of_rows_and_columns() -> None:
    """Row 0 turns by a right angle, row 1 is parallel; columns the other way round."""
    one, two = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 1.0], [3.0, 3.0]])
    parameters = {"weight": [1.0, 1.0], "nuslerp_flatten": False, "nuslerp_row_wise": False}
    method = METHODS["nuslerp"]
    equal(method([one.clone(), two.clone()], None, Block("w", 0, 0), parameters)[1], [2.0, 2.0])
    near(method([one.clone(), two.clone()], None, Block("w", 0, 0), parameters)[0], [HALF, HALF])
    one, two, parameters = one.T.contiguous(), two.T.contiguous(), parameters | {"nuslerp_row_wise": True}
    stats = method.collect_stats(
        lambda visit, sample=0: iter([visit([one.clone(), two.clone()], Block("w", 0, 0))]), 4, parameters
    )
    near(method([one, two], stats, Block("w", 0, 0), parameters), [[HALF, 2.0], [HALF, 2.0]])


def test_nuslerp_treats_a_vector_as_one_row() -> None:
    blocks = InMemoryScan([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], 1)
    parameters = {"weight": [1.0, 1.0], "nuslerp_flatten": False, "nuslerp_row_wise": False}

    def scan(visit: Any, sample: int = 0) -> Any:
        return blocks(lambda inputs, block: visit(inputs, Block("w", block.start, 0, is_vector=True)), sample)

    assert METHODS["nuslerp"].collect_stats(scan, 2, parameters) == pytest.approx((HALF, HALF))


def test_multislerp() -> None:
    """Directions at a right angle meet half-way, at the weighted mean length."""
    near(combine("multislerp", [[1.0, 0.0], [0.0, 3.0]], weight=[1.0, 1.0]), [2 * HALF, 2 * HALF])
    near(combine("multislerp", [[1.0, 0.0], [0.0, 3.0]], weight=[3.0, 4.0], normalize_weights=False), [9.0, 12.0])
    equal(combine("multislerp", [[1.0, 5.0]], weight=[0.0]), [1.0, 5.0])  # one stays as it is
    equal(combine("multislerp", [[1.0, 0.0], [-1.0, 0.0]], weight=[1.0, 1.0]), [0.0, 0.0])  # two that cancel: a line
    equal(combine("multislerp", [[0.0, 0.0]] * 3, weight=[1.0, 1.0, 1.0]), [0.0, 0.0])


def test_multislerp_refuses_directions_that_cancel() -> None:
    refused("multislerp", "sum to zero", weight=[1.0, -1.0])
    with pytest.raises(ArithmeticError, match="cancel"):
        combine("multislerp", [[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], weight=[1.0, 1.0, 2.0])


def test_karcher() -> None:
    near(combine("karcher", [[1.0, 0.0], [0.0, 3.0]]), [2 * HALF, 2 * HALF])
    near(combine("karcher", [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), [math.sqrt(1 / 3)] * 3)
    equal(combine("karcher", [[1.0, 2.0]]), [1.0, 2.0])
    equal(combine("karcher", [[0.0, 0.0], [0.0, 0.0]]), [0.0, 0.0])
    near(combine("karcher", [[0.0, 0.0], [3.0, 4.0]]), [1.5, 2.0])  # zeros have no direction, but a length


def test_karcher_balances_the_angles() -> None:
    """Directions at 0, 0 and 90 degrees: the mean lies at 30, where the mean of vectors lies at 26.6."""
    near(combine("karcher", [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), [math.cos(math.pi / 6), 0.5])


def test_model_stock() -> None:
    """cos = 1/2: t = 2 * 1/2 / (1 + 1/2) = 2/3; at a right angle nothing is left; parallel ones are averaged."""
    third = math.sqrt(3) / 2
    near(combine("model_stock", [[1.0, 0.0], [0.5, third]]), [0.5, third / 3])
    equal(combine("model_stock", [[1.0, 0.0], [0.0, 1.0]]), [0.0, 0.0])
    near(combine("model_stock", [[1.0, 2.0], [3.0, 6.0]]), [2.0, 4.0])
    equal(combine("model_stock", [[1.0, 2.0], [-1.0, -2.0]]), [0.0, 0.0])


def test_model_stock_filter_wise() -> None:
    """Blocks of single elements are rows: parallel or opposed."""
    near(combine("model_stock", [[1.0, 1.0], [3.0, -3.0]], filter_wise=True), [2.0, 0.0])


# dropping


def test_breadcrumbs() -> None:
    """Ten elements: the largest one goes, of the rest the four largest stay."""
    delta = [1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0, 9.0, -10.0]
    expected = [0.0, 0.0, 0.0, 0.0, 0.0, -6.0, 7.0, -8.0, 9.0, 0.0]
    equal(combine("breadcrumbs", [delta], weight=[1.0], density=0.4, gamma=0.1), expected)
    equal(combine("breadcrumbs", [delta], weight=[1.0], density=0.05, gamma=0.1), [0.0] * 10)
    equal(combine("breadcrumbs", [delta], weight=[1.0]), delta)
    rescaled = combine("breadcrumbs", [delta], weight=[1.0], density=0.4, gamma=0.1, rescale=True)
    near(rescaled, [one * 55 / 30 for one in expected])


def test_breadcrumbs_density_takes_precedence_over_gamma() -> None:
    """gamma gives way where the two are more than there is."""
    equal(combine("breadcrumbs", [[1.0, 2.0, 3.0, 4.0]], weight=[1.0], density=0.75, gamma=0.5), [1.0, 2.0, 3.0, 0.0])


@pytest.mark.parametrize("size", [1, 3, 100])
def test_breadcrumbs_keeps_the_exact_count_among_equal_magnitudes(size: int) -> None:
    """Exactly four stay, whatever the blocks; the largest are the first of equals."""
    kept = combine("breadcrumbs", [[2.0] * 10], weight=[1.0], density=0.4, gamma=0.2, size=size)
    equal(kept, [0.0, 0.0, 2.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0])


def test_breadcrumbs_ties() -> None:
    deltas = [[4.0, -3.0, 1.0, 0.5], [1.0, 2.0, -5.0, 0.25]]
    # without the largest of each: [0, -3, 1, 0] and [1, 2, 0, 0]
    merged = combine("breadcrumbs_ties", deltas, weight=[1.0, 1.0], density=0.5, gamma=0.25)
    equal(merged, [1.0, -3.0, 1.0, 0.0])


@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_della_keeps_large_elements_more_often(name: str) -> None:
    """Magnitudes 1..400 in each of 500 rows: the chance to stay goes from 0.2 to 0.8."""
    rows = torch.arange(1.0, 401.0).expand(500, 400).contiguous()
    parameters = {one.name: one.default for one in METHODS[name].parameters.values()}
    parameters |= {"weight": [1.0], "density": [0.5], "epsilon": [0.3], "normalize": False}
    stats = Rescaled([MaskCache()], [1.0])
    kept = METHODS[name]([rows.clone()], stats, Block("w", 0, 0), parameters).ne(0).float().mean(dim=0)
    expected = torch.linspace(0.2, 0.8, 400)
    assert float((kept - expected).abs().amax()) < 5 * 0.5 / math.sqrt(500)
    assert float((kept - expected).view(8, 50).mean(dim=1).abs().amax()) < 5 * 0.5 / math.sqrt(500 * 50)


@pytest.mark.parametrize("shape", [(64, 33), (3, 20_000), (1, 100_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_della_ranks_match_a_stable_sort(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype).mul(4).round()  # many equals
    rows[0, :3] = torch.tensor([math.nan, math.inf, -0.0])
    for part in by_rows([rows]):
        assert torch.equal(magnitude_order(part[0]), part[0].float().abs().sort(dim=1, stable=True).indices)


def many(rows: torch.Tensor) -> torch.Tensor:
    """Continuous: nearly no two are equal."""
    return rows


def differences(rows: torch.Tensor) -> torch.Tensor:
    """Of bfloat16 models: few different ones, many zeros."""
    base = rows.roll(1).mul(0.02).bfloat16()
    return (base + rows * 1e-4).bfloat16().float() - base.float()


def halves(rows: torch.Tensor) -> torch.Tensor:
    """Many of one magnitude, some a little above."""
    rows[:, ::2] = -1.0
    rows[:, 1::16] = 1.0 + rows[:, 1::16].abs() * 1e-6
    return rows


def nothing(rows: torch.Tensor) -> torch.Tensor:
    """Zeros of both signs, and what is not finite."""
    rows.zero_()[:, ::3] = -0.0
    rows[:1, :1], rows[-1:, -1:] = math.nan, -math.inf
    return rows


@pytest.mark.needs_kernels
@pytest.mark.parametrize("density", [0.5, 0.3, 0.9])
@pytest.mark.parametrize("shape", [(1, 1), (9, 1), (3, 2), (40, 7), (8, 600), (3, 2048), (2, 5633), (1, 100_001)])
@pytest.mark.parametrize("made", [many, differences, halves, nothing])
def test_della_native_mask_matches_torch(
    made: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, int], density: float
) -> None:
    """The mask that a sort makes, wherever the block stands."""
    rows = made(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    for is_vector in {False, shape[1] == 1}:
        block = Block("w", 3 * shape[1] + is_vector, 7, is_vector)
        expected = random_mask(rows, block, 1, drop_probability(rows, block, density, 0.0999))
        found = rank_mask_native(rows, block, 1, density, 0.0999)
        assert found is not None
        assert torch.equal(found, expected)


@pytest.mark.needs_kernels
def test_della_falls_back_to_sorting_for_nearly_equal_magnitudes() -> None:
    """Most magnitudes differ less than their buckets do, beside a few that are far away."""
    rows = 1 + torch.rand(4, 4096, generator=torch.Generator().manual_seed(1)) * 1e-4
    rows[:, :100] *= 1e6
    block = Block("w", 0, 7)
    assert rank_mask_native(rows, block, 0, 0.5, 0.15) is None
    assert torch.equal(
        rank_mask(rows, block, 0, 0.5, 0.15), random_mask(rows, block, 0, drop_probability(rows, block, 0.5, 0.15))
    )


def test_della_refuses_probabilities_outside_0_to_1() -> None:
    refused("della", "epsilon 0.15", density=[0.5, 0.1], epsilon=[0.15, 0.15])
    refused("della_linear", "epsilon 0.5", density=[0.5], epsilon=[0.5])
    METHODS["della"].check_parameters({"density": [1.0, 0.5], "epsilon": [0.15, 0.4]})


@pytest.mark.needs_kernels
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_sce_native_matches_torch(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variances and means that torch computes, bit for bit; with zeros of both signs and equal elements."""
    numbers = torch.Generator().manual_seed(3)
    deltas = [torch.randn(3, 1001, generator=numbers) * 10.0**-at for at in range(count)]
    deltas[0][:, ::5], deltas[-1][:, 1::5] = 0.0, -0.0
    deltas[-1][:, ::7] = deltas[0][:, ::7]
    weights = [0.4, 1e-9, 0.6, 0.2, 0.3][:count]
    native_variance, native_mean = variance(deltas), sign_consensus_mean([one.clone() for one in deltas], weights)
    monkeypatch.setattr(bindings, "is_available", lambda: False)
    assert torch.equal(native_variance, variance(deltas))
    expected = sign_consensus_mean(deltas, weights)
    assert torch.equal(native_mean.view(torch.int32), expected.view(torch.int32))


# choosing


def test_sce() -> None:
    """Mean squares 1 and 9 weigh 0.1 and 0.9; element 0 agrees, of element 1 plus wins, by the sum."""
    near(combine("sce", [[1.0, -1.0], [3.0, 3.0]]), [0.1 * 1 + 0.9 * 3, 3.0])
    near(combine("sce", [[1e-4, 1e-4], [3e-4, -1e-4]]), [2e-4, 1e-4])  # too small to weigh: equal weights


def test_sce_selects_by_variance() -> None:
    """Variances 0, 1, 4, 0.25: of three that vary int(3 * 0.7) = 2 are kept."""
    deltas = [[5.0, 1.0, 1.0, 0.0], [5.0, 3.0, 5.0, 1.0]]
    # weights of [0, 1, 1, 0] and [0, 3, 5, 0]: 2 and 34 of 36
    near(combine("sce", deltas, select_topk=0.7), [0.0, 3 - 2 * 2 / 36, 5 - 4 * 2 / 36, 0.0])
    equal(combine("sce", deltas, select_topk=0.0), [0.0] * 4)
    equal(combine("sce", [[1.0, 2.0]] * 3, select_topk=0.5), [0.0, 0.0])


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_sce_selects_a_fraction_of_the_varying_elements(share: float) -> None:
    """Of 3000 elements every third varies, more and more; the sample sees blocks that hardly do."""
    varying = torch.arange(3000.0).mul(torch.arange(3000) % 3 == 0)
    for start in InMemoryScan([varying], 100).starts(SAMPLE_BLOCKS):
        varying[start : start + 100] *= 1e-3
    scan = InMemoryScan([torch.zeros(3000), varying], 100)
    threshold = threshold_of_largest_fraction(variance_scan(scan), 3000, share)
    ranked = varying.double().square().div(4).float().sort(descending=True).values
    assert threshold.value == float(ranked[int(share * int(varying.count_nonzero())) - 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_variance_does_not_change_its_inputs(dtype: torch.dtype) -> None:
    deltas = [torch.randn(50, 4, dtype=dtype) for _ in range(3)]
    kept = [delta.clone() for delta in deltas]
    torch.testing.assert_close(variance(deltas), torch.stack(kept).var(dim=0, correction=0))
    assert all(map(torch.equal, deltas, kept))


def test_ram() -> None:
    """Element 0 is changed by both, 1 and 2 by one, 3 by none that counts."""
    deltas = [[1.0, 4.0, 0.0, 1e-6], [3.0, 0.0, -2.0, 0.0]]
    equal(combine("ram", deltas), [2.0, 4.0, -2.0, 0.0])
    equal(combine("ram", deltas, epsilon=2.5), [3.0, 4.0, 0.0, 0.0])


def test_ramplus_tl() -> None:
    """Model 0 shares 1 of 3 changes: unique ones grow by 1 + 0.1 * 1/2; model 1 has 1 and 1: at most alpha."""
    deltas = [[1.0, 4.0, 2.0, 0.0], [3.0, 0.0, 0.0, 2.0]]
    near(combine("ramplus_tl", deltas, alpha=0.8), [2.0, 4 * 1.05, 2 * 1.05, 2 * 1.08])
    equal(combine("ramplus_tl", [[1.0], [3.0]]), [2.0])


def test_nearswap() -> None:
    """Distances 0.5, 2 and 0: nearer than 1 is swapped, at 2 half of the way is gone."""
    equal(combine("nearswap", [[1.0, 1.0, 4.0], [1.5, 3.0, 4.0]], t=1.0), [1.5, 2.0, 4.0])
    equal(combine("nearswap", [[1.0, 1.0], [1.5, 3.0]], t=0.0), [1.0, 1.0])


def vectors(*values: list[float]) -> Any:
    """The engine's view of 1-D tensors, in one block."""
    inputs = [torch.tensor(one).view(-1, 1) for one in values]
    block = Block("w", 0, 0, is_vector=True)
    return (lambda visit, sample=0: iter([visit([one.clone() for one in inputs], block)])), inputs, block


def test_arcee_fusion() -> None:
    """One of eight changes stands out from the quartiles and is taken over."""
    base, other = [0.0] * 8, [0.1, 0.1, 0.11, 0.12, 0.1, 0.12, 0.11, 1.0]
    scan, inputs, block = vectors(base, other)
    stats = METHODS["arcee_fusion"].collect_stats(scan, 8, {})
    equal(METHODS["arcee_fusion"](inputs, stats, block, {}).flatten(), [0.0] * 7 + [1.0])


def test_arcee_fusion_of_equal_models_is_the_base() -> None:
    equal(combine("arcee_fusion", [[1.0, 2.0], [1.0, 2.0]]), [1.0, 2.0])


@pytest.mark.parametrize(
    "name", ["nuslerp", "multislerp", "karcher", "sce", "model_stock", "ramplus_tl", "breadcrumbs"]
)
def test_stats_of_an_empty_tensor(name: str) -> None:
    """A tensor without elements."""
    known = METHODS[name].parameters.values()
    values = {one.name: [0.5, 0.5] if one.per_input else one.default for one in known}
    METHODS[name].collect_stats(lambda visit, sample=0: iter(()), 0, values)
