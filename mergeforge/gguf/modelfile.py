"""Ollama's Modelfile for a GGUF file: its path, the chat template and the stop strings.

Ollama uses Go templates instead of Jinja, and recognizes only a few Jinja templates. Well-known chat formats are
recognized here by their markers, as in llama.cpp. For others TEMPLATE is left out, and Ollama inspects the file itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergeforge.gguf.key_values import Keys


@dataclass(frozen=True)
class ChatFormat:
    """A chat format: the text of each turn with "%" for its content, and the markers of its Jinja template.

    `system` is "" if the system text goes into the user's turn, before the user's text. A template that contains one of
    `excluded` has another format.
    """

    name: str
    markers: tuple[str, ...]
    system: str
    user: str
    assistant: str
    end: str
    excluded: tuple[str, ...] = ()

    def template(self) -> str:
        """The Go template of one exchange; Ollama repeats it for every exchange."""
        prompt = "{{ .Prompt }}" if self.system else "{{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}"
        system = f"{{{{ if .System }}}}{self.system.replace('%', '{{ .System }}')}{{{{ end }}}}" if self.system else ""
        user = f"{{{{ if .Prompt }}}}{self.user.replace('%', prompt)}{{{{ end }}}}"
        return system + user + self.assistant.replace("%", "{{ .Response }}")


def _same_turns(
    name: str,
    markers: tuple[str, ...],
    turn: str,
    end: str,
    roles: tuple[str, str, str] = ("system", "user", "assistant"),
    excluded: tuple[str, ...] = (),
) -> ChatFormat:
    """A format whose turns differ only in the name of the role."""
    system, user, assistant = (turn.format(role) for role in roles)
    return ChatFormat(name, markers, system, user, assistant, end, excluded)


_BAR = "\uff5c"
CHAT_FORMATS = (  # the first one whose markers all occur is used
    _same_turns(
        "Granite",
        ("<|start_of_role|>", "<|end_of_role|>"),
        "<|start_of_role|>{}<|end_of_role|>%<|end_of_text|>\n",
        "<|end_of_text|>",
    ),
    _same_turns(
        "Command-R",
        ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>"),
        "<|START_OF_TURN_TOKEN|><|{}_TOKEN|>%<|END_OF_TURN_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        roles=("SYSTEM", "USER", "CHATBOT"),
        excluded=("<|START_RESPONSE|>",),
    ),
    ChatFormat(
        "DeepSeek",
        (f"<{_BAR}User{_BAR}>", f"<{_BAR}Assistant{_BAR}>"),
        "%",
        f"<{_BAR}User{_BAR}>%",
        f"<{_BAR}Assistant{_BAR}>%<{_BAR}end\u2581of\u2581sentence{_BAR}>",
        f"<{_BAR}end\u2581of\u2581sentence{_BAR}>",
    ),
    ChatFormat(
        "Gemma",
        ("<start_of_turn>", "<end_of_turn>"),
        "",
        "<start_of_turn>user\n%<end_of_turn>\n",
        "<start_of_turn>model\n%<end_of_turn>\n",
        "<end_of_turn>",
    ),
    _same_turns(
        "Llama 3",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|start_header_id|>{}<|end_header_id|>\n\n%<|eot_id|>",
        "<|eot_id|>",
    ),
    _same_turns(
        "ChatML",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_start|>{}\n%<|im_end|>\n",
        "<|im_end|>",
        excluded=("<|im_sep|>",),
    ),
    _same_turns(
        "Phi-3", ("<|user|>", "<|assistant|>", "<|end|>"), "<|{}|>\n%<|end|>\n", "<|end|>", excluded=("<|channel|>",)
    ),
    _same_turns(
        "Zephyr",
        ("<|user|>", "<|assistant|>", "eos_token"),
        "<|{}|>\n%</s>\n",
        "</s>",
        excluded=("<|endoftext|>", "[gMASK]", "<|end|>"),
    ),
    ChatFormat("Llama 2", ("[INST]", "<<SYS>>"), "", "[INST] %", " [/INST] %</s>", "</s>"),
    ChatFormat("Mistral", ("[INST]",), "", "[INST] %", " [/INST]%</s>", "</s>", excluded=("[SYSTEM_PROMPT]",)),
)
MODELFILE = "Modelfile"
_ENDS = ("eos", "eot", "eom")


def chat_format(template: str) -> ChatFormat | None:
    """The well-known format of a Jinja template; None if it has none of them."""
    for chat in CHAT_FORMATS:
        if all(marker in template for marker in chat.markers) and not any(word in template for word in chat.excluded):
            return chat
    return None


def modelfile(gguf_name: str, keys: Keys, others: Sequence[str] = (), towers: Sequence[str] = ()) -> str:
    """The Modelfile of a GGUF file with this name and these key/values; `others` and `towers` are named in comments.

    towers: mmproj files, which are not taken as a second FROM by all versions of Ollama.
    """
    lines = [f"FROM ./{gguf_name}", *(f"# FROM ./{name}" for name in others)]
    if towers:
        lines.append("# Images and audio: versions of Ollama that accept a second FROM read this file, too.")
        lines += [f"# FROM ./{name}" for name in towers]
    jinja = keys["tokenizer.chat_template"].value if "tokenizer.chat_template" in keys else ""
    chat = chat_format(jinja)
    if chat is not None:
        lines += [f"# {chat.name}", f'TEMPLATE """{_go_template(chat)}"""']
    elif jinja:
        lines.append("# The chat template is not a well-known one: Ollama reads it from the file.")
    else:
        lines.append("# The model has no chat template: Ollama passes the prompt unchanged.")
    lines += [f"PARAMETER stop {_quoted(text)}" for text in _stop_strings(keys, chat)]
    return "\n".join(lines) + "\n"


def _go_template(chat: ChatFormat) -> str:
    """The template; Llama 2 marks the system text within the user's turn."""
    template = chat.template()
    if chat.name != "Llama 2":
        return template
    return template.replace("{{ .System }}\n\n", "<<SYS>>\n{{ .System }}\n<</SYS>>\n\n")


def _stop_strings(keys: Keys, chat: ChatFormat | None) -> list[str]:
    """The texts of the tokens that end a text, a turn or a message, and the format's own end marker."""
    tokens = keys["tokenizer.ggml.tokens"].value if "tokenizer.ggml.tokens" in keys else ()
    ids = [keys[f"tokenizer.ggml.{kind}_token_id"].value for kind in _ENDS if f"tokenizer.ggml.{kind}_token_id" in keys]
    stops = [tokens[token_id] for token_id in ids if token_id < len(tokens)]
    if chat is not None and chat.end in tokens:
        stops.append(chat.end)
    return list(dict.fromkeys(stops))


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
