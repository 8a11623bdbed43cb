"""Commands of mergeforge on tiny models, and digests of the files that they write.

tools/golden_outputs records the digests and test_golden_outputs.py compares them: code may move, output bytes may not.
Only the part "What of mergeforge is used" knows where things are in the package. All numbers of the models come from
numpy's raw PCG64 stream and exact arithmetic, so they are the same on every machine and with every version of torch.

A digest covers a whole file. Of the files next to the weights, those that programs read are covered; README.md,
Modelfile and the receipt mergeforge.json hold prose and times and are not. No safetensors or GGUF file holds either,
or the program's version.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import shutil
import signal
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from support.paths import TESTS

GOLDEN = TESTS / "execute" / "golden_outputs.json"
ENVIRONMENT = "environment"  # the key in outputs.json for what the machine-dependent cases were recorded with
SIDE_FILES = {
    "adapter_config.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
ENDINGS = (".safetensors", ".gguf", ".jsonl")
METHODS: dict[str, dict[str, Any]] = {
    "arcee_fusion": {},
    "breadcrumbs": {"weight": 0.3, "density": 0.4, "gamma": 0.02},
    "breadcrumbs_ties": {"weight": 0.3, "density": 0.4},
    "dare_linear": {"weight": 0.3, "density": 0.4},
    "dare_ties": {"weight": 0.3, "density": 0.4},
    "della": {"weight": 0.3, "density": 0.5, "epsilon": 0.1},
    "della_linear": {"weight": 0.3, "density": 0.5, "epsilon": 0.1, "lambda": 1.1},
    "fold": {"weight": 0.6},
    "karcher": {},
    "linear": {"weight": 0.3},
    "model_stock": {},
    "multislerp": {"weight": 0.3},
    "nearswap": {"t": 1e-3},
    "nuslerp": {"weight": 0.3},
    "passthrough": {"scale": 0.9},
    "ram": {},
    "ramplus_tl": {"r": 0.2},
    "sce": {"select_topk": 0.5},
    "slerp": {"t": 0.3},
    "task_arithmetic": {"weight": 0.3},
    "ties": {"weight": 0.3, "density": 0.4},
}
ONE_MODEL = ("arcee_fusion", "nearswap", "passthrough", "slerp")  # besides the base, or at all
NO_BASE = ("karcher", "linear", "multislerp", "nuslerp", "passthrough")
GGUF_TYPES = [
    "f32",
    "f16",
    "bf16",
    "q8_0",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q2_k",
    "q3_k_s",
    "q3_k_m",
    "q3_k_l",
    "q4_k_s",
    "q4_k_m",
    "q5_k_s",
    "q5_k_m",
    "q6_k",
    "iq4_nl",
    "iq4_xs",
]


# What of mergeforge is used: the command, and what is listed here.


def run_mergeforge(*arguments: str) -> int:
    """Run a command in this process; returns its exit code."""
    from mergeforge.cli import run_command

    on_terminate = signal.getsignal(signal.SIGTERM) if threading.current_thread() is threading.main_thread() else None
    try:
        return run_command(list(arguments))
    finally:
        if on_terminate is not None:
            signal.signal(signal.SIGTERM, on_terminate)


def write_tiny(folder: Path, shape: Sequence[int], dtype: str = "BF16") -> None:
    """A Llama with config and tokenizer. `shape`: hidden, intermediate, layers, heads, key-value heads, vocabulary."""
    from mergeforge.operations.synthetic_models import ModelShape, write_model

    write_model(folder, ModelShape(*shape), dtype=dtype)


def has_kernels() -> bool:
    """Whether the C library is compiled and up to date."""
    from mergeforge.native import bindings

    return bindings.is_available()


def without_kernels() -> Any:
    """A context in which torch replaces the C library."""
    from mergeforge.native import bindings

    return patch.object(bindings, "is_available", lambda: False)


def interrupt_after(tiles: int, recipe: Path, out: Path) -> None:
    """Run the merge and stop after a number of tiles, as an interrupted run does."""
    import mergeforge

    plan = mergeforge.plan(recipe, out=out, device="cpu", threads=1, memory="32MiB")
    running = mergeforge.iter_run(plan)
    for _ in range(tiles):
        next(running)
    running.close()


# Numbers and files.


def uniform(seed: int, count: int) -> NDArray[np.int64]:
    """Integers from 0 to 65535. The raw stream of PCG64 never changes between versions of numpy."""
    words = np.random.PCG64(seed).random_raw((count + 3) // 4)
    return words.view(np.uint16)[:count].astype(np.int64)


def bell(seed: int, shape: Sequence[int], scale: float) -> NDArray[np.float32]:
    """Approximately normal: sums of three uniform numbers, with standard deviation `scale`."""
    count = int(np.prod(shape))
    total = uniform(seed, 3 * count).reshape(3, count).sum(0) - 3 * 65535 // 2
    return (total.astype(np.float64) * (scale / 32768)).astype(np.float32).reshape(shape)


def stored(values: NDArray[np.float32], dtype: str) -> bytes:
    """The bytes as safetensors stores them; bfloat16 is truncated, not rounded."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype]).tobytes()


