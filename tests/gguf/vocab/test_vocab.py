"""Vocabularies by hand: what is refused and how, what is filled in, padded, rebuilt; the reader of tokenizer.model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.pre_tokenizer_splits import STEPS, steps_of
from support.tokenizer_folders import (
    GPT2_BYTE_LEVEL,
    byte_level,
    byte_level_model,
    config,
    of_sentencepiece,
    sentencepiece_model,
    special,
    split,
    template,
    tokenizer_files,
    write_model,
)

from mergeforge.errors import RecipeError, SourceError
from mergeforge.gguf.key_values import boolean, string, u32
from mergeforge.gguf.vocab import KINDS, Vocabulary, vocabulary
from mergeforge.gguf.vocab.sentencepiece import piece_model
from mergeforge.gguf.vocab.token_decoder import bytes_of_letters, decoded

BASE = 480
END = {"tokenizer_config.json": {"eos_token": "<|endoftext|>"}}


def made(folder: Path, files: dict[str, Any], kind: str = "gpt2", rows: int = BASE + 1, **more: Any) -> Vocabulary:
    """The vocabulary of a model with these files; `settings` go into its config.json."""
    settings = config("LlamaForCausalLM", rows, **more.pop("settings", {}))
    return vocabulary(tokenizer_files(write_model(folder, settings, files)), settings, kind, rows=rows, **more)


def test_pieces_are_those_of_sentencepiece(tmp_path: Path) -> None:
    import sentencepiece

    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model())
    library = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    found = piece_model(path)
    assert [one.text for one in found.pieces] == [library.IdToPiece(i) for i in range(library.vocab_size())]
    assert [one.score for one in found.pieces] == [library.GetScore(i) for i in range(library.vocab_size())]
    assert [one.kind for one in found.pieces[:4]] == [2, 3, 3, 6]
    assert (found.algorithm, found.add_dummy_prefix, found.remove_extra_whitespaces) == (2, True, False)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x0a\xff", b"{}"])
def test_what_is_no_sentencepiece_model(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"tokenizer\.model is not a sentencepiece model"):
        made(tmp_path, {"tokenizer.model": content}, "llama")


def test_rebuilt_is_as_from_the_model(tmp_path: Path) -> None:
    """The same texts and types as with tokenizer.model; the scores in the same order."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    own = [special(number, one) for number, one in enumerate(("<unk>", "<s>", "</s>"))]
    listed = {"added_tokens_decoder": {str(one["id"]): {**one, "id": 0} for one in own}}
    for one in listed["added_tokens_decoder"].values():
        del one["id"]
    config_file = {"tokenizer_config.json": {**names, **listed}}
    model = made(tmp_path / "a", {"tokenizer.model": sentencepiece_model(), **config_file}, "llama", 420).keys
    json_only = made(tmp_path / "b", {"tokenizer.json": of_sentencepiece(), **config_file}, "llama", 420).keys
    for key in ("tokens", "token_type"):
        assert model[f"tokenizer.ggml.{key}"] == json_only[f"tokenizer.ggml.{key}"]
    ranks = json_only["tokenizer.ggml.scores"].value
    merged = [i for i, score in enumerate(model["tokenizer.ggml.scores"].value) if score < 0 and ranks[i] < 0]
    by_score = sorted(merged, key=lambda i: -model["tokenizer.ggml.scores"].value[i])
    assert sorted(merged, key=lambda i: -ranks[i]) == by_score and len(merged) > 50


def test_gemma_without_its_model_is_rebuilt(tmp_path: Path) -> None:
    """llama.cpp's converter refuses it. Gemma puts no space before a text."""
    spaced = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    found = made(tmp_path, {"tokenizer.json": of_sentencepiece(normalizer=spaced)}, "gemma", 420)
    assert found.keys["tokenizer.ggml.add_space_prefix"] == boolean(False)
    assert any("no tokenizer.model" in note for note in found.notes)


