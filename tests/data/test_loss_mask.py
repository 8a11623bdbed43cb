"""Which tokens are trained on: against ids written by hand, and the three ways against one another."""

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

from mergeforge.data import example
from mergeforge.data.conversation import BadRow, conversation
from mergeforge.data.render import make_renderer
from mergeforge.data.settings import DataSettings
from mergeforge.errors import RecipeError, SourceError
from mergeforge.tokenizer.chat_templates import NAMED


def test_chatml_by_hand(folder: Path) -> None:
    found = example(chat("A?", "B!", "C?", "D!", system="S"), chatml(folder))
    start, end, newline = [IM_START], [IM_END], [10]
    asked = start + ids("user\nA?") + end + newline + start + ids("assistant\n")
    again = newline + start + ids("user\nC?") + end + newline + start + ids("assistant\n")
    system = start + ids("system\nS") + end + newline
    assert found.tokens.tolist() == system + asked + ids("B!") + end + again + ids("D!") + end + newline
    untrained = [-100] * (len(system) + len(asked))
    assert found.labels.tolist() == untrained + ids("B!") + end + [-100] * len(again) + ids("D!") + end + [-100]


def test_llama_3_by_hand_has_one_bos(folder: Path) -> None:
    """The template writes BOS, and so does the tokenizer before any text."""
    tokens = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = with_tokens(folder, *tokens, eos="<|eot_id|>", template=NAMED["llama3"], bos=True)
    found = example(chat("Hi", "Yo"), tokenizer)
    asked = [256, 277, *ids("user"), 278, *ids("\n\nHi"), 279, 277, *ids("assistant"), 278, *ids("\n\n")]
    assert found.tokens.tolist() == [*asked, *ids("Yo"), 279]
    assert found.labels.tolist() == [-100] * len(asked) + [*ids("Yo"), 279]


def test_mistral_by_hand(folder: Path) -> None:
    tokenizer = with_tokens(folder, "[INST]", "[/INST]", template=NAMED["mistral"], bos=True)
    found = example(chat("Hi", "Yo"), tokenizer)
    asked = [256, 32, 277, *ids(" Hi "), 278]
    assert found.tokens.tolist() == [*asked, *ids(" Yo"), 257]
    assert trained(found) == [*ids(" Yo"), 257]


def test_plain_by_hand(tokenizer: Any) -> None:
    found = example(chat("Hi", "Yo", "So?", "No"), tokenizer)
    first = ids("User: Hi\nAssistant:")
    assert found.tokens.tolist() == [*first, *ids(" Yo"), 257, *ids("\nUser: So?\nAssistant:"), *ids(" No"), 257]
    assert trained(found) == [*ids(" Yo"), 257, *ids(" No"), 257]


def test_plain_puts_bos_first_where_the_tokenizer_does(folder: Path) -> None:
    found = example(chat("Hi", "Yo"), with_tokens(folder, bos=True))
    assert found.tokens.tolist() == [256, *ids("User: Hi\nAssistant: Yo"), 257]


def test_a_text_is_trained_on_whole(folder: Path) -> None:
    """All but the first token, which nothing predicts."""
    found = example("on top", with_tokens(folder, bos=True))
    assert found.tokens.tolist() == [256, *ids("on top"), 257]
    assert found.labels.tolist() == [-100, *ids("on top"), 257]


@pytest.mark.parametrize("other", [TAGGED, PROMPT_THINKS], ids=["tags", "offsets"])
@pytest.mark.parametrize("loss_on", ["assistant", "last"])
def test_every_way_gives_the_same_mask(folder: Path, other: str, loss_on: str) -> None:
    messages = chat(
        "What's 1?", "  It is one.\n\nSure.", "Ünïcode 日本?", "はい 😀 yes", "Why?", "So.", system="Be brief"
    )
    want, found = (example(messages, chatml(folder, one), loss_on=loss_on) for one in (CHATML, other))
    assert found.tokens.tolist() == want.tokens.tolist()
    assert found.labels.tolist() == want.labels.tolist()


