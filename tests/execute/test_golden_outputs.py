"""Output bytes are those that tests/execute/golden_outputs.json records: moving code changes none."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import output_cases as golden
from support.output_cases import Case

RECORDED = golden.read_golden()
CASES = golden.cases()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    with golden.inside(folder):
        golden.write_inputs()
    return folder


def param(case: Case) -> object:
    marks = [pytest.mark.needs_kernels] if case.needs == "kernels" else []
    return pytest.param(case, id=case.name, marks=marks)


@pytest.mark.parametrize("case", [param(case) for case in CASES])
def test_output_bytes_equal_the_recorded_ones(case: Case, inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.needs == "peft":
        pytest.importorskip("peft")
    here, there = golden.environment(), RECORDED[golden.ENVIRONMENT]
    if case.torch_linalg and here != there:
        pytest.skip(
            f"torch_linalg: its last bits depend on torch and the processor; recorded with {there}, here {here}"
        )
    monkeypatch.chdir(inputs)
    outputs, expected = golden.outputs_of(case), RECORDED[case.name]
    assert outputs == expected, f"{case.name}: {', '.join(golden.differences(outputs, expected))}"


def test_compares_every_recorded_case() -> None:
    assert RECORDED.keys() - {golden.ENVIRONMENT} == {case.name for case in CASES}


def test_interruptions_and_little_memory_do_not_change_bytes() -> None:
    assert RECORDED["resumed"] == RECORDED["shards"]
    assert RECORDED["little memory, fold"] == RECORDED["fold three"]
    for method in ("linear", "ties", "dare_ties", "slerp"):
        assert RECORDED[f"little memory, {method}"] == RECORDED[f"method {method}"]


def test_torch_and_the_c_library_write_the_same_bytes() -> None:
    """Recorded on a machine where torch fuses multiply and add, as the C library does."""
    pairs = [name for name in RECORDED if name.endswith(" in torch")]
    assert {name.split()[0] for name in pairs} == {"method", "fold", "stages", "gguf"}
    assert all(RECORDED[name] == RECORDED[name.removesuffix(" in torch")] for name in pairs)
