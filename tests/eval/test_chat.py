"""mergeforge chat: piped lines and their answers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.small_models import ANSWERS

import mergeforge
from mergeforge import eval
from mergeforge.cli import run_command
from mergeforge.errors import RecipeError
from mergeforge.eval import GREEDY
from mergeforge.eval.chat import DEMO, Chat
from mergeforge.eval.smoke_test import PROMPTS

GREEDY_OPTIONS = ("--temperature", "0")


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Run chat on lines; (exit code, stdout, stderr)."""

    def run(model: Path, *lines: str, options: tuple[str, ...] = GREEDY_OPTIONS) -> tuple[int, str, str]:
        import io

        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = run_command(["chat", str(model), *options])
        message = capfd.readouterr()
        return code, message.out, message.err

    return run


def test_prompt_prints_only_the_answer(taught: Path, taught_gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("xllamacpp")
    for model in (taught, taught_gguf):
        assert run_command(["chat", str(model), "--prompt", PROMPTS[0], *GREEDY_OPTIONS]) == 0
        assert capfd.readouterr().out == f"{ANSWERS[0]}\n"


def test_stop_string_ends_an_answer(taught: Path, taught_gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("xllamacpp")
    for model in (taught, taught_gguf):
        assert run_command(["chat", str(model), "--prompt", PROMPTS[2], "--stop", "</output>", *GREEDY_OPTIONS]) == 0
        assert capfd.readouterr().out == "red, green, blue\n"


def test_answers_lines_and_runs_slash_commands(talk, taught: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "chat.jsonl"
    lines = ("", PROMPTS[1], "/reset", PROMPTS[3], "/set stop sea", "/regen", "/system Be short.", f"/save {file}")
    code, out, err = talk(taught, *lines, "/nonsense", "/set temperture 1", "/exit", PROMPTS[0])
    assert code == 0 and out.splitlines() == [ANSWERS[1], ANSWERS[3], "The "]
    assert "there is no command /nonsense" in err and "did you mean 'temperature'?" in err
    row = json.loads(file.read_text(encoding="utf-8"))
    assert [one["content"] for one in row["messages"]] == ["Be short.", PROMPTS[3], "The"]


def test_gguf_chat_by_lines(talk, taught_gguf: Path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("xllamacpp")
    code, out, _ = talk(taught_gguf, PROMPTS[3], "/reset", PROMPTS[1])
    assert code == 0 and out.splitlines() == [ANSWERS[3], ANSWERS[1]]


def test_compare_base_answers_with_both(talk, base: Path, adapter: Path) -> None:  # type: ignore[no-untyped-def]
    options = ("--compare-base", "--max-tokens", "4", *GREEDY_OPTIONS)
    code, out, _ = talk(adapter, "the hen", options=options)
    message = re.findall(r"^\[(adapter|model)\b", out, re.MULTILINE)  # an answer may contain line breaks
    assert code == 0 and message == ["adapter", "model"]
    alone = talk(base, "the hen", options=("--max-tokens", "4", *GREEDY_OPTIONS))[1]
    assert out.partition("\n[model] ")[2].rstrip("\n") == alone.rstrip("\n")
    assert talk(base, "x", options=("--compare-base",))[0] == 2


def test_save_keeps_both_conversations_of_a_comparison(talk, adapter: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    options = ("--compare-base", "--max-tokens", "4", *GREEDY_OPTIONS)
    code, _, err = talk(adapter, "the hen", f"/save {tmp_path}/chat.md", options=options)
    assert code == 0 and "chat.md" in err and "chat-base.md" in err
    ours, base = ((tmp_path / name).read_text(encoding="utf-8") for name in ("chat.md", "chat-base.md"))
    assert ours.startswith("**user**: the hen") and base.startswith("**user**: the hen") and ours != base


def test_4_bit_and_presets(talk, base: Path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("bitsandbytes")
    code, _, message = talk(base, "/set", options=("--quantise", "nf4", "--preset", "creative", "--top-k", "5"))
    assert code == 0 and "top_k              5" in message
    assert talk(base, "the hen", options=("--quantize", "nf4", "--max-tokens", "3"))[0] == 0
    assert talk(base, "x", options=("--preset", "creatve"))[0] == 2


def test_seed_makes_answers_reproducible(base: Path) -> None:
    model = eval.open_model(str(base))
    drawn = [model.chat([{"role": "user", "content": "a"}], eval.Sampling(8, 1.0, seed=s)).text for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_demo_answers_its_prompts(talk, base: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = talk(base, options=("--demo", "--max-tokens", "2"))
    assert code == 0 and all(f"> {prompt}" in out for prompt in DEMO)


def test_oldest_turns_are_dropped_when_the_context_is_full(taught: Path, taught_gguf: Path) -> None:
    pytest.importorskip("xllamacpp")
    model = eval.open_model(str(taught))
    assert isinstance(model, eval.TransformersModel)
    model.loaded.model.config.max_position_embeddings = 256
    for one in (eval.open_model(str(taught_gguf), context=256), model):
        notes: list[str] = []
        chat = Chat(one, eval.Sampling(4, 0), "short", notes.append)
        for _ in range(4):
            chat.send("the hen " * 15)
        assert notes and "forgotten" in notes[0] and 2 <= len(chat.turns) < 8
        assert chat.messages[0] == {"role": "system", "content": "short"}
        with pytest.raises(eval.PromptTooLong):
            chat.send("the hen in the barn " * 60)
        assert chat.turns[-1]["role"] == "assistant", "a message that could not be answered is not kept"


def test_an_answer_cut_by_max_tokens_is_not_a_full_context(talk, base: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Random weights give tokens without text, for which llama.cpp sends nothing in a chat."""
    pytest.importorskip("xllamacpp")
    folder = tmp_path / "random"
    shutil.copytree(base, folder)
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    (file,) = mergeforge.convert_to_gguf(folder, "f16", out=tmp_path / "random.gguf", device="cpu")
    for model in (file, folder):
        code, _, err = talk(model, options=("--prompt", "hi", "--max-tokens", "12", "--seed", "1"))
        assert code == 0 and "context is full" not in err
        assert "[the answer was cut: max_tokens is 12]" in err, model


def test_an_answer_cut_by_the_context_says_so(talk, base: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "short"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    code, _, err = talk(folder, options=("--prompt", "hi", "--max-tokens", "100", *GREEDY_OPTIONS))
    assert code == 0 and "the answer was cut: the context is full" in err


def test_save_as_text(taught: Path, tmp_path: Path) -> None:
    chat = Chat(eval.open_model(str(taught)), GREEDY)
    chat.send(PROMPTS[1])
    chat.save(tmp_path / "chat.md")
    assert (tmp_path / "chat.md").read_text(encoding="utf-8") == f"**user**: {PROMPTS[1]}\n\n**assistant**: 4\n"
    with pytest.raises(RecipeError, match="no answer"):
        Chat(chat.model, GREEDY).regenerate()


def test_ctrl_c_stops_an_answer(base: Path) -> None:
    """SIGINT during an answer: the text so far stays, there is no traceback, and the exit code is 130."""
    options = ("--prompt", "the hen", "--max-tokens", "2000", "--temperature", "0")
    command = [sys.executable, "-m", "mergeforge", "chat", str(base), *options]
    pipe = subprocess.PIPE
    run = subprocess.Popen(command, stdout=pipe, stderr=pipe, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.stdout and run.stdout.read(1)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and b"[stopped]" in err and b"Traceback" not in err
