"""Models rebuilt from GGUF headers: names, shapes and config values, against the models the headers were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gguf_assembly import infos
from support.gguf_round_trip import ONE_WAY, OTHER_NAMES

from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import ARCHITECTURES, build_spec
from mergeforge.gguf.hf_model import rebuild
from mergeforge.gguf.hf_model.classes import classes_of, known_architectures
from mergeforge.gguf.hf_model.rope import solve_llama3
from mergeforge.gguf.key_values import Value, array, encode_key_values, f32, string, u32
from mergeforge.gguf.reader import GGUFHeader, GGUFTensorInfo
from mergeforge.io.disk import DiskFile

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "architectures" / "golden_architectures.json").read_text()
)
# keys that a tower decides, that the file lacks the tensors for, and that follow from the others
UNSTATED = {"n_deepstack_layers", "rope.scaling.type", "attention.key_length", "attention.value_length"}
KINDS = {"bert": "bert", "jina_bert": "bert", "spm": "llama", "gemma": "llama"}


def header_of(config: dict[str, Any], stored: dict[str, Any], folder: Path, **changes: Value | None) -> GGUFHeader:
    """The header of the model's F32 file; only tensors that are computed from the config can be read."""
    spec = build_spec(config, infos({name: tuple(shape) for name, shape in stored.items()}))
    shapes = {target.tensor: target.shape for targets in spec.targets.values() for target in targets}
    keys: dict[str, Any] = {"general.architecture": string(spec.arch), **spec.keys}
    keys |= {"tokenizer.ggml.pre": string("glm4" if "glm4" in spec.vocab else "gpt-2")}
    keys |= {"tokenizer.ggml.model": string(KINDS.get(spec.vocab, "gpt2"))}
    keys |= {f"{spec.arch}.{name.replace('__', '.')}": value for name, value in changes.items()}
    path = folder / "constants.bin"
    path.write_bytes(b"".join(value.tobytes() for value in spec.constants.values()) + b"\0")
    file, offset = DiskFile(path), 0
    tensors = {name: GGUFTensorInfo(name, shape, "F32", 1, 4, file, 0) for name, shape in shapes.items()}
    for name, value in spec.constants.items():
        tensors[name] = GGUFTensorInfo(name, value.shape, "F32", 1, 4, file, offset)
        offset += value.nbytes
    return GGUFHeader({key: value for key, value in keys.items() if value is not None}, tensors, {})


def stored_value(item: tuple[str, Value]) -> tuple[str, bytes]:
    """A key and the bytes of its value in a file: of Grok 1's attn_output_multiplier, a float32 is left."""
    return item[0], encode_key_values(dict([item]))


@pytest.mark.parametrize("name", [name for name in GOLDEN if name not in {**OTHER_NAMES, **ONE_WAY}])
def test_names_and_shapes_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    facts = GOLDEN[name]
    model = rebuild.rebuild_model(header_of(facts["config"], facts["stored"], tmp_path), Path(name))
    spec = build_spec(facts["config"], infos({key: tuple(shape) for key, shape in facts["stored"].items()}))
    wanted = {key: tuple(facts["stored"][key]) for key in spec.targets}
    assert {key: info.shape for key, info in model.tensors.items()} == wanted
    before, after = (dict(map(stored_value, keys.items())) for keys in (spec.keys, model.spec.keys))
    differing = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert {key.partition(".")[2] for key in differing} <= UNSTATED


@pytest.mark.parametrize("name", [name for name in ONE_WAY if name in GOLDEN])
def test_models_that_cannot_be_turned_back_are_refused(name: str, tmp_path: Path) -> None:
    facts = GOLDEN[name]
    with pytest.raises(SourceError):
        rebuild.rebuild_model(header_of(facts["config"], facts["stored"], tmp_path), Path(name))


def test_every_architecture_that_is_written_can_be_read() -> None:
    """classes.json has a class for every function of gguf/architectures: else run tools/gguf_classes."""
    known = {entry.name for arch in known_architectures() for entry in classes_of(arch)}
    by_function: dict[Any, list[str]] = {}
    for name in ARCHITECTURES:
        by_function.setdefault(ARCHITECTURES[name], []).append(name)
    assert [names for names in by_function.values() if not known & {*names}] == []


@pytest.mark.parametrize("name", ["llama3", "llama-yarn", "phi-three-long", "gemma3", "deepseek3", "jamba", "dbrx"])
def test_config_values_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    """What a model computes with: sizes, rope, epsilon, experts."""
    config = GOLDEN[name]["config"]
    model = rebuild.rebuild_model(header_of(config, GOLDEN[name]["stored"], tmp_path), Path(name))
    ignored = (
        "_token_id",
        "architectures",
        "layer_types",
        "rope_scaling",
        "num_nextn_predict_layers",
        "attention_dropout",
        "pad_token_id",
    )
    wanted = {key: value for key, value in config.items() if not key.endswith(ignored) and key in model.config}
    rope = wanted.pop("rope_parameters", {})
    assert {key: model.config[key] for key in wanted} == wanted
    assert rope.items() <= {**rope, **model.config.get("rope_parameters", {})}.items()


