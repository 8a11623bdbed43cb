"""mmproj files, against those of llama.cpp's converter: as recorded, or installed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from support.gguf_models import Shapes
from support.llama_cpp_tools import convert, needs_converter, read
from support.multimodal_models import MMPROJ_TYPES, MULTIMODAL, make_multimodal, write_folder
from support.tower_defaults import transformers_defaults

import mergeforge
from mergeforge.cli import run_command
from mergeforge.errors import SourceError
from mergeforge.gguf.mmproj import MMPROJ_CLASSES
from mergeforge.gguf.mmproj.tower_defaults import tower_defaults

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden_mmproj.json").read_text())
BREAK = "v.token_embd.img_break"  # llama.cpp needs it; b11549's converter does not write it for Hugging Face folders
WITH_BREAK = ("pixtral", "mistral3")


def golden_folder(name: str, root: Path) -> Path:
    facts = GOLDEN[name]
    shapes: Shapes = {key: tuple(shape) for key, shape in facts["stored"].items()}
    folder = root / name
    write_folder(folder, facts["config"], shapes, facts["processor"])
    return folder


def write_towers(folder: Path, kind: str, file: Path) -> bytes:
    (written,) = mergeforge.convert_to_gguf(folder, out=file, mmproj=kind, device="cpu")
    return written.read_bytes()


@pytest.mark.parametrize("kind", MMPROJ_TYPES)
@pytest.mark.parametrize("name", [name for name in GOLDEN if name not in WITH_BREAK])
def test_files_equal_the_converters(name: str, kind: str, tmp_path: Path) -> None:
    data = write_towers(golden_folder(name, tmp_path), kind, tmp_path / "towers.gguf")
    assert hashlib.sha256(data).hexdigest() == GOLDEN[name]["files"][kind]


@needs_converter
@pytest.mark.parametrize("tiny", MULTIMODAL, ids=lambda tiny: tiny.name)
def test_models_of_the_installed_transformers_equal_the_converters(tiny: Any, tmp_path: Path) -> None:
    """The keys and tensors of every type, but for the one tensor that the converter leaves out."""
    folder = make_multimodal(tiny, tmp_path / tiny.name)
    jobs = [(folder, tmp_path / f"{kind}.gguf", kind, "") for kind in MMPROJ_TYPES]
    assert convert(jobs, mmproj=True) == {}
    for _, official, kind, _ in jobs:
        write_towers(folder, kind, tmp_path / f"own-{kind}.gguf")
        own, wanted = read(tmp_path / f"own-{kind}.gguf"), read(official)
        extra = own.tensors.pop(BREAK, None)
        if extra is not None:
            own.keys["general.size_label"] = wanted.keys["general.size_label"]
        assert list(own.keys.items()) == list(wanted.keys.items())
        assert (extra is not None) == (tiny.name in WITH_BREAK)
        assert own.tensors == wanted.tensors


def test_the_embedding_of_a_line_break_is_that_of_its_token(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import load_file

    folder = golden_folder("mistral3", tmp_path)
    write_towers(folder, "f32", tmp_path / "towers.gguf")
    kind, shape, data = read(tmp_path / "towers.gguf").tensors[BREAK]
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    (number,) = (token["id"] for token in tokens if token["content"] == "[IMG_BREAK]")
    stored = load_file(folder / "model.safetensors")
    (name,) = (name for name in stored if name.endswith("embed_tokens.weight"))
    assert (kind, shape) == ("F32", (128,)) and np.array_equal(np.frombuffer(data, "<f4"), stored[name][number])


@pytest.mark.parametrize(("name", "old", "new"), [
    ("gemma3", "vision_tower.vision_model.", "vision_tower."),
    ("gemma3", "vision_tower.", "model.vision_tower."),
    ("qwen2.5vl", "visual.", "model.visual."),
    ("internvl", "model.vision_tower.", "vision_tower."),
    ("llama4", "vision_model.", "model.vision_model."),
    ("voxtral", "audio_tower.", "model.audio_tower."),
])  # fmt: skip
def test_towers_are_found_under_the_names_of_all_transformers(name: str, old: str, new: str, tmp_path: Path) -> None:
    """The same values under other names, against the file of the published names."""
    from safetensors.numpy import load_file, save_file

    folder = golden_folder(name, tmp_path)
    wanted = write_towers(folder, "f32", tmp_path / "published.gguf")
    stored = load_file(folder / "model.safetensors")
    renamed = {key.replace(old, new, 1) if key.startswith(old) else key: value for key, value in stored.items()}
    assert renamed.keys() != stored.keys()
    save_file(renamed, folder / "model.safetensors")
    write_towers(folder, "f32", tmp_path / "renamed.gguf")
    one, two = read(tmp_path / "published.gguf"), read(tmp_path / "renamed.gguf")
    assert wanted and one.keys == two.keys and one.tensors == two.tensors


def test_a_merge_writes_the_towers_beside_the_model(tmp_path: Path) -> None:
    """`output: {gguf: [q4_k_m], mmproj: f16}`: the towers' file of the merged folder, and both in the card."""
    folders = [golden_folder("gemma3", tmp_path), golden_folder("gemma3", tmp_path / "second")]
    models = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in folders]
    output = {"gguf": ["q8_0"], "mmproj": "f16", "name": "tiny"}
    recipe = {"merge_method": "linear", "models": models, "output": output}
    plan = mergeforge.plan(recipe, out=tmp_path / "merged", device="cpu")
    mergeforge.run(plan)
    merged = plan.out
    written = merged / "mmproj-tiny-F16.gguf"
    write_towers(merged, "f16", tmp_path / "alone.gguf")
    assert read(written).tensors == read(tmp_path / "alone.gguf").tensors
    assert "mmproj-tiny-F16.gguf" in (merged / "README.md").read_text()
    modelfile = (merged / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./tiny-Q8_0.gguf\n") and "# FROM ./mmproj-tiny-F16.gguf\n" in modelfile
    assert run_command(["verify", str(merged)]) == 0


def test_towers_join_a_folder_of_conversions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model's file, then the towers, then another model's file: one receipt of all three."""
    folder, out = golden_folder("gemma3", tmp_path), str(tmp_path / "out")
    for options in (["--type", "f16"], ["--mmproj", "f16"], ["--type", "q8_0"]):
        assert run_command(["gguf", str(folder), *options, "--out", out, "--device", "cpu"]) == 0
    names = {path.name for path in Path(out).glob("*.gguf")}
    assert names == {"gemma3-F16.gguf", "gemma3-Q8_0.gguf", "mmproj-gemma3-F16.gguf"}
    receipt = json.loads((Path(out) / "mergeforge.json").read_text())
    assert names <= receipt["files"].keys()
    assert run_command(["verify", out]) == 0


@pytest.mark.parametrize(("change", "message"), [
    ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM has no towers that can be written"),
    ({"architectures": []}, "config.json has no 'architectures'"),
    ({"vision_config": {"model_type": "siglip_vision_model", "patch_size": None}}, "a tower has no 'patch_size'"),
    ({"vision_config": {"num_hidden_layers": "many"}}, "config.json does not describe the towers"),
    ({"vision_config": {"num_hidden_layers": 9}}, "no tensor becomes v.blk.4.attn_q"),
])  # fmt: skip
def test_wrong_configs_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = golden_folder("gemma3", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    vision = {**config["vision_config"], **change.pop("vision_config", {})}
    (folder / "config.json").write_text(json.dumps({**config, **change, "vision_config": vision}))
    with pytest.raises(SourceError, match=message):
        write_towers(folder, "f16", tmp_path / "towers.gguf")
    assert not (tmp_path / "towers.gguf").exists()


def test_types_are_named_as_those_of_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any case is accepted, other types are refused, and no chat with the towers alone is proposed."""
    command = ["gguf", str(golden_folder("gemma3", tmp_path)), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert run_command([*command, "--mmproj", "q4_k_m"]) == 2
    err = capsys.readouterr().err
    assert "an mmproj file cannot have the type 'q4_k_m'" in err and "nothing would be written" not in err
    assert run_command([*command, "--mmproj", "F16"]) == 0
    said = "".join(capsys.readouterr())
    assert "mmproj-gemma3-F16.gguf" in said and "mergeforge chat" not in said


@pytest.mark.parametrize(("vision", "processor", "message"), [
    ([1], {}, "vision_config is not an object"),
    ("x", {}, "vision_config is not an object"),
    ({}, {"image_mean": "0.5"}, "image_mean must be a list of three numbers, not '0.5'"),
    ({}, {"image_mean": [0.5]}, "image_mean must be a list of three numbers"),
    ({}, {"image_std": [0.5, 0.5, float("nan")]}, "image_std must be a list of three numbers"),
    ({"patch_size": 7}, {}, "does not fit hidden_size 64 and patch_size 7"),
    ({"hidden_size": 32}, {}, "does not fit hidden_size 32 and patch_size 14"),
])  # fmt: skip
def test_wrong_values_are_refused(vision: Any, processor: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = golden_folder("gemma3", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    vision = {**config["vision_config"], **vision} if isinstance(vision, dict) else vision
    (folder / "config.json").write_text(json.dumps({**config, "vision_config": vision}))
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, **processor}))
    with pytest.raises(SourceError, match=message):
        write_towers(folder, "f16", tmp_path / "towers.gguf")


@pytest.mark.parametrize("text", ["{nope", "[1]", '"x"', ""])
def test_a_processor_file_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    folder = golden_folder("gemma3", tmp_path)
    (folder / "preprocessor_config.json").write_text(text)
    with pytest.raises(SourceError, match=r"preprocessor_config\.json"):
        write_towers(folder, "f16", tmp_path / "towers.gguf")


def test_weights_of_other_sizes_are_refused(tmp_path: Path) -> None:
    """One weight of a block has fewer columns than its input has values."""
    from safetensors.numpy import load_file, save_file

    folder = golden_folder("gemma3", tmp_path)
    stored = load_file(folder / "model.safetensors")
    name = next(name for name in stored if name.endswith("layers.1.self_attn.q_proj.weight") and "vision" in name)
    save_file(stored | {name: stored[name][:, :-1].copy()}, folder / "model.safetensors")
    with pytest.raises(SourceError, match=r"q_proj\.weight \(64, 63\) does not fit hidden_size 64"):
        write_towers(folder, "f16", tmp_path / "towers.gguf")


def test_tensors_of_the_text_model_without_dimensions_are_refused(tmp_path: Path) -> None:
    """The head, and the embedding."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    folder = golden_folder("exaone4.5", tmp_path)
    stored = load_file(folder / "model.safetensors")
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        assert name in stored
        save_file(stored | {name: np.zeros((), "float32")}, folder / "model.safetensors")
        with pytest.raises(SourceError, match=rf"{name} has shape \(\), but"):
            mergeforge.convert_to_gguf(folder, ["f16"], out=tmp_path / "out", device="cpu")


def test_a_model_without_its_towers_names_the_base(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = golden_folder("gemma3", tmp_path)
    stored = {key: value for key, value in load_file(folder / "model.safetensors").items() if "language_model" in key}
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(SourceError, match="the model has no towers") as caught:
        write_towers(folder, "f16", tmp_path / "towers.gguf")
    assert "from the base model" in str(caught.value.hint)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(SourceError, match=r"preprocessor_config\.json has no 'image_mean'"):
        write_towers(folder, "f16", tmp_path / "towers.gguf")


def test_defaults_are_those_of_transformers() -> None:
    for kind, defaults in tower_defaults().items():
        assert transformers_defaults(kind, defaults) == defaults, kind


def test_every_class_is_named_once() -> None:
    assert {"Gemma3ForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"} <= set(MMPROJ_CLASSES)
