"""eval --card: the table in a model card, and that verify accepts the changed card."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from mergeforge.cli import run_command
from mergeforge.eval.card_results import BEGIN, END, with_result_row

ROW = ("m", "d.jsonl", "3", "9", "1.0000", "2.718", "0.5000", "50.00%")
OTHER = ("m", "other.jsonl", *ROW[2:])


def rows_of(card: Path) -> list[list[str]]:
    """The cells of the table, without its header."""
    table = card.read_text().partition(BEGIN)[2].partition(END)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]


def evaluate(*arguments: object) -> int:
    return run_command(["eval", *map(str, arguments), "--data", "sample:chat", "--limit", "3", "--samples", "0", "-q"])


def test_results_of_a_merge_and_its_gguf_pass_verify(taught: Path, tmp_path: Path) -> None:
    out, recipe = tmp_path / "out", tmp_path / "r.yaml"
    recipe.write_text(
        yaml.safe_dump({"merge_method": "passthrough", "models": [str(taught)], "output": {"gguf": "f16"}})
    )
    assert run_command(["run", str(recipe), "--out", str(out), "-q"]) == 0
    original = (out / "README.md").read_text()
    for _ in range(2):  # the second time replaces the row
        assert evaluate(out, "--card") == 0
    assert evaluate(next(out.glob("*.gguf")), "--card") == 0
    card = (out / "README.md").read_text()
    rows = rows_of(out / "README.md")
    assert [row[:3] for row in rows] == [["out", "sample:chat", "3"], ["out-F16.gguf", "sample:chat", "3"]]
    assert float(rows[0][4]) == pytest.approx(float(rows[1][4]), abs=1e-2), "NLL of the model and of its GGUF"
    before, _, after = card.partition("## Evaluation")
    assert original.startswith(before.rstrip()) and original.endswith(after.partition(END)[2].strip() + "\n")
    assert run_command(["verify", str(out)]) == 0


def test_creates_a_missing_card(taught: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(taught, tmp_path / "mine")
    assert evaluate(folder, "--card") == 0
    assert (folder / "README.md").read_text().startswith("# mine\n\n## Evaluation\n")


def test_remote_model_has_no_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("org/away", "--card") == 2
    assert "has no model card" in capsys.readouterr().err


@pytest.mark.parametrize("other", [["--smoke"], ["--lm-eval", "arc_easy"]])
def test_refuses_card_with_smoke_and_lm_eval(
    taught: Path, other: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["eval", str(taught), "--card", *other]) == 2
    assert "--card records only the results of --data" in capsys.readouterr().err


def test_card_that_is_not_text_is_unchanged(taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(taught, tmp_path / "mine")
    (folder / "README.md").write_bytes(b"\xff\xfe")
    assert evaluate(folder, "--card") == 3
    assert "README.md cannot be read" in capsys.readouterr().err
    assert (folder / "README.md").read_bytes() == b"\xff\xfe"


def test_table_goes_before_use_and_is_updated_in_place() -> None:
    card = "# m\n\nText.\n\n## Use\n\ncode\n"
    once = with_result_row(card, ROW)
    assert once.index("Text.") < once.index("## Evaluation") < once.index("| m |") < once.index("## Use")
    assert with_result_row(once, ROW) == once
    both = with_result_row(once, OTHER)
    assert both.count("| m |") == 2 and both.count("## Evaluation") == 1
    assert with_result_row(both, OTHER) == both
    renamed = both.replace("## Evaluation", "## Results")  # the owner may edit the text around it
    assert with_result_row(renamed, ROW) == renamed
