"""Malformed files of every kind that a merge reads, each made from a good one by one change.

A case says which file is changed and how; everything else stays good. `cases()` yields all of them.
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Change = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Case:
    """A changed file (its name under the folder of good ones)."""

    kind: str
    name: str
    file: str
    change: Change

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


def cases() -> Iterator[Case]:
    for name, change in (SAFETENSORS | _cuts("safetensors")).items():
        yield Case("safetensors", name, "base/model.safetensors", change)
        if "adapter too" in name or name.startswith("cut"):
            yield Case("adapter weights", name, "legal/adapter_model.safetensors", change)
    for name, change in INDEX.items():
        yield Case("index", name, "sharded/model.safetensors.index.json", change)
    for file in ("base/config.json", "legal/adapter_config.json"):
        for name, change in JSON.items():
            yield Case(file, name, file, change)
    for name, value in ADAPTER.items():
        yield Case("adapter config", name, "legal/adapter_config.json", _with(value))
    for name, text in RECIPES.items():
        yield Case(
            "recipe", name, "recipe.yaml", lambda old, text=text: text if isinstance(text, bytes) else text.encode()
        )
    for name, change in GGUF.items():
        yield Case("gguf", name, "model.gguf", change)
    for name, change in (GGUF | GGUF_ALONE).items():
        yield Case("gguf alone", name, "model.gguf", change)


def _instead(new: bytes) -> Change:
    return lambda old: new


def _header(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Change a safetensors header's JSON; the data stays."""

    def changed(data: bytes) -> bytes:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        new = change(header)
        raw = new if isinstance(new, bytes) else json.dumps(header if new is None else new).encode()
        return len(raw).to_bytes(8, "little") + raw + data[8 + size :]

    return changed


def _first(**fields: Any) -> Change:
    """Change fields of the first tensor's entry."""

    def change(header: dict[str, Any]) -> None:
        name = next(key for key in header if key != "__metadata__")
        header[name] = {key: value for key, value in {**header[name], **fields}.items() if value is not ...}

    return _header(change)


def _cuts(kind: str) -> dict[str, Change]:
    def cut(share: float) -> Change:
        return lambda data: data[: int(len(data) * share)]

    found: dict[str, Change] = {f"cut at {share:.0%}": cut(share) for share in (0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999)}
    return found | {"cut by a byte": lambda data: data[:-1], "a byte too many": lambda data: data + b"\0"}


def _length(value: int) -> Change:
    return lambda data: struct.pack("<Q", value) + data[8:]


def _rename_to(name: str) -> Change:
    def change(header: dict[str, Any]) -> None:
        old = next(key for key in header if key != "__metadata__")
        header[name] = header.pop(old)

    return _header(change)


def _shift(by: int) -> Change:
    def change(header: dict[str, Any]) -> None:
        for name, entry in header.items():
            if name != "__metadata__":
                entry["data_offsets"] = [one + by for one in entry["data_offsets"]]

    return _header(change)


def _swapped(header: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if name == old else name: entry for name, entry in header.items()}


def _overlap(header: dict[str, Any]) -> None:
    names = [name for name in header if name != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]


def _twice(header: dict[str, Any]) -> bytes:
    text = json.dumps(header)
    name = next(key for key in header if key != "__metadata__")
    return (text[:-1] + f', "{name}": {json.dumps(header[name])}}}').encode()


