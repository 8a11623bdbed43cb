"""Modelfiles against expected text, and chat formats of the templates in llama.cpp's source tree."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.llama_cpp_tools import TREE, needs_converter

from mergeforge.gguf.key_values import array, string, u32
from mergeforge.gguf.modelfile import chat_format, modelfile

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}{% endfor %}"


def keys(template: str, *tokens: str, eos: int = 0) -> dict[str, object]:
    values = {"tokenizer.ggml.tokens": array("string", tokens), "tokenizer.ggml.eos_token_id": u32(eos)}
    return {**values, "tokenizer.chat_template": string(template)} if template else values


def test_chatml() -> None:
    assert (
        modelfile("model-Q4_K_M.gguf", keys(CHATML, "<|endoftext|>", "<|im_end|>"))
        == '''FROM ./model-Q4_K_M.gguf
# ChatML
TEMPLATE """{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}{{ if .Prompt }}<|im_start|>user
{{ .Prompt }}<|im_end|>
{{ end }}<|im_start|>assistant
{{ .Response }}<|im_end|>
"""
PARAMETER stop "<|endoftext|>"
PARAMETER stop "<|im_end|>"
'''
    )


def test_llama_2() -> None:
    template = "{{ bos_token }}[INST] <<SYS>>{{ system }}<</SYS>>{{ content }} [/INST]"
    assert (
        modelfile("m.gguf", keys(template, "</s>"))
        == '''FROM ./m.gguf
# Llama 2
TEMPLATE """{{ if .Prompt }}[INST] {{ if .System }}<<SYS>>
{{ .System }}
<</SYS>>

{{ end }}{{ .Prompt }}{{ end }} [/INST] {{ .Response }}</s>"""
PARAMETER stop "</s>"
'''
    )


def test_gemma() -> None:
    template = "{{ '<start_of_turn>' + role + content + '<end_of_turn>' }}"
    assert (
        modelfile("m.gguf", keys(template, "<eos>", "<end_of_turn>"))
        == '''FROM ./m.gguf
# Gemma
TEMPLATE """{{ if .Prompt }}<start_of_turn>user
{{ if .System }}{{ .System }}

{{ end }}{{ .Prompt }}<end_of_turn>
{{ end }}<start_of_turn>model
{{ .Response }}<end_of_turn>
"""
PARAMETER stop "<eos>"
PARAMETER stop "<end_of_turn>"
'''
    )


def test_unknown_templates_are_left_to_ollama() -> None:
    assert "TEMPLATE" not in modelfile("m.gguf", keys("{{ strange }}", 'a"b'))
    assert 'PARAMETER stop "a\\"b"' in modelfile("m.gguf", keys("{{ strange }}", 'a"b'))


def test_model_without_a_template() -> None:
    assert modelfile("m.gguf", keys("", "</s>")).splitlines()[1].startswith("# The model has no chat template")


@needs_converter
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("meta-llama-Llama-3.1-8B-Instruct", "Llama 3"),
        ("Qwen-Qwen2.5-7B-Instruct", "ChatML"),
        ("Qwen-Qwen3-0.6B", "ChatML"),
        ("google-gemma-2-2b-it", "Gemma"),
        ("microsoft-Phi-3.5-mini-instruct", "Phi-3"),
        ("mistralai-Mistral-Nemo-Instruct-2407", "Mistral"),
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "DeepSeek"),
        ("ibm-granite-granite-3.3-2B-Instruct", "Granite"),
        ("CohereForAI-c4ai-command-r-plus-tool_use", "Command-R"),
        ("openai-gpt-oss-120b", None),
        ("Mistral-Small-3.2-24B-Instruct-2506", None),
        ("GLM-4.6", None),
        ("google-gemma-4-31B-it", None),
    ],
)
def test_templates_of_real_models(file: str, name: str | None) -> None:
    chat = chat_format((Path(TREE) / "models" / "templates" / f"{file}.jinja").read_text("utf-8"))
    assert (chat.name if chat else None) == name
