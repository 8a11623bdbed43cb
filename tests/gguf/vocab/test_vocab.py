"""Vocabularies: errors and notes, padding, rebuilt scores, special tokens, and the reader of tokenizer.model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.pre_tokenizer_splits import STEPS, pre_tokenizer_steps
from support.special_token_cases import BASE, decoder_entries
from support.tokenizer_folders import (
    GPT2_BYTE_LEVEL,
    added_token,
    byte_level_model,
    byte_level_tokenizer,
    config,
    sentencepiece_model,
    sentencepiece_tokenizer,
    split_step,
    template_processor,
    tokenizer_files,
    write_model,
)

from mergeforge.errors import RecipeError, SourceError
from mergeforge.gguf.key_values import boolean, string, u32
from mergeforge.gguf.vocab import KINDS, Vocabulary, vocabulary
from mergeforge.gguf.vocab.bpe import byte_alphabet, decode_token
from mergeforge.gguf.vocab.sentencepiece import read_sentencepiece

END = {"tokenizer_config.json": {"eos_token": "<|endoftext|>"}}


def build_vocab(
    folder: Path, files: dict[str, Any], kind: str = "gpt2", rows: int = BASE + 1, **options: Any
) -> Vocabulary:
    """The vocabulary of a model with these files; the option `settings` goes into its config.json."""
    settings = config("LlamaForCausalLM", rows, **options.pop("settings", {}))
    return vocabulary(tokenizer_files(write_model(folder, settings, files)), settings, kind, rows=rows, **options)


def test_reads_tokenizer_model_like_sentencepiece(tmp_path: Path) -> None:
    """Texts, scores and settings equal those that the sentencepiece package reads."""
    import sentencepiece

    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model())
    library = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    model = read_sentencepiece(path)
    assert [piece.text for piece in model.pieces] == [library.IdToPiece(i) for i in range(library.vocab_size())]
    assert [piece.score for piece in model.pieces] == [library.GetScore(i) for i in range(library.vocab_size())]
    assert [piece.token_type for piece in model.pieces[:4]] == [2, 3, 3, 6]
    assert (model.algorithm, model.add_dummy_prefix, model.remove_extra_whitespaces) == (2, True, False)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x0a\xff", b"{}"])
def test_invalid_tokenizer_model_is_an_error(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"tokenizer\.model is not a sentencepiece model"):
        build_vocab(tmp_path, {"tokenizer.model": content}, "llama")


def test_rebuilt_vocabulary_equals_that_of_tokenizer_model(tmp_path: Path) -> None:
    """From tokenizer.json alone: the same texts and types as with tokenizer.model, and scores in the same order."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    entries = decoder_entries(*(added_token(i, text) for i, text in enumerate(("<unk>", "<s>", "</s>"))))
    config_file = {"tokenizer_config.json": {**names, "added_tokens_decoder": entries}}
    model = build_vocab(tmp_path / "a", {"tokenizer.model": sentencepiece_model(), **config_file}, "llama", 420).keys
    json_only = build_vocab(
        tmp_path / "b", {"tokenizer.json": sentencepiece_tokenizer(), **config_file}, "llama", 420
    ).keys
    for key in ("tokens", "token_type"):
        assert model[f"tokenizer.ggml.{key}"] == json_only[f"tokenizer.ggml.{key}"]
    ranks = json_only["tokenizer.ggml.scores"].value
    merged = [i for i, score in enumerate(model["tokenizer.ggml.scores"].value) if score < 0 and ranks[i] < 0]
    by_score = sorted(merged, key=lambda i: -model["tokenizer.ggml.scores"].value[i])
    assert sorted(merged, key=lambda i: -ranks[i]) == by_score and len(merged) > 50


def test_gemma_without_tokenizer_model_is_rebuilt(tmp_path: Path) -> None:
    """llama.cpp's converter refuses such a model. Gemma puts no space before a text."""
    spaced = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    vocab = build_vocab(tmp_path, {"tokenizer.json": sentencepiece_tokenizer(normalizer=spaced)}, "gemma", 420)
    assert vocab.keys["tokenizer.ggml.add_space_prefix"] == boolean(False)
    assert any("no tokenizer.model" in note for note in vocab.notes)


def test_note_on_merges_that_scores_cannot_express(tmp_path: Path) -> None:
    """Every second merge is removed: the scores would still merge those pairs."""
    tokenizer = sentencepiece_tokenizer()
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][::2]
    notes = build_vocab(tmp_path, {"tokenizer.json": tokenizer}, "llama", 420).notes
    assert any("pairs of tokens for which tokenizer.json has no merge" in note for note in notes)


def test_no_tokenizer_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="the model has no tokenizer"):
        build_vocab(tmp_path, {})


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {}}'])
def test_invalid_tokenizer_json_is_an_error(content: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"tokenizer\.json"):
        build_vocab(tmp_path, {"tokenizer.json": content})


