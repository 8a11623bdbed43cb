"""Models of equal names and shapes that mean different things: refused, or a warning."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers
from safetensors.torch import load_file, save_file
from support.quiet import quiet
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel

import mergeforge
from mergeforge.errors import SourceError

SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "phi3": {"pad_token_id": 0},
    "bert": {},
    "modernbert": {"cls_token_id": 1, "sep_token_id": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family, as transformers saves it."""
    root = tmp_path_factory.mktemp("families")
    with quiet():
        for family, more in FAMILIES.items():
            config = transformers.AutoConfig.for_model(family, **{**SIZES, **more})
            transformers.AutoModel.from_config(config).save_pretrained(root / family)
    return root


def changed(folder: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a model whose config says something else."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    change(config)
    (out / "config.json").write_text(json.dumps(config))
    return out


def setting(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(values)


def theta(value: float) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        config.setdefault("rope_parameters", {"rope_type": "default"})["rope_theta"] = value

    return change


def scaling(factor: float) -> Callable[[dict[str, Any]], None]:
    """As transformers 4 wrote it."""

    def change(config: dict[str, Any]) -> None:
        del config["rope_parameters"]
        config.update(rope_theta=10000.0, rope_scaling={"rope_type": "linear", "factor": factor})

    return change


def plan(folders: Sequence[Path], tmp_path: Path, **recipe: Any) -> mergeforge.Plan:
    models = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in folders]
    return mergeforge.plan({"merge_method": "linear", "models": models, **recipe}, out=tmp_path / "out", device="cpu")


def said(plan: mergeforge.Plan) -> list[str]:
    """The warnings about contradictions."""
    return [warning for warning in plan.warnings if "no tokenizer" not in warning]


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_one_config_give_no_warning(models: Path, tmp_path: Path, family: str) -> None:
    other = changed(models / family, tmp_path / "other", setting(use_cache=False))
    assert not said(plan([models / family, other], tmp_path))


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("llama", setting(num_attention_heads=8, head_dim=4), "attention heads"),
        ("llama", setting(head_dim=16), "head size"),
        ("qwen2", setting(num_key_value_heads=4), "key-value heads"),
        ("gpt2", setting(n_head=8), "attention heads"),
        ("gpt2", setting(activation_function="relu"), "activation"),
        ("bert", setting(num_attention_heads=2), "attention heads"),
        ("bert", setting(hidden_act="relu"), "activation"),
        (
            "gpt_neox",
            setting(rope_parameters={"partial_rotary_factor": 1.0}),
            "rotated dimensions",
        ),
        ("llama", setting(model_type="mistral", architectures=["MistralModel"]), "mistral"),
        ("qwen2", setting(model_type="llama", architectures=["LlamaModel"]), "llama"),
    ],
)
def test_contradictions_are_refused_unless_the_recipe_insists(
    models: Path, tmp_path: Path, family: str, change: Callable[[dict[str, Any]], None], named: str
) -> None:
    folders = [models / family, changed(models / family, tmp_path / "other", change)]
    with pytest.raises(SourceError, match=named) as caught:
        plan(folders, tmp_path)
    assert caught.value.exit_code == 3 and "allow_mismatch" in caught.value.hint
    assert any(named in warning for warning in said(plan(folders, tmp_path, allow_mismatch=True)))


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("llama", theta(500000.0), "rope theta"),
        ("llama", scaling(2.0), "rope scaling"),
        ("qwen3", theta(1e6), "rope theta"),
        ("mistral", setting(sliding_window=16), "sliding window"),
        ("mistral", setting(sliding_window=None), "sliding window"),
        ("gemma2", setting(final_logit_softcapping=None), "softcapping of logits"),
        ("llama", setting(rms_norm_eps=0.01), "norm epsilon"),
        ("bert", setting(layer_norm_eps=0.01), "norm epsilon"),
        ("gemma2", setting(final_logit_softcapping=None, query_pre_attn_scalar=8), "attention scale"),
        ("bert", setting(architectures=["BertForPreTraining"]), "BertForPreTraining"),
    ],
)
def test_doubtful_differences_are_warnings(
    models: Path, tmp_path: Path, family: str, change: Callable[[dict[str, Any]], None], named: str
) -> None:
    folders = [models / family, changed(models / family, tmp_path / "other", change)]
    assert any(named in warning for warning in said(plan(folders, tmp_path)))
    with pytest.raises(SourceError, match=named):
        mergeforge.plan(plan(folders, tmp_path).recipe, out=tmp_path / "out", device="cpu", strict=True)


def test_older_configs_say_the_same_in_other_words(models: Path, tmp_path: Path) -> None:
    """rope_theta, rope_scaling and torch_dtype of transformers 4, or no rope_theta at all, against rope_parameters."""

    def older(config: dict[str, Any]) -> None:
        del config["rope_parameters"]
        config.update(rope_theta=10000.0, rope_scaling=None, torch_dtype="float32")

    def oldest(config: dict[str, Any]) -> None:
        for key in ("rope_parameters", "head_dim", "dtype"):
            config.pop(key, None)

    for name, change in (("older", older), ("oldest", oldest)):
        assert not said(plan([models / "llama", changed(models / "llama", tmp_path / name, change)], tmp_path))