@pytest.mark.parametrize(("template", "way"), [(CHATML, "prefix"), (TAGGED, "tags"), (PROMPT_THINKS, "offsets")])
def test_the_ways_that_are_taken(folder: Path, template: str, way: str) -> None:
    renderer = make_renderer(DataSettings(()), chatml(folder, template))
    assert renderer.render(conversation(chat("a", "b", "c", "d"))).way == way


def test_tags_that_mark_an_answer_in_several_pieces(folder: Path) -> None:
    """As where the end of the whole is marked on its own; the last answer is known by what was asked before it."""
    template = TAGGED + "{%- if not add_generation_prompt %}{% generation %}{{ '</s>' }}{% endgeneration %}{% endif -%}"
    tokenizer = chatml(folder, template)
    messages = chat("a", "b", "c", "d")
    assert trained(example(messages, tokenizer)) == [*ids("b"), IM_END, *ids("d"), IM_END, 257]
    assert trained(example(messages, tokenizer, loss_on="last")) == [*ids("d"), IM_END, 257]


def test_two_special_tokens_that_end_an_answer_are_both_trained(folder: Path) -> None:
    def spelled(template: str) -> str:
        template = template.replace("'<|im_end|>\\n'", "'<|im_end|></s>\\n'")
        return template.replace("<|im_end|>' }}", "<|im_end|></s>' }}")

    want = [*ids("b"), IM_END, 257, *ids("d"), IM_END, 257]
    for template in (CHATML, TAGGED, PROMPT_THINKS):
        assert trained(example(chat("a", "b", "c", "d"), chatml(folder, spelled(template)))) == want


def test_what_ends_the_whole_does_not_part_the_answers(folder: Path) -> None:
    """Phi-3 writes EOS after the last answer's end of turn; Mistral's and others' end every answer alike."""
    template = CHATML + "{%- if not add_generation_prompt %}{{ '</s>' }}{% endif -%}"
    found = make_renderer(DataSettings(()), chatml(folder, template)).render(conversation(chat("a", "b", "c", "d")))
    assert found.way == "prefix"
    assert trained(found.examples[0]) == [*ids("b"), IM_END, *ids("d"), IM_END, 10, 257]


def test_another_end_for_the_last_answer_parts_them(folder: Path) -> None:
    """As gpt-oss does it: <|return|> after the last answer, <|end|> after those before."""
    template = CHATML.replace("'<|im_end|>\\n'", "('</s>' if loop.last and loop.index % 2 == 0 else '<|im_end|>\\n')")
    found = make_renderer(DataSettings(()), chatml(folder, template)).render(conversation(chat("a", "b", "c", "d")))
    assert [trained(one) for one in found.examples] == [[*ids("b"), 257], [*ids("d"), 257]]


def test_tags_without_the_end_of_turn_get_it(folder: Path) -> None:
    inside = TAGGED.replace("m['content'] + '<|im_end|>' }}{% endgeneration %}", "m['content'] }}{% endgeneration %}")
    inside = inside.replace("{{- '\\n' -}}", "{{- ('<|im_end|>' if m['role'] == 'assistant' else '') + '\\n' -}}")
    found = example(chat("a", "b", "c", "d"), chatml(folder, inside))
    assert trained(found) == [*ids("b"), IM_END, *ids("d"), IM_END]


def test_an_answer_that_ends_in_another_special_token_is_trained_to_its_end(folder: Path) -> None:
    tokenizer = with_tokens(folder, "<|im_start|>", "<|im_end|>", "</output>", template=PROMPT_THINKS)
    found = example(chat("a", "b</output>"), tokenizer)
    assert trained(found) == [*ids("b"), 279, IM_END]


