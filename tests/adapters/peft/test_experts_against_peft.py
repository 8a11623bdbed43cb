"""Adapters of experts on checkpoints with the old tensor names, compared with the unmerged model's logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergeforge
from mergeforge.adapters.peft.hf_renames import loaded_tensors
from mergeforge.errors import SourceError

if TYPE_CHECKING:
    from support.peft_lab import Lab, Trained

SIZES: dict[str, Any] = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
FOUR: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def write(lab: Lab, kind: str) -> Path:
    """A tiny model with experts and no zero weights, saved by transformers."""
    import transformers

    folder = lab.folder / kind
    if folder.exists():
        return folder
    factories: dict[str, Any] = {
        "mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**SIZES, **HEADS, intermediate_size=40, num_local_experts=4)
        ),
        "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(
                **SIZES, **HEADS, intermediate_size=40, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2
            )
        ),
        "square": lambda: transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(
                **SIZES, **HEADS, intermediate_size=40, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2
            )
        ),
        "gpt_oss": lambda: transformers.GptOssForCausalLM(
            transformers.GptOssConfig(**SIZES, **HEADS, intermediate_size=32, num_local_experts=4)
        ),
        "olmoe": lambda: transformers.OlmoeForCausalLM(
            transformers.OlmoeConfig(
                **SIZES, num_attention_heads=4, intermediate_size=24, num_experts=4, num_experts_per_tok=2
            )
        ),
        "llama4": lambda: transformers.Llama4ForCausalLM(
            transformers.Llama4TextConfig(
                **SIZES, **HEADS, intermediate_size=24, intermediate_size_mlp=40, num_local_experts=4, pad_token_id=0
            )
        ),
    }
    with lab.quiet():
        torch.manual_seed(1)
        model = factories[kind]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return folder


def check(lab: Lab, base: Path, adapter: Trained, folder: Path | None = None) -> None:
    out = mergeforge.merge(base_model=str(base), adapters=[str(folder or adapter.folder)], out=lab.out())
    names = set(load_file(base / "model.safetensors"))
    assert set(load_file(out / "model.safetensors")) == names
    with lab.quiet():
        before, expected, ours = (lab.logits(model) for model in (lab.load(base), adapter.model, lab.load(out)))
    assert float((expected - before).abs().max()) > 1e-2
    assert float((ours - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "square", "gpt_oss", "olmoe"])
@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "gate_up", "down"])
def test_target_parameters(lab: Lab, kind: str, targets: list[str]) -> None:
    base = write(lab, kind)
    adapter = lab.train(base, r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=targets)
    check(lab, base, adapter)


def test_target_parameters_of_llama_4(lab: Lab) -> None:
    base = write(lab, "llama4")
    targets = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
    check(lab, base, lab.train(base, r=2, target_modules=["q_proj"], target_parameters=targets))


def test_target_parameters_of_a_router(lab: Lab) -> None:
    base = write(lab, "mixtral")
    check(lab, base, lab.train(base, r=2, target_modules=["q_proj"], target_parameters=["mlp.gate.weight"]))


def test_unsloth_layout_of_lora_b_is_read(lab: Lab) -> None:
    """The same delta with the ranks of each expert next to each other in lora_B, as the config says."""
    base = write(lab, "mixtral")
    adapter = lab.train(base, r=2, target_modules=["q_proj"], target_parameters=BOTH)

    def expert_major(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: value.view(len(value), 2, 4).transpose(1, 2).reshape(value.shape).contiguous()
            if "experts" in name and "lora_B" in name
            else value
            for name, value in tensors.items()
        }

    check(lab, base, adapter, lab.edited(adapter, {"lora_B_layout": "expert_major"}, expert_major))


def test_fused_and_separate_experts_give_the_same_weights(lab: Lab) -> None:
    """A checkpoint with Qwen's experts stacked, as mergekit 0.1.5 writes them, takes the same adapter."""
    base = write(lab, "qwen3_moe")
    adapter = lab.train(base, r=2, target_modules=["q_proj"], target_parameters=BOTH)
    tensors = load_file(base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    stacked = {name: value for name, value in tensors.items() if ".experts." not in name}
    for name, parts in loaded_tensors(config, {name: tuple(value.shape) for name, value in tensors.items()}).items():
        rows = max(part.loaded_start + part.rows for part in parts)
        stack = torch.zeros(4, rows, tensors[parts[0].name].shape[1])
        for part in parts:
            stack[part.expert, part.loaded_start : part.loaded_start + part.rows] = tensors[part.name]
        stacked[name] = stack
    fused = lab.out()
    fused.mkdir()
    save_file(stacked, fused / "model.safetensors", {"format": "pt"})
    (fused / "config.json").write_text(json.dumps(config))
    ours = load_file(
        mergeforge.merge(base_model=str(fused), adapters=[str(adapter.folder)], out=lab.out()) / "model.safetensors"
    )
    apart = load_file(
        mergeforge.merge(base_model=str(base), adapters=[str(adapter.folder)], out=lab.out()) / "model.safetensors"
    )
    gate = "model.layers.1.mlp.experts.3.gate_proj.weight"
    torch.testing.assert_close(ours["model.layers.1.mlp.experts.gate_up_proj"][3, :24], apart[gate])
    assert not torch.equal(apart[gate], tensors[gate])


@pytest.mark.parametrize("fused", [False, True])
def test_adapter_of_single_experts(lab: Lab, fused: bool, tmp_path: Path) -> None:
    """Adapters of transformers 4 name each expert's layers: W + s B A of that expert alone."""
    base = write(lab, "qwen3_moe")
    tensors = load_file(base / "model.safetensors")
    if fused:
        gates = [tensors.pop(f"model.layers.0.mlp.experts.{at}.gate_proj.weight") for at in range(4)]
        ups = [tensors.pop(f"model.layers.0.mlp.experts.{at}.up_proj.weight") for at in range(4)]
        tensors["model.layers.0.mlp.experts.gate_up_proj"] = torch.stack(
            [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
        )
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    for folder in (model, adapter):
        folder.mkdir()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    (model / "config.json").write_text((base / "config.json").read_text())
    module = "base_model.model.model.layers.0.mlp.experts.2.up_proj"
    a, b = torch.randn(2, 32), torch.randn(24, 2)
    save_file({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    out = load_file(
        mergeforge.merge(base_model=str(model), adapters=[str(adapter)], out=tmp_path / "out") / "model.safetensors"
    )
    changed = {name for name, value in tensors.items() if not torch.equal(out[name], value)}
    if fused:
        assert changed == {"model.layers.0.mlp.experts.gate_up_proj"}
        change = out["model.layers.0.mlp.experts.gate_up_proj"] - tensors["model.layers.0.mlp.experts.gate_up_proj"]
        torch.testing.assert_close(change[2, 24:], 3 * b @ a, rtol=1e-4, atol=1e-5)
        assert float(change[[0, 1, 3]].abs().max()) == float(change[2, :24].abs().max()) == 0
    else:
        assert changed == {"model.layers.0.mlp.experts.2.up_proj.weight"}


def test_factors_that_fit_no_parameter_are_refused(lab: Lab) -> None:
    base = write(lab, "mixtral")
    adapter = lab.train(write(lab, "qwen3_moe"), r=2, target_modules=["q_proj"], target_parameters=BOTH)
    with pytest.raises(SourceError, match="fit none of its parameters"):
        mergeforge.plan({"base_model": str(base), "adapters": [str(adapter.folder)]}, out=lab.out())


def test_vision_model_with_old_tensor_names(lab: Lab) -> None:
    """Gemma 3's checkpoints have language_model.model.*, the model that transformers 5 loads model.language_model.*."""
    import transformers

    text = {**SIZES, **HEADS, "intermediate_size": 40, "sliding_window": 8}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    with lab.quiet():
        torch.manual_seed(0)
        base = lab.out()
        transformers.Gemma3ForConditionalGeneration(config).save_pretrained(base)
    names = sorted(load_file(base / "model.safetensors"))
    assert any(name.startswith("language_model.model.") for name in names)
    import peft

    with lab.quiet():
        model = transformers.Gemma3ForConditionalGeneration.from_pretrained(base)
        tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=r".*(q_proj|up_proj|fc1)"))
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        adapter = lab.out()
        tuned.save_pretrained(adapter)
    out = mergeforge.merge(base_model=str(base), adapters=[str(adapter)], out=lab.out())
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    changed = sorted(name for name, value in after.items() if not torch.equal(value, before[name]))
    with lab.quiet():
        merged = tuned.merge_and_unload()
        reloaded = transformers.Gemma3ForConditionalGeneration.from_pretrained(out)
    for (name, mine), (_, theirs) in zip(reloaded.state_dict().items(), merged.state_dict().items(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)
    assert {name.rsplit(".", 2)[1] for name in changed} == {"q_proj", "up_proj", "fc1"}
