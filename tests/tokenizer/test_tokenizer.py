"""The output's tokens, ids, files and rows against hand-computed ones, and refused settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_llamas import TEXTS, files_of, loaded, maps, planned, write, written

from mergeforge.errors import MergeforgeError, RecipeError, SourceError
from mergeforge.io.aux_files import InMemoryFile
from mergeforge.tokenizer import (
    ModelToken,
    ModelTokenizer,
    TokenizerPlan,
    TokenizerSettings,
    TokenSetting,
    Zero,
    chat_template,
    plan_tokenizer,
    remap_special_ids,
    with_chat_template,
)


def made(name: str, value: Any) -> InMemoryFile:
    return InMemoryFile(name, (value if isinstance(value, str) else json.dumps(value)).encode())


def words(label: str, vocab: str, added: str = "", rows: int = 0, **config: Any) -> ModelTokenizer:
    """A model whose tokenizer knows these words, in this order; `added` ones are special."""
    ids = {word: number for number, word in enumerate(vocab.split())}
    entries = [{"id": len(ids) + at, "content": word, "special": True} for at, word in enumerate(added.split())]
    tokenizer = {"added_tokens": entries, "model": {"type": "WordLevel", "vocab": ids, "unk_token": "a"}}
    files = {"tokenizer.json": made("tokenizer.json", tokenizer)}
    files |= {"tokenizer_config.json": made("tokenizer_config.json", config)}
    return ModelTokenizer(label, files, rows or len(ids) + len(entries))


def plan(*models: ModelTokenizer, base: str | None = None, **settings: Any) -> TokenizerPlan:
    return plan_tokenizer(TokenizerSettings(**settings), models, base)


def tokens(plan: TokenizerPlan) -> dict[str, int]:
    """The output's tokens as its tokenizer.json lists them."""
    value = json.loads(plan.files["tokenizer.json"].read_text())
    return value["model"]["vocab"] | {one["content"]: one["id"] for one in value["added_tokens"]}


def rows(plan: TokenizerPlan, label: str) -> dict[str, list[int]]:
    return {other: one.tolist() for other, one in plan.row_sources[label].sources.items()}


A, B, C = words("a", "x y z"), words("b", "z w v", "<b>"), words("c", "q w x", "<c> <b>")


def test_union_follows_the_recipe_order_then_the_ids() -> None:
    assert list(tokens(plan(A, B, C))) == ["x", "y", "z", "w", "v", "<b>", "q", "<c>"]
    assert list(tokens(plan(A, C, B))) == ["x", "y", "z", "q", "w", "<c>", "<b>", "v"]
    assert list(tokens(plan(A, B, C, base="c"))) == ["q", "w", "x", "<c>", "<b>", "y", "z", "v"]
    assert list(tokens(plan(A, B, C)).values()) == list(range(8))


def test_missing_rows_come_from_the_base_or_the_only_model_or_the_mean() -> None:
    """x y z w v <b> q <c>: w and <b> are b's and c's, v is b's alone, x a's and c's."""
    found = plan(A, B, C)
    assert rows(found, "a") == {
        "a": [0, 1, 2, -1, -1, -1, -1, -1],
        "b": [-1, -1, -1, 1, 2, 3, -1, -1],
        "c": [-1, -1, -1, 1, -1, 4, 0, 3],
    }
    assert rows(found, "b")["a"] == [0, 1, -1, -1, -1, -1, -1, -1]
    assert rows(found, "b")["c"] == [2, -1, -1, -1, -1, -1, 0, 3]
    based = plan(A, B, C, base="b")  # z w v <b> x y q <c>
    assert rows(based, "a") == {
        "a": [2, -1, -1, -1, 0, 1, -1, -1],
        "b": [-1, 1, 2, 3, -1, -1, -1, -1],
        "c": [-1, -1, -1, -1, -1, -1, 0, 3],
    }