def test_merges_that_scores_cannot_tell_are_noted(tmp_path: Path) -> None:
    tokenizer = of_sentencepiece()
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][::2]
    notes = made(tmp_path, {"tokenizer.json": tokenizer}, "llama", 420).notes
    assert any("merge by score that tokenizer.json has no merge for" in note for note in notes)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="the model has no tokenizer"):
        made(tmp_path, {})


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {}}'])
def test_what_is_no_tokenizer_json(content: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"tokenizer\.json"):
        made(tmp_path, {"tokenizer.json": content})


def test_no_merges(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="has no merges"):
        made(tmp_path, {"tokenizer.json": byte_level(model={"merges": []})})


def test_merges_of_a_file_of_their_own(tmp_path: Path) -> None:
    """vocab.json, merges.txt and added_tokens.json alone, as GPT-2's first models have them."""
    vocab, merges = byte_level_model()
    added = {"<|endoftext|>": len(vocab)}
    files = {"vocab.json": vocab, "merges.txt": "#version: 0.2\n" + "\n".join(merges), "added_tokens.json": added}
    files["tokenizer_config.json"] = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    assert made(tmp_path / "a", files).keys == made(tmp_path / "b", {"tokenizer.json": byte_level(), **END}).keys


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    """A LoRA that added tokens without growing the embedding."""
    added = [special(BASE, "<|endoftext|>"), special(BASE + 1, "<tool>"), special(BASE + 2, "</tool>")]
    with pytest.raises(
        SourceError, match=r"up to 482, the token embedding has only 481 rows: '<tool>' \(481\)"
    ) as caught:
        made(tmp_path, {"tokenizer.json": byte_level(added=added)})
    assert "remove" in caught.value.hint


def test_a_name_without_a_row_is_left_out(tmp_path: Path) -> None:
    """tokenizer_config.json names a padding token that no vocabulary has."""
    files = {"tokenizer.json": byte_level(), "tokenizer_config.json": {"pad_token": "[PAD]"}}
    found = made(tmp_path, files)
    assert found.size == BASE + 1 and any("'[PAD]', which is in no vocabulary" in note for note in found.notes)


def test_padding(tmp_path: Path) -> None:
    found = made(tmp_path, {"tokenizer.json": byte_level(), **END}, rows=BASE + 3)
    assert found.keys["tokenizer.ggml.tokens"].value[-2:] == ("[PAD481]", "[PAD482]")
    assert found.keys["tokenizer.ggml.token_type"].value[-3:] == (3, 5, 5)
    assert found.notes == ("2 of 483 rows of the embedding have no token: listed as unused [PADn]",)


def test_two_ids_for_one_text(tmp_path: Path) -> None:
    """llama.cpp aborts at such a file."""
    added = [special(BASE, "<|endoftext|>"), special(BASE + 1, "Ġend", on=False), special(BASE + 2, " end", on=False)]
    with pytest.raises(SourceError, match=r"1 texts with two ids: ' end' \(481 and 482\)"):
        made(tmp_path, {"tokenizer.json": byte_level(added=added)}, rows=BASE + 3)


def test_unknown_splitting(tmp_path: Path) -> None:
    """The regex is shown, the nearest names are given, and --pre helps."""
    regex = STEPS["qwen2"][0]["pattern"]["Regex"].replace(r"\p{N}|", r"\p{N}{1,7}|")
    tokenizer = byte_level([split(regex), {**GPT2_BYTE_LEVEL, "use_regex": False}])
    with pytest.raises(SourceError) as caught:
        made(tmp_path, {"tokenizer.json": tokenizer, **END})
    assert r"\p{N}{1,7}" in str(caught.value)
    assert "qwen2" in caught.value.hint and "--pre NAME" in caught.value.hint
    found = made(tmp_path, {"tokenizer.json": tokenizer, **END}, pre="qwen2")
    assert found.keys["tokenizer.ggml.pre"] == string("qwen2")


@pytest.mark.parametrize("step", [None, {"type": "Metaspace"}, {"type": "Whitespace"}])
def test_no_byte_level_is_never_taken_for_one(step: Any, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="splits text as no pre-tokenizer"):
        made(tmp_path, {"tokenizer.json": byte_level(pre_tokenizer=step)})


