"""llama.cpp's tokeniser on our keys against sentencepiece and the tokenizers library: equal ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.llama_engine import tokenize, write_vocabulary
from support.pre_tokenizer_splits import STEPS, steps_of
from support.tokenizer_folders import (
    TEXTS,
    byte_level,
    byte_level_model,
    config,
    of_sentencepiece,
    sentencepiece_model,
    special,
    template,
    tokenizer_files,
    word_pieces,
    write_model,
)

from mergeforge.gguf.vocab import vocabulary

pytest.importorskip("xllamacpp")
BOS = len(byte_level_model()[0])
WITH_BOS = {"llama-bpe": "llama", "command-r": "cohere", "llama4": "llama4", "tekken": "mistral"}
IGNORING = ("llama-bpe", "tekken", "youtu", "minicpm5")
FAMILY = {**WITH_BOS, "olmo": "olmo", "dbrx": "phi3", "qwen2": "qwen2", "gpt-4o": "gpt_oss"}
# Where llama.cpp's own splitting is not its model's: marks of Indic scripts count as no letters in the
# first three; digits are not cut one by one in the next; spaces stay with digits in the last.
NOT_THE_SAME = {"tekken": (2,), "gpt-4o": (2,), "llama4": (2,), "deepseek-llm": (0, 1, 4), "falcon": (2, 4)}


def engine_ids(folder: Path, settings: dict[str, Any], kind: str, rows: int) -> list[list[int]]:
    found = vocabulary(tokenizer_files(folder), settings, kind, rows=rows)
    write_vocabulary(folder / "vocabulary.gguf", found.keys)
    return tokenize(folder / "vocabulary.gguf", TEXTS)


def library_ids(tokenizer: dict[str, Any]) -> list[list[int]]:
    from tokenizers import Tokenizer

    library = Tokenizer.from_str(json.dumps(tokenizer))
    return [list(library.encode(text).ids) for text in TEXTS]


@pytest.mark.parametrize("name", STEPS)
def test_byte_level(name: str, tmp_path: Path) -> None:
    """Each way of splitting: the name found, and the engine's ids on code, numbers, scripts and emoji."""
    end = {"post_processor": template("<s>", ids={"<s>": BOS})} if name in WITH_BOS else {}
    model = {"ignore_merges": name in IGNORING}
    tokenizer = byte_level(steps_of(name), added=[special(BOS, "<s>")], model=model, **end)
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "<s>"}}
    folder = write_model(tmp_path, config("LlamaForCausalLM", BOS + 1), files)
    settings = {"model_type": FAMILY.get(name, "")}
    assert vocabulary(tokenizer_files(folder), settings, "gpt2", rows=BOS + 1).keys["tokenizer.ggml.pre"].value == name
    pairs = zip(engine_ids(folder, settings, "gpt2", BOS + 1), library_ids(tokenizer), strict=True)
    assert [i for i, (ours, theirs) in enumerate(pairs) if ours != theirs] == list(NOT_THE_SAME.get(name, ()))


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
def test_sentencepiece(file: str, tmp_path: Path) -> None:
    """tokenizer.model, and the tokenizer.json made of it alone, both as sentencepiece."""
    import sentencepiece

    content = sentencepiece_model() if file == "tokenizer.model" else of_sentencepiece()
    settings = config("LlamaForCausalLM", 420, bos_token_id=1, eos_token_id=2)
    folder = write_model(tmp_path, settings, {file: content})
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    theirs = [[1, *processor.EncodeAsIds(text)] for text in TEXTS]
    assert engine_ids(folder, settings, "llama", 420) == theirs


def test_added_tokens(tmp_path: Path) -> None:
    """Added tokens inside a text, special and not, in tokenizer.json's spelling and as they are."""
    from tokenizers import Tokenizer

    added = [special(BOS, "<|im_start|>"), special(BOS + 1, "    ", on=False), special(BOS + 2, "<fim>", on=False)]
    tokenizer = byte_level(added=added)
    folder = write_model(tmp_path, config("LlamaForCausalLM", BOS + 3), {"tokenizer.json": tokenizer})
    found = vocabulary(tokenizer_files(folder), {}, "gpt2", rows=BOS + 3)
    write_vocabulary(folder / "vocabulary.gguf", found.keys)
    texts = ["<|im_start|>user<fim>x", "a    b        c", "no added token"]
    library = Tokenizer.from_str(json.dumps(tokenizer))
    assert tokenize(folder / "vocabulary.gguf", texts) == [library.encode(text).ids for text in texts]


def test_word_pieces(tmp_path: Path) -> None:
    """BERT, with [CLS] and [SEP] around."""
    from tokenizers import Tokenizer

    tokenizer = word_pieces()
    rows = len(tokenizer["model"]["vocab"])
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": names}
    folder = write_model(tmp_path, config("BertModel", rows), files)
    found = vocabulary(tokenizer_files(folder), {}, "bert", rows=rows)
    write_vocabulary(folder / "vocabulary.gguf", found.keys)
    texts = ["The quick brown fox", "over 12, the Fox's!", "unknown € sign"]
    library = Tokenizer.from_str(json.dumps(tokenizer))
    assert tokenize(folder / "vocabulary.gguf", texts) == [library.encode(text).ids for text in texts]
