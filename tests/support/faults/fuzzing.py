"""What is fuzzed: for each kind of input that comes from strangers, good files, and what reads them.

`try_one` writes a file and lets the program read it: an error of ours is as good as success, anything else is a crash.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from mergeforge.errors import MergeforgeError
from support.faults.mutating import Mutation, changed_bytes, changed_header, changed_json, changed_lines, changed_yaml

ROWS = [
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "a"},
        ]
    },
    {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
    {"instruction": "i", "input": "n", "output": "o"},
    {"prompt": "p", "response": "r"},
    {"text": "t"},
]
TRAIN = b"""\
model: base
data: [{path: rows.jsonl, format: auto, columns: {prompt: q}}]
method: qlora
lora: {r: 8, alpha: 16, dora: false, targets: [q_proj]}
epochs: 2
batch: {size: 8, micro: 2}
val: 0.1
template: chatml
loss_on: assistant
tokens: {add: [<a>]}
save: {every: 10, keep: 2}
eval: {max_tokens: 8}
after: {merge: {dtype: bfloat16}, gguf: [q8_0]}
output: run
"""
LINEAR = b"""\
merge_method: linear
models: [{model: base, parameters: {weight: 0.5}}, near]
dtype: bfloat16
"""
TIES = b"""\
merge_method: ties
base_model: base
parameters: {normalize: true, density: [0.2, 0.8]}
models:
- model: near
  parameters: {weight: [{filter: mlp, value: 0.3}, {value: 1}]}
output:
  path: out
  shard_size: 5GB
  gguf: [{type: q4_k_m, tensor_types: {attn_v: q6_k}}]