def test_a_sliding_window_that_is_switched_off_does_not_matter(models: Path, tmp_path: Path) -> None:
    """Qwen 2.5's models state different windows, and use none."""
    change = setting(use_sliding_window=False, sliding_window=32768)
    assert not said(plan([models / "qwen2", changed(models / "qwen2", tmp_path / "other", change)], tmp_path))


WORDS = [f"w{number}" for number in range(96)]
TOKENIZERS: dict[str, Callable[[list[str]], Any]] = {
    "tokenizer.json of words": lambda words: WordLevel({word: at for at, word in enumerate(words)}, unk_token="w0"),
    "tokenizer.json of bpe": lambda words: BPE({word: at for at, word in enumerate(words)}, []),
    "tokenizer.json of unigram": lambda words: Unigram([(word, -1.0) for word in words], unk_id=0),
}


def write_tokenizer(folder: Path, kind: str, words: list[str]) -> None:
    if kind == "vocab.txt":
        (folder / kind).write_text("\n".join(words))
    elif kind == "vocab.json":
        (folder / kind).write_text(json.dumps({word: number for number, word in enumerate(words)}))
    elif kind == "tokenizer.model":
        (folder / kind).write_bytes(repr(words).encode())
    else:
        Tokenizer(TOKENIZERS[kind](words)).save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("kind", [*TOKENIZERS, "vocab.txt", "vocab.json", "tokenizer.model"])
def test_vocabularies_of_one_size_are_compared(models: Path, tmp_path: Path, kind: str) -> None:
    """The same ids: no warning. Two tokens swapped: a warning. Half of them moved: refused, if they can be read."""
    swapped, moved = [*WORDS[:94], WORDS[95], WORDS[94]], [*WORDS[:40], *WORDS[40:][::-1]]
    for name, words in {"a": WORDS, "same": WORDS, "swapped": swapped, "moved": moved}.items():
        shutil.copytree(models / "llama", tmp_path / name)
        write_tokenizer(tmp_path / name, kind, words)
    assert not plan([tmp_path / "a", tmp_path / "same"], tmp_path).warnings
    assert len(plan([tmp_path / "a", tmp_path / "swapped"], tmp_path).warnings) == 1
    if kind == "tokenizer.model":
        assert len(plan([tmp_path / "a", tmp_path / "moved"], tmp_path).warnings) == 1
        return
    with pytest.raises(SourceError, match="differ at 56 of 96 ids"):
        plan([tmp_path / "a", tmp_path / "moved"], tmp_path)


def test_tensors_of_an_adapter_in_a_model_are_refused(models: Path, tmp_path: Path) -> None:
    """A PEFT model saved by transformers has base_layer and lora_A among its tensors."""
    with quiet():
        model = transformers.AutoModel.from_pretrained(models / "llama")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    shutil.copytree(models / "llama", tmp_path / "unmerged")
    state = {name: tensor.contiguous() for name, tensor in wrapped.base_model.model.state_dict().items()}
    save_file(state, tmp_path / "unmerged" / "model.safetensors")
    with pytest.raises(SourceError, match="tensors of an adapter") as caught:
        plan([models / "llama", tmp_path / "unmerged"], tmp_path)
    assert "merge_and_unload" in caught.value.hint


def test_an_adapter_of_another_architecture_is_refused(models: Path, tmp_path: Path) -> None:
    """Mistral's and Llama's layers have equal names and shapes."""
    with quiet():
        model = transformers.AutoModel.from_pretrained(models / "mistral")
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    recipe = {"base_model": str(models / "llama"), "adapters": [str(tmp_path / "adapter")]}
    with pytest.raises(SourceError, match="mistral"):
        mergeforge.plan(recipe, out=tmp_path / "out", device="cpu")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "org/model-that-is-not-here"  # PEFT's auto_mapping still names the class
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(SourceError, match="MistralModel"):
        mergeforge.plan(recipe, out=tmp_path / "out", device="cpu")
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("trained_on", ["", "x" * 5000, "no\0folder", 7, None])
def test_an_adapter_that_names_no_local_base_is_folded(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained_on: Any
) -> None:
    """Run from a folder that holds another model's config.json, onto a base without one."""
    monkeypatch.chdir(models / "bert")
    with quiet():
        model = transformers.AutoModel.from_pretrained(models / "llama")
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings |= {"base_model_name_or_path": trained_on, "auto_mapping": None}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "bare").mkdir()
    shutil.copy(models / "llama" / "model.safetensors", tmp_path / "bare")
    recipe = {"base_model": str(tmp_path / "bare"), "adapters": [str(tmp_path / "adapter")]}
    assert mergeforge.plan(recipe, out=tmp_path / "out", device="cpu").tensor_plans


@pytest.mark.parametrize("content", ["[1]", "\x00", '{"model": {"vocab": 5}}', '{"model": {"vocab": {"a": [1]}}}', "{"])
def test_tokenizers_that_cannot_be_read_are_not_compared(models: Path, tmp_path: Path, content: str) -> None:
    for name, text in (("a", content), ("b", content + " ")):
        shutil.copytree(models / "llama", tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text(text)
    assert not plan([tmp_path / "a", tmp_path / "b"], tmp_path).warnings