def save(path: Path, tensors: Mapping[str, tuple[str, Sequence[int], bytes]]) -> None:
    """Write a safetensors file of (dtype, shape, bytes) by name."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(data for _, _, data in tensors.values())


def shapes(path: Path) -> dict[str, list[int]]:
    """The tensors of a safetensors file, in file order."""
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    held = {name: facts["shape"] for name, facts in header.items() if name != "__metadata__"}
    return dict(sorted(held.items(), key=lambda item: header[item[0]]["data_offsets"]))


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_llama(folder: str, shape: Sequence[int], seed: int, near: int | None = None, dtype: str = "BF16") -> None:
    """Write a model of pseudo-random numbers; with `near`, those of the model of that seed plus a small change."""
    path = Path(folder)
    write_tiny(path, shape, dtype)
    tensors = {}
    for at, (name, size) in enumerate(shapes(path / "model.safetensors").items()):
        if name.endswith("norm.weight"):
            values = 1 + bell(1000 * seed + at, size, 0.02)
        elif near is None:
            values = bell(1000 * seed + at, size, 0.02)
        else:
            values = bell(1000 * near + at, size, 0.02) + bell(1000 * seed + at, size, 0.001)
        tensors[name] = (dtype, size, stored(values, dtype))
    save(path / "model.safetensors", tensors)


TINY = (64, 176, 4, 4, 2, 320)
WIDE = (256, 512, 2, 4, 2, 320)  # K types take rows of 256


def modules(shape: Sequence[int]) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear modules of a Llama."""
    hidden, inner, layers, heads, groups, _ = shape
    narrow = hidden // heads * groups
    each = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {f"model.layers.{layer}.{name}": size for layer in range(layers) for name, size in each.items()}


def write_peft(folder: str, config: Mapping[str, Any], seed: int, tensors: Mapping[str, Sequence[int]]) -> None:
    """Write an adapter as PEFT stores it. Factors that multiply a weight are around 1, the others around 0."""
    held = {}
    for at, (name, size) in enumerate(tensors.items()):
        values = bell(1000 * seed + at, size, 0.02)
        if name.endswith(("ia3_l", "norm.weight")):
            values = 1 + values
        elif "magnitude" in name:
            values = np.abs(values) + np.float32(0.1)
        held[f"base_model.model.{name}"] = ("F32", size, stored(values, "F32"))
    save(Path(folder) / "adapter_model.safetensors", held)
    write_json(Path(folder) / "adapter_config.json", {"base_model_name_or_path": "base", **config})


def write_lora(folder: str, shape: Sequence[int], rank: int, seed: int, dora: bool = False, **config: Any) -> None:
    tensors: dict[str, Sequence[int]] = {}
    for name, (out, into) in modules(shape).items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = (rank, into), (out, rank)
        if dora:
            tensors[f"{name}.lora_magnitude_vector"] = (out,)
    targets = sorted({name.rpartition(".")[2] for name in modules(shape)})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "use_dora": dora}
    write_peft(folder, settings | config, seed, tensors)