def test_a_name_that_llama_cpp_lacks(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no pre-tokenizer 'qwen22'") as caught:
        made(tmp_path, {"tokenizer.json": byte_level()}, pre="qwen22")
    assert "qwen2" in caught.value.hint


def test_an_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no kind of vocabulary"):
        made(tmp_path, {}, "gpt3")
    assert {"llama", "gpt2", "spm_or_gpt2", "gemma", "bert"} <= set(KINDS)


def test_what_the_engine_does_not_do_is_noted(tmp_path: Path) -> None:
    spaced = {**GPT2_BYTE_LEVEL, "add_prefix_space": True}
    normalizer = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}
    notes = made(tmp_path, {"tokenizer.json": byte_level([spaced], normalizer=normalizer), **END}).notes
    assert any("NFKC, Lowercase" in note for note in notes)
    assert any("puts a space before a text" in note for note in notes)


def test_a_name_for_sentencepiece_has_no_effect(tmp_path: Path) -> None:
    found = made(tmp_path, {"tokenizer.model": sentencepiece_model()}, "llama", 420, pre="qwen2")
    assert found.keys["tokenizer.ggml.pre"] == string("default")
    assert any("--pre qwen2 has no effect" in note for note in found.notes)


@pytest.mark.parametrize("model", [{"type": "Unigram", "vocab": [["a", 0.0]]}, {"type": "WordPiece"}])
def test_another_algorithm(model: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"is a {model['type']} vocabulary"):
        made(tmp_path, {"tokenizer.json": byte_level(model=model, added=[])}, "llama")


BOS = template("<s>", ids={"<s>": BASE})


@pytest.mark.parametrize(
    ("family", "ignoring", "post_processor", "name", "adds"),
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
def test_one_splitting_many_names(
    family: str, ignoring: bool, post_processor: Any, name: str, adds: bool, tmp_path: Path
) -> None:
    """Llama 3's regex: merges ignored or not and BOS or none decide, and a key says what the engine would not do."""
    tokenizer = byte_level(
        steps_of("llama-bpe"),
        added=[special(BASE, "<s>")],
        post_processor=post_processor,
        model={"ignore_merges": ignoring},
    )
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "<s>"}}
    keys = made(tmp_path, files, settings={"model_type": family}).keys
    assert keys["tokenizer.ggml.pre"] == string(name)
    assert keys.get("tokenizer.ggml.add_bos_token") == boolean(adds)


def test_an_eos_among_several(tmp_path: Path) -> None:
    found = made(tmp_path, {"tokenizer.json": byte_level()}, settings={"eos_token_id": [BASE, 7]})
    assert found.keys["tokenizer.ggml.eos_token_id"] == u32(BASE)
    assert any("lists the EOS tokens" in note for note in found.notes)


def test_a_negative_id_is_left_out(tmp_path: Path) -> None:
    """llama.cpp's converter stops at it."""
    found = made(tmp_path, {"tokenizer.json": byte_level()}, settings={"pad_token_id": -1})
    assert "tokenizer.ggml.padding_token_id" not in found.keys
    assert any("pad_token_id -1" in note for note in found.notes)


def test_a_template_without_a_tokenizer_config(tmp_path: Path) -> None:
    found = made(tmp_path, {"tokenizer.json": byte_level(), "chat_template.jinja": "{{ x }}"})
    assert found.keys["tokenizer.chat_template"] == string("{{ x }}")


def test_code_llama_and_granite_by_their_size(tmp_path: Path) -> None:
    found = made(tmp_path / "a", {"tokenizer.model": sentencepiece_model()}, "llama", 32016)
    assert found.keys["tokenizer.ggml.eot_token_id"] == u32(32010)
    found = made(tmp_path / "b", {"tokenizer.json": byte_level(), **END}, "llama", 49152)
    assert found.keys["tokenizer.ggml.add_bos_token"] == boolean(False)


def test_letters_of_bytes() -> None:
    """As the tokenizers library has them."""
    from tokenizers import pre_tokenizers

    assert set(bytes_of_letters()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert decoded("ĠtÃ©", GPT2_BYTE_LEVEL) == " té" and decoded("a b", GPT2_BYTE_LEVEL) == "a b"
