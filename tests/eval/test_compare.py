"""Differences and their intervals, by hand and on tiny models; output and exit codes of eval and compare."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.small_models import random_rows

from mergeforge import eval
from mergeforge.cli import run_command
from mergeforge.core.messages import warnings_in
from mergeforge.errors import RecipeError, SourceError
from mergeforge.eval import ConfidenceInterval
from mergeforge.eval.bootstrap import paired_bootstrap
from mergeforge.eval.compare import compare_evaluations
from mergeforge.eval.evaluate import Evaluation, RowResult
from mergeforge.operations.synthetic_models import SHAPES, write_model


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """Run a command and return its JSON."""
    shown = [] if "--metrics" in arguments else ["--samples", "0"]
    assert run_command([*map(str, arguments), *shown, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_interval_by_hand() -> None:
    """Three rows have 27 equally likely draws, so each outermost draw is more than 2.5 %."""
    one, other = [(2.0, 1.0), (4.0, 2.0), (9.0, 3.0)], [(3.0, 1.0), (4.0, 2.0), (6.0, 3.0)]
    every = [
        sum(other[at][0] for at in draw) / sum(other[at][1] for at in draw)
        - sum(one[at][0] for at in draw) / sum(one[at][1] for at in draw)
        for draw in itertools.product(range(3), repeat=3)
    ]
    interval = paired_bootstrap(one, other, draws=20_000)
    assert interval.difference == pytest.approx(13 / 6 - 15 / 6)
    assert (interval.low, interval.high) == pytest.approx((min(every), max(every))) == (-1, 1)
    assert paired_bootstrap(one, other, draws=20_000) == interval, "the same seed gives the same interval"


def test_constant_difference_has_an_interval_of_no_width() -> None:
    rows = [(float(at), 2.0) for at in range(1, 9)]
    interval = paired_bootstrap(rows, [(nll + 1, tokens) for nll, tokens in rows])
    assert (interval.low, interval.difference, interval.high) == pytest.approx((0.5, 0.5, 0.5))
    assert interval.verdict == "worse"
    assert paired_bootstrap(rows, rows).verdict == "no difference"
    assert paired_bootstrap(rows[:1], rows[1:2]).low == -math.inf, "one row gives no interval"


def test_verdicts() -> None:
    assert [ConfidenceInterval(0, low, high).verdict for low, high in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1))] == [
        "worse",
        "better",
        "no difference",
    ]
    assert ConfidenceInterval(0.15, 0.1, 0.2, margin=0.1).verdict == "no difference"


def test_interval_covers_the_truth_in_95_of_100_trials() -> None:
    random = np.random.default_rng(0)
    inside = 0
    for trial in range(100):
        size = random.integers(5, 50, 80)
        one, other = (size * random.normal(2, 0.5, 80) for _ in range(2))
        interval = paired_bootstrap(
            list(zip(one, size, strict=True)), list(zip(other, size, strict=True)), draws=400, seed=trial
        )
        inside += interval.low <= 0 <= interval.high
    assert 88 <= inside <= 99


def test_fail_if_worse(base: Path, taught: Path, questions: Path, capfd: pytest.CaptureFixture[str]) -> None:
    comparison = run(capfd, "compare", base, taught, base, "--data", questions, "--template", "plain")
    worse, same = (model["against_first"] for model in comparison["models"][1:])
    assert worse["verdict"] == "worse" and 0 < worse["low"] < worse["difference"] < worse["high"]
    assert (same["verdict"], same["difference"]) == ("no difference", 0)
    assert comparison["measure"] == "nats per token" and comparison["rows"] == 40
    options = ["--data", str(questions), "--template", "plain", "--limit", "20", "--samples", "1", "--max-tokens", "4"]
    command = ["compare", str(base), str(taught), *options, "--fail-if-worse"]
    assert run_command(command) == 1 and "worse" in capfd.readouterr().out
    assert run_command([*command, "--margin", "100"]) == 0
    command[1:3] = command[2:0:-1]
    assert run_command(command) == 0 and "better" in capfd.readouterr().out


def test_single_adapter_is_compared_with_its_base(
    base: Path, adapter: Path, questions: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    alone = run(capfd, "compare", adapter, "--data", questions)
    both = run(capfd, "compare", base, adapter, "--data", questions)
    for one, other in zip(alone["models"], both["models"], strict=True):
        assert one["nll"] == pytest.approx(other["nll"], rel=1e-6)
    with pytest.raises(RecipeError, match="not an adapter"):
        eval.compare([base], questions)


def test_different_vocabularies_are_compared_by_bytes(base: Path, questions: Path, tmp_path: Path) -> None:
    """The same model with a tokenizer without merges: more tokens, the same bytes."""
    other = write_model(tmp_path / "other", SHAPES["tiny"], dtype="F32")
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    comparison = eval.compare([base, other], questions)
    one, two = comparison.evaluations
    assert comparison.measure == "bits per byte" and two.tokens > one.tokens
    assert sum(row.nbytes for row in one.rows) == sum(row.nbytes for row in two.rows)
    assert comparison.intervals[0].difference == pytest.approx(two.bits_per_byte - one.bits_per_byte)
    assert any("tokenize the rows differently" in note for note in comparison.notes)


def test_bytes_are_counted_over_the_answers(base: Path, questions: Path) -> None:
    evaluation = eval.evaluate(base, questions)
    rows = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    assert [row.nbytes for row in evaluation.rows] == [len(f" {row['response']}".encode()) for row in rows]
    assert evaluation.bits_per_byte == pytest.approx(
        evaluation.nll * evaluation.tokens / math.log(2) / sum(row.nbytes for row in evaluation.rows)
    )


def test_limit_selects_the_same_rows_for_every_model(base: Path, taught: Path, questions: Path) -> None:
    one = eval.evaluate(base, questions, limit=7)
    other = eval.evaluate(taught, questions, limit=7)
    assert len(one.rows) == 7 and {row.key for row in one.rows} == {row.key for row in other.rows}


def test_rows_too_long_for_one_model_are_left_out(base: Path, questions: Path, tmp_path: Path) -> None:
    short = write_model(tmp_path / "short", SHAPES["tiny"], dtype="F32")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    comparison = eval.compare([base, short], questions)
    assert (
        0 < comparison.rows < 40
        and comparison.left_out == 40 - comparison.rows
        and comparison.measure == "nats per token"
    )
    assert comparison.intervals[0].difference == pytest.approx(0, abs=1e-6)
    assert comparison.evaluations[0].nll == pytest.approx(comparison.evaluations[1].nll, rel=1e-6)


def test_eval_of_adapter_folder_and_gguf(
    base: Path, adapter: Path, merged: Path, questions: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("xllamacpp")
    models = (adapter, merged, merged / "m-F16.gguf")
    results = [run(capfd, "eval", model, "--data", questions, "--limit", 10) for model in models]
    assert [result["kind"] for result in results] == ["adapter", "model", "gguf"]
    assert [result["nll"] for result in results] == pytest.approx([results[0]["nll"]] * 3, abs=1e-3)
    assert len({result["tokens"] for result in results}) == 1
    quantized = run(capfd, "eval", base, "--data", questions, "--quantize", "nf4", "--limit", 10)
    plain = run(capfd, "eval", base, "--data", questions, "--limit", 10)
    assert 0 < abs(quantized["nll"] - plain["nll"]) < 0.1


def test_samples_and_text_metrics(taught: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sacrebleu"), pytest.importorskip("rouge_score")
    from support.small_models import ANSWERS

    from mergeforge.eval.smoke_test import PROMPTS

    rows = [{"prompt": one, "response": two} for one, two in zip(PROMPTS, ANSWERS, strict=True)]
    path = tmp_path / "taught.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    result = run(capfd, "eval", taught, "--data", path, "--metrics", "bleu,rouge,chrf")
    assert result["metrics"] == pytest.approx({"bleu": 100, "rouge": 100, "chrf": 100})
    assert [one["answer"].strip() for one in result["samples"]] == list(ANSWERS)
    assert result["accuracy"] > 0.99 and result["perplexity"] < 1.1
    assert run_command(["eval", str(taught), "--data", str(path), "--samples", "1", "--stop", "née"]) == 0
    assert "answered: Hello,  [stop]" in capfd.readouterr().out
    assert run_command(["eval", str(taught), "--data", str(path), "--metrics", "blue"]) == 2


def test_mistakes(base: Path, questions: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(questions)]
    message = {
        ("eval", str(base)): (2, "name the rows to score: --data FILE"),
        ("eval", str(base), str(base), *data): (2, "eval takes one model"),
        ("eval", str(tmp_path / "nothing"), *data): (3, "neither a local path"),
        ("eval", str(tmp_path), *data): (3, "holds neither config.json nor adapter_config.json"),
        ("eval", "no.gguf", *data): (3, "there is no file no.gguf"),
        ("eval", str(base), *data, "--quantize", "int3"): (2, "must be none or nf4"),
        ("eval", str(base), *data, "--device", "tpu"): (2, "the device 'tpu' is not available"),
        ("eval", str(base), *data, "--loss-on", "lst"): (2, "did you mean 'last'?"),
        ("eval", str(base), *data, "--columns", "x"): (2, "write ROLE=COLUMN"),
        ("compare", str(base), *data): (2, "is the only model, and not an adapter"),
        ("eval", str(base), *data, "--lm-eval", "arc_easy"): (6, 'pip install "lm-eval>=0.4.8"'),
    }
    for command, (code, text) in message.items():
        assert run_command(list(command)) == code, command
        err = capfd.readouterr().err
        assert text in err, (command, err)


def test_base_of_an_adapter(adapter: Path, base: Path, tmp_path: Path) -> None:
    """A missing base is named with --base; a relative path is relative to the adapter."""
    lost = tmp_path / "lost"
    lost.mkdir()
    for file in adapter.iterdir():
        (lost / file.name).write_bytes(file.read_bytes())
    config = json.loads((lost / "adapter_config.json").read_text())
    (lost / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone"}))
    with pytest.raises(SourceError, match=r"the base of .* was not found") as caught:
        eval.open_model(lost)
    assert "--base" in caught.value.command_hint
    rows = random_rows(3)
    expected = eval.evaluate(adapter, rows).nll
    assert eval.evaluate(lost, rows, base=str(base)).nll == pytest.approx(expected)
    (lost / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "../base"}))
    (tmp_path / "base").symlink_to(base)
    assert eval.evaluate(lost, rows).nll == pytest.approx(expected), "a base relative to the adapter"


def test_nan_is_worse_than_any_number() -> None:
    rows, broken = [(1.0, 2.0)] * 5, [(math.nan, 2.0)] * 5
    assert paired_bootstrap(rows, broken).verdict == "worse" and paired_bootstrap(broken, rows).verdict == "better"


def test_only_one_model_is_in_memory(
    base: Path, taught: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    alive: list[weakref.ref[object]] = []
    module = importlib.import_module("mergeforge.eval.compare")  # the attribute of that name is the function
    open_model = module.open_model

    def watched(*arguments: Any, **settings: Any) -> Any:
        assert not any(one() for one in alive), "the previous model is freed"
        model = open_model(*arguments, **settings)
        alive.append(weakref.ref(model.loaded.model))  # type: ignore[attr-defined]
        return model

    monkeypatch.setattr(module, "open_model", watched)
    eval.compare([base, taught, base], questions, limit=3)
    assert len(alive) == 3


def test_an_adapter_with_another_tokenizer_is_compared_with_its_base_by_bytes(
    base: Path, adapter: Path, questions: Path, tmp_path: Path
) -> None:
    """Each with its own tokenizer: the base's loss is what it is without the adapter, and a warning says why."""
    other = tmp_path / "adapter"
    shutil.copytree(adapter, other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, other / name)
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    comparison = eval.compare([other], questions, base=str(base))
    one, two = comparison.evaluations
    assert comparison.measure == "bits per byte" and two.tokens > one.tokens
    assert one.nll == pytest.approx(eval.evaluate(base, questions).nll, rel=1e-6)
    assert len(warnings_in(comparison.notes)) == 1 and "that of its base" in warnings_in(comparison.notes)[0]
    assert "warnings" in eval.evaluate(other, questions, base=str(base)).as_dict()


def test_bits_per_byte_are_compared_over_the_same_bytes_only() -> None:
    """Rows whose answers have other bytes for one model are left out; there is no verdict if all do."""
    one = evaluation_of([10, 20, 30])
    same, some, none = (evaluation_of(sizes) for sizes in ([10, 20, 30], [10, 21, 30], [11, 21, 31]))
    hashes: list[dict[int, str]] = [dict.fromkeys(range(3), text) for text in "ab"]
    assert compare_evaluations([one, same], hashes).rows == 3
    comparison = compare_evaluations([one, some], hashes)
    assert (comparison.rows, comparison.other_text) == (2, 1) and warnings_in(comparison.notes)
    with pytest.raises(SourceError, match="other text of every answer"):
        compare_evaluations([one, none], hashes)


def evaluation_of(sizes: list[int]) -> Evaluation:
    """Rows of two tokens, whose answers have these bytes."""
    return Evaluation("m", "model", tuple(RowResult(at, at, 3.0, 2, 1, size) for at, size in enumerate(sizes)), 0, 1, 6)
