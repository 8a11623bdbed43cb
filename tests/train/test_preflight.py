"""What the plan refuses: everything that would fail after the data is tokenized or the model is loaded."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.training_models import EXPERTS, write_tiny
from support.training_runs import run
from torch import Tensor
from torch.nn.functional import cross_entropy

from mergeforge.errors import BudgetError, MergeforgeError, RecipeError, SourceError
from mergeforge.operations.synthetic_models import write_tokenizer
from mergeforge.train.plan import make_plan
from mergeforge.train.resume import Resume


def good_loss(logits: Tensor, labels: Tensor, count: Any) -> Tensor:
    return cross_entropy(logits, labels, reduction="sum") / count


def two_arguments(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels)


def loss_of_rows(logits: Tensor, labels: Tensor, count: Any) -> Tensor:
    return cross_entropy(logits, labels, reduction="none")


def detached(logits: Tensor, labels: Tensor, count: Any) -> Tensor:
    return cross_entropy(logits.detach(), labels)


def not_a_number(logits: Tensor, labels: Tensor, count: Any) -> Tensor:
    return logits.sum() * float("nan")


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"lora": {"layers": [1, 7]}}, "the model has no layer 7", "0 to 1"),
    ({"lora": {"targets": ["q_proj", "v_porj"]}}, "no module 'v_porj'", "did you mean 'v_proj'"),
    ({"lora": {"targets": "nothing.*"}}, "does not fit the model", "q_proj"),
    ({"lora": {"rank_pattern": {"qkv_mix": 8}}}, "rank_pattern: the model has no module 'qkv_mix'", "q_proj"),
    ({"lora": {"alpha_pattern": {"q_proj(": 8}}}, "not a regular expression", ""),
    ({"lora": {"modules_to_save": ["score"]}}, "modules_to_save: the model has no module 'score'", "lm_head"),
    ({"memory": {"offload_activations": True}}, "offload_activations is for GPUs", "remove"),
    ({"attention": "flash_attention_2"}, "flash_attention_2 needs a GPU and 16 bit", "attention: sdpa"),
    ({"after": {"gguf": "q4_k_x"}}, "unknown GGUF type 'q4_k_x'", "q4_k_s"),
    ({"after": {"merge": {"dtype": "bfloat17"}}}, "no dtype 'bfloat17'", "bfloat16"),
    ({"loss": f"{__name__}.two_arguments"}, "two_arguments fails: TypeError", "loss\\(logits, labels, count\\)"),
    ({"loss": f"{__name__}.loss_of_rows"}, r"returns a tensor of shape \(4,\)", "count"),
    ({"loss": f"{__name__}.detached"}, "not a number that depends on the logits", "count"),
    ({"loss": f"{__name__}.not_a_number"}, "returns nan", "count"),
]


@pytest.mark.parametrize(("changes", "message", "hint"), REFUSED)
def test_the_plan_refuses(changes: dict[str, Any], message: str, hint: str, settings: dict[str, Any]) -> None:
    with pytest.raises(MergeforgeError, match=message) as refusal:
        make_plan(settings | changes, device="cpu")
    assert re.search(hint, refusal.value.command_hint)


def test_a_loss_of_the_right_form_is_accepted(settings: dict[str, Any]) -> None:
    assert make_plan(settings | {"loss": f"{__name__}.good_loss"}, device="cpu").settings.loss


def test_dora_on_fused_experts_is_refused_unless_they_are_not_targeted(settings: dict[str, Any], here: Path) -> None:
    base = write_tiny(here, "mixtral", vocab_size=320, **EXPERTS)
    write_tokenizer(base)
    settings |= {"model": str(base), "method": "dora"}
    with pytest.raises(RecipeError, match="DoRA does not work on experts"):
        make_plan(settings, device="cpu")
    assert make_plan(settings | {"lora": {"targets": ["q_proj", "v_proj"]}}, device="cpu")


def copied(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder / "copy")
    return folder / "copy"


def test_truncated_weights_are_refused(settings: dict[str, Any], base: Path, here: Path) -> None:
    copy = copied(base, here)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(SourceError, match=r"model\.safetensors"):
        make_plan(settings | {"model": str(copy)}, device="cpu")


def test_weights_that_are_missing_are_refused(settings: dict[str, Any], base: Path, here: Path) -> None:
    """A missing matrix by the plan; a missing norm, which is little beside the rest, when the model is loaded."""
    copy = copied(base, here)
    tensors = load_file(copy / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"lacks model\.norm\.weight"):
        run(settings | {"model": str(copy)})
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors | {"model.norm.weight": norm}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match="weights, but a model of its config"):
        make_plan(settings | {"model": str(copy)}, device="cpu")


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2", "gpt2"])
def test_a_missing_tokenizer_is_refused(model_type: str, settings: dict[str, Any], base: Path, here: Path) -> None:
    """transformers makes an empty tokenizer for several model types."""
    copy = copied(base, here)
    (copy / "tokenizer.json").unlink()
    config = json.loads((copy / "config.json").read_text()) | {"model_type": model_type}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="has no tokenizer that transformers can read: there is none of its files"):
        make_plan(settings | {"model": str(copy)}, device="cpu")


def test_a_quantized_base_is_refused(settings: dict[str, Any], base: Path, here: Path) -> None:
    copy = copied(base, here)
    config = json.loads((copy / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"is quantized \(gptq\)"):
        make_plan(settings | {"model": str(copy)}, device="cpu")


def test_a_disk_without_room_for_the_checkpoints_is_refused(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 100_000))
    with pytest.raises(BudgetError, match=r"3 checkpoints and the result need about .* but .* has 100.0 KB"):
        make_plan(settings, device="cpu")


def test_resuming_from_a_path_that_is_not_there_is_refused(settings: dict[str, Any], here: Path) -> None:
    """Also where nothing has run yet: it would start from the beginning without a word."""
    with pytest.raises(SourceError, match="step-40 is not a checkpoint"):
        run(settings, Resume(str(here / "run" / "checkpoints" / "step-40")))
    assert not (here / "run" / "run.json").exists()


def test_full_training_writes_gguf_files(settings: dict[str, Any]) -> None:
    from mergeforge.train.post_training import run_post_training

    settings = {key: value for key, value in settings.items() if key != "lora"} | {"method": "full", "max_steps": 1}
    settings |= {"after": {"gguf": ["q8_0", "f16"]}}
    trained = run(settings)
    plan = make_plan(settings, device="cpu")
    result = run_post_training(plan, plan.settings.after)
    assert [path.name for path in result.ggufs] == ["model-Q8_0.gguf", "model-F16.gguf"]
    assert all(path.is_file() for path in result.ggufs) and (trained.result / "model.safetensors").is_file()


def test_a_model_without_a_gguf_form_is_refused(settings: dict[str, Any], here: Path) -> None:
    base = write_tiny(here, "gpt_neo", vocab_size=320, attention_types=[[["global", "local"], 1]], num_layers=2)
    write_tokenizer(base)
    with pytest.raises(SourceError, match="GPTNeoForCausalLM is not supported in GGUF"):
        make_plan(settings | {"model": str(base), "after": {"gguf": "q8_0"}}, device="cpu")


def test_the_plan_counts_what_is_trained(settings: dict[str, Any]) -> None:
    """The number of weights by PEFT on the model without weights, and by the finished adapter."""
    trained = run(settings | {"max_steps": 1})
    stored = load_file(trained.result / "adapter_model.safetensors")
    plan = make_plan(settings, device="cpu")
    assert plan.trained == sum(tensor.numel() for tensor in stored.values())