"""
FOLD = b"""\
base_model: base
adapters: [adapter, {adapter: adapter, weight: 0.4}]
tokenizer_source: union
output: {adapter: {rank: 4}}
"""
STACK = b"""\
merge_method: passthrough
chat_template: chatml
slices:
- sources: [{model: base, layer_range: [0, 2]}]
- sources: [{model: base, layer_range: [1, 4]}]
"""
SLERP = b"""\
merge_method: slerp
base_model: base
models: [base, near]
parameters: {t: 0.5}
tokenizer: {source: base, tokens: {<s>: {source: base, force: true}}}
output: {publish: {repo: a/b, private: true}}
"""


@dataclass(frozen=True)
class Target:
    """A kind of input: good ones, how they are changed, and what reads a file of it."""

    name: str
    seeds: Sequence[bytes]
    mutations: Sequence[Mutation]
    file: Path
    read: Callable[[], Any]

    def try_one(self, data: bytes) -> None:
        """Raises whatever is not an error of ours."""
        self.file.unlink(missing_ok=True)  # it may be a link to another target's
        self.file.write_bytes(data)
        try:
            self.read()
        except MergeforgeError:
            return

    def mutated(self, chance: Random) -> bytes:
        """A good input, changed."""
        return chance.choice(self.mutations)(chance.choice(self.seeds), chance)


def targets(root: Path) -> Iterator[Target]:
    """All of them; their good files lie below `root`."""
    from mergeforge.execute import executor
    from mergeforge.gguf.reader import read_gguf
    from mergeforge.io.safetensors_header import read_header
    from mergeforge.operations.synthetic_models import ModelShape, write_adapter, write_model
    from mergeforge.operations.verify import verify
    from mergeforge.planner import make_plan, read_recipe
    from mergeforge.train.settings import read as read_training

    shape = ModelShape(64, 96, 1, 4, 2, 320)
    base, near = write_model(root / "base", shape, seed=0), write_model(root / "near", shape, seed=1, near=0)
    adapter = write_adapter(root / "adapter", shape, str(base), rank=2, seed=2)
    copied = {"merge_method": "passthrough", "models": [str(base)]}
    executor.run_plan(make_plan(copied | {"output": {"shard_size": 60_000}}, out=root / "sharded"))
    executor.run_plan(make_plan(copied | {"output": {"gguf": "f16", "safetensors": False}}, out=root / "gguf"))
    gguf = next((root / "gguf").glob("*.gguf"))
    linear = {"merge_method": "linear", "models": [str(base), str(near)], "parameters": {"weight": 0.5}}
    fold = {"base_model": str(base), "adapters": [str(adapter)]}
    to_gguf = {**copied, "output": {"gguf": "f16"}}
    beside = [near / "config.json", *near.glob("tokenizer*")]
    number = iter(range(1 << 30))

    def plan(recipe: Any) -> Callable[[], Any]:
        return lambda: make_plan(recipe, out=root / f"out{next(number)}", threads=1, memory="64MiB")

    def file_target(name: str, path: Path, mutations: Sequence[Mutation], recipe: Any) -> Target:
        return Target(name, [path.read_bytes()], mutations, path, plan(recipe))

    anything, objects = [changed_bytes], [changed_bytes, changed_json, changed_json]
    header = root / "header.safetensors"
    small = _small_file()
    yield Target(
        "header", [small], [changed_bytes, changed_header, changed_header], header, lambda: read_header(header)
    )
    index = _copied(root, "sharded") / "model.safetensors.index.json"
    yield file_target("index", index, objects, copied | {"models": [str(index.parent)]})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        path = _copied(root, "base", name) / name
        yield file_target(name.removesuffix(".json"), path, objects, to_gguf | {"models": [str(path.parent)]})
    path = _copied(root, "base", "union") / "tokenizer.json"
    union = {**linear, "models": [str(path.parent), str(near)], "tokenizer_source": "union"}
    yield file_target("union", path, objects, union)
    path = _copied(root, "adapter") / "adapter_config.json"
    yield file_target("adapter", path, objects, fold | {"adapters": [str(path.parent)]})
    alone = _folder(root, "gguf", [gguf, *beside])
    held, merged = alone / gguf.name, plan({**linear, "models": [str(base), str(alone / gguf.name)]})
    yield Target("gguf", [gguf.read_bytes()], anything, held, lambda: (read_gguf(held), merged()))
    yield from _gguf_to_gguf(root, gguf, adapter, base)
    recipe = root / "recipe.yaml"
    texts = [LINEAR, TIES, FOLD, STACK, SLERP]
    yield Target("recipe", texts, [changed_bytes, changed_yaml, changed_yaml], recipe, lambda: read_recipe(recipe))
    training = root / "train.yaml"
    yield Target(
        "train", [TRAIN], [changed_bytes, changed_yaml, changed_yaml], training, lambda: read_training(training)
    )
    lines = [b"\n".join(json.dumps(row).encode() for _ in range(4)) for row in ROWS]
    yield from _rows(root, lines)
    receipt = _copied(root, "sharded", "receipt") / "mergeforge.json"
    yield Target("receipt", [receipt.read_bytes()], objects, receipt, lambda: verify(receipt.parent))


def _gguf_to_gguf(root: Path, gguf: Path, adapter: Path, base: Path) -> Iterator[Target]:
    """A GGUF file that is requantized, and a GGUF LoRA that is folded into one."""
    import mergeforge
    from mergeforge.operations.requantize_gguf import plan_gguf
    from mergeforge.planner import Options, make_plan
    from mergeforge.planner.requantize import Requantization

    changed = _folder(root, "requantize", [gguf]) / gguf.name
    (lora,) = mergeforge.convert_to_gguf(adapter, base=base, out=root / "lora" / "lora.gguf")
    options = Options(memory="64MiB", device="cpu", threads=1)

    def plan(model: Path, types: Sequence[str], request: Requantization) -> None:
        plan_gguf(str(model), types, str(root / "requantized"), {}, request, options)

    again = Requantization(allow_requantize=True)
    seeds, folded = [gguf.read_bytes()], Requantization(adapters=((str(lora), 1.0),))
    yield Target("requantize", seeds, [changed_bytes], changed, lambda: plan(changed, ["q4_k_m", "f16"], again))
    alone = _folder(root, "alone", [gguf]) / gguf.name
    recipe = {"merge_method": "passthrough", "models": [str(alone)]}

    def convert() -> None:
        make_plan(recipe, out=root / "unwritten", threads=1, memory="64MiB")

    yield Target("gguf_alone", seeds, [changed_bytes], alone, convert)
    yield Target("gguf_lora", [lora.read_bytes()], [changed_bytes], lora, lambda: plan(gguf, ["q8_0"], folded))


def _rows(root: Path, lines: Sequence[bytes]) -> Iterator[Target]:
    from mergeforge.data.counts import RecordCounter
    from mergeforge.data.settings import DataSource
    from mergeforge.data.source_reader import open_files, parse_file

    def read(path: Path) -> Callable[[], Any]:
        def all_rows() -> None:
            for opened in open_files(DataSource(str(path))):
                for _ in parse_file(opened, RecordCounter()):
                    pass

        return all_rows

    lists = [b"[" + seed.replace(b"\n", b",") + b"]" for seed in lines]
    csv = [b'prompt,response\na,b\n\'c\',"d,""e"\n', b"instruction;input;output\na;b;c\n", b"text\nx\ny\n"]
    kinds = {"jsonl": (lines, [changed_bytes, changed_lines]), "json": (lists, [changed_bytes, changed_json])}
    for ending, (seeds, mutations) in {**kinds, "csv": (csv, [changed_bytes])}.items():
        path = root / f"rows.{ending}"
        yield Target(ending, seeds, mutations, path, read(path))


def _small_file() -> bytes:
    """Safetensors with little data, so that changes meet the header."""
    import numpy
    from safetensors.numpy import save

    tensors = {"a": numpy.zeros((3, 5), "float32"), "b.weight": numpy.ones(7, "float16"), "c": numpy.zeros((), "int64")}
    return bytes(save(tensors, {"format": "pt"}))


def _copied(root: Path, name: str, called: str = "") -> Path:
    return _folder(root, called or name, (root / name).iterdir())


def _folder(root: Path, name: str, files: Iterable[Path]) -> Path:
    """A folder of links to files."""
    folder = root / f"fuzzed-{name}"
    folder.mkdir()
    for path in files:
        (folder / path.name).hardlink_to(path)
    return folder
