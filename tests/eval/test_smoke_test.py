"""eval --smoke: the taught model passes in every backend, and every check has a model that fails it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.small_models import ANSWERS, make_adapter

from mergeforge import eval
from mergeforge.cli import run_command
from mergeforge.eval import Answer, SmokeResult
from mergeforge.eval.smoke_test import PROMPTS, check_answers, read_prompts, repeated_ending

STOP = ("--stop", "</output>")


def checks(found: SmokeResult) -> set[str]:
    return {failure.check for failure in found.failures}


def changed(taught: Path, folder: Path, name: str, change: object) -> Path:
    """The taught model with one tensor changed by a function."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(taught, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])  # type: ignore[operator]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_folder_adapter_and_gguf_pass_and_agree(
    taught: Path, taught_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("xllamacpp")
    adapter = make_adapter(taught, tmp_path / "adapter", std=0.0)
    models = [str(adapter), str(taught), str(taught_gguf)]
    assert run_command(["eval", "--smoke", *models, *STOP, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["ok"] and [one["kind"] for one in result["models"]] == ["adapter", "model", "gguf"]
    for model in result["models"]:
        assert [one["text"].strip() for one in model["answers"]] == [answer.partition("</")[0] for answer in ANSWERS]
        assert [one["ended"] for one in model["answers"]] == ["eos", "eos", "stop", "eos"]
    assert [(one["same"], one["share"]) for one in result["agreement"]] == [(4, 1.0)] * 2


def test_printed_report(taught: Path, base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["eval", "--smoke", str(taught), str(base), "gone", "--max-tokens", "12", *STOP]) == 1
    message = capfd.readouterr().out
    assert f"FAILS {base} (model)" in message and "FAILS gone" in message and "of 4 answers are equal" in message
    assert "does not end within 12 tokens" in message and "it has no chat template" in message


def test_answer_that_never_ends(base: Path) -> None:
    result = eval.smoke(eval.open_model(base), ["the hen"], eval.Sampling(8, 0))
    assert {"ends by itself", "template"} <= checks(result)


def test_nan_weights(taught: Path, tmp_path: Path) -> None:
    broken = changed(taught, tmp_path / "nan", "model.norm.weight", lambda one: one * float("nan"))
    result = eval.smoke(eval.open_model(broken), PROMPTS[:1], eval.Sampling(4, 0))
    assert "finite" in checks(result)
    assert not eval.evaluate(broken, taught_rows(taught)).finite


def test_gguf_with_infinite_values(taught: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    broken = changed(taught, tmp_path / "nan", "model.norm.weight", lambda one: one * 1e38)
    assert run_command(["gguf", str(broken), "--type", "f32", "--out", str(tmp_path / "nan.gguf"), "-q"]) == 0
    model = eval.open_model(tmp_path / "nan.gguf", tokenizer=str(taught))
    result = eval.smoke(model, PROMPTS[:1], eval.Sampling(4, 0))
    assert "finite" in checks(result), result
    assert not eval.evaluate(model, taught_rows(taught)).finite


def test_empty_answer(taught: Path, tmp_path: Path) -> None:
    def only_eos(head: torch.Tensor) -> torch.Tensor:
        head = head.clone()
        head[257] = 0
        head[:257] = head[258:] = 0
        return head

    silent = changed(taught, tmp_path / "silent", "lm_head.weight", only_eos)
    config = json.loads((silent / "generation_config.json").read_text())
    (silent / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [0, 257]}))
    result = eval.smoke(eval.open_model(silent), PROMPTS[:2])
    assert checks(result) == {"not empty"} and [one.ended for one in result.answers] == ["eos", "eos"]


def test_special_token_in_the_answer(taught: Path, tmp_path: Path) -> None:
    """A model whose EOS is not its end of turn continues past it: the token leaks into the answer, but is not shown."""
    other = tmp_path / "other"
    shutil.copytree(taught, other)
    for name in ("generation_config.json", "config.json"):
        config = json.loads((other / name).read_text())
        (other / name).write_text(json.dumps(config | {"eos_token_id": 256}))
    tokenizer = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"eos_token": "<s>"}))
    result = eval.smoke(eval.open_model(other), PROMPTS[1:2], eval.Sampling(8, 0))
    assert "no marks in the text" in checks(result) and result.answers[0].leaked == ("</s>",)
    assert "</s>" not in result.answers[0].text


def test_tokens_that_training_added_may_be_in_an_answer(taught: Path, tmp_path: Path) -> None:
    """A token of the taught answer becomes an added special token, which the template does not use."""
    other = tmp_path / "other"
    shutil.copytree(taught, other)
    tokens = json.loads((other / "tokenizer.json").read_text())
    model = eval.open_model(str(taught))
    names = {number: name for name, number in tokens["model"]["vocab"].items()}
    ids = model.tokenizer(ANSWERS[3], add_special_tokens=False)["input_ids"]
    first, text = next((number, names[number]) for number in ids if names[number] not in model.template)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokens["added_tokens"].append({"id": first, "content": text, **flags})
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    result = eval.smoke(eval.open_model(other), PROMPTS[3:], eval.Sampling(64, 0))
    assert any(text in answer.leaked for answer in result.answers)
    assert "no marks in the text" not in checks(result)


def test_turn_markers_written_as_text() -> None:
    def answer(text: str, ended: str = "eos") -> Answer:
        return Answer(text, 9, ended, 1, 0.1)

    assert [one.check for one in check_answers([answer("ok<|im_end|>\n<|im_start|>user")])] == ["no marks in the text"]
    assert [one.check for one in check_answers([answer("so it is. " * 20, "length")])] == [
        "ends by itself",
        "no repetition",
    ]
    assert not check_answers([answer("Fine.")])


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("I say. " + "so it is " * 8, "so it is "),
        ("!" * 60, "!"),
        ("ha " * 14, "ha "),
        ("na na na na batman", ""),
        ("one, two, three, four", ""),
        ("1. a\n2. a\n3. a\n4. a\n5. a\n6. a\n7. a\n", ""),
        ("\n" * 80, ""),
    ],
)
def test_repetition(text: str, part: str) -> None:
    assert sorted(repeated_ending(text)) == sorted(part)


def test_prompts_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("# mine\none\n\n two \n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ("one", "two")


def taught_rows(taught: Path) -> list[eval.TokenRow]:
    from support.small_models import random_rows

    return random_rows(2)