def test_tokenizer_json_without_merges_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="has no merges"):
        build_vocab(tmp_path, {"tokenizer.json": byte_level_tokenizer(model={"merges": []})})


def test_vocab_json_with_merges_txt(tmp_path: Path) -> None:
    """vocab.json, merges.txt and added_tokens.json without tokenizer.json, as in the first GPT-2 models."""
    vocab, merges = byte_level_model()
    added = {"<|endoftext|>": len(vocab)}
    files = {"vocab.json": vocab, "merges.txt": "#version: 0.2\n" + "\n".join(merges), "added_tokens.json": added}
    files["tokenizer_config.json"] = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    assert (
        build_vocab(tmp_path / "a", files).keys
        == build_vocab(tmp_path / "b", {"tokenizer.json": byte_level_tokenizer(), **END}).keys
    )


def test_more_tokens_than_embedding_rows_is_an_error(tmp_path: Path) -> None:
    """The case of a LoRA that added tokens without resizing the embedding."""
    added = [added_token(BASE, "<|endoftext|>"), added_token(BASE + 1, "<tool>"), added_token(BASE + 2, "</tool>")]
    with pytest.raises(
        SourceError, match=r"up to 482, but the token embedding has only 481 rows\. .*: '<tool>' \(481\)"
    ) as caught:
        build_vocab(tmp_path, {"tokenizer.json": byte_level_tokenizer(added=added)})
    assert "remove" in caught.value.hint


def test_named_token_without_an_embedding_row_is_left_out(tmp_path: Path) -> None:
    """tokenizer_config.json names a padding token that is not in the vocabulary."""
    files = {"tokenizer.json": byte_level_tokenizer(), "tokenizer_config.json": {"pad_token": "[PAD]"}}
    vocab = build_vocab(tmp_path, files)
    assert vocab.size == BASE + 1 and any("'[PAD]', which is not in the vocabulary" in note for note in vocab.notes)


def test_embedding_rows_without_a_token_become_padding(tmp_path: Path) -> None:
    vocab = build_vocab(tmp_path, {"tokenizer.json": byte_level_tokenizer(), **END}, rows=BASE + 3)
    assert vocab.keys["tokenizer.ggml.tokens"].value[-2:] == ("[PAD481]", "[PAD482]")
    assert vocab.keys["tokenizer.ggml.token_type"].value[-3:] == (3, 5, 5)
    assert vocab.notes == ("2 of 483 embedding rows have no token; they become unused tokens [PADn]",)


def test_two_ids_for_one_text_is_an_error(tmp_path: Path) -> None:
    """llama.cpp aborts when it loads such a file."""
    added = [
        added_token(BASE, "<|endoftext|>"),
        added_token(BASE + 1, "Ġend", special=False),
        added_token(BASE + 2, " end", special=False),
    ]
    with pytest.raises(SourceError, match=r"same text two ids, which llama\.cpp cannot load: ' end' \(481 and 482\)"):
        build_vocab(tmp_path, {"tokenizer.json": byte_level_tokenizer(added=added)}, rows=BASE + 3)


def test_unknown_pre_tokenizer_is_an_error(tmp_path: Path) -> None:
    """The error shows the regex and names the most similar pre-tokenizers; --pre then selects one."""
    regex = STEPS["qwen2"][0]["pattern"]["Regex"].replace(r"\p{N}|", r"\p{N}{1,7}|")
    tokenizer = byte_level_tokenizer([split_step(regex), {**GPT2_BYTE_LEVEL, "use_regex": False}])
    with pytest.raises(SourceError) as caught:
        build_vocab(tmp_path, {"tokenizer.json": tokenizer, **END})
    assert r"\p{N}{1,7}" in str(caught.value)
    assert "qwen2" in caught.value.hint and "--pre NAME" in caught.value.command_hint
    vocab = build_vocab(tmp_path, {"tokenizer.json": tokenizer, **END}, pre="qwen2")
    assert vocab.keys["tokenizer.ggml.pre"] == string("qwen2")


@pytest.mark.parametrize("step", [None, {"type": "Metaspace"}, {"type": "Whitespace"}])
def test_pre_tokenizer_without_byte_level_matches_nothing(step: Any, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="splits text in a way that no pre-tokenizer"):
        build_vocab(tmp_path, {"tokenizer.json": byte_level_tokenizer(pre_tokenizer=step)})


def test_unknown_pre_tokenizer_name_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no pre-tokenizer 'qwen22'") as caught:
        build_vocab(tmp_path, {"tokenizer.json": byte_level_tokenizer()}, pre="qwen22")
    assert "qwen2" in caught.value.hint


def test_unknown_kind_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown kind of vocabulary: 'gpt3'"):
        build_vocab(tmp_path, {}, "gpt3")
    assert {"llama", "gpt2", "spm_or_gpt2", "gemma", "bert"} <= set(KINDS)


