"""Adapters that bring a classification head to a base without one, against the unmerged PeftModel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quiet import quiet
from support.tiny_architectures import ARCHITECTURES

import mergeforge
from mergeforge.errors import SourceError

TASKS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
LABELS = 5
TOKENS = torch.arange(10, 17).view(1, -1)


def trained(kind: str, task: str, root: Path) -> Any:
    """A PeftModel for a task, saved beside the base that it was trained from."""
    import peft
    import transformers

    base = next(one for one in ARCHITECTURES if one.kind == kind)
    with quiet():
        base.make(1).save_pretrained(root / "base")
        labels = {} if task == "QUESTION_ANS" else {"num_labels": LABELS}
        model = getattr(transformers, TASKS[task]).from_pretrained(root / "base", dtype=torch.float32, **labels)
        model.config.pad_token_id = 0
        linear = next(name for name, one in model.named_modules() if "layer" in name and _is_linear(one))
        config = peft.LoraConfig(task_type=task, target_modules=[linear], init_lora_weights=False)
        tuned = peft.get_peft_model(model, config).eval()
        tuned.save_pretrained(root / "adapter")
    return tuned


def _is_linear(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear)


def fold(root: Path) -> Path:
    adapters = [str(root / "adapter")]
    return mergeforge.merge(base_model=str(root / "base"), adapters=adapters, out=root / "out", device="cpu", threads=1)


@pytest.mark.parametrize(
    "kind, task",
    [
        ("llama", "SEQ_CLS"),
        ("llama", "TOKEN_CLS"),
        ("qwen2", "SEQ_CLS"),
        ("gpt_neox", "SEQ_CLS"),
        ("bert", "TOKEN_CLS"),
        ("roberta", "SEQ_CLS"),
        ("distilbert", "QUESTION_ANS"),
    ],
)
def test_the_result_is_a_model_of_the_task(kind: str, task: str, tmp_path: Path) -> None:
    """The class in config.json loads it, with nothing missing or left over; its outputs are the PeftModel's."""
    import transformers

    model = trained(kind, task, tmp_path)
    out = fold(tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [type(model.base_model.model).__name__]
    assert len(config["id2label"]) == len(config["label2id"]) == (2 if task == "QUESTION_ANS" else LABELS)
    with quiet(), torch.no_grad():
        cls = getattr(transformers, TASKS[task])
        loaded, report = cls.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
        found, expected = loaded.eval()(TOKENS), model(TOKENS)
    assert not any(report[which] for which in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)


def test_a_head_that_needs_tensors_nobody_has_is_refused(tmp_path: Path) -> None:
    """BertForSequenceClassification pools: PEFT does not save the pooler that a masked LM lacks."""
    trained("bert", "SEQ_CLS", tmp_path)
    with pytest.raises(
        SourceError, match=r"BertForSequenceClassification, whose .*pooler.* neither it nor the base has"
    ):
        fold(tmp_path)


def test_a_head_whose_class_has_another_prefix_than_the_base(tmp_path: Path) -> None:
    """Llama's question-answering class finds the tensors of LlamaModel, but none of LlamaForCausalLM's."""
    import transformers

    tuned = trained("llama", "QUESTION_ANS", tmp_path)
    with pytest.raises(SourceError, match=r"was trained on a LlamaForQuestionAnswering, .* takes random values"):
        fold(tmp_path)
    with quiet():
        tuned.unload().transformer.save_pretrained(tmp_path / "base")
    out = fold(tmp_path)
    with quiet():
        tuned = trained_again(tmp_path)
        model = transformers.AutoModelForQuestionAnswering.from_pretrained(out)
    torch.testing.assert_close(model(TOKENS).start_logits, tuned(TOKENS).start_logits)


def trained_again(root: Path) -> Any:
    """The saved adapter, loaded by PEFT with its saved base."""
    import peft
    import transformers

    base = transformers.AutoModelForQuestionAnswering.from_pretrained(root / "base")
    return peft.PeftModel.from_pretrained(base, root / "adapter").eval()
