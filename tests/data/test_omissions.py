"""Rows that a template would turn into nonsense: tool calls, results and system messages that it does not render."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.byte_chats import CHATML, TAGGED, chat, chatml, ids, trained, write_rows

from mergeforge.core.messages import WarningText
from mergeforge.data import DataSettings, data_settings, prepare
from mergeforge.data.conversation import InvalidRecord, parse_conversation
from mergeforge.data.render import make_renderer
from mergeforge.data.system_messages import without_system_messages

QUESTION = {"role": "user", "content": "weather in Rome?"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}],
}
RESULT = {"role": "tool", "content": "17 degrees"}
ANSWER = {"role": "assistant", "content": "It is warm."}
RENDERS_CALLS = CHATML.replace("message['content'] +", "message['content'] ~ (message.tool_calls or '') +")
REFUSES_SYSTEM = """\
{%- for message in messages -%}
  {%- if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif -%}
  {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
DROPS_SYSTEM = REFUSES_SYSTEM.replace(
    "{{ raise_exception('System role not supported') }}{% endif -%}", "{% else %}"
).replace("<|im_end|>\\n' -}}", "<|im_end|>\\n' -}}{% endif -%}", 1)


def render(folder: Path, template: str, messages: list[Any], **settings: Any) -> str:
    """The text of the trained tokens."""
    tokenizer = chatml(folder, template)
    examples = make_renderer(DataSettings((), **settings), tokenizer).render(parse_conversation(messages)).examples
    return str(tokenizer.decode([token for example in examples for token in trained(example)]))


@pytest.mark.parametrize("template", [CHATML, TAGGED])
@pytest.mark.parametrize("messages", [[QUESTION, CALL], [QUESTION, CALL, RESULT, ANSWER]])
def test_refuses_tool_calls_that_the_template_leaves_out(folder: Path, template: str, messages: list[Any]) -> None:
    with pytest.raises(InvalidRecord, match=r"leaves out the call of the tool 'get_weather'|renders nothing"):
        render(folder, template, messages)


def test_trains_on_tool_calls_that_the_template_renders(folder: Path) -> None:
    text = render(folder, RENDERS_CALLS, [QUESTION, CALL, RESULT, ANSWER])
    assert "get_weather" in text and "Rome" in text and "It is warm." in text


def test_refuses_a_template_that_renders_the_first_of_two_calls(folder: Path) -> None:
    template = RENDERS_CALLS.replace(
        "(message.tool_calls or '')", "(message.tool_calls[:1] if message.tool_calls else '')"
    )
    second = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
    both = {**CALL, "tool_calls": [*CALL["tool_calls"], second]}  # type: ignore[misc]
    with pytest.raises(InvalidRecord, match="leaves out the call"):
        render(folder, template, [QUESTION, both])


def test_refuses_tool_results_that_the_template_leaves_out(folder: Path) -> None:
    template = RENDERS_CALLS.replace("{{-", "{%- if message.role != 'tool' -%}{{-", 1).replace(
        "-}}", "-}}{% endif %}", 1
    )
    with pytest.raises(InvalidRecord, match=r"leaves out message 3 \(tool\)"):
        render(folder, template, [QUESTION, CALL, RESULT, ANSWER])


@pytest.mark.parametrize(
    "call",
    [
        {"tool_calls": [{"name": "get_weather", "arguments": '{"city": "Rome"}'}]},
        {"function_call": {"name": "get_weather", "arguments": '{"city": "Rome"}'}},
    ],
)
def test_older_forms_of_tool_calls_are_read_alike(call: dict[str, Any]) -> None:
    row = parse_conversation([QUESTION, {"role": "assistant", "content": None, **call}])
    assert row.messages[1]["tool_calls"] == CALL["tool_calls"]


def test_warns_of_tools_and_reasoning_that_the_template_leaves_out(tmp_path: Path, folder: Path) -> None:
    answer = {**ANSWER, "reasoning_content": "Rome is in the south."}
    path = write_rows(tmp_path / "a.jsonl", [{"messages": [QUESTION, answer], "tools": [{"name": "get_weather"}]}])
    prepared = prepare(data_settings({"data": [{"path": str(path)}]}), chatml(folder), tmp_path / "store")
    warnings = [note for note in prepared.notes if isinstance(note, WarningText)]
    assert [warning.split(",")[0] for warning in warnings] == [
        "the template leaves out the definitions of tools",
        "the template leaves out reasoning_content",
    ]


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, DROPS_SYSTEM])
def test_system_messages_of_templates_without_them(folder: Path, template: str) -> None:
    """merge puts the text in front of the question; drop removes it; refuse rejects the row."""
    tokenizer = chatml(folder, template)
    row = parse_conversation(chat("q", "a", "r", "b", system="Be kind."))

    def tokens(policy: str) -> list[int]:
        return make_renderer(DataSettings((), system_policy=policy), tokenizer).render(row).examples[0].tokens.tolist()

    def expected(question: str) -> list[int]:
        plain = parse_conversation(chat(question, "a", "r", "b"))
        return make_renderer(DataSettings(()), tokenizer).render(plain).examples[0].tokens.tolist()

    assert tokens("merge") == expected("Be kind.\n\nq")
    assert tokens("drop") == expected("q")
    with pytest.raises(InvalidRecord):
        tokens("refuse")