def test_notes_tell_where_rows_come_from() -> None:
    notes = plan(A, B, C, tokens={"new": TokenSetting(Zero())}).notes
    assert "tokenizer: 3 tokens of a" in notes
    assert "tokenizer: 3 more tokens from b" in notes
    assert "tokenizer: 2 more tokens from c" in notes
    assert "tokenizer: 1 more token from the recipe" in notes
    assert (
        "embedding rows of a: 3 of its own, 1 from b, 2 from c, 2 averaged over several models, 1 set to zero" in notes
    )


def test_equal_tokenizers_keep_every_file_and_row() -> None:
    one, other = words("one", "x y z", rows=8), words("other", "x y z", rows=8)
    found = plan(one, other)
    assert found.files["tokenizer.json"] is one.files["tokenizer.json"]
    assert (found.size, rows(found, "one"), rows(found, "other")) == (8, {"one": [*range(8)]}, {"other": [*range(8)]})


def test_padded_vocabulary_stays_padded_and_new_tokens_use_its_rows() -> None:
    """Rows 4 to 7 of the base have no token; the other model has tokens there, or no rows."""
    found = plan(words("base", "a b c", "<s>", rows=8), words("other", "a b c d", "<s>", rows=7), base="base")
    assert tokens(found) == {"a": 0, "b": 1, "c": 2, "<s>": 3, "d": 4}
    assert found.size == 8
    assert rows(found, "base") == {"base": [0, 1, 2, 3, -1, 5, 6, 7], "other": [-1, -1, -1, -1, 3, -1, -1, -1]}
    assert rows(found, "other") == {"base": [-1] * 7 + [7], "other": [0, 1, 2, 4, 3, 5, 6, -1]}


def test_pad_to_multiple_of_replaces_the_padding_of_the_base() -> None:
    found = plan(words("base", "a b c", rows=8), base="base", source="base", pad_to_multiple_of=4)
    assert (found.size, found.row_sources["base"].padding) == (4, 1)
    assert rows(found, "base") == {"base": [0, 1, 2, -1]}


def test_settings_of_single_tokens() -> None:
    settings = {
        "<b>": TokenSetting("c"),
        "x": TokenSetting(Zero(), force=True),
        "y": TokenSetting(ModelToken("b", token="<b>")),
        "new": TokenSetting(ModelToken("a", token_id=2)),
        "q": TokenSetting(None),
    }
    found = plan(A, B, C, tokens=settings)  # x y z w v <b> q <c> new
    assert rows(found, "a") == {
        "a": [-1, 1, 2, -1, -1, -1, -1, -1, 2],
        "b": [-1, -1, -1, 1, 2, -1, -1, -1, -1],
        "c": [-1, -1, -1, 1, -1, 4, 0, 3, -1],
    }
    assert rows(found, "b")["b"] == [-1, 3, 0, 1, 2, 3, -1, -1, -1]


def test_new_tokens_are_added_to_a_base() -> None:
    found = plan(A, B, base="a", source="base", tokens={"<b>": TokenSetting("b"), "new": TokenSetting(None)})
    assert tokens(found) == {"x": 0, "y": 1, "z": 2, "<b>": 3, "new": 4}
    assert rows(found, "a") == {"a": [0, 1, 2, -1, -1], "b": [-1, -1, -1, 3, -1]}
    assert "no model has an embedding row for 'new': set to zero" in found.notes


def test_tokenizer_only_model_gives_rows_only_where_the_recipe_says() -> None:
    """o has x and z, too: a keeps its own, b takes a's x, not the mean; o's own word is nobody's."""
    value = json.loads(words("o", "z o x", "<o>").files["tokenizer.json"].read_text())
    other = ModelTokenizer("o", {"tokenizer.json": made("", value)}, 4, merged=False)
    assert plan(A, B, other).row_sources["a"].size == plan(A, B).row_sources["a"].size == 6
    found = plan(A, B, other, source="o", tokens={"<o>": TokenSetting("o")})
    assert tokens(found) == {"z": 0, "o": 1, "x": 2, "<o>": 3}
    assert rows(found, "b") == {"a": [-1, -1, 0, -1], "b": [0, -1, -1, -1], "o": [-1, -1, -1, 3]}
    assert "no model has an embedding row for 'o': set to zero" in found.notes