SAFETENSORS: dict[str, Change] = {
    "nothing but zeros": lambda data: bytes(len(data)),
    "not a safetensors file": lambda data: b"PK\x03\x04" + data[4:],
    "a pickle": lambda data: b"\x80\x02}q\x00." + data[6:],
    "header length 0": _length(0),
    "header length 1": _length(1),
    "header longer than the file": _length(1 << 40),
    "header length negative as signed": _length((1 << 64) - 1),
    "header of 200 MB": _length(200 << 20),
    "header not JSON": _header(lambda header: b"{" * 40),
    "header a list": _header(lambda header: b"[]"),
    "header a number": _header(lambda header: b"5"),
    "header not UTF-8": _header(lambda header: b'{"\xff\xfe": 1}'),
    "header of nested lists": _header(lambda header: b"[" * 100000),
    "no tensors": _header(lambda header: b"{}"),
    "tensor entry a list": _header(lambda header: {**header, "model.norm.weight": []}),
    "tensor entry null": _header(lambda header: {**header, "model.norm.weight": None}),
    "dtype unknown": _first(dtype="F7"),
    "dtype a number": _first(dtype=32),
    "dtype missing": _first(dtype=...),
    "dtype of another size": _first(dtype="F64"),
    "dtype lower case": _first(dtype="bf16"),
    "shape missing": _first(shape=...),
    "shape negative": _first(shape=[-1, -1]),
    "shape of floats": _first(shape=[1.5, 2]),
    "shape of text": _first(shape=["4", "4"]),
    "shape a number": _first(shape=16),
    "shape of booleans": _first(shape=[True, 4]),
    "shape too large": _first(shape=[1 << 40, 1 << 40]),
    "shape beyond 64 bits": _first(shape=[1 << 63, 1 << 63, 4]),
    "shape with a zero": _first(shape=[0, 4]),
    "shape one element more": _first(shape=[5, 5, 7, 11]),
    "shape of 5000 ones": _first(shape=[1] * 5000),
    "offsets missing": _first(data_offsets=...),
    "offsets one number": _first(data_offsets=[0]),
    "offsets three numbers": _first(data_offsets=[0, 4, 8]),
    "offsets reversed": _first(data_offsets=[8, 0]),
    "offsets negative": _first(data_offsets=[-8, 0]),
    "offsets of floats": _first(data_offsets=[0.0, 8.0]),
    "offsets beyond the file": _first(data_offsets=[1 << 50, (1 << 50) + 8]),
    "offsets beyond 64 bits": _first(data_offsets=[0, 1 << 70]),
    "offsets as text": _first(data_offsets=["0", "8"]),
    "offsets shifted by 2": _shift(2),
    "offsets shifted by -2": _shift(-2),
    "two tensors in one place": _header(_overlap),
    "a tensor twice": _header(_twice),
    "a name that is empty": _rename_to(""),
    "metadata a list": _header(lambda header: {**header, "__metadata__": []}),
    "metadata of numbers": _header(lambda header: {**header, "__metadata__": {"a": 5}}),
    "an unknown field": _header(lambda header: header["model.norm.weight"].update(x=1)),
    "the norm has another name": _header(lambda header: _swapped(header, "model.norm.weight", "x")),
}


def _json(change: Callable[[Any], Any]) -> Change:
    def changed(data: bytes) -> bytes:
        value = json.loads(data)
        new = change(value)
        return json.dumps(value if new is None else new).encode()

    return changed


def _map(change: Callable[[dict[str, Any]], Any]) -> Change:
    def changed(value: Any) -> Any:
        new = change(value["weight_map"])
        if new is not None:
            value["weight_map"] = new

    return _json(changed)