def test_system_messages_anywhere_are_merged() -> None:
    system, user, assistant = ({"role": role, "content": role[0]} for role in ("system", "user", "assistant"))
    merged = without_system_messages([system, assistant, user, system, assistant, system, user, assistant], "merge")
    assert [message["content"] for message in merged] == ["s", "a", "u\n\ns", "a", "s\n\nu", "a"]


def test_adds_the_generation_prompt_that_a_template_lacks(tmp_path: Path, folder: Path) -> None:
    """With a template that ignores add_generation_prompt, only the answer is trained on, as with ChatML itself."""
    without = CHATML.partition("{%- if add_generation_prompt")[0]
    assert render(folder, without, chat("q", "a")) == render(folder, CHATML, chat("q", "a")) == "a<|im_end|>"
    path = write_rows(tmp_path / "a.jsonl", [{"messages": chat("q", "a")}])
    prepared = prepare(data_settings({"data": [{"path": str(path)}]}), chatml(folder, without), tmp_path / "store")
    assert prepared.template_name == "the tokenizer's own, with a generation prompt"
    tokenizer = chatml(folder, prepared.template)
    prompt = tokenizer.apply_chat_template(chat("q"), add_generation_prompt=True, tokenize=False)
    assert prompt == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


def test_warns_where_a_generation_prompt_cannot_be_added(folder: Path) -> None:
    """What precedes this template's answers depends on their number."""
    template = CHATML.partition("{%- if add_generation_prompt")[0].replace(
        "'<|im_start|>' +", "loop.index ~ '<|im_start|>' +"
    )
    renderer = make_renderer(DataSettings(()), chatml(folder, template))
    assert any(isinstance(note, WarningText) and "no generation prompt" in note for note in renderer.notes())


@pytest.mark.parametrize(
    ("flags", "used"),
    [
        ({"weight": 0}, 1),
        ({"weight": 1}, 2),
        ({"loss": False}, 1),
        ({"train": "false"}, 1),
        ({"loss": 0.73}, 2),
        ({"weight": 0.5}, 2),
        ({"weight": "0"}, 1),
        ({"weight": -1}, 1),
        ({"weight": float("nan")}, 1),
        ({"weight": "heavy"}, 1),
    ],
)
def test_rows_that_say_whether_they_are_trained_on(tmp_path: Path, folder: Path, flags: Any, used: int) -> None:
    rows = [{"prompt": "q", "response": "a", **flags}, {"prompt": "r", "response": "b"}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    prepared = prepare(data_settings({"data": [{"path": str(path)}]}), chatml(folder), tmp_path / "store")
    assert prepared.counts.used == used


def test_messages_with_loss_false_are_not_trained_on(folder: Path) -> None:
    messages = chat("q", "a", "r", "b")
    messages[1]["loss"] = False
    assert render(folder, CHATML, messages) == "b<|im_end|>"


def test_tokens_of_batches_are_those_of_single_rows(tmp_path: Path, folder: Path) -> None:
    """A store of 300 rows against each row rendered alone, with a template that needs several strategies."""
    from support.byte_chats import REASONING

    tokenizer = chatml(folder, REASONING)
    rows = [chat(f"q{n}", f"<think>\n{n}\n</think>\n\na{n}", "r", "b" * (n % 7 + 1)) for n in range(300)]
    path = write_rows(tmp_path / "a.jsonl", [{"messages": row} for row in rows])
    store = prepare(data_settings({"data": [{"path": str(path)}]}), tokenizer, tmp_path / "store").train
    renderer = make_renderer(DataSettings(()), tokenizer)
    alone = [example for row in rows for example in renderer.render(parse_conversation(row)).examples]
    assert len(store) == len(alone) == 600
    for index, example in enumerate(alone):
        assert store[index].tokens.tolist() == example.tokens.tolist()
        assert store[index].labels.tolist() == example.labels.tolist()
    assert ids("b") == trained(alone[1])[:-1]
