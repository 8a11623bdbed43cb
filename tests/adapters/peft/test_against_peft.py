"""Folds of PEFT adapters, compared with PEFT's own merge, and where that is wrong, with the unmerged model.

Float32 results are compared with merge_and_unload, bfloat16 results with float64 sums over the adapter's files, tied
embeddings with the logits of the unmerged PeftModel.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mergeforge
from mergeforge import SourceError

if TYPE_CHECKING:
    from support.peft_lab import Lab, Trained

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONV1D = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
FOLDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": LINEAR}),
    "rslora": ("llama", {"use_rslora": True, "r": 3}),
    "patterns": (
        "llama",
        {
            "target_modules": LINEAR,
            "rank_pattern": {r"layers\.0\.mlp\..*": 2, r"1\.mlp\.down_proj": 5, "o_proj": 3},
            "alpha_pattern": {r"^model\.layers\.1\.self_attn\.q_proj": 3, "v_proj": 1},
        },
    ),
    "patterns that overlap": ("llama", {"target_modules": LINEAR, "rank_pattern": {"layers.0.*": 2, "down_proj": 5}}),
    "rslora with patterns": ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_": 9}}),
    "lora_bias": ("qwen2", {"lora_bias": True, "use_rslora": True}),
    "bias all": ("qwen2", {"bias": "all"}),
    "bias lora_only": ("qwen2", {"bias": "lora_only", "target_modules": ["q_proj"]}),
    "conv1d": ("gpt2", CONV1D),
    "conv1d, bias all": ("gpt2", {**CONV1D, "bias": "all"}),
    "conv1d, lora_bias": ("gpt2", {**CONV1D, "lora_bias": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "save head": ("llama", {"modules_to_save": ["lm_head"]}),
    "save embedding": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "save norms": ("llama", {"modules_to_save": ["norm", "post_attention_layernorm"]}),
    "save layer norms with biases": ("gpt2", {**CONV1D, "modules_to_save": ["ln_f"]}),
    "tokens": ("llama", {"trainable_token_indices": [1, 5, 47]}),
    "tokens of both": ("llama", {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2]}}),
    "dora": ("llama", {"use_dora": True, "target_modules": LINEAR}),
    "dora, rslora": ("llama", {"use_dora": True, "use_rslora": True, "alpha_pattern": {"q_proj": 3}}),
    "dora on an embedding": ("llama", {"use_dora": True, "target_modules": ["embed_tokens", "lm_head"]}),
    "dora on conv1d": ("gpt2", {**CONV1D, "use_dora": True}),
    "grown": ("llama", {"grow": 3}),
    "grown, both targeted": ("llama", {"grow": 3, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "grown, embedding saved": ("llama", {"grow": 3, "modules_to_save": ["embed_tokens"]}),
    "grown, both saved": ("llama", {"grow": 3, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "grown, tokens": ("llama", {"grow": 3, "trainable_token_indices": [48, 49, 50]}),
}
TIED: dict[str, tuple[bool, dict[str, Any]]] = {  # stays tied, how it was trained
    "neither": (True, {}),
    "embedding": (False, {"target_modules": ["embed_tokens"]}),
    "head": (False, {"target_modules": ["lm_head"]}),
    "both": (False, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "tying ensured": (True, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "dora on the embedding": (False, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "save embedding": (False, {"modules_to_save": ["embed_tokens"]}),
    "save head": (False, {"modules_to_save": ["lm_head"]}),
    "save both": (False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "save, tying ensured": (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "save head, tying ensured": (True, {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    "grown, saved, tying ensured": (
        True,
        {"grow": 3, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "tokens": (True, {"trainable_token_indices": [1, 5]}),
    "tokens of the head": (False, {"trainable_token_indices": {"lm_head": [1, 5]}}),
    "tokens, others of the head": (False, {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}}),
    "grown": (True, {"grow": 3}),
    "grown, embedding": (False, {"grow": 3, "target_modules": ["embed_tokens"]}),
    "grown, tying ensured": (True, {"grow": 3, "target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "grown, embedding saved": (False, {"grow": 3, "modules_to_save": ["embed_tokens"]}),
    "grown, head saved": (False, {"grow": 3, "modules_to_save": ["lm_head"]}),
    "grown, tokens": (True, {"grow": 3, "trainable_token_indices": [1, 50]}),
}


def close(actual: torch.Tensor, expected: torch.Tensor, within: float = 1e-6) -> bool:
    """Whether the largest difference is at most `within` times the largest value."""
    return actual.shape == expected.shape and bool((actual - expected).abs().max() <= within * expected.abs().max())


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert [name for name in actual if not close(actual[name], expected[name])] == []


def fold(lab: Lab, base: Path, *adapters: Path, **options: Any) -> Path:
    return mergeforge.merge(
        base_model=str(base), adapters=[str(adapter) for adapter in adapters], out=lab.out(), **options
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def delta(adapter: Path, module: str) -> torch.Tensor:
    """s * B A of one linear module in float64, computed from the adapter's files."""
    factors, settings = load_file(adapter / "adapter_model.safetensors"), config_of(adapter)
    a, b = (factors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    return settings["lora_alpha"] / settings["r"] * b @ a


def config_of(adapter: Path) -> dict[str, Any]:
    return json.loads((adapter / "adapter_config.json").read_text())


# the fold, in float32


@pytest.mark.parametrize("case", FOLDS)
def test_fold_equals_peft_merge_and_unload(lab: Lab, case: str) -> None:
    kind, settings = FOLDS[case]
    base = lab.base(kind)
    adapter = lab.train(base, **settings)
    out = fold(lab, base, adapter.folder)
    assert_same(tensors(out), adapter.merged_by_peft())
    assert close(lab.logits(lab.load(out)), lab.logits(adapter.model), 1e-5)
    assert config(out)["vocab_size"] == 48 + settings.get("grow", 0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fold_changes_only_the_adapted_tensors(lab: Lab, kind: str) -> None:
    base = lab.base(kind)
    adapter = lab.train(
        base, target_modules=["q_proj"] if kind == "llama" else ["c_attn"], fan_in_fan_out=kind == "gpt2"
    )
    before, after = tensors(base), tensors(fold(lab, base, adapter.folder))
    changed = {name for name in before if not before[name].equal(after[name])}
    assert before.keys() == after.keys()
    assert changed == {name for name in before if name.endswith(("q_proj.weight", "c_attn.weight"))}


@pytest.fixture(scope="module")
def three(lab: Lab) -> list[Trained]:
    """Adapters of ranks 2, 4 and 7 for the float32 Llama."""
    base = lab.base("llama")
    return [lab.train(base, r=rank, lora_alpha=5, seed=rank, target_modules=LINEAR) for rank in (2, 4, 7)]


def test_three_weighted_adapters_equal_merging_them_one_by_one_in_peft(lab: Lab, three: list[Trained]) -> None:
    weights = (0.7, -0.2, 1.5)
    out = fold(lab, lab.base("llama"), *(adapter.folder for adapter in three), weights=weights)
    with lab.quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(lab.base("llama"))
        for adapter, weight in zip(three, weights, strict=True):
            model = peft.PeftModel.from_pretrained(model, adapter.folder)
            for name, value in model.named_parameters():
                if "lora_B" in name:
                    value.data.mul_(weight)
            model = model.merge_and_unload()
    assert_same(tensors(out), model.state_dict())


def test_two_dora_adapters_add_their_deltas(lab: Lab) -> None:
    base = lab.base("llama")
    pair = [lab.train(base, use_dora=True, seed=seed, r=2 + seed) for seed in (1, 2)]
    start = tensors(base)
    deltas = [{name: value - start[name] for name, value in adapter.merged_by_peft().items()} for adapter in pair]
    expected = {name: start[name] + 0.5 * deltas[0][name] - deltas[1][name] for name in start}
    assert_same(tensors(fold(lab, base, *(adapter.folder for adapter in pair), weights=(0.5, -1.0))), expected)


def test_two_adapters_that_both_target_the_embedding(lab: Lab) -> None:
    """Each file also contains the base's embedding; the expected result adds the deltas of PEFT's two merges."""
    base = lab.base("llama")
    pair = [lab.train(base, seed=seed, target_modules=["embed_tokens"]) for seed in (1, 2)]
    start, merged = tensors(base), [adapter.merged_by_peft() for adapter in pair]
    expected = {name: merged[0][name] + merged[1][name] - start[name] for name in start}
    assert_same(tensors(fold(lab, base, *(adapter.folder for adapter in pair))), expected)


def test_overlapping_alpha_patterns_use_the_first_in_the_file_with_a_note(lab: Lab) -> None:
    """PEFT sorts the patterns when it saves, so the model that it loads again is the reference."""
    base = lab.base("llama")
    adapter = lab.train(base, alpha_pattern={"v_proj": 16, "layers.*": 2})
    with lab.quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        expected = peft.PeftModel.from_pretrained(model, adapter.folder).merge_and_unload().state_dict()
    plan = mergeforge.plan({"base_model": str(base), "adapters": [str(adapter.folder)]}, out=lab.out())
    assert any(
        "alpha_pattern matches model.layers.0.self_attn.v_proj with 2, 16; the first is used" in note
        for note in plan.notes
    )
    assert_same(tensors(fold(lab, base, adapter.folder)), expected)


def test_adapter_of_a_recipe_model_equals_one_on_the_base(lab: Lab, three: list[Trained]) -> None:
    base = str(lab.base("llama"))
    model = {"model": base, "adapters": [{"adapter": str(three[0].folder)}]}
    out = mergeforge.merge({"merge_method": "passthrough", "models": [model]}, out=lab.out())
    assert_same(tensors(out), three[0].merged_by_peft())


# the fold of a bfloat16 base: one rounding


def exact_fold(before: torch.Tensor, module: str, adapters: list[Path], weights: tuple[float, ...]) -> torch.Tensor:
    """W + sum(w * s * B A) in float64."""
    return before.double() + sum(w * delta(adapter, module) for w, adapter in zip(weights, adapters, strict=True))


@pytest.mark.parametrize("alpha", [8, 0.05], ids=["deltas like the weights", "deltas of a hundredth"])
def test_bfloat16_fold_equals_the_float64_sum_rounded_once(lab: Lab, alpha: float) -> None:
    """The float32 sum may round differently only where the exact sum is halfway between two bfloat16 numbers."""
    base, weights = lab.base("llama", "bfloat16"), (0.6, 0.3, -0.4)
    adapters = [lab.train(base, r=r, seed=r, lora_alpha=alpha, target_modules=LINEAR).folder for r in (2, 3, 8)]
    before, after = tensors(base), tensors(fold(lab, base, *adapters, weights=weights))
    differ = 0
    for module in linear_names(base):
        exact, folded = exact_fold(before[f"{module}.weight"], module, adapters, weights), after[f"{module}.weight"]
        half_ulp = 2.0 ** (torch.frexp(exact).exponent - 9)
        assert ((folded.double() - exact).abs() <= half_ulp + 1e-7 * exact.abs().max()).all()
        differ += int((folded != exact.bfloat16()).sum())
    assert differ <= (2e-4 if alpha == 8 else 2e-6) * sum(
        before[f"{name}.weight"].numel() for name in linear_names(base)
    )
    assert after["model.norm.weight"].equal(before["model.norm.weight"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_dora_fold_equals_the_float64_formula_rounded_once(lab: Lab, dtype: str) -> None:
    base = lab.base("llama", dtype)
    adapter = lab.train(base, use_dora=True, target_modules=["q_proj"])
    name = "model.layers.0.self_attn.q_proj"
    value = tensors(base)[f"{name}.weight"].double() + delta(adapter.folder, name)
    magnitude = adapter.tensors[f"base_model.model.{name}.lora_magnitude_vector"].double()
    expected = (magnitude / value.norm(dim=1)).unsqueeze(1) * value
    folded = tensors(fold(lab, base, adapter.folder))[f"{name}.weight"]
    assert folded.equal(expected.to(folded.dtype))


# tied embeddings: PEFT's own merge is wrong there, so the unmerged model is the reference


@pytest.mark.parametrize("case", TIED)
@pytest.mark.parametrize("stored", [False, True], ids=["no lm_head", "lm_head stored"])
def test_logits_on_a_tied_base_equal_the_unmerged_model(lab: Lab, case: str, stored: bool) -> None:
    stays_tied, settings = TIED[case]
    base = lab.base("llama-tied")
    adapter = lab.train(base, **settings)
    if stored:
        base = with_stored_head(lab, base)
    out = fold(lab, base, adapter.folder)
    assert config(out)["tie_word_embeddings"] is stays_tied
    assert ("lm_head.weight" in tensors(out)) is (stored or not stays_tied)
    assert config(out)["vocab_size"] == len(tensors(out)["model.embed_tokens.weight"]) == 48 + settings.get("grow", 0)
    assert close(lab.logits(lab.load(out)), lab.logits(adapter.model), 1e-5)


def with_stored_head(lab: Lab, base: Path) -> Path:
    """The same tied model with a copy of the embedding as lm_head.weight, as .bin files have it."""
    folder = lab.folder / f"{base.name}-stored"
    if not folder.exists():
        shutil.copytree(base, folder)
        weights = tensors(base)
        save_file(
            weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, folder / "model.safetensors"
        )
    return folder


def test_trained_tokens_apply_to_both_when_another_adapter_unties_the_head(lab: Lab) -> None:
    """Trained tokens apply to a tied head too, even when a second adapter unties it from the embedding."""
    base = lab.base("llama-tied")
    tokens = lab.train(base, trainable_token_indices=[1, 5])
    head = lab.train(base, target_modules=["lm_head"], seed=3)
    folded = tensors(fold(lab, base, tokens.folder, head.folder))
    embedding = fold(lab, base, tokens.folder)
    assert close(folded["model.embed_tokens.weight"], tensors(embedding)["model.embed_tokens.weight"])
    expected = tensors(embedding)["model.embed_tokens.weight"] + delta(head.folder, "lm_head")
    assert close(folded["lm_head.weight"], expected)


def test_adapter_of_a_tied_head_merged_with_models(lab: Lab) -> None:
    """linear of two copies of the base and base + adapter: a third of the adapter's change of the head."""
    base = lab.base("llama-tied")
    head = lab.train(base, target_modules=["lm_head"])
    recipe = {
        "merge_method": "linear",
        "base_model": str(base),
        "models": [{"model": str(base), "parameters": {"weight": 2}}],
        "adapters": [{"adapter": str(head.folder), "weight": 1}],
    }
    out = mergeforge.merge(recipe, out=lab.out())
    embedding = tensors(base)["model.embed_tokens.weight"]
    assert close(tensors(out)["lm_head.weight"], embedding + delta(head.folder, "lm_head") / 3)
    assert close(tensors(out)["model.embed_tokens.weight"], embedding)
    assert config(out)["tie_word_embeddings"] is False


@pytest.mark.parametrize(("targets", "stays_tied"), [(["c_attn"], True), (["wte"], False), (["lm_head"], False)])
def test_gpt2_without_tie_word_embeddings_in_its_config(lab: Lab, targets: list[str], stays_tied: bool) -> None:
    base = lab.folder / "gpt2-without-flag"
    if not base.exists():
        shutil.copytree(lab.base("gpt2"), base)
        remaining = {key: value for key, value in config(base).items() if key != "tie_word_embeddings"}
        (base / "config.json").write_text(json.dumps(remaining))
    adapter = lab.train(base, target_modules=targets, fan_in_fan_out=targets == ["c_attn"])
    out = fold(lab, base, adapter.folder)
    assert config(out).get("tie_word_embeddings", True) is stays_tied
    assert close(lab.logits(lab.load(out)), lab.logits(adapter.model), 1e-5)


# the key formats of older files


KEY_FORMATS = {
    ".default": lambda key: re.sub(r"(lora_[AB]|lora_magnitude_vector)(?=\.weight|$)", r"\1.default", key),
    "the adapter's own name": lambda key: KEY_FORMATS["modules_to_save"](KEY_FORMATS[".default"](key)).replace(
        ".default", ".sft"
    ),
    "_orig_mod.": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "_orig_mod. around all": lambda key: "_orig_mod." + key,
    "module.": lambda key: "module." + key,
    "module. inside": lambda key: key.replace("base_model.model.", "base_model.model.module."),
    "fsdp": lambda key: key.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "checkpointed": lambda key: key.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "headless": lambda key: key.replace("base_model.model.model.", "base_model.model."),
    "modules_to_save": lambda key: key.replace("model.norm.", "model.norm.modules_to_save.default."),
}


@pytest.mark.parametrize("key_format", KEY_FORMATS)
def test_older_key_formats_give_the_same_tensors(lab: Lab, dora: Trained, key_format: str) -> None:
    renamed = lab.edited(
        dora, tensors=lambda saved: {KEY_FORMATS[key_format](key): value for key, value in saved.items()}
    )
    assert renamed != dora.tensors
    assert_same(tensors(fold(lab, lab.base("llama"), renamed)), dora.merged_by_peft())


@pytest.fixture(scope="module")
def dora(lab: Lab) -> Trained:
    return lab.train(lab.base("llama"), use_dora=True, modules_to_save=["model.norm"])


def test_gpt2_saved_without_its_prefix_gives_the_same_tensors(lab: Lab) -> None:
    """The Hub's gpt2 was saved from the model without a head: h.0.attn..., not transformer.h.0.attn..."""
    base, bare = lab.base("gpt2"), lab.folder / "gpt2-bare"
    shutil.copytree(base, bare)
    short = {name.removeprefix("transformer."): value for name, value in tensors(base).items()}
    save_file(short, bare / "model.safetensors")
    adapter = lab.train(base, **CONV1D | {"target_modules": ["c_attn", "c_proj", "wte"], "modules_to_save": ["ln_f"]})
    out = fold(lab, bare, adapter.folder)
    expected = adapter.merged_by_peft()
    folded = {f"transformer.{name}": value for name, value in tensors(out).items() if name != "lm_head.weight"}
    assert_same(folded, expected)
    assert close(lab.logits(lab.load(out)), lab.logits(adapter.model), 1e-5)


def test_bin_adapter_needs_allow_pickle(lab: Lab, dora: Trained) -> None:
    folder = lab.edited(dora)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(dora.tensors, folder / "adapter_model.bin")
    with pytest.raises(SourceError, match=r"adapter_model\.bin is a pickle"):
        fold(lab, lab.base("llama"), folder)
    assert_same(tensors(fold(lab, lab.base("llama"), folder, allow_pickle=True)), dora.merged_by_peft())


# what cannot be folded is refused


@pytest.fixture(scope="module")
def plain(lab: Lab) -> Trained:
    return lab.train(lab.base("llama"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "NEW"}, "peft_type NEW is not supported"),
        ({"peft_type": None}, "without a peft_type is not supported"),
        ({"use_qalora": True}, "use_qalora: QA-LoRA"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens: activated LoRA"),
        ({"use_bdlora": True}, "use_bdlora: True, which has no valid number of blocks"),
        ({"init_lora_weights": "corda"}, "init_lora_weights: corda, so it is relative to a changed base"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "init_lora_weights: pissa, .*base_is_residual: true"),
        ({"init_lora_weights": "spiral"}, "init_lora_weights: spiral, and this version does not know"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights: pissa_niter_16"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights: loftq, so it is relative to a changed base"),
        ({"r": 8}, "q_proj: its tensors have rank 4, but its config says 8"),
        ({"r": "4"}, "needs a rank r"),
        ({"lora_alpha": None}, "a numeric lora_alpha"),
        ({"use_dora": True}, "q_proj has no lora_magnitude_vector, but the config sets use_dora"),
        ({"twist": 0.5}, r"its config sets twist = 0\.5, and this version does not know"),
    ],
    ids=str,
)
def test_unsupported_configs_are_refused(lab: Lab, plain: Trained, changes: Any, message: str) -> None:
    edited = lab.edited(plain, config=changes)
    with pytest.raises(SourceError, match=f"{edited.name}: .*{message}"):
        fold(lab, lab.base("llama"), edited)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (
            lambda saved: {key.replace("layers.1.self_attn", "layers.1.attention"): saved[key] for key in saved},
            r"'base_model\.model\.model\.layers\.1\.attention\..*' matches no tensor",
            r"nearest: .*model\.layers\.1\.self_attn\.[qv]_proj\.weight",
        ),
        (
            lambda saved: {key.replace("layers.1", "layers.7"): saved[key] for key in saved},
            r"layers\.7\..* matches no tensor",
            "nearest: ",
        ),
        (
            lambda saved: {key: saved[key] for key in saved if key != f"{Q0}B.weight"},
            r"layers\.0\.self_attn\.q_proj\.lora_A\.weight' has no matching factor",
            "",
        ),
        (lambda saved: saved | {f"{Q0}A.weight": torch.zeros(0)}, r"q_proj\.lora_A\.weight' is empty", "ZeRO-3"),
        (
            lambda saved: saved | {f"{Q0}A.weight": torch.ones(4, 64), f"{Q0}B.weight": torch.ones(64, 4)},
            r"q_proj is made for shape \[64, 64\], but .*q_proj\.weight of .* is \[32, 32\]",
            "trained on another model",
        ),
        (lambda saved: saved | {f"{Q0}A.weight": torch.ones(4, 32, 1)}, "factors of shapes", ""),
        (lambda saved: saved | {f"{Q0}A.weight": torch.ones(3, 32)}, "A has rank 3, B has rank 4", ""),
        (lambda saved: saved | {f"{Q0}A.weight": saved[f"{Q0}A.weight"].int()}, "dtype I32, not a float", ""),
        (lambda saved: saved | {f"{Q0}E": torch.ones(4, 1)}, r"unknown tensor .*lora_E'", ""),
        (
            lambda saved: saved | {f"{Q0}A.default.weight": torch.ones(4, 32)},
            r"q_proj\.lora_A.* duplicates ",
            "",
        ),
        (
            lambda saved: (
                {key.replace("_A.", "_A.sft."): value for key, value in saved.items()}
                | {f"{Q0}A.dpo.weight": torch.ones(4, 32)}
            ),
            r"tensors of several adapters: (sft, dpo|dpo, sft)",
            "folder of its own",
        ),
        (
            lambda saved: saved | {"base_model.model.model.norm.weight": torch.ones(31)},
            r"norm is made for shape \[31\], but .*\[32\]",
            "",
        ),
        (
            lambda saved: saved | {"base_model.model.model.embed_tokens.base_layer.weight": torch.ones(48, 64)},
            r"embed_tokens is made for shape \[48, 64\], but .*\[48, 32\]",
            "",
        ),
        (lambda saved: {}, "contains no tensors", ""),
    ],
    ids=[
        "unknown module",
        "unknown layer",
        "no partner",
        "size 0",
        "other shape",
        "three dimensions",
        "ranks",
        "integers",
        "unknown role",
        "twice",
        "two adapters",
        "norm",
        "embedding",
        "nothing",
    ],
)
def test_mismatched_tensors_are_refused(lab: Lab, plain: Trained, change: Any, message: str, hint: str) -> None:
    edited = lab.edited(plain, tensors=change)
    with pytest.raises(SourceError, match=f"{edited.name}.*{message}") as caught:
        fold(lab, lab.base("llama"), edited)
    assert re.search(hint, caught.value.hint)


def test_adapter_of_another_model_is_refused(lab: Lab, plain: Trained) -> None:
    with pytest.raises(SourceError, match=r"lora_A\.weight' matches no tensor of .*gpt2"):
        fold(lab, lab.base("gpt2"), plain.folder)


def test_adapter_that_resized_only_the_embedding_is_refused(lab: Lab) -> None:
    """PEFT saves a resized lm_head only if it is a target like the embedding; otherwise its new rows are lost."""
    base = lab.base("llama")
    adapter = lab.train(base, grow=3, target_modules=["embed_tokens", "q_proj"])
    assert "base_model.model.lm_head.base_layer.weight" not in adapter.tensors
    with pytest.raises(SourceError, match=r"embed_tokens\.weight would have 51 rows and lm_head\.weight 48"):
        fold(lab, base, adapter.folder)


def test_two_different_resized_vocabularies_are_refused(lab: Lab) -> None:
    """Adapters that replace the same tensor differently cannot be summed."""
    base = lab.base("llama")
    pair = [lab.train(base, grow=3, seed=seed).folder for seed in (1, 2)]
    with pytest.raises(SourceError, match=r"both replace .*weight"):
        fold(lab, base, *pair)


def test_missing_adapter_folder_is_refused(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"adapter_config\.json does not exist"):
        fold(lab, lab.base("llama"), tmp_path)


# methods over the adapters' deltas


def linear_names(base: Path) -> list[str]:
    return [name.removesuffix(".weight") for name in tensors(base) if name.split(".")[-2] in LINEAR]


def test_linear_is_the_base_plus_the_normalized_mean_of_the_deltas(lab: Lab, three: list[Trained]) -> None:
    base, weights = lab.base("llama"), (1.0, 2.0, 5.0)
    folders = [adapter.folder for adapter in three]
    before, after = tensors(base), tensors(fold(lab, base, *folders, weights=weights, method="linear"))
    for name in linear_names(base):
        mean = sum(weight * delta(adapter, name) for weight, adapter in zip(weights, folders, strict=True)) / 8
        assert close(after[f"{name}.weight"], before[f"{name}.weight"] + mean)
    assert after["model.embed_tokens.weight"].equal(before["model.embed_tokens.weight"])


def test_slerp_is_the_base_plus_the_arc_between_two_deltas(lab: Lab, three: list[Trained]) -> None:
    base, t = lab.base("llama"), 0.3
    folders = [adapter.folder for adapter in three[:2]]
    before = tensors(base)
    after = tensors(fold(lab, base, *folders, method="slerp", parameters={"t": t}))
    for name in linear_names(base):
        adapter, delta_1 = (delta(folder, name) for folder in folders)
        angle = torch.acos((adapter * delta_1).sum() / adapter.norm() / delta_1.norm())
        arc = (torch.sin((1 - t) * angle) * adapter + torch.sin(t * angle) * delta_1) / torch.sin(angle)
        assert close(after[f"{name}.weight"], before[f"{name}.weight"] + arc)


def ties(deltas: list[np.ndarray], weights: list[float], density: float) -> np.ndarray:
    """TIES as published (https://arxiv.org/abs/2306.01708), dense; of equal magnitudes the first is kept."""
    kept = []
    for delta, weight in zip(deltas, weights, strict=True):
        flat = delta.ravel()
        chosen = np.argsort(-abs(flat), kind="stable")[: max(1, int(density * flat.size))]
        trimmed = np.zeros_like(flat)
        trimmed[chosen] = flat[chosen] * weight
        kept.append(trimmed.reshape(delta.shape))
    sign = np.where(sum(kept) >= 0, 1.0, -1.0)
    agree = [np.where(delta * sign > 0, delta, 0) for delta in kept]
    weight = sum((delta != 0) * weight for delta, weight in zip(agree, weights, strict=True))
    return sum(agree) / np.where(weight == 0, 1, weight)


def test_ties_of_three_adapters_equals_the_dense_algorithm(lab: Lab, three: list[Trained]) -> None:
    base, weights = lab.base("llama"), [1.0, 0.5, 2.0]
    folders = [adapter.folder for adapter in three]
    options = {"weights": weights, "method": "ties", "parameters": {"density": 0.5}}
    before, after = tensors(base), tensors(fold(lab, base, *folders, **options))
    for name in linear_names(base):
        expected = ties([delta(adapter, name).numpy() for adapter in folders], weights, 0.5)
        assert close(after[f"{name}.weight"], before[f"{name}.weight"] + torch.from_numpy(expected))


@pytest.mark.parametrize("density", [0.5, 0.3, 0.001])
def test_ties_keeps_exactly_k_elements_and_the_first_of_equals(lab: Lab, plain: Trained, density: float) -> None:
    """All elements of the delta are 2: the first k remain."""
    ones = lab.edited(plain, tensors=lambda saved: {key: torch.ones_like(saved[key]).mul_(0.5) for key in saved})
    base = lab.base("llama")
    after = tensors(fold(lab, base, ones, method="ties", parameters={"density": density}))
    name = "model.layers.1.self_attn.q_proj.weight"
    change = (after[name] - tensors(base)[name]).flatten()
    k = max(1, int(density * change.numel()))
    assert change[:k].sub(2).abs().max() < 1e-6
    assert change[k:].eq(0).all()


@pytest.mark.parametrize("method", ["linear", "ties", "task_arithmetic"])
def test_one_adapter_gives_its_fold_with_every_method(lab: Lab, method: str) -> None:
    """Also for biases, saved modules, tokens and DoRA."""
    base = lab.base("qwen2")
    settings = {"use_dora": True, "bias": "all", "modules_to_save": ["lm_head"], "trainable_token_indices": [1, 5]}
    adapter = lab.train(base, **settings)
    assert_same(tensors(fold(lab, base, adapter.folder, method=method)), adapter.merged_by_peft())


# the folder


def tokenizer(lab: Lab, folder: Path, words: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    plain = Tokenizer(models.WordLevel({f"w{at}": at for at in range(words)}, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    with lab.quiet():
        transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="w0").save_pretrained(folder)


def test_resized_vocabulary_uses_the_adapters_tokenizer_and_size(lab: Lab) -> None:
    base = lab.folder / "llama-with-tokenizer"
    shutil.copytree(lab.base("llama"), base)
    tokenizer(lab, base, 48)
    adapter = lab.train(base, grow=3)
    tokenizer(lab, adapter.folder, 51)
    out = fold(lab, base, adapter.folder)
    with lab.quiet():
        assert transformers.AutoTokenizer.from_pretrained(out)("w7 w50").input_ids == [7, 50]
    assert config(out)["vocab_size"] == 51
    assert close(lab.logits(lab.load(out)), lab.logits(adapter.model), 1e-5)


def test_unchanged_tokenizer_is_copied_from_the_base(lab: Lab) -> None:
    base = lab.folder / "llama-with-same-tokenizer"
    shutil.copytree(lab.base("llama"), base)
    tokenizer(lab, base, 48)
    adapter = lab.train(base)
    for path in base.glob("tokenizer*"):
        (adapter.folder / path.name).write_text(json.dumps(json.loads(path.read_text())))
    out = fold(lab, base, adapter.folder)
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(("stored", "asked"), [("bfloat16", None), ("float32", None), ("float32", "bfloat16")])
def test_config_has_the_dtype_that_transformers_loads(lab: Lab, stored: str, asked: str | None) -> None:
    base = lab.base("llama", stored)
    adapter = lab.train(base)
    recipe = {"base_model": str(base), "adapters": [str(adapter.folder)]} | ({"dtype": asked} if asked else {})
    out = mergeforge.merge(recipe, out=lab.out())
    expected = getattr(torch, asked or stored)
    assert {value.dtype for value in tensors(out).values()} == {expected}
    assert lab.load(out).dtype == expected
    assert close(
        lab.logits(lab.load(out)).float(),
        lab.logits(adapter.model).float(),
        1e-5 if expected == torch.float32 else 0.05,
    )


def test_generated_tokens_equal_the_unmerged_models(lab: Lab, dora: Trained) -> None:
    out = fold(lab, lab.base("llama"), dora.folder)
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    with lab.quiet():
        generated, expected = (
            model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False)
            for model in (lab.load(out), dora.model)
        )
    assert generated.equal(expected)