def test_added_token_has_the_flags_of_the_first_model() -> None:
    """`w` is a word of b, and an added token of d: so it is one in the output, too."""
    d = words("d", "q", "w")
    value = json.loads(plan(A, B, d).files["tokenizer.json"].read_text())
    flags = {one["content"]: one["special"] for one in value["added_tokens"]}
    assert flags == {"w": True, "v": False, "<b>": True, "q": False}


def test_tokens_without_a_row_count_as_missing() -> None:
    """b's embedding has no row for <b>: it is left out of b, and taken from c; unless b names it."""
    lost = words("b", "z w v", "<b>", rows=3)
    assert "<b>" not in tokens(plan(lost, A))
    assert "b has no embedding row for '<b>': left out of the tokenizer" in plan(lost, A).notes
    assert rows(plan(C, lost), "b")["c"][tokens(plan(C, lost))["<b>"]] == 4
    named = plan(words("b", "z w v", "<b>", rows=3, pad_token="<b>"), A)
    assert tokens(named)["<b>"] == 3
    assert named.size == 6


def test_tokens_named_only_in_tokenizer_config_are_added() -> None:
    one = words("one", "x y", pad_token={"content": "<pad>"}, rows=3, additional_special_tokens=["<more>"])
    found = plan(one, A)
    assert tokens(found) == {"x": 0, "y": 1, "<pad>": 2, "<more>": 3, "z": 4}
    assert rows(found, "one")["one"] == [0, 1, 2, -1, -1]


def test_special_ids_follow_the_source_tokenizer() -> None:
    one = words("one", "x y", "<s> </s>", bos_token="<s>", eos_token="</s>")
    other = words("other", "y z x w", "<end> <s>", bos_token="<s>", eos_token="<end>")
    found = plan(one, other, base="one", source="other")
    assert found.special_ids == {"bos_token_id": 5, "eos_token_id": 4}
    config = {"vocab_size": 4, "bos_token_id": 2, "eos_token_id": [3, 1], "pad_token_id": 3, "sep_token_id": None}
    moved = {"vocab_size": 4, "bos_token_id": 5, "eos_token_id": [4, 0], "sep_token_id": None}
    assert remap_special_ids(config, found, "one") == moved
    assert remap_special_ids({"text_config": config}, found, "one") == {"text_config": moved}
    forced = plan(one, other, base="one", tokens={"</s>": TokenSetting(Zero(), force=True)})
    assert remap_special_ids(config, forced, "one") == config
    assert forced.special_ids == {}


def test_files_that_list_added_tokens_are_rewritten_and_others_copied() -> None:
    one = words("one", "x y", "<s>", added_tokens_decoder={"2": {"content": "<s>", "special": True}}, bos_token="<s>")
    more = {name: made(name, {}) for name in ("added_tokens.json", "special_tokens_map.json", "config.json")}
    more |= {name: made(name, "?") for name in ("tokenizer.model", "merges.txt", "README.md", "tekken.json")}
    found = plan(ModelTokenizer("one", {**one.files, **more}, 3), A)
    kept = {"special_tokens_map.json", "tokenizer.model", "merges.txt"}
    changed = {"tokenizer.json", "tokenizer_config.json", "added_tokens.json"}
    assert found.files.keys() == kept | changed
    assert all(found.files[name] is more[name] for name in kept)
    config = json.loads(found.files["tokenizer_config.json"].read_text())
    assert [one["content"] for one in config["added_tokens_decoder"].values()] == ["<s>", "z"]
    assert config["bos_token"] == "<s>"
    assert json.loads(found.files["added_tokens.json"].read_text()) == {"<s>": 2, "z": 3}
    assert "tekken.json is left out, because it lacks the new tokens" in found.notes


def test_vocab_json_suffices_if_no_token_is_added() -> None:
    files = {"vocab.json": made("vocab.json", {"x": 0, "w": 1}), "added_tokens.json": made("", {"<e>": 3, "<s>": 2})}
    old = ModelTokenizer("old", files, 4)
    assert tokens(plan(A, old)) == {"x": 0, "y": 1, "z": 2, "w": 3, "<s>": 4, "<e>": 5}
    assert plan(A, old, source="old").files == files
    with pytest.raises(SourceError, match=r"^old has no tokenizer.json to add tokens to \('y', 'z'\)"):
        plan(old, A)


