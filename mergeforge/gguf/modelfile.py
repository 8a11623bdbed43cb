"""Ollama's Modelfile for a GGUF file: where it is, how a chat is spelled, what ends an answer.

Ollama's templates are Go's, not Jinja, and it recognises only few Jinja templates. A well-known chat
format is known here by its markers, as llama.cpp does it; for others TEMPLATE is left out, and Ollama
looks at the file itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from mergeforge.gguf.key_values import Keys


@dataclass(frozen=True)
class ChatFormat:
    """How a chat is spelled: what stands before and after each part, and what its Jinja template contains.

    `system` "" where the system's text goes into the user's turn, before it.
    """

    name: str
    markers: tuple[str, ...]
    system: str
    user: str
    assistant: str
    end: str
    other: tuple[str, ...] = ()  # with one of these in the template it is another format

    def template(self) -> str:
        """In Go's template language, for one exchange; Ollama repeats it for each."""
        prompt = "{{ .Prompt }}" if self.system else "{{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}"
        system = f"{{{{ if .System }}}}{self.system.replace('%', '{{ .System }}')}{{{{ end }}}}" if self.system else ""
        user = f"{{{{ if .Prompt }}}}{self.user.replace('%', prompt)}{{{{ end }}}}"
        return system + user + self.assistant.replace("%", "{{ .Response }}")


def _alike(
    name: str,
    markers: tuple[str, ...],
    turn: str,
    end: str,
    roles: tuple[str, str, str] = ("system", "user", "assistant"),
    other: tuple[str, ...] = (),
) -> ChatFormat:
    """A format whose turns differ by the name of the role only."""
    system, user, assistant = (turn.format(role) for role in roles)
    return ChatFormat(name, markers, system, user, assistant, end, other)


_BAR = "\uff5c"
FORMATS = (  # the first whose markers are all there
    _alike(
        "Granite",
        ("<|start_of_role|>", "<|end_of_role|>"),
        "<|start_of_role|>{}<|end_of_role|>%<|end_of_text|>\n",
        "<|end_of_text|>",
    ),
    _alike(
        "Command-R",
        ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>"),
        "<|START_OF_TURN_TOKEN|><|{}_TOKEN|>%<|END_OF_TURN_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        roles=("SYSTEM", "USER", "CHATBOT"),
        other=("<|START_RESPONSE|>",),
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
    _alike(
        "Llama 3",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|start_header_id|>{}<|end_header_id|>\n\n%<|eot_id|>",
        "<|eot_id|>",
    ),
    _alike(
        "ChatML",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_start|>{}\n%<|im_end|>\n",
        "<|im_end|>",
        other=("<|im_sep|>",),
    ),
    _alike("Phi-3", ("<|user|>", "<|assistant|>", "<|end|>"), "<|{}|>\n%<|end|>\n", "<|end|>", other=("<|channel|>",)),
    _alike(
        "Zephyr",
        ("<|user|>", "<|assistant|>", "eos_token"),
        "<|{}|>\n%</s>\n",
        "</s>",
        other=("<|endoftext|>", "[gMASK]", "<|end|>"),
    ),
    ChatFormat("Llama 2", ("[INST]", "<<SYS>>"), "", "[INST] %", " [/INST] %</s>", "</s>"),
    ChatFormat("Mistral", ("[INST]",), "", "[INST] %", " [/INST]%</s>", "</s>", other=("[SYSTEM_PROMPT]",)),
)
_ENDS = ("eos", "eot", "eom")


def chat_format(template: str) -> ChatFormat | None:
    """The well-known format that a Jinja template makes; None where it is none of them."""
    for one in FORMATS:
        if all(marker in template for marker in one.markers) and not any(word in template for word in one.other):
            return one
    return None


def modelfile(gguf_name: str, keys: Keys) -> str:
    """The Modelfile for a file of this name whose key/values are `keys`."""
    lines = [f"FROM ./{gguf_name}"]
    jinja = keys["tokenizer.chat_template"].value if "tokenizer.chat_template" in keys else ""
    form = chat_format(jinja)
    if form is not None:
        lines += [f"# {form.name}", f'TEMPLATE """{_system_in_user(form)}"""']
    elif jinja:
        lines.append("# The model's chat template is none that is known here: Ollama looks for it in the file.")
    else:
        lines.append("# The model has no chat template: Ollama passes the prompt as it is.")
    lines += [f"PARAMETER stop {_quoted(text)}" for text in _stops(keys, form)]
    return "\n".join(lines) + "\n"


def _system_in_user(form: ChatFormat) -> str:
    """The template; Llama 2 marks the system's text inside the user's turn."""
    found = form.template()
    if form.name != "Llama 2":
        return found
    return found.replace("{{ .System }}\n\n", "<<SYS>>\n{{ .System }}\n<</SYS>>\n\n")


def _stops(keys: Keys, form: ChatFormat | None) -> list[str]:
    """The texts of the tokens that end a text, a turn or a message, and the format's own."""
    tokens = keys["tokenizer.ggml.tokens"].value if "tokenizer.ggml.tokens" in keys else ()
    ids = [keys[f"tokenizer.ggml.{kind}_token_id"].value for kind in _ENDS if f"tokenizer.ggml.{kind}_token_id" in keys]
    found = [tokens[number] for number in ids if number < len(tokens)]
    if form is not None and form.end in tokens:
        found.append(form.end)
    return list(dict.fromkeys(found))


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