JSON: dict[str, Change] = {
    "empty": lambda data: b"",
    "cut in half": lambda data: data[: len(data) // 2],
    "not UTF-8": lambda data: b"\xff\xfe" + data,
    "a list": lambda data: b"[]",
    "a number": lambda data: b"5",
    "null": lambda data: b"null",
    "text": lambda data: b'"x"',
    "nested 100,000 deep": lambda data: b"[" * 100000,
    "zeros": lambda data: bytes(len(data)),
    "trailing brace": lambda data: data + b"}",
}
INDEX: dict[str, Change] = JSON | {
    "no weight_map": _json(lambda value: {"metadata": {}}),
    "weight_map a list": _map(lambda held: list(held)),
    "weight_map empty": _map(lambda held: {}),
    "a file that is a number": _map(lambda held: {**held, next(iter(held)): 5}),
    "a file that is missing": _map(lambda held: {**held, next(iter(held)): "model-00009-of-00009.safetensors"}),
    "a file above": _map(lambda held: {**held, next(iter(held)): "../base/model.safetensors"}),
    "a file elsewhere": _map(lambda held: {**held, next(iter(held)): "/etc/passwd"}),
    "a file with a NUL": _map(lambda held: {**held, next(iter(held)): "model\0.safetensors"}),
    "a file that is no weights": _map(lambda held: {**held, next(iter(held)): "config.json"}),
    "a tensor that no file holds": _map(lambda held: {**held, "ghost.weight": next(iter(held.values()))}),
    "a tensor in another file": _map(lambda held: {**held, next(iter(held)): sorted(set(held.values()))[-1]}),
    "a tensor that is not listed": _map(lambda held: dict(list(held.items())[1:])),
}
ADAPTER: dict[str, dict[str, Any]] = {
    "no peft_type": {"peft_type": None},
    "an unknown peft_type": {"peft_type": "WHATEVER"},
    "a list as peft_type": {"peft_type": ["LORA"]},
    "a router": {"peft_type": "XLORA"},
    "prompts": {"peft_type": "PROMPT_TUNING"},
    "no rank": {"r": None},
    "rank 0": {"r": 0},
    "rank negative": {"r": -4},
    "rank text": {"r": "four"},
    "rank of another adapter": {"r": 77},
    "no alpha": {"lora_alpha": None},
    "alpha text": {"lora_alpha": "x"},
    "an unknown field": {"frobnicate": True},
    "activated LoRA": {"alora_invocation_tokens": [1, 2]},
    "PiSSA on the original": {"init_lora_weights": "pissa_niter_4"},
    "LoftQ on the original": {"init_lora_weights": "loftq"},
    "DoRA without magnitudes": {"use_dora": True},
    "ranks of other modules": {"rank_pattern": {".*": 99}},
    "repeated layers: a number": {"layer_replication": 5},
    "repeated layers: no pairs": {"layer_replication": [[1, 2, 3]]},
    "repeated layers: reversed": {"layer_replication": [[2, 1]]},
    "repeated layers: beyond the model": {"layer_replication": [[0, 99]]},
    "a pattern that is no expression": {"rank_pattern": {"(": 4}},
}


def _with(fields: dict[str, Any]) -> Change:
    def change(value: Any) -> Any:
        return {key: item for key, item in {**copy.deepcopy(value), **fields}.items() if item is not None}

    return _json(change)


GOOD = "merge_method: linear\nmodels:\n- {model: base, parameters: {weight: 1}}\n"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
STACK = "merge_method: passthrough\nslices: [{sources: [{model: base, layer_range: RANGE}]}]\n"
TIES = "merge_method: ties\nbase_model: base\nmodels: [{model: sharded, parameters: {weight: 1, density: 5}}]\n"
PASS = "merge_method: passthrough\nmodels: [{}]\n"
CIRCLE = "---\n".join(["name: a\n" + PASS.format("b"), "name: b\n" + PASS.format("a"), PASS.format("a")])
RECIPES: dict[str, str | bytes] = {
    "empty": "",
    "only a comment": "# nothing\n",
    "a list": "- a\n",
    "a number": "5\n",
    "not UTF-8": b"\xff\xfe\x00",
    "NULs": b"\0" * 40,
    "a tab": "models:\n\t- a\n",
    "cut in the middle": GOOD[:40] + "{",
    "an alias bomb": BOMB,
    "nested 5000 deep": "a: " + "[" * 5000,
    "a python tag": GOOD + "name: !!python/object/apply:os.system ['true']\n",
    "a key twice": GOOD + "merge_method: ties\n",
    "no method": "models: [base]\n",
    "an unknown method": "merge_method: tise\nmodels: [base]\n",
    "an unknown key": GOOD + "mdels: []\n",
    "a key in the wrong place": GOOD + "weight: 1\n",
    "no models": "merge_method: linear\n",
    "models empty": "merge_method: linear\nmodels: []\n",
    "models a text": "merge_method: linear\nmodels: base\n",
    "a model that is not there": GOOD.replace("base", "./nowhere"),
    "weight text": GOOD.replace("weight: 1", "weight: heavy"),
    "weight not a number": GOOD.replace("weight: 1", "weight: .nan"),
    "weights that sum to 0": GOOD + "- {model: legal-model, parameters: {weight: -1}}\n",
    "density 5": TIES,
    "ties without a base": GOOD.replace("linear", "ties"),
    "slerp of one": "merge_method: slerp\nbase_model: base\nmodels: [base]\nparameters: {t: 0.5}\n",
    "a reversed layer_range": STACK.replace("RANGE", "[2, 1]"),
    "layers that are not there": STACK.replace("RANGE", "[0, 99]"),
    "slices and models": GOOD + "slices: [{sources: [{model: base, layer_range: [0, 1]}]}]\n",
    "a dtype that is none": GOOD + "dtype: fp16\n",
    "an expression that is none": GOOD + "rules: [{match: '(', use: base}]\n",
    "documents in a circle": CIRCLE,
    "a document without a name": GOOD + "---\n" + GOOD,
    "a GGUF type that is none": GOOD + "output: {gguf: q9_k}\n",
    "a size that is none": GOOD + "output: {shard_size: many}\n",
    "an output that is an input": GOOD + "output: {path: base}\n",
    "no base and no adapters": "dtype: float32\n",
    "an adapter that is not there": "base_model: base\nadapters: [./nowhere]\n",
    "a model as an adapter": "base_model: base\nadapters: [base]\n",
    "an adapter as a model": "merge_method: passthrough\nmodels: [legal]\n",
    "a NUL in a path": 'merge_method: passthrough\nmodels: ["ba\\0se"]\n',
    "a path of 10,000 letters": f"merge_method: passthrough\nmodels: [{'x' * 10000}]\n",
    "a tokenizer that is not there": GOOD + "tokenizer_source: ./nowhere\n",
    "a template that is none": GOOD + "chat_template: shouting\n",
}


def _gguf_at(offset: int, data: bytes) -> Change:
    return lambda old: old[:offset] + data + old[offset + len(data) :]


GGUF: dict[str, Change] = _cuts("gguf") | {
    "another magic": _gguf_at(0, b"GGML"),
    "byte order reversed": _gguf_at(0, b"FUGG"),
    "version 0": _gguf_at(4, struct.pack("<I", 0)),
    "version 99": _gguf_at(4, struct.pack("<I", 99)),
    "tensor count huge": _gguf_at(8, struct.pack("<Q", 1 << 60)),
    "tensor count 0": _gguf_at(8, struct.pack("<Q", 0)),
    "key count huge": _gguf_at(16, struct.pack("<Q", 1 << 60)),
    "key count 0": _gguf_at(16, struct.pack("<Q", 0)),
    "first key's length huge": _gguf_at(24, struct.pack("<Q", 1 << 62)),
    "first key not UTF-8": _gguf_at(32, b"\xff\xfe\xfd"),
    "first key of another name": _gguf_at(32, b"GENERAL"),
    "zeros": lambda data: b"GGUF" + bytes(len(data) - 4),
}


def write(case: Case, folder: Path) -> None:
    path = folder / case.file
    path.write_bytes(case.change(path.read_bytes()))


def _renamed(old: bytes, new: bytes) -> Change:
    """The first occurrence of a name replaced by one of the same length."""
    assert len(old) == len(new)
    return lambda data: data.replace(old, new, 1)


def _number(key: bytes, value: int) -> Change:
    """Another value of a u32 key."""

    def changed(data: bytes) -> bytes:
        at = data.index(key) + len(key) + 4
        return data[:at] + struct.pack("<I", value) + data[at + 4 :]

    return changed


# A file that must give names, config and tokenizer as well.
GGUF_ALONE: dict[str, Change] = {
    "another architecture": _renamed(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lemma"),
    "an architecture with other tensors": _renamed(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba"),
    "no vocabulary": _renamed(b"tokenizer.ggml.model", b"tokenizer.ggml.modal"),
    "no tokens": _renamed(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokans"),
    "no merges": _renamed(b"tokenizer.ggml.merges", b"tokenizer.ggml.marges"),
    "an unknown pre-tokenizer": _renamed(b"\x05\0\0\0\0\0\0\0gpt-2", b"\x05\0\0\0\0\0\0\0gpt-9"),
    "no layers": _number(b"llama.block_count", 0),
    "layers without number": _number(b"llama.block_count", 1 << 31),
    "more layers than tensors": _number(b"llama.block_count", 9),
    "no heads": _number(b"llama.attention.head_count", 0),
    "heads that do not divide the rows": _number(b"llama.attention.head_count", 7),
    "no key-value heads": _number(b"llama.attention.head_count_kv", 0),
    "another hidden size": _number(b"llama.embedding_length", 1),
    "a tensor with another name": _renamed(b"blk.0.attn_q.weight", b"blk.0.attn_z.weight"),
    "a tensor of a block too many": _renamed(b"blk.0.attn_q.weight", b"blk.7.attn_q.weight"),
}