def write_other_adapters() -> None:
    """PEFT methods other than LoRA, on all linear modules."""
    every = modules(TINY)
    targets = sorted({name.rpartition(".")[2] for name in every})
    ia3 = {f"{name}.ia3_l": (1, into) if "mlp." in name else (out, 1) for name, (out, into) in every.items()}
    feedforward = [name for name in targets if name in ("gate_proj", "up_proj", "down_proj")]
    write_peft(
        "adapters/ia3",
        {"peft_type": "IA3", "target_modules": targets, "feedforward_modules": feedforward},
        31,
        ia3,
    )
    loha = {
        f"{name}.hada_w{number}_{side}": (out, 3) if side == "a" else (3, into)
        for name, (out, into) in every.items()
        for number in "12"
        for side in "ab"
    }
    write_peft("adapters/loha", {"peft_type": "LOHA", "r": 3, "alpha": 60, "target_modules": targets}, 32, loha)
    lokr = {
        f"{name}.lokr_w{number}": (8, 8) if number == "1" else (out // 8, into // 8)
        for name, (out, into) in every.items()
        for number in "12"
    }
    write_peft("adapters/lokr", {"peft_type": "LOKR", "r": 4, "alpha": 8, "target_modules": targets}, 33, lokr)
    norms = {f"model.layers.{at}.input_layernorm.weight": (64,) for at in range(4)}
    write_peft("adapters/norms", {"peft_type": "LN_TUNING", "target_modules": ["input_layernorm"]}, 34, norms)


PAIRS = ("wh", "ly", "um", "ck", "qu", "zz")


def other_tokenizer(folder: str, pairs: Sequence[str], added: Sequence[str]) -> int:
    """Replace three merge pairs of a model's tokenizer and add tokens; returns the number of tokens."""
    path = Path(folder) / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    known = sorted(value["model"]["vocab"], key=value["model"]["vocab"].__getitem__)
    known = [*known[:-3], *pairs]
    value["model"]["vocab"] = {token: at for at, token in enumerate(known)}
    value["model"]["merges"] = [*value["model"]["merges"][:-3], *(list(pair) for pair in pairs)]
    plain = value["added_tokens"][0]
    for at, token in enumerate(added):
        value["added_tokens"].append(plain | {"id": len(known) + at, "content": token})
    write_json(path, value)
    return len(known) + len(added)


def write_gptq(folder: str, shape: Sequence[int]) -> None:
    """Write a model with random 4-bit words in the layout of GPTQ."""
    path = Path(folder)
    shutil.copytree("base", path)
    tensors: dict[str, tuple[str, Sequence[int], bytes]] = {}
    linear = modules(shape)
    for at, (name, size) in enumerate(shapes(Path("base/model.safetensors")).items()):
        module = name.removesuffix(".weight")
        if module not in linear:
            tensors[name] = ("BF16", size, stored(bell(70_000 + at, size, 0.02), "BF16"))
            continue
        out, into = linear[module]
        words = np.random.PCG64(80_000 + at).random_raw(into * out // 16 + into // 16 * out // 16)
        data = words.tobytes()
        tensors[f"{module}.qweight"] = ("I32", (into // 8, out), data[: into * out // 2])
        tensors[f"{module}.qzeros"] = ("I32", (into // 16, out // 8), data[into * out // 2 :][: into // 16 * out // 2])
        scales = np.abs(bell(90_000 + at, (into // 16, out), 0.002)) + np.float32(0.001)
        tensors[f"{module}.scales"] = ("F16", (into // 16, out), stored(scales, "F16"))
        groups = (np.arange(into) // 16).astype(np.int32)
        tensors[f"{module}.g_idx"] = ("I32", (into,), groups.tobytes())
    save(path / "model.safetensors", tensors)
    config = json.loads((path / "config.json").read_text())
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False}
    write_json(path / "config.json", config | {"quantization_config": settings})


def write_imatrix(path: Path) -> None:
    """Write an imatrix in llama-imatrix's older format, for every linear tensor of the wide model."""
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    data = struct.pack("<i", len(modules(WIDE)))
    for at, (module, (_, into)) in enumerate(modules(WIDE).items()):
        layer, leaf = module.split(".")[2], module.rpartition(".")[2]
        name = f"blk.{layer}.{names[leaf]}.weight".encode()
        values = uniform(60_000 + at, into).astype(np.float32) + 1
        data += struct.pack("<i", len(name)) + name + struct.pack("<ii", 1, into) + values.tobytes()
    path.write_bytes(data)


def write_t5(folder: str, seed: int) -> None:
    """Write a model with the parts that `modules` selects: encoder, decoder, and shared tensors."""
    names = [f"{part}.block.{at}.w" for part in ("encoder", "decoder") for at in range(2)]
    names += ["shared.weight", "lm_head.weight"]
    tensors = {
        name: ("F32", (16, 8), stored(bell(seed * 100 + at, (16, 8), 0.1), "F32")) for at, name in enumerate(names)
    }
    save(Path(folder) / "model.safetensors", tensors)
    config = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "num_layers": 2}
    write_json(Path(folder) / "config.json", config | {"num_decoder_layers": 2, "tie_word_embeddings": False})


def write_inputs() -> None:
    """Write all models and adapters to the current folder."""
    write_llama("base", TINY, 0)
    for seed, name in enumerate(("tuned-a", "tuned-b", "tuned-c"), 1):
        write_llama(name, TINY, seed, near=0)
    write_llama("half", TINY, 4, near=0, dtype="F16")
    write_llama("single", TINY, 5, near=0, dtype="F32")
    write_llama("wide", WIDE, 6)
    write_llama("wide-tuned", WIDE, 7, near=6)
    write_lora("adapters/loan", TINY, 4, 21)
    write_lora("adapters/underwriting", TINY, 8, 22)
    write_lora("adapters/fraud", TINY, 2, 23, lora_alpha=3, use_rslora=True)
    write_lora("adapters/dora", TINY, 4, 24, dora=True)
    write_lora("adapters/patterns", TINY, 4, 25, alpha_pattern={"q_proj": 3}, lora_alpha=5)
    write_lora("adapters/wide", WIDE, 4, 26)
    write_other_adapters()
    for name, pairs, added in (("code", PAIRS[:3], ["<tool>", "<|im_end|>"]), ("chat", PAIRS[2:5], ["<|im_end|>"])):
        write_llama(name, (16, 32, 1, 2, 2, 277 + len(added)), 50 + len(added), dtype="F32")
        assert other_tokenizer(name, pairs, added) == 277 + len(added)
    write_llama("plain", (16, 32, 1, 2, 2, 277), 43, dtype="F32")
    write_gptq("gptq", TINY)
    write_imatrix(Path("imatrix.dat"))
    write_t5("t5-a", 1)
    write_t5("t5-b", 2)
    topics = [{"prompt": f"Join {a} and {b}.", "response": f"{a}-{b}"} for a in PAIRS for b in PAIRS]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in topics))


# Cases.


@dataclass(frozen=True)
class Case:
    """A command that runs in the folder of the inputs and writes to a new folder.

    `needs`: "kernels" or "peft". `torch_linalg`: the last bits depend on the processor and on torch's version:
    products of matrices, decompositions, weighted sums and exponentials by torch. These are the cases that differ under
    ATEN_CPU_CAPABILITY=avx2 or default with MKL_CBWR=COMPATIBLE, and all others with a product or a decomposition.
    """

    name: str
    run: Callable[[Path], None]
    needs: str = ""
    torch_linalg: bool = False


@dataclass(frozen=True)
class Options:
    """Options that must not change the bytes."""

    threads: int = 2
    memory: str = ""

    def arguments(self) -> list[str]:
        return ["--threads", str(self.threads), *(["--memory", self.memory] if self.memory else [])]


OPTIONS = Options()  # tools/golden_outputs sets others


def command(*arguments: str) -> None:
    code = run_mergeforge(*arguments)
    assert code == 0, f"exit code {code}: mergeforge {' '.join(arguments)}"


def merging(
    recipe: Any, *arguments: str, context: Callable[[], Any] = contextlib.nullcontext
) -> Callable[[Path], None]:
    """Merge a recipe (a list: several documents) into the folder `merged`."""

    def run(folder: Path) -> None:
        path = folder / "recipe.yaml"
        path.write_text("\n---\n".join(json.dumps(one) for one in (recipe if isinstance(recipe, list) else [recipe])))
        given = arguments if "--threads" in arguments or "--memory" in arguments else (*OPTIONS.arguments(), *arguments)
        with context():
            command("run", str(path), "--out", str(folder / "merged"), "--device", "cpu", "-q", *given)

    return run


def models_recipe(method: str, **changed: Any) -> dict[str, Any]:
    models = ["tuned-a"] if method in ONE_MODEL else ["tuned-a", "tuned-b"]
    if method in ("karcher", "multislerp", "model_stock", "sce", "ram", "ramplus_tl"):
        models.append("tuned-c")
    entries: list[dict[str, Any]] = [{"model": name} for name in models]
    parameters = dict(METHODS[method])
    if "weight" in parameters:
        for at, entry in enumerate(entries):
            entry["parameters"] = {"weight": [parameters["weight"], 0.45, 0.2][at]}
        del parameters["weight"]
    recipe: dict[str, Any] = {"merge_method": method, "models": entries, "parameters": parameters}
    return recipe | ({} if method in NO_BASE else {"base_model": "base"}) | changed


ADAPTERS = [
    {"adapter": "adapters/loan", "weight": 0.4},
    {"adapter": "adapters/underwriting", "weight": 0.4},
    {"adapter": "adapters/fraud", "weight": 0.2},
]
LINEAR = models_recipe("linear")
JOINED = {"base_model": "base", "adapters": ADAPTERS[:2]}


def methods() -> Iterator[Case]:
    """Every method through the C library and through torch."""
    for method in METHODS:
        recipe, fuses = models_recipe(method), method == "arcee_fusion"
        yield Case(f"method {method}", merging(recipe), "kernels", torch_linalg=fuses)
        torchs = fuses or method in ("karcher", "linear", "multislerp")
        yield Case(f"method {method} in torch", merging(recipe, context=without_kernels), torch_linalg=torchs)
    for method, more in {
        "linear": {"normalize": False},
        "model_stock": {"filter_wise": True},
        "nuslerp": {"nuslerp_row_wise": True},
        "sce": {"select_topk": 0.1},
        "task_arithmetic": {"lambda": 0.7, "normalize": True},
        "ties": {"rescale": True, "normalize": False},
        "dare_ties": {"rescale": False},
    }.items():
        recipe = models_recipe(method)
        recipe["parameters"] = recipe["parameters"] | more
        yield Case(f"method {method}, {' '.join(more)}", merging(recipe))
    for method in ("nuslerp", "multislerp"):
        yield Case(f"method {method} with a base", merging(models_recipe(method, base_model="base")))


def dtypes() -> Iterator[Case]:
    mixed = [{"model": name, "parameters": {"weight": 0.5}} for name in ("tuned-a", "half", "single")]
    for dtype in ("bfloat16", "float16", "float32"):
        yield Case(f"dtype {dtype}", merging({"merge_method": "linear", "models": mixed, "dtype": dtype}))
    yield Case("dtype ties float32", merging(models_recipe("ties", dtype="float32")))
    yield Case(
        "dtype of f16 models",
        merging({"merge_method": "passthrough", "models": ["half"], "parameters": {"scale": 1.1}}),
    )
    yield Case(
        "dtype out_dtype",
        merging({"merge_method": "linear", "models": mixed, "dtype": "float32", "out_dtype": "float16"}),
    )


def adapters() -> Iterator[Case]:
    yield Case("fold one", merging({"base_model": "base", "adapters": ["adapters/loan"]}), torch_linalg=True)
    yield Case("fold three", merging({"base_model": "base", "adapters": ADAPTERS}), torch_linalg=True)
    yield Case(
        "fold three in torch",
        merging({"base_model": "base", "adapters": ADAPTERS}, context=without_kernels),
        torch_linalg=True,
    )
    yield Case(
        "fold three float32",
        merging({"base_model": "base", "adapters": ADAPTERS, "dtype": "float32"}),
        torch_linalg=True,
    )
    for kind in ("dora", "patterns", "ia3", "loha", "lokr", "norms"):
        recipe = {"base_model": "base", "adapters": [{"adapter": f"adapters/{kind}", "weight": 0.8}]}
        yield Case(f"fold {kind}", merging(recipe), torch_linalg=True)
    mixed = [*ADAPTERS[:1], {"adapter": "adapters/dora", "weight": 0.3}, {"adapter": "adapters/ia3", "weight": 0.3}]
    yield Case("fold kinds together", merging({"base_model": "base", "adapters": mixed}), torch_linalg=True)
    given = {
        "ties": {"density": 0.5},
        "dare_ties": {"density": 0.5},
        "linear": {},
        "slerp": {
            "t": [{"filter": "self_attn", "value": [0.2, 0.8]}, {"filter": "mlp", "value": [0.8, 0.2]}, {"value": 0.5}]
        },
        "sce": {"select_topk": 0.5},
        "della": {"density": 0.5},
    }
    for method, parameters in given.items():
        entries: list[Any] = ADAPTERS if method not in ("slerp", "sce") else ["adapters/loan", "adapters/underwriting"]
        recipe = {"merge_method": method, "base_model": "base", "adapters": entries, "parameters": parameters}
        yield Case(f"adapters by {method}", merging(recipe), torch_linalg=True)
    both = {"merge_method": "ties", "base_model": "base", "models": ["tuned-a"], "adapters": ["adapters/loan"]}
    yield Case(
        "model and adapter by ties", merging(both | {"parameters": {"weight": 0.5, "density": 0.5}}), torch_linalg=True
    )
    plus = {"merge_method": "linear", "models": ["tuned-a+adapters/loan", "tuned-b"], "parameters": {"weight": 0.5}}
    yield Case("model+lora", merging(plus), torch_linalg=True)
    yield Case(
        "fold onto nf4 values",
        merging({"base_model": "base", "base_numerics": "dequant_nf4", "adapters": ["adapters/loan"]}),
        torch_linalg=True,
    )


def structure() -> Iterator[Case]:
    """Slices, modules, rules, gradients, filters, documents, tokenizers."""
    sliced = [
        {"sources": [{"model": "tuned-a", "layer_range": [0, 3]}]},
        {"sources": [{"model": "tuned-b", "layer_range": [1, 4]}]},
    ]
    yield Case("slices", merging({"merge_method": "passthrough", "slices": sliced, "dtype": "bfloat16"}))
    weighed = [
        {"sources": [{"model": "tuned-a", "layer_range": [0, 2]}, {"model": "tuned-b", "layer_range": [2, 4]}]},
        {
            "sources": [{"model": "tuned-b", "layer_range": [1, 3]}, {"model": "tuned-c", "layer_range": [1, 3]}],
            "parameters": {"weight": [0.2, 0.9]},
        },
    ]
    yield Case(
        "slices by linear", merging({"merge_method": "linear", "slices": weighed, "parameters": {"weight": 0.5}})
    )
    parts = {
        "encoder": {
            "slices": [{"sources": [{"model": one, "layer_range": [0, 1]}]} for one in ("t5-b", "t5-a", "t5-a")]
        },
        "decoder": {"models": ["t5-b"]},
        "shared": {"models": ["t5-a"]},
    }
    yield Case("modules", merging({"merge_method": "passthrough", "modules": parts}))
    rules = [
        {"match": r"self_attn\.[qkv]_proj", "merge_method": "slerp", "models": ["tuned-a"], "parameters": {"t": 0.4}},
        {"match": r"mlp\.", "merge_method": "ties", "parameters": {"weight": 0.5, "density": 0.5}},
        {"match": ["embed_tokens", "lm_head"], "use": "tuned-a"},
        {"use": "base"},
    ]
    yield Case("rules", merging({"base_model": "base", "models": ["tuned-a", "tuned-b"], "rules": rules}))
    gradients = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": "tuned-a", "parameters": {"density": [1, 0.7, 0.1], "weight": 1.0}},
            {"model": "tuned-b", "parameters": {"density": 0.5, "weight": [0, 0.3, 0.7, 1]}},
            {
                "model": "tuned-c",
                "parameters": {"density": 0.33, "weight": [{"filter": "mlp", "value": 0.5}, {"value": 0}]},
            },
        ],
        "parameters": {"normalize": True},
        "dtype": "float16",
    }
    yield Case("gradients and filters", merging(gradients))
    t = [
        {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
        {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
        {"value": 0.5},
    ]
    yield Case(
        "gradients of slerp",
        merging({"merge_method": "slerp", "base_model": "tuned-a", "models": ["tuned-b"], "parameters": {"t": t}}),
    )
    seeded = models_recipe("dare_linear", random_seed=7)
    yield Case("another random seed", merging(seeded))
    stages: list[Any] = [
        {"name": "average", "merge_method": "linear", "models": ["tuned-a", "tuned-b"], "parameters": {"weight": 0.5}},
        {
            "name": "deeper",
            "merge_method": "passthrough",
            "slices": [{"sources": [{"model": "average", "layer_range": each}]} for each in ([0, 3], [1, 4])],
        },
        {
            "merge_method": "passthrough",
            "models": [
                {"model": "deeper", "parameters": {"scale": [{"filter": "o_proj", "value": 0.8}, {"value": 1.0}]}}
            ],
        },
    ]
    yield Case("stages", merging(stages))
    yield Case("stages in torch", merging(stages, context=without_kernels))
    reused: list[Any] = [
        {"name": "first", "merge_method": "linear", "models": ["base", "tuned-b"], "parameters": {"weight": 0.5}},
        {
            "name": "second",
            "merge_method": "slerp",
            "base_model": "first",
            "models": ["tuned-a"],
            "parameters": {"t": 0.5},
        },
        {
            "merge_method": "dare_ties",
            "base_model": "base",
            "models": ["second", "tuned-c"],
            "parameters": {"weight": 0.5, "density": 0.6},
        },
    ]
    yield Case("stages of several methods", merging(reused))
    words = {"merge_method": "linear", "models": ["plain", "code", "chat"], "parameters": {"weight": 0.4}}
    for source in ("union", "base", "chat"):
        base = {"base_model": "plain", "models": words["models"][1:]} if source == "base" else {}
        yield Case(
            f"tokenizer {source}", merging({**words, **base, "tokenizer": {"source": source}}), torch_linalg=True
        )
    padded = {"source": "union", "pad_to_multiple_of": 64}
    yield Case(
        "tokenizer padded, template chatml",
        merging(words | {"tokenizer": padded, "chat_template": "chatml"}),
        torch_linalg=True,
    )
    chosen = {"source": "union", "tokens": {"<tool>": {"source": "code", "force": True}}}
    yield Case("tokenizer with a token's source", merging(words | {"tokenizer": chosen}), torch_linalg=True)


def outputs() -> Iterator[Case]:
    """Output formats, and options that must not change the output."""
    yield Case("shards", merging(LINEAR | {"output": {"shard_size": "100KB"}}))
    yield Case("shards of a fold", merging(JOINED | {"output": {"shard_size": "60KB"}}), torch_linalg=True)
    yield Case(
        "fp8",
        merging(
            {
                "merge_method": "linear",
                "models": ["wide", "wide-tuned"],
                "parameters": {"weight": 0.5},
                "output": {"fp8": True},
            }
        ),
    )
    yield Case("from gptq", merging({"merge_method": "passthrough", "models": ["gptq"]}))
    yield Case("fold onto gptq", merging({"base_model": "gptq", "adapters": ["adapters/loan"]}), torch_linalg=True)
    yield Case("from fp8", from_fp8)
    for method in ("linear", "ties", "dare_ties", "slerp"):
        yield Case(f"little memory, {method}", merging(models_recipe(method), "--memory", "40MiB", "--threads", "1"))
    yield Case(
        "little memory, fold",
        merging({"base_model": "base", "adapters": ADAPTERS}, "--memory", "40MiB", "--threads", "1"),
        torch_linalg=True,
    )
    yield Case("resumed", resumed)
    alone = {"output": {"safetensors": False, "adapter": True}}
    yield Case("adapters joined", merging(JOINED | alone), torch_linalg=True)
    yield Case("adapters joined and cut", merging(JOINED | {"output": {"adapter": {"rank": 3}}}), torch_linalg=True)
    yield Case(
        "adapters joined and cut, bfloat16",
        merging(JOINED | {"output": {"safetensors": False, "adapter": {"rank": 5, "dtype": "bfloat16"}}}),
        torch_linalg=True,
    )
    for svd in ("exact", "randomised"):
        yield Case(f"extract-lora {svd}", extracting("--rank", "4", "--svd", svd), torch_linalg=True)
    yield Case(
        "extract-lora by energy",
        extracting("--energy", "0.5", "--rank", "16", "--save-rest", "--dtype", "bfloat16"),
        torch_linalg=True,
    )
    yield Case("data split", splitting)


def from_fp8(folder: Path) -> None:
    recipe = {"merge_method": "passthrough", "models": ["wide"], "output": {"fp8": True}}
    inside = folder / "fp8"
    inside.mkdir()
    merging(recipe)(inside)
    again = {"merge_method": "linear", "models": [str(inside / "merged"), "wide-tuned"], "parameters": {"weight": 0.5}}
    merging(again)(folder)
    shutil.rmtree(inside)


def resumed(folder: Path) -> None:
    """Interrupted by closing the iterator, then resumed: the bytes of the case `shards`."""
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(LINEAR | {"output": {"shard_size": "100KB"}}))
    interrupt_after(9, path, folder / "merged")
    assert any((folder / "merged").iterdir()) and not list((folder / "merged").glob("model*.safetensors"))
    options = ("--device", "cpu", "--threads", "1", "--memory", "32MiB", "-q")
    command("run", str(path), "--out", str(folder / "merged"), *options)


def extracting(*arguments: str) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        given = ("--device", "cpu", "--threads", str(OPTIONS.threads), "-q", *arguments)
        command("extract-lora", "tuned-a", "--base", "base", "--out", str(folder / "merged"), *given)

    return run


def splitting(folder: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        command("data", "split", "rows.jsonl", "--val", "0.2", "--out", str(folder / "merged"))


def ggufs() -> Iterator[Case]:
    merged = {"merge_method": "linear", "models": ["wide", "wide-tuned"], "parameters": {"weight": 0.5}}
    for kind in GGUF_TYPES:
        recipe = merged | {"output": {"gguf": [kind], "safetensors": False}}
        needs = "" if kind in ("f32", "f16", "bf16") else "kernels"
        yield Case(f"gguf {kind}", merging(recipe), needs)
    for kind in ("q8_0", "q4_0", "q5_1", "q2_k", "q3_k_m", "q4_k_m", "q6_k", "iq4_nl", "iq4_xs"):
        recipe = merged | {"output": {"gguf": [kind], "safetensors": False}}
        yield Case(f"gguf {kind} in torch", merging(recipe, context=without_kernels))
    folded = {"base_model": "wide", "adapters": ["adapters/wide"], "output": {"gguf": ["q8_0"]}}
    yield Case("gguf of a fold", merging(folded), torch_linalg=True)
    rounded = merged | {"output": {"gguf": ["f32", "q8_0"], "gguf_from": "stored"}}
    yield Case("gguf from stored values", merging(rounded))
    yield Case("gguf of narrow rows", merging(LINEAR | {"output": {"gguf": ["q4_k_m"], "safetensors": False}}))
    yield Case("gguf command", exporting("wide", "--type", "q4_k_m", "--type", "q8_0"))
    yield Case(
        "gguf command, imatrix", exporting("wide", "--type", "q4_k_s", "--type", "iq4_xs", "--imatrix", "imatrix.dat")
    )
    yield Case("gguf command, pure", exporting("wide", "--type", "q5_k_m", "--pure"))
    yield Case(
        "gguf command, tensor types",
        exporting("wide", "--type", "q4_0", "--tensor-type", "ffn_down=q6_k", "--output-tensor-type", "f16"),
    )
    yield Case("gguf command, parts", exporting("wide", "--type", "f16", "--split-max-size", "1MB"))
    yield Case("from gguf", from_gguf)


def exporting(model: str, *arguments: str) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        given = ("--device", "cpu", *OPTIONS.arguments(), "-q", *arguments)
        command("gguf", model, "--out", str(folder / "merged"), *given)

    return run


def from_gguf(folder: Path) -> None:
    """A GGUF file as one of the models."""
    inside = folder / "gguf"
    exporting("tuned-a", "--type", "q8_0")(inside)
    (file,) = inside.rglob("*.gguf")
    merging({"merge_method": "linear", "models": ["base", str(file)], "parameters": {"weight": 0.5}})(folder)
    shutil.rmtree(inside)


def training(folder: Path) -> None:
    """Two steps of LoRA on the tiny model in one thread."""
    import torch

    settings = {
        "model": "base",
        "data": "rows.jsonl",
        "method": "lora",
        "lora": {"r": 4},
        "lr": 0.003,
        "max_steps": 2,
        "batch": {"size": 4, "micro": 2},
        "pack": False,
        "eval": {"max_tokens": 4},
    }
    path = folder / "train.yaml"
    path.write_text(json.dumps(settings))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        command("train", str(path), "--out", str(folder / "run"), "--device", "cpu", "-q")
    finally:
        torch.set_num_threads(threads)
    shutil.copytree(folder / "run" / "adapter", folder / "merged")
    path = folder / "merged" / "adapter_config.json"  # PEFT's: with the base's whole path, and sets in any order
    config = json.loads(path.read_text())
    targets = sorted(config["target_modules"])
    write_json(path, {"target_modules": targets, "r": config["r"], "lora_alpha": config["lora_alpha"]})


def cases() -> list[Case]:
    made = [
        *methods(),
        *dtypes(),
        *adapters(),
        *structure(),
        *outputs(),
        *ggufs(),
        Case("train", training, "peft", torch_linalg=True),
    ]
    assert len({case.name for case in made}) == len(made)
    return made


# Digests.


def digests(folder: Path) -> dict[str, str]:
    """File name -> the first 16 hex digits of the sha256 of each covered file."""
    held = sorted(path for path in folder.rglob("*") if path.name in SIDE_FILES or path.name.endswith(ENDINGS))
    assert held, f"nothing in {folder}"
    return {path.relative_to(folder).as_posix(): digest(path) for path in held}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def environment() -> dict[str, str]:
    """The environment that the results of matrix products and decompositions depend on."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "cpu": f"{platform.machine()} {capability}"}


def outputs_of(case: Case) -> dict[str, str]:
    """Run a case in the current folder, which holds the inputs, and digest its output."""
    place = Path("outputs") / case.name.replace(" ", "_").replace(",", "")
    place.mkdir(parents=True)
    case.run(place)
    found = digests(place / "merged")
    shutil.rmtree(place)
    return found


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Make a folder the current one inside the block."""
    kept = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(kept)


def read_golden() -> dict[str, dict[str, str]]:
    golden: dict[str, dict[str, str]] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return golden


def differences(found: Mapping[str, str], expected: Mapping[str, str]) -> Iterable[str]:
    return sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