@pytest.mark.parametrize(
    "parameters", [(8.0, 4.0, 8192, 5e5, 128), (32.0, 4.0, 8192, 5e5, 64), (16.0, 3.0, 4096, 1e6, 96)]
)
def test_llama3_rope_is_found_from_its_divisors(parameters: tuple[float, float, int, float, int]) -> None:
    """transformers' formula in float32, solved for its parameters."""
    factor, high, context, theta, size = parameters
    waves = 2 * np.pi * theta ** (np.arange(0, size, 2) / size)
    smooth = (context / waves - 1) / (high - 1)
    divisors = np.where(waves > context, factor, 1 / ((1 - smooth) / factor + smooth))
    divisors = np.where(waves < context / high, 1.0, divisors).astype(np.float32)
    assert solve_llama3(divisors, theta) == {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
    assert solve_llama3(np.linspace(1, 3, size // 2, dtype=np.float32), theta) == {}


def refusal(header: GGUFHeader) -> str:
    with pytest.raises(SourceError) as caught:
        rebuild.rebuild_model(header, Path("model.gguf"))
    return f"{caught.value} ({caught.value.hint})"


def test_files_that_are_no_whole_model_are_refused(tmp_path: Path) -> None:
    """Unknown architectures, tensors that no class has, missing ones, and keys that contradict the tensors."""
    facts = GOLDEN["llama"]
    header = header_of(facts["config"], facts["stored"], tmp_path)
    other = {**header.keys, "general.architecture": string("lamma")}
    assert "'lamma'" in refusal(GGUFHeader(other, header.tensors, {}))
    extra = GGUFTensorInfo("blk.0.attn_rel_b.weight", (4,), "F32", 1, 4, header.tensors["output.weight"].file, 0)
    assert "attn_rel_b" in refusal(GGUFHeader(header.keys, {**header.tensors, extra.name: extra}, {}))
    fewer = {name: tensor for name, tensor in header.tensors.items() if name != "blk.1.ffn_up.weight"}
    assert "blk.1.ffn_up" in refusal(GGUFHeader(header.keys, fewer, {}))
    wrong = {**header.keys, "llama.embedding_length": u32(128)}
    assert "6 equal parts" in refusal(GGUFHeader({**wrong, "llama.attention.head_count": u32(3)}, header.tensors, {}))


@pytest.mark.parametrize(
    "value", [string("x"), f32(float("nan")), array("string", ["a"]), array("f32", [float("inf")])]
)
def test_keys_that_are_no_numbers_are_named(value: Value, tmp_path: Path) -> None:
    facts = GOLDEN["llama"]
    header = header_of(facts["config"], facts["stored"], tmp_path, rope__freq_base=value)
    assert "llama.rope.freq_base is" in refusal(header) and "must be a number" in refusal(header)


@pytest.mark.parametrize(("name", "key"), [("gemma4", "attention__key_length"), ("roberta", "context_length")])
def test_sizes_that_no_model_has_are_refused(name: str, key: str, tmp_path: Path) -> None:
    """Before an array of that length is made."""
    facts = GOLDEN[name]
    header = header_of(facts["config"], facts["stored"], tmp_path, **{key: u32(2**32 - 1)})
    assert f"{key.replace('__', '.')} is 4294967295, but at most" in refusal(header)


def test_keys_that_old_files_lack_get_the_default(tmp_path: Path) -> None:
    """A file without rope.freq_base has transformers' default, and one without vocab_size the rows of the embedding."""
    facts = GOLDEN["llama"]
    header = header_of(facts["config"], facts["stored"], tmp_path, rope__freq_base=None, vocab_size=None)
    model = rebuild.rebuild_model(header, Path("model.gguf"))
    assert model.config["vocab_size"] == facts["config"]["vocab_size"]
    assert model.config.get("rope_parameters", {}).get("rope_theta", 10000.0) == 10000.0
    other = header_of(facts["config"], facts["stored"], tmp_path, rope__freq_base=f32(5e5))
    assert rebuild.rebuild_model(other, Path("model.gguf")).config["rope_parameters"]["rope_theta"] == 5e5


def test_scaled_rope_belongs_to_full_attention(tmp_path: Path) -> None:
    """Gemma 3 4B and larger: linear scaling in layers with full attention, and none in the others."""
    facts = GOLDEN["gemma3"]
    rope = {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}}
    rope["sliding_attention"] = {"rope_type": "default", "rope_theta": 1e4}
    config = {**facts["config"], "rope_parameters": rope}
    model = rebuild.rebuild_model(header_of(config, facts["stored"], tmp_path), Path("model.gguf"))
    assert model.config["rope_parameters"] == rope
    assert model.notes == ()


def test_keys_without_a_place_are_noted(tmp_path: Path) -> None:
    facts = GOLDEN["llama"]
    header = header_of(facts["config"], facts["stored"], tmp_path, attention__novel=u32(3))
    assert "llama.attention.novel" in rebuild.rebuild_model(header, Path("model.gguf")).notes[0]
