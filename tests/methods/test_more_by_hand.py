"""mergekit's other methods on numbers that one can check by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.method_blocks import InMemoryScan, combine, of_scan, statistics
from test_by_hand import equal, near

from mergeforge.methods import METHODS, Block
from mergeforge.methods.block_statistics import SAMPLE_BLOCKS
from mergeforge.methods.rank_mask import magnitude_order
from mergeforge.methods.statistics import InnerProducts, KthVariance
from mergeforge.methods.sub_blocks import by_rows
from mergeforge.methods.variance import variance

HALF = math.sqrt(0.5)


def refused(name: str, match: str, **parameters: Any) -> None:
    values = {one.name: one.default for one in METHODS[name].parameters.values()} | parameters
    with pytest.raises(ValueError, match=match):
        METHODS[name].check_parameters(values)


@pytest.mark.parametrize("size", [1, 2, 100])
def test_inner_products(size: int) -> None:
    known = statistics([torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, 1.0, 3.0])], size)
    assert known.collect(InnerProducts()).tolist() == [[5.0, 2.0], [2.0, 10.0]]


def test_inner_products_of_an_empty_tensor() -> None:
    assert of_scan(lambda visit, sample=0: iter(()), 0).collect(InnerProducts()).shape == (0, 0)


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
    equal(method.merge_block([one.clone(), two.clone()], None, Block("w", 0, 0), parameters)[1], [2.0, 2.0])
    near(method.merge_block([one.clone(), two.clone()], None, Block("w", 0, 0), parameters)[0], [HALF, HALF])
    one, two, parameters = one.T.contiguous(), two.T.contiguous(), parameters | {"nuslerp_row_wise": True}
    known = of_scan(lambda visit, sample=0: iter([visit([one.clone(), two.clone()], Block("w", 0, 0))]), 4)
    prepared = method.prepare(known, parameters)
    near(method.merge_block([one, two], prepared, Block("w", 0, 0), parameters), [[HALF, 2.0], [HALF, 2.0]])


def test_nuslerp_treats_a_vector_as_one_row() -> None:
    blocks = InMemoryScan([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], 1)
    parameters = {"weight": [1.0, 1.0], "nuslerp_flatten": False, "nuslerp_row_wise": False}

    def scan(visit: Any, sample: int = 0) -> Any:
        return blocks(lambda inputs, block: visit(inputs, Block("w", block.start, 0, is_vector=True)), sample)

    known = of_scan(scan, 2, first_block=Block("w", 0, 0, is_vector=True))
    assert METHODS["nuslerp"].prepare(known, parameters).factors == pytest.approx([HALF, HALF])


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
    parameters |= {"rescale": False}
    method, block = METHODS[name], Block("w", 0, 0)
    prepared = method.prepare(of_scan(None, rows.numel(), 1), parameters)
    kept = method.merge_block([rows.clone()], prepared, block, parameters).ne(0).float().mean(dim=0)
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


def test_della_refuses_probabilities_outside_0_to_1() -> None:
    refused("della", "epsilon 0.15", density=[0.5, 0.1], epsilon=[0.15, 0.15])
    refused("della_linear", "epsilon 0.5", density=[0.5], epsilon=[0.5])
    METHODS["della"].check_parameters({"density": [1.0, 0.5], "epsilon": [0.15, 0.4]})


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
    threshold = statistics([torch.zeros(3000), varying], 100).collect(KthVariance(share))
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
    prepared = METHODS["arcee_fusion"].prepare(of_scan(scan, 8), {})
    equal(METHODS["arcee_fusion"].merge_block(inputs, prepared, block, {}).flatten(), [0.0] * 7 + [1.0])


def test_arcee_fusion_of_equal_models_is_the_base() -> None:
    equal(combine("arcee_fusion", [[1.0, 2.0], [1.0, 2.0]]), [1.0, 2.0])


@pytest.mark.parametrize(
    "name", ["nuslerp", "multislerp", "karcher", "sce", "model_stock", "ramplus_tl", "breadcrumbs"]
)
def test_stats_of_an_empty_tensor(name: str) -> None:
    """A tensor without elements."""
    known = METHODS[name].parameters.values()
    values = {one.name: [0.5, 0.5] if one.per_input else one.default for one in known}
    METHODS[name].prepare(of_scan(lambda visit, sample=0: iter(()), 0), values)
