"""Random models and adapters with real shapes: for the demo, the tests and the benchmarks.

Weights are slices of one pool of random numbers, so gigabytes are written at the speed of the disk, shard by shard, in
little memory. `near` makes a model that differs from another by a small random change, as a fine-tune does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.core.tensor_info import TensorInfo, torch_dtype
from mergeforge.errors import RecipeError, did_you_mean
from mergeforge.io.disk import WriteBehind
from mergeforge.io.file_layout import Layout, OutputFiles
from mergeforge.writers.safetensors import INDEX, index_content, lay_out

if TYPE_CHECKING:
    from torch import Tensor

POOL = (1 << 22) + 4099  # elements; not a power of two, so that no two rows of a matrix are equal
STD = 0.02
CHANGE = 5e-4  # standard deviation by which a short fine-tune changes a weight
PAIRS = ("th", "he", "in", "er", "an", "re", "nd", "on", "en", "at", "ou", "ed", "ha", "to", "or", "it", "is", "hi")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Llama model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False

    def tensors(self, dtype: str = "BF16") -> list[TensorInfo]:
        """Every tensor, in the order in which transformers saves them."""
        return [TensorInfo(name, dtype, shape) for name, shape in self._shapes()]

    def linears(self, layer: int) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of a layer's linear modules by name."""
        kv = self.hidden // self.heads * self.kv_heads
        attention = {"q_proj": self.hidden, "k_proj": kv, "v_proj": kv, "o_proj": self.hidden}
        at = f"model.layers.{layer}"
        modules = {f"{at}.self_attn.{name}": (out, self.hidden) for name, out in attention.items()}
        modules |= {f"{at}.mlp.{name}": (self.intermediate, self.hidden) for name in ("gate_proj", "up_proj")}
        return modules | {f"{at}.mlp.down_proj": (self.hidden, self.intermediate)}

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            for module, size in self.linears(layer).items():
                yield f"{module}.weight", size
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield f"model.layers.{layer}.{norm}.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab, self.hidden)

    def config(self, dtype: str) -> dict[str, Any]:
        known = torch_dtype(dtype)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "bos_token_id": 256,
            "eos_token_id": 257,
            "pad_token_id": 258,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 2048,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied,
            "torch_dtype": str(known).removeprefix("torch."),
            "vocab_size": self.vocab,
        }


SHAPES = {
    "tiny": ModelShape(64, 176, 4, 4, 2, 320),
    "demo": ModelShape(256, 768, 8, 8, 4, 4096),
    "1.1b": ModelShape(2048, 5632, 22, 32, 4, 32000),  # TinyLlama
    "llama-1b": ModelShape(2048, 8192, 16, 32, 8, 128256, tied=True),  # Llama 3.2 1B
    "3b": ModelShape(3200, 8640, 26, 32, 32, 32000),  # OpenLLaMA 3B
    "7b": ModelShape(4096, 11008, 32, 32, 32, 32000),  # Llama 2
    "13b": ModelShape(5120, 13824, 40, 40, 40, 32000),
    "70b": ModelShape(8192, 28672, 80, 64, 8, 32000),
}


def model_shape(name: str) -> ModelShape:
    """The shape of a known model. Raises RecipeError with the closest name."""
    if name not in SHAPES:
        raise RecipeError(f"unknown shape '{name}'", hint=did_you_mean(name, SHAPES) or ", ".join(SHAPES))
    return SHAPES[name]


def write_model(
    folder: Path,
    shape: ModelShape,
    *,
    seed: int = 0,
    near: int | None = None,
    dtype: str = "BF16",
    shard_size: int = 5 * 10**9,
    std: float = STD,
) -> Path:
    """Write a checkpoint with config and byte-level tokenizer; with `near`, a fine-tune of that seed's model."""
    import torch

    pool = _pool(seed if near is None else near, std)
    if near is not None:
        pool = pool + _pool(seed, CHANGE)
    known = torch_dtype(dtype)
    assert known is not None
    tensors = shape.tensors(dtype)
    ones = torch.ones(shape.hidden, dtype=known)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, lay_out(tensors, shard_size), tensors, pool.to(known), ones)
    _write_json(folder / "config.json", shape.config(dtype))
    _write_json(folder / "generation_config.json", {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258})
    write_tokenizer(folder)
    return folder


def write_adapter(
    folder: Path,
    shape: ModelShape,
    base: str,
    *,
    rank: int = 16,
    alpha: float = 32,
    targets: Sequence[str] = TARGETS,
    seed: int = 1,
    dtype: str = "F32",
) -> Path:
    """Write a PEFT LoRA adapter of the model, with both factors random."""
    known = torch_dtype(dtype)
    assert known is not None
    tensors = []
    for layer in range(shape.layers):
        for module, (out, into) in shape.linears(layer).items():
            if module.rpartition(".")[2] in targets:
                tensors.append(TensorInfo(f"base_model.model.{module}.lora_A.weight", dtype, (rank, into)))
                tensors.append(TensorInfo(f"base_model.model.{module}.lora_B.weight", dtype, (out, rank)))
    folder.mkdir(parents=True, exist_ok=True)
    layout = lay_out(tensors, 1 << 40)
    _write(folder, layout, tensors, _pool(seed, 0.01).to(known), None)
    (folder / "model.safetensors").replace(folder / "adapter_model.safetensors")
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(targets),
        "task_type": "CAUSAL_LM",
    }
    _write_json(folder / "adapter_config.json", config)
    return folder


def _pool(seed: int, std: float) -> Tensor:
    import torch

    return torch.randn(POOL, generator=torch.Generator().manual_seed(seed)) * std


def _write(folder: Path, layout: Layout, tensors: list[TensorInfo], pool: Tensor, ones: Tensor | None) -> None:
    import torch

    files, behind = OutputFiles(folder, layout.files), WriteBehind()
    files.open()
    doubled = torch.cat([pool, pool])
    for number, info in enumerate(tensors):
        extent = layout.extents[info.name]
        if ones is not None and len(info.shape) == 1:
            files.write(extent.file, ones.view(torch.uint8).numpy(), extent.offset, behind)
            continue
        start = number * 7919 * 64 % POOL
        for done in range(0, info.numel, POOL):
            part = doubled[start : start + min(POOL, info.numel - done)]
            files.write(extent.file, part.view(torch.uint8).numpy(), extent.offset + done * info.bits // 8, behind)
    files.sync()
    files.close()
    shards = index_content(layout, tensors)
    if shards is not None:
        (folder / INDEX).write_bytes(shards)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer: 256 bytes, three special tokens, and the most common English letter pairs."""
    vocabulary = {character: at for at, character in enumerate(_byte_characters())}
    specials = {"<s>": 256, "</s>": 257, "<pad>": 258}
    vocabulary |= {pair: 259 + at for at, pair in enumerate(PAIRS)}
    added = [
        {
            "id": at,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token, at in specials.items()
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary | specials,
            "merges": [list(pair) for pair in PAIRS],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=1), encoding="utf-8")
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048} | names,
    )


def _byte_characters() -> list[str]:
    """GPT-2's printable character for each byte."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in plain else next(spare)) for byte in range(256)]