def test_note_on_steps_that_llama_cpp_does_not_do(tmp_path: Path) -> None:
    spaced = {**GPT2_BYTE_LEVEL, "add_prefix_space": True}
    normalizer = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}
    notes = build_vocab(
        tmp_path, {"tokenizer.json": byte_level_tokenizer([spaced], normalizer=normalizer), **END}
    ).notes
    assert any("NFKC, Lowercase" in note for note in notes)
    assert any("puts a space before a text" in note for note in notes)


def test_note_that_pre_has_no_effect_on_sentencepiece(tmp_path: Path) -> None:
    vocab = build_vocab(tmp_path, {"tokenizer.model": sentencepiece_model()}, "llama", 420, pre="qwen2")
    assert vocab.keys["tokenizer.ggml.pre"] == string("default")
    assert any("--pre qwen2 has no effect" in note for note in vocab.notes)


@pytest.mark.parametrize("model", [{"type": "Unigram", "vocab": [["a", 0.0]]}, {"type": "WordPiece"}])
def test_vocabulary_of_another_algorithm_is_an_error(model: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"holds a {model['type']} vocabulary"):
        build_vocab(tmp_path, {"tokenizer.json": byte_level_tokenizer(model=model, added=[])}, "llama")


BOS = template_processor("<s>", ids={"<s>": BASE})


@pytest.mark.parametrize(
    ("family", "ignore_merges", "post_processor", "name", "adds_bos"),
    [
        ("llama", True, BOS, "llama-bpe", True),
        ("llama", False, BOS, "llama-bpe", True),
        ("llama", True, GPT2_BYTE_LEVEL, "llama-bpe", False),
        ("llama", True, None, "llama-bpe", False),
        ("llama", False, GPT2_BYTE_LEVEL, "smaug-bpe", False),
        ("phi3", False, GPT2_BYTE_LEVEL, "dbrx", False),
        ("glm4", True, GPT2_BYTE_LEVEL, "glm4", False),
        ("lfm2", True, BOS, "lfm2", True),
    ],
)
def test_name_among_those_with_equal_splits(
    family: str, ignore_merges: bool, post_processor: Any, name: str, adds_bos: bool, tmp_path: Path
) -> None:
    """For Llama 3's regex, ignore_merges and BOS decide; a key corrects the BOS where the engine's default differs."""
    tokenizer = byte_level_tokenizer(
        pre_tokenizer_steps("llama-bpe"),
        added=[added_token(BASE, "<s>")],
        post_processor=post_processor,
        model={"ignore_merges": ignore_merges},
    )
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "<s>"}}
    keys = build_vocab(tmp_path, files, settings={"model_type": family}).keys
    assert keys["tokenizer.ggml.pre"] == string(name)
    assert keys.get("tokenizer.ggml.add_bos_token") == boolean(adds_bos)


def test_first_of_several_eos_tokens_is_used(tmp_path: Path) -> None:
    vocab = build_vocab(tmp_path, {"tokenizer.json": byte_level_tokenizer()}, settings={"eos_token_id": [BASE, 7]})
    assert vocab.keys["tokenizer.ggml.eos_token_id"] == u32(BASE)
    assert any("lists the EOS tokens" in note for note in vocab.notes)


def test_negative_id_is_left_out(tmp_path: Path) -> None:
    """llama.cpp's converter fails on it."""
    vocab = build_vocab(tmp_path, {"tokenizer.json": byte_level_tokenizer()}, settings={"pad_token_id": -1})
    assert "tokenizer.ggml.padding_token_id" not in vocab.keys
    assert any("pad_token_id to -1" in note for note in vocab.notes)


def test_chat_template_file_without_a_tokenizer_config(tmp_path: Path) -> None:
    vocab = build_vocab(tmp_path, {"tokenizer.json": byte_level_tokenizer(), "chat_template.jinja": "{{ x }}"})
    assert vocab.keys["tokenizer.chat_template"] == string("{{ x }}")


def test_code_llama_and_granite_are_recognized_by_vocabulary_size(tmp_path: Path) -> None:
    code_llama = build_vocab(tmp_path / "a", {"tokenizer.model": sentencepiece_model()}, "llama", 32016)
    assert code_llama.keys["tokenizer.ggml.eot_token_id"] == u32(32010)
    granite = build_vocab(tmp_path / "b", {"tokenizer.json": byte_level_tokenizer(), **END}, "llama", 49152)
    assert granite.keys["tokenizer.ggml.add_bos_token"] == boolean(False)


def test_byte_alphabet_equals_that_of_tokenizers() -> None:
    from tokenizers import pre_tokenizers

    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert decode_token("ĠtÃ©", GPT2_BYTE_LEVEL) == " té" and decode_token("a b", GPT2_BYTE_LEVEL) == "a b"
