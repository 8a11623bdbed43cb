"""Which tokens are trained on: compared with ids written by hand, and the strategies compared with each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.byte_chats import (
    CHATML,
    IM_END,
    IM_START,
    PROMPT_THINKS,
    REASONING,
    TAGGED,
    chat,
    chatml,
    ids,
    trained,
    with_tokens,
)

from mergeforge.data import make_example
from mergeforge.data.conversation import InvalidRecord, parse_conversation
from mergeforge.data.render import make_renderer
from mergeforge.data.settings import DataSettings
from mergeforge.errors import RecipeError, SourceError
from mergeforge.tokenizer.chat_templates import NAMED

FOUR_TURNS = parse_conversation(chat("a", "b", "c", "d"))


def test_chatml_by_hand(folder: Path) -> None:
    example = make_example(chat("A?", "B!", "C?", "D!", system="S"), chatml(folder))
    start, end, newline = [IM_START], [IM_END], [10]
    asked = start + ids("user\nA?") + end + newline + start + ids("assistant\n")
    again = newline + start + ids("user\nC?") + end + newline + start + ids("assistant\n")
    system = start + ids("system\nS") + end + newline
    assert example.tokens.tolist() == system + asked + ids("B!") + end + again + ids("D!") + end + newline
    untrained = [-100] * (len(system) + len(asked))
    assert example.labels.tolist() == untrained + ids("B!") + end + [-100] * len(again) + ids("D!") + end + [-100]


def test_llama_3_by_hand_has_one_bos(folder: Path) -> None:
    """Both the template and the tokenizer write BOS."""
    tokens = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = with_tokens(folder, *tokens, eos="<|eot_id|>", template=NAMED["llama3"], bos=True)
    example = make_example(chat("Hi", "Yo"), tokenizer)
    asked = [256, 277, *ids("user"), 278, *ids("\n\nHi"), 279, 277, *ids("assistant"), 278, *ids("\n\n")]
    assert example.tokens.tolist() == [*asked, *ids("Yo"), 279]
    assert example.labels.tolist() == [-100] * len(asked) + [*ids("Yo"), 279]


def test_mistral_by_hand(folder: Path) -> None:
    tokenizer = with_tokens(folder, "[INST]", "[/INST]", template=NAMED["mistral"], bos=True)
    example = make_example(chat("Hi", "Yo"), tokenizer)
    asked = [256, 32, 277, *ids(" Hi "), 278]
    assert example.tokens.tolist() == [*asked, *ids(" Yo"), 257]
    assert trained(example) == [*ids(" Yo"), 257]


def test_plain_by_hand(tokenizer: Any) -> None:
    example = make_example(chat("Hi", "Yo", "So?", "No"), tokenizer)
    first = ids("User: Hi\nAssistant:")
    assert example.tokens.tolist() == [*first, *ids(" Yo"), 257, *ids("\nUser: So?\nAssistant:"), *ids(" No"), 257]
    assert trained(example) == [*ids(" Yo"), 257, *ids(" No"), 257]


def test_plain_starts_with_bos_if_the_tokenizer_does(folder: Path) -> None:
    example = make_example(chat("Hi", "Yo"), with_tokens(folder, bos=True))
    assert example.tokens.tolist() == [256, *ids("User: Hi\nAssistant: Yo"), 257]


def test_text_is_trained_on_in_full(folder: Path) -> None:
    """All tokens except the first, which nothing predicts."""
    example = make_example("on top", with_tokens(folder, bos=True))
    assert example.tokens.tolist() == [256, *ids("on top"), 257]
    assert example.labels.tolist() == [-100, *ids("on top"), 257]


@pytest.mark.parametrize("other", [TAGGED, PROMPT_THINKS], ids=["tags", "offsets"])
@pytest.mark.parametrize("loss_on", ["assistant", "last"])
def test_all_strategies_give_the_same_mask(folder: Path, other: str, loss_on: str) -> None:
    messages = chat(
        "What's 1?", "  It is one.\n\nSure.", "Ünïcode 日本?", "はい 😀 yes", "Why?", "So.", system="Be brief"
    )
    expected, example = (
        make_example(messages, chatml(folder, template), loss_on=loss_on) for template in (CHATML, other)
    )
    assert example.tokens.tolist() == expected.tokens.tolist()
    assert example.labels.tolist() == expected.labels.tolist()


@pytest.mark.parametrize(("template", "strategy"), [(CHATML, "prefix"), (TAGGED, "tags"), (PROMPT_THINKS, "offsets")])
def test_strategy_by_template(folder: Path, template: str, strategy: str) -> None:
    renderer = make_renderer(DataSettings(()), chatml(folder, template))
    assert renderer.render(FOUR_TURNS).strategy == strategy


def test_tags_that_mark_an_answer_in_several_pieces(folder: Path) -> None:
    """The end of the conversation has a tag of its own; the prompt before the last answer identifies its tags."""
    template = TAGGED + "{%- if not add_generation_prompt %}{% generation %}{{ '</s>' }}{% endgeneration %}{% endif -%}"
    tokenizer = chatml(folder, template)
    messages = chat("a", "b", "c", "d")
    assert trained(make_example(messages, tokenizer)) == [*ids("b"), IM_END, *ids("d"), IM_END, 257]
    assert trained(make_example(messages, tokenizer, loss_on="last")) == [*ids("d"), IM_END, 257]


def test_both_special_tokens_that_end_an_answer_are_trained_on(folder: Path) -> None:
    def with_two_endings(template: str) -> str:
        template = template.replace("'<|im_end|>\\n'", "'<|im_end|></s>\\n'")
        return template.replace("<|im_end|>' }}", "<|im_end|></s>' }}")

    expected = [*ids("b"), IM_END, 257, *ids("d"), IM_END, 257]
    for template in (CHATML, TAGGED, PROMPT_THINKS):
        assert trained(make_example(chat("a", "b", "c", "d"), chatml(folder, with_two_endings(template)))) == expected


def test_final_eos_does_not_split_the_answers(folder: Path) -> None:
    """Phi-3's template writes EOS after the last answer's end of turn."""
    template = CHATML + "{%- if not add_generation_prompt %}{{ '</s>' }}{% endif -%}"
    rendered = make_renderer(DataSettings(()), chatml(folder, template)).render(
        parse_conversation(chat("a", "b", "c", "d"))
    )
    assert rendered.strategy == "prefix"
    assert trained(rendered.examples[0]) == [*ids("b"), IM_END, *ids("d"), IM_END, 10, 257]


def test_different_ending_of_the_last_answer_splits_the_answers(folder: Path) -> None:
    """gpt-oss writes <|return|> after the last answer and <|end|> after earlier ones."""
    template = CHATML.replace("'<|im_end|>\\n'", "('</s>' if loop.last and loop.index % 2 == 0 else '<|im_end|>\\n')")
    rendered = make_renderer(DataSettings(()), chatml(folder, template)).render(
        parse_conversation(chat("a", "b", "c", "d"))
    )
    assert [trained(example) for example in rendered.examples] == [[*ids("b"), 257], [*ids("d"), 257]]


def test_tags_are_extended_through_the_end_of_turn(folder: Path) -> None:
    inside = TAGGED.replace("m['content'] + '<|im_end|>' }}{% endgeneration %}", "m['content'] }}{% endgeneration %}")
    inside = inside.replace("{{- '\\n' -}}", "{{- ('<|im_end|>' if m['role'] == 'assistant' else '') + '\\n' -}}")
    example = make_example(chat("a", "b", "c", "d"), chatml(folder, inside))
    assert trained(example) == [*ids("b"), IM_END, *ids("d"), IM_END]


def test_answer_with_its_own_final_special_token(folder: Path) -> None:
    tokenizer = with_tokens(folder, "<|im_start|>", "<|im_end|>", "</output>", template=PROMPT_THINKS)
    example = make_example(chat("a", "b</output>"), tokenizer)
    assert trained(example) == [*ids("b"), 279, IM_END]


def test_one_example_per_answer_if_the_template_rewrites_earlier_ones(folder: Path) -> None:
    """Each answer follows exactly what the model would be given: its own reasoning, but none before it."""
    renderer = make_renderer(DataSettings(()), chatml(folder, REASONING))
    first, second = "<think>\none\n</think>\n\nB", "<think>\ntwo\n</think>\n\nD"
    rendered = renderer.render(parse_conversation(chat("A", first, "C", second)))
    assert [trained(example) for example in rendered.examples] == [[*ids(first), IM_END], [*ids(second), IM_END]]
    prompt = renderer.prompt(chat("A", first, "C"))
    assert rendered.examples[1].tokens.tolist()[: len(prompt)] == prompt
    assert ids("one")[0] not in prompt, "the first reasoning is removed"
    assert rendered.strategy == "prefix, one example per answer"


def test_empty_reasoning_before_the_last_answer_is_trained_on(folder: Path) -> None:
    """Qwen3 adds it to answers without reasoning; the model has to write it."""
    template = CHATML.replace(
        "message['content']",
        "('<think></think>' if loop.last and message['role'] == 'assistant' else '') + message['content']",
    )
    rendered = make_renderer(DataSettings(()), chatml(folder, template)).render(
        parse_conversation(chat("A", "B", "C", "D"))
    )
    assert [trained(example) for example in rendered.examples] == [
        [*ids(f"<think></think>{answer}"), IM_END] for answer in "BD"
    ]


def test_single_answer_with_reasoning_is_one_example(folder: Path) -> None:
    rendered = make_renderer(DataSettings(()), chatml(folder, REASONING)).render(
        parse_conversation(chat("A", "<think>x</think>B"))
    )
    assert (len(rendered.examples), rendered.strategy) == (1, "prefix")


def test_refuses_a_template_that_rewrites_an_answer(folder: Path) -> None:
    template = PROMPT_THINKS.replace("message['content']", "message['content'] | replace('see', 'sea')")
    assert trained(make_example(chat("a", "look here"), chatml(folder, template))) == [*ids("look here"), IM_END]
    with pytest.raises(SourceError, match="cannot be masked exactly: an answer is rewritten"):
        make_example(chat("a", "see here"), chatml(folder, template))


@pytest.mark.parametrize("content", ["m.content | upper", "''", "m.content if m.role == 'user' else ''"])
def test_refuses_a_template_that_leaves_out_contents(folder: Path, content: str) -> None:
    tokenizer = chatml(folder, "{% for m in messages %}{{ " + content + " }}{% endfor %}")
    with pytest.raises(SourceError, match="leaves out or rewrites message contents"):
        make_example(chat("a", "see here"), tokenizer)
    assert trained(make_example("a text needs no template", tokenizer)) == [
        *ids("a text needs no template")[1:],
        IM_END,
    ]


def test_templates_of_vision_models_get_lists_of_parts(folder: Path) -> None:
    """Given text, some of them drop it silently and some fail."""
    expected = make_example(chat("a", "b", "c", "d"), chatml(folder))
    for parts in ("message['content']", "message['content'] | selectattr('type', 'equalto', 'text')"):
        inside = " }}{% for part in " + parts + " %}{{ part['text'] }}{% endfor %}{{ "
        template = CHATML.replace(" + message['content'] + ", inside).replace("{{- '<|im_start|>'", "{{ '<|im_start|>'")
        example = make_example(chat("a", "b", "c", "d"), chatml(folder, template))
        assert example.labels.tolist() == expected.labels.tolist()


def test_reports_what_a_template_raises(folder: Path) -> None:
    with pytest.raises(SourceError, match="take turns"):
        make_example(
            [{"role": "user", "content": "a"}, *chat("b", "c")], with_tokens(folder, template=NAMED["mistral"])
        )


def test_eos_is_added_if_the_template_ends_answers_without_a_special_token(tokenizer: Any) -> None:
    example = make_example(chat("a", "b"), tokenizer, template="alpaca")
    assert trained(example) == [*ids("b"), 257]
    example = make_example(chat("a", "b"), tokenizer, template="chatml")
    assert trained(example) == [*ids("b<|im_end|>\n"), 257], "this tokenizer reads its markers as text"


def test_trailing_questions_are_left_out(folder: Path) -> None:
    tokenizer = chatml(folder)
    assert (
        make_example(chat("a", "b", "c"), tokenizer).tokens.tolist()
        == make_example(chat("a", "b"), tokenizer).tokens.tolist()
    )


def test_train_and_weight_of_a_message(folder: Path) -> None:
    messages = chat("a", "b", "c", "d")
    tokenizer = chatml(folder)
    for key, no, yes in (("train", False, True), ("weight", 0, 1), ("training", False, True)):
        masked = [messages[0], {**messages[1], key: no}, messages[2], messages[3]]
        assert trained(make_example(masked, tokenizer)) == [*ids("d"), IM_END]
        asked = [{**messages[0], key: yes}, *messages[1:]]
        assert trained(make_example(asked, tokenizer)) == [*ids("a"), IM_END, *ids("b"), IM_END, *ids("d"), IM_END]
    with pytest.raises(SourceError, match=r"weight must be 0 or 1, not 0\.5"):
        make_example([messages[0], {**messages[1], "weight": 0.5}], tokenizer)


def test_loss_on_all(folder: Path) -> None:
    messages, tokenizer = chat("a", "b", "c", "d"), chatml(folder)
    whole = make_example(messages, tokenizer, loss_on="all")
    assert whole.labels.tolist() == [-100, *whole.tokens.tolist()[1:]]
    masked = [messages[0], {**messages[1], "train": False}, *messages[2:]]
    left_out = make_example(masked, tokenizer, loss_on="all")
    gone = [at for at in range(1, len(whole)) if left_out.labels[at] == -100]
    assert left_out.tokens[gone].tolist() == [*ids("b"), IM_END]


def test_loss_on_last_with_the_last_answer_excluded(folder: Path) -> None:
    masked = [*chat("a", "b", "c"), {"role": "assistant", "content": "d", "train": False}]
    with pytest.raises(SourceError, match="no answer to train on"):
        make_example(masked, chatml(folder), loss_on="last")


def test_tools_and_tool_calls_reach_the_template(folder: Path) -> None:
    template = "{{ tools | tojson }}" + CHATML.replace(
        "message['content']",
        "message['content'] + (message.tool_calls[0].function.arguments.x if message.tool_calls else '')",
    )
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": "42"}'}}
    row = parse_conversation(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}],
        tools='[{"name": "f"}]',
    )
    example = make_renderer(DataSettings(()), chatml(folder, template)).render(row).examples[0]
    assert trained(example) == [*ids("42"), IM_END]
    assert example.tokens.tolist()[: len(ids('[{"name": "f"}]'))] == ids('[{"name": "f"}]')


def test_templates_by_name_and_file(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(CHATML)
    by_file = make_example(chat("a", "b"), tokenizer, template=str(tmp_path / "own.jinja"))
    assert by_file.tokens.tolist() == make_example(chat("a", "b"), tokenizer, template="chatml").tokens.tolist()
    with pytest.raises(RecipeError, match="there is no chat template 'chatmk'") as error:
        make_example(chat("a", "b"), tokenizer, template="chatmk")
    assert error.value.hint == "did you mean 'chatml'?"
    with pytest.raises(RecipeError, match="the tokenizer has no chat template"):
        make_example(chat("a", "b"), tokenizer, template="tokenizer")


def test_tokenizer_without_offsets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes then work by token; sentinels cannot."""
    expected = make_example(chat("a", "b", "c", "d"), chatml(folder))
    monkeypatch.setattr(type(chatml(folder)), "is_fast", False)
    example = make_example(chat("a", "b", "c", "d"), chatml(folder))
    assert example.labels.tolist() == expected.labels.tolist()
    with pytest.raises(SourceError, match="does not report which characters"):
        make_example(chat("a", "b"), chatml(folder, PROMPT_THINKS))


def test_tags_cannot_mark_a_question(folder: Path) -> None:
    row = parse_conversation([{"role": "user", "content": "a", "train": True}, {"role": "assistant", "content": "b"}])
    with pytest.raises(InvalidRecord, match="mark only the assistant's messages"):
        make_renderer(DataSettings(()), chatml(folder, TAGGED)).render(row)