def test_answers_alone_where_the_template_rewrites_earlier_ones(folder: Path) -> None:
    """Each answer is trained on after just what the model would be given: reasoning in itself, none before it."""
    renderer = make_renderer(DataSettings(()), chatml(folder, REASONING))
    first, second = "<think>\none\n</think>\n\nB", "<think>\ntwo\n</think>\n\nD"
    found = renderer.render(conversation(chat("A", first, "C", second)))
    assert [trained(one) for one in found.examples] == [[*ids(first), IM_END], [*ids(second), IM_END]]
    given = renderer.prompt(chat("A", first, "C"))
    assert found.examples[1].tokens.tolist()[: len(given)] == given
    assert ids("one")[0] not in given, "the first reasoning is not there any more"
    assert found.way == "prefix, each answer apart"


def test_an_empty_thought_before_the_last_answer_alone(folder: Path) -> None:
    """As Qwen3 does it for answers without reasoning; the model has to write it, so it is trained on."""
    template = CHATML.replace(
        "message['content']",
        "('<think></think>' if loop.last and message['role'] == 'assistant' else '') + message['content']",
    )
    found = make_renderer(DataSettings(()), chatml(folder, template)).render(conversation(chat("A", "B", "C", "D")))
    assert [trained(one) for one in found.examples] == [[*ids(f"<think></think>{one}"), IM_END] for one in "BD"]


def test_one_answer_with_reasoning_is_one_example(folder: Path) -> None:
    found = make_renderer(DataSettings(()), chatml(folder, REASONING)).render(
        conversation(chat("A", "<think>x</think>B"))
    )
    assert (len(found.examples), found.way) == (1, "prefix")


def test_a_template_that_rewrites_an_answer_is_refused(folder: Path) -> None:
    template = PROMPT_THINKS.replace("message['content']", "message['content'] | replace('see', 'sea')")
    assert trained(example(chat("a", "look here"), chatml(folder, template))) == [*ids("look here"), IM_END]
    with pytest.raises(SourceError, match="cannot be masked exactly: an answer is rewritten"):
        example(chat("a", "see here"), chatml(folder, template))


@pytest.mark.parametrize("content", ["m.content | upper", "''", "m.content if m.role == 'user' else ''"])
def test_a_template_that_leaves_out_what_messages_say_is_refused(folder: Path, content: str) -> None:
    tokenizer = chatml(folder, "{% for m in messages %}{{ " + content + " }}{% endfor %}")
    with pytest.raises(SourceError, match="leaves out or rewrites what messages say"):
        example(chat("a", "see here"), tokenizer)
    assert trained(example("a text needs no template", tokenizer)) == [*ids("a text needs no template")[1:], IM_END]


def test_templates_of_vision_models_get_their_lists_of_parts(folder: Path) -> None:
    """Given text, some leave it out without a word, and some break."""
    want = example(chat("a", "b", "c", "d"), chatml(folder))
    for parts in ("message['content']", "message['content'] | selectattr('type', 'equalto', 'text')"):
        inside = " }}{% for part in " + parts + " %}{{ part['text'] }}{% endfor %}{{ "
        template = CHATML.replace(" + message['content'] + ", inside).replace("{{- '<|im_start|>'", "{{ '<|im_start|>'")
        found = example(chat("a", "b", "c", "d"), chatml(folder, template))
        assert found.labels.tolist() == want.labels.tolist()


def test_what_a_template_raises_is_told(folder: Path) -> None:
    with pytest.raises(SourceError, match="take turns"):
        example([{"role": "user", "content": "a"}, *chat("b", "c")], with_tokens(folder, template=NAMED["mistral"]))


def test_eos_where_the_template_ends_answers_with_no_special_token(tokenizer: Any) -> None:
    found = example(chat("a", "b"), tokenizer, template="alpaca")
    assert trained(found) == [*ids("b"), 257]
    found = example(chat("a", "b"), tokenizer, template="chatml")
    assert trained(found) == [*ids("b<|im_end|>\n"), 257], "its marks are text to this tokenizer"


def test_trailing_questions_are_left_out(folder: Path) -> None:
    tokenizer = chatml(folder)
    assert example(chat("a", "b", "c"), tokenizer).tokens.tolist() == example(chat("a", "b"), tokenizer).tokens.tolist()