def test_union_loads_in_transformers_with_every_special_token(three: list[Path], tmp_path: Path) -> None:
    found = planned(three)
    tokenizer = loaded(written(found, tmp_path))
    assert tokenizer.get_vocab() == tokens(found)
    assert len(tokenizer) == found.size
    assert tokenizer.convert_ids_to_tokens(tokenizer("<|im_end|><tool>").input_ids) == ["<|im_end|>", "<tool>"]
    for text in TEXTS["english"]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_rows_move_with_their_tokens(three: list[Path]) -> None:
    """Every token that a model has keeps its embedding in that model."""
    found = planned(three)
    before, after = tokens(found), maps(three, found)
    for folder in three:
        own = maps([folder], planned([folder]))[folder.name]
        for token, number in tokens(planned([folder])).items():
            assert after[folder.name][before[token]].equal(own[number])


# refused

BROKEN: dict[str, tuple[type[MergeforgeError], str, Mapping[str, Any], list[ModelTokenizer]]] = {
    "source": (RecipeError, "tokenizer source 'd' is not a model of this merge", {"source": "d"}, [A, B]),
    "padding": (RecipeError, "pad_to_multiple_of must be at least 1, not 0", {"pad_to_multiple_of": 0}, [A]),
    "empty": (RecipeError, "a token cannot be an empty string", {"tokens": {"": TokenSetting(Zero())}}, [A]),
    "model": (
        RecipeError,
        "'x' takes its row from 'd', which is not a model of this merge",
        {"tokens": {"x": TokenSetting("d")}},
        [A],
    ),
    "token": (RecipeError, "tokenizer.tokens: a has no token 'w'", {"tokens": {"w": TokenSetting("a")}}, [A, B]),
    "forced": (RecipeError, "'x' has 'force' but no source", {"tokens": {"x": TokenSetting(None, True)}}, [A]),
    "other token": (
        RecipeError,
        "'x' takes its row from 'k', but a has no such token",
        {"tokens": {"x": TokenSetting(ModelToken("a", token="k"))}},
        [A],
    ),
    "token id": (
        RecipeError,
        "'x' takes its row from token_id 3, but a has 3 rows",
        {"tokens": {"x": TokenSetting(ModelToken("a", token_id=3))}},
        [A],
    ),
    "rows": (
        SourceError,
        r"^d: its tokenizer has more tokens than its embedding has rows \(2\): 'z' \(2\)",
        {},
        [A, words("d", "x y z", rows=2)],
    ),
    "missing": (SourceError, "^d has no tokenizer.json$", {}, [A, ModelTokenizer("d", {}, 3)]),
    "sentencepiece": (
        SourceError,
        "^d has no tokenizer.json, only tokenizer.model$",
        {},
        [A, ModelTokenizer("d", {"tokenizer.model": made("tokenizer.model", "?")}, 3)],
    ),
    "no JSON": (
        SourceError,
        "^tokenizer.json cannot be read as JSON",
        {},
        [ModelTokenizer("d", {"tokenizer.json": made("tokenizer.json", "version https")}, 3)],
    ),
    "no tokens": (
        SourceError,
        "^tokenizer.json contains no tokens",
        {},
        [ModelTokenizer("d", {"tokenizer.json": made("tokenizer.json", {"model": {}})}, 3)],
    ),
    "bad ids": (
        SourceError,
        "^tokenizer.json: its vocabulary cannot be read",
        {},
        [ModelTokenizer("d", {"tokenizer.json": made("tokenizer.json", {"model": {"vocab": {"x": None}}})}, 3)],
    ),
    "negative ids": (
        SourceError,
        "^tokenizer.json has tokens with negative ids",
        {},
        [ModelTokenizer("d", {"tokenizer.json": made("tokenizer.json", {"model": {"vocab": {"x": -1}}})}, 3)],
    ),
    "holes": (
        SourceError,
        r"^d: several tokens share one id: 'b' and '<s>' \(2\)",
        {},
        [
            ModelTokenizer(
                "d",
                {
                    "tokenizer.json": made(
                        "", {"model": {"vocab": {"a": 0, "b": 2}}, "added_tokens": [{"content": "<s>"}]}
                    )
                },
                3,
            )
        ],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_mistakes_are_refused_with_a_message(name: str) -> None:
    kind, message, settings, models = BROKEN[name]
    with pytest.raises(kind, match=message):
        plan_tokenizer(TokenizerSettings(**settings), models, None)


def test_unknown_base_is_refused() -> None:
    with pytest.raises(RecipeError, match="base_model 'z' is not a model of this merge"):
        plan(A, B, base="z")


def test_large_union_uses_int32_arrays() -> None:
    """100,000 tokens in each of two models, half of them shared: every row has one place."""
    one = words("one", " ".join(f"t{at}" for at in range(100_000)))
    two = words("two", " ".join(f"t{at}" for at in range(149_999, 49_999, -1)))
    found = plan(one, two)
    assert found.size == 150_000
    assert {rows.dtype for pick in found.row_sources.values() for rows in pick.sources.values()} == {np.dtype("int32")}
    assert sum((rows >= 0).sum() for rows in found.row_sources["one"].sources.values()) == 150_000


# chat templates


def chat_model(label: str, template: Any = None, jinja: str | None = None) -> ModelTokenizer:
    files = {"tokenizer_config.json": made("tokenizer_config.json", {"chat_template": template} if template else {})}
    return ModelTokenizer(label, files | ({"chat_template.jinja": made("", jinja)} if jinja else {}), 3)


def test_auto_takes_the_most_frequent_template_and_the_first_on_a_tie() -> None:
    named = [{"name": "tool_use", "template": "{{ no }}"}, {"name": "default", "template": "{{ b }}"}]
    a, b, c, none = (
        chat_model("a", "{{ a }}"),
        chat_model("b", named),
        chat_model("c", jinja="{{ b }}\n"),
        chat_model("none"),
    )
    assert chat_template("auto", [a, b, c, none]) == "{{ b }}"
    assert chat_template("auto", [none, b, a]) == "{{ b }}"
    assert chat_template("auto", [none]) is None


def test_templates_by_name_or_as_jinja() -> None:
    assert "<|im_start|>" in (chat_template("chatml", []) or "")
    assert chat_template("{{ messages }}", []) == "{{ messages }}"
    with pytest.raises(RecipeError, match="unknown chat template 'chatlm'") as caught:
        chat_template("chatlm", [])
    assert caught.value.hint == "did you mean 'chatml'?"


TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "Why?"},
]
RENDERED = {
    "alpaca": "Be kind.\n\n### Instruction:\n1 + 1?\n\n### Response:\n2\n\n### Instruction:\nWhy?\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n"
    "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|]Be kind.[|endofturn|]\n[|user|]1 + 1?\n"
    "[|assistant|]2[|endofturn|]\n[|user|]Why?\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n1 + 1?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n2<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Be kind.\n\n1 + 1? [/INST] 2</s> [INST] Why? [/INST]",
}


@pytest.mark.parametrize("name", RENDERED)
def test_named_templates_render_in_their_format(name: str, tmp_path: Path) -> None:
    """As the formats' makers describe them, through the file that the output gets."""
    folder = write(tmp_path / "m", "english", chat_template="{{ old }}")
    files = with_chat_template(files_of(folder), chat_template(name, []) or "")
    assert "chat_template" not in json.loads(files["tokenizer_config.json"].read_text())
    plan = TokenizerPlan("", {key: files[key] for key in files if "token" in key or "chat" in key}, 0, {}, {}, ())
    tokenizer = loaded(written(plan, tmp_path / "out"))
    assert tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) == RENDERED[name]


def test_recipe_template_replaces_all_others() -> None:
    names = ("chat_template.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "tokenizer.json")
    files = with_chat_template({name: made(name, {}) for name in names}, "{{ mine }}")
    assert files.keys() == {"chat_template.jinja", "tokenizer.json"}
    assert files["chat_template.jinja"].read_text() == "{{ mine }}"
