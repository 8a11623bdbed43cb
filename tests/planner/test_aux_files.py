"""The files beside the weights: everything is copied but weights, card, training state and caches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mergeforge

# what tokenizers, processors and modules of the families in transformers and sentence-transformers are stored in
SIDE_FILES = (
    *(
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer.model.v3",
        "spiece.model",
        "sentencepiece.bpe.model",
        "spm.model",
    ),
    *("source.spm", "target.spm", "bpe.codes", "vocab.bpe", "qwen.tiktoken", "tiktoken.model", "dict.txt", "vocab.txt"),
    *(
        "vocab.json",
        "merges.txt",
        "vocab-src.json",
        "vocab-tgt.json",
        "entity_vocab.json",
        "normalizer.json",
        "emoji.json",
    ),
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "chat_template.jinja"),
    *("additional_chat_templates/tool_use.jinja", "generation_config.json", "LICENSE", "USE_POLICY.md", "NOTICE.txt"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json"),
    *(
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "value_head.safetensors",
        "configuration_own.py",
        "ops/own.py",
    ),
)
LEFT_OUT = {
    "pytorch_model.bin": "weights",
    "onnx/model.onnx": "weights",
    "original/params.json": "weights",  # beside original/consolidated.00.pth
    "original/consolidated.00.pth": "weights",
    "adapter_config.json": "weights",
    "optimizer.pt": "training state",
    "trainer_state.json": "training state",
    "checkpoint-500/config.json": "training state",
    "picture.png": "model card",
    "quantize_config.json": "record",
}
UNMENTIONED = (
    "README.md",
    ".gitattributes",
    ".cache/huggingface/x.metadata",
    "__pycache__/x.pyc",
    "mergekit_config.yml",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny Llamas."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("models")
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(
            root / name
        )
    return root


def fresh(models: Path, folder: Path, *names: str) -> Path:
    """A copy of the first model with more files, each of which holds its own name."""
    import shutil

    shutil.copytree(models / "a", folder)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file({"weight": torch.ones(2)}, folder / name)
        else:
            (folder / name).write_text(json.dumps({"file": name}))
    return folder


def average(*folders: Path) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": str(one), "parameters": {"weight": 0.5}} for one in folders]}


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_every_side_file_is_copied(models: Path, tmp_path: Path) -> None:
    base = fresh(models, tmp_path / "base", *SIDE_FILES)
    out = mergeforge.merge(average(base, models / "b"), out=tmp_path / "out", device="cpu")
    assert set(SIDE_FILES) <= files_in(out)
    assert all((out / name).read_bytes() == (base / name).read_bytes() for name in SIDE_FILES)


def test_what_is_left_out_is_listed(models: Path, tmp_path: Path) -> None:
    base = fresh(models, tmp_path / "base", *LEFT_OUT, *UNMENTIONED)
    plan = mergeforge.plan(average(base, models / "b"), out=tmp_path / "out", device="cpu")
    assert set(plan.aux_files) == {"generation_config.json"}
    for name, kind in LEFT_OUT.items():
        shown = name.partition("/")[0] + "/" if "/" in name else name
        assert any(shown in note and note.endswith(f"({kind})") for note in plan.notes), name
    assert not any(name in note for note in plan.notes for name in UNMENTIONED)


def test_a_crowded_subfolder_is_listed_and_a_deep_file_copied(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergeforge.io.model_files.MAX_SUBFOLDER_FILES", 3)
    base = fresh(models, tmp_path / "base", *(f"data/{number}.txt" for number in range(4)), "1_Pooling/a/b/c/d.json")
    plan = mergeforge.plan(average(base, models / "b"), out=tmp_path / "out", device="cpu")
    assert set(plan.aux_files) == {"generation_config.json", "1_Pooling/a/b/c/d.json"}
    assert any("data/" in note and "more than 3 files" in note for note in plan.notes)


def test_a_merge_of_a_single_file_copies_no_neighbors(models: Path, tmp_path: Path) -> None:
    """A folder of many checkpoints is not one model."""
    base = fresh(models, tmp_path / "base", "other.json", "notes.txt", "LICENSE", "tokenizer.json")
    plan = mergeforge.plan(average(base / "model.safetensors", models / "b"), out=tmp_path / "out", device="cpu")
    assert set(plan.aux_files) == {"generation_config.json", "LICENSE", "tokenizer.json"}


def test_missing_code_is_removed_from_auto_map(models: Path, tmp_path: Path) -> None:
    base = fresh(models, tmp_path / "base", "configuration_own.py")
    config = json.loads((base / "config.json").read_text())
    here, elsewhere = {"AutoConfig": "configuration_own.Own"}, {"AutoModel": "org/repo--modeling_own.Own"}
    auto_map = here | elsewhere | {"AutoModelForCausalLM": "modeling_own.Own"}
    (base / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    (base / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}})
    )
    plan = mergeforge.plan(average(base, models / "b"), out=tmp_path / "out", device="cpu")
    assert plan.config is not None and plan.config["auto_map"] == here | elsewhere
    assert "auto_map" not in json.loads(plan.aux_files["tokenizer_config.json"].read_text())
    assert any("modeling_own.py" in warning for warning in plan.warnings)
    assert any("tokenization_own.py" in warning for warning in plan.warnings)


def test_weights_that_are_not_merged_and_differ_are_a_warning(models: Path, tmp_path: Path) -> None:
    names = ("tokenizer.json", "2_Dense/model.safetensors", "value_head.safetensors")
    one, other = fresh(models, tmp_path / "one", *names), fresh(models, tmp_path / "other", *names)
    assert not mergeforge.plan(average(one, other), out=tmp_path / "out", device="cpu").warnings
    save_file({"weight": torch.zeros(2)}, other / "2_Dense" / "model.safetensors")
    (warning,) = mergeforge.plan(average(one, other), out=tmp_path / "out", device="cpu").warnings
    assert "2_Dense/model.safetensors" in warning and str(other) in warning


@pytest.mark.filterwarnings("ignore")
def test_a_merged_embedder_is_one(tmp_path: Path) -> None:
    """A folded adapter gives the embeddings of sentence-transformers with PEFT's merged weights."""
    import peft
    from sentence_transformers import SentenceTransformer, models
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "red", "green", "blue", "sea", "wide"]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    BertModel(BertConfig(vocab_size=len(words), initializer_range=0.2, **sizes)).save_pretrained(tmp_path / "bert")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        tmp_path / "bert"
    )
    transformer = models.Transformer(str(tmp_path / "bert"), max_seq_length=16)
    modules = [transformer, models.Pooling(32, pooling_mode="cls"), models.Dense(32, 24), models.Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "base"))

    wrapped = peft.get_peft_model(
        transformer.auto_model, peft.LoraConfig(target_modules=["value", "dense"], init_lora_weights=False)
    )
    wrapped.save_pretrained(tmp_path / "adapter")
    transformer.auto_model = wrapped.merge_and_unload()
    sentences = ["red green sea", "blue", "wide wide"]
    expected = SentenceTransformer(modules=modules, device="cpu").encode(sentences)

    out = mergeforge.merge(
        base_model=tmp_path / "base", adapters=[tmp_path / "adapter"], out=tmp_path / "out", device="cpu"
    )
    merged = SentenceTransformer(str(out), device="cpu")
    np.testing.assert_allclose(merged.encode(sentences), expected, atol=1e-5)
    assert merged.max_seq_length == 16
    assert not np.allclose(
        SentenceTransformer(str(tmp_path / "base"), device="cpu").encode(sentences), expected, atol=1e-3
    )
    assert load_file(out / "2_Dense" / "model.safetensors").keys() == {"linear.weight", "linear.bias"}