def test_train_and_weight_of_a_message_are_honoured(folder: Path) -> None:
    messages = chat("a", "b", "c", "d")
    tokenizer = chatml(folder)
    for key, no, yes in (("train", False, True), ("weight", 0, 1), ("training", False, True)):
        masked = [messages[0], {**messages[1], key: no}, messages[2], messages[3]]
        assert trained(example(masked, tokenizer)) == [*ids("d"), IM_END]
        asked = [{**messages[0], key: yes}, *messages[1:]]
        assert trained(example(asked, tokenizer)) == [*ids("a"), IM_END, *ids("b"), IM_END, *ids("d"), IM_END]
    with pytest.raises(SourceError, match=r"weight must be 0 or 1, not 0\.5"):
        example([messages[0], {**messages[1], "weight": 0.5}], tokenizer)


def test_loss_on_all(folder: Path) -> None:
    messages, tokenizer = chat("a", "b", "c", "d"), chatml(folder)
    whole = example(messages, tokenizer, loss_on="all")
    assert whole.labels.tolist() == [-100, *whole.tokens.tolist()[1:]]
    masked = [messages[0], {**messages[1], "train": False}, *messages[2:]]
    left_out = example(masked, tokenizer, loss_on="all")
    gone = [at for at in range(1, len(whole)) if left_out.labels[at] == -100]
    assert left_out.tokens[gone].tolist() == [*ids("b"), IM_END]


def test_loss_on_last_with_the_last_answer_masked_is_nothing(folder: Path) -> None:
    masked = [*chat("a", "b", "c"), {"role": "assistant", "content": "d", "train": False}]
    with pytest.raises(SourceError, match="no answer to train on"):
        example(masked, chatml(folder), loss_on="last")


def test_tools_and_calls_reach_the_template(folder: Path) -> None:
    template = "{{ tools | tojson }}" + CHATML.replace(
        "message['content']",
        "message['content'] + (message.tool_calls[0].function.arguments.x if message.tool_calls else '')",
    )
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": "42"}'}}
    row = conversation(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}],
        tools='[{"name": "f"}]',
    )
    found = make_renderer(DataSettings(()), chatml(folder, template)).render(row).examples[0]
    assert trained(found) == [*ids("42"), IM_END]
    assert found.tokens.tolist()[: len(ids('[{"name": "f"}]'))] == ids('[{"name": "f"}]')


def test_templates_by_name_and_file(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(CHATML)
    by_file = example(chat("a", "b"), tokenizer, template=str(tmp_path / "own.jinja"))
    assert by_file.tokens.tolist() == example(chat("a", "b"), tokenizer, template="chatml").tokens.tolist()
    with pytest.raises(RecipeError, match="there is no chat template 'chatmk'") as error:
        example(chat("a", "b"), tokenizer, template="chatmk")
    assert error.value.hint == "did you mean 'chatml'?"
    with pytest.raises(RecipeError, match="has none of its own"):
        example(chat("a", "b"), tokenizer, template="tokenizer")


def test_a_tokenizer_without_offsets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes are then told apart by their tokens; marks cannot be."""
    want = example(chat("a", "b", "c", "d"), chatml(folder))
    monkeypatch.setattr(type(chatml(folder)), "is_fast", False)
    found = example(chat("a", "b", "c", "d"), chatml(folder))
    assert found.labels.tolist() == want.labels.tolist()
    with pytest.raises(SourceError, match="does not tell which characters"):
        example(chat("a", "b"), chatml(folder, PROMPT_THINKS))


def test_no_message_that_is_no_answer_can_be_marked_by_tags(folder: Path) -> None:
    row = conversation([{"role": "user", "content": "a", "train": True}, {"role": "assistant", "content": "b"}])
    with pytest.raises(BadRow, match="marks no other messages"):
        make_renderer(DataSettings(()), chatml(folder, TAGGED)).render(row)
