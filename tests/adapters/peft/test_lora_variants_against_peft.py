"""LoRA variants and LoRA on convolutions: mergeforge's merge, PEFT's merge, and the unmerged model's output.

The convolutions are in a small torch module, saved as a single model.safetensors. The adapters are made by PEFT, with
random values in all trainable tensors.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mergeforge
from mergeforge import SourceError
from mergeforge.adapters.adapted_tensor import AdaptedTensor
from mergeforge.adapters.open import open_adapter
from mergeforge.adapters.peft.lora_config import replicated_layers
from mergeforge.checkpoints.checkpoint import open_checkpoint
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.worker import Worker

if TYPE_CHECKING:
    from support.peft_lab import Lab, Trained

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONVOLUTIONS = ["wide", "flat", "point", "deep", "dot"]
BLOCKS = peft.tuners.lora.config.BdLoraConfig


class Net(nn.Module):
    """1D, 2D, 3D and grouped convolutions, and torch's MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv1d(6, 8, 3, padding=1)
        self.dot = nn.Conv1d(8, 8, 1)
        self.flat = nn.Conv2d(8, 12, 3, padding=1)
        self.point = nn.Conv2d(12, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.deep = nn.Conv3d(8, 4, 3, padding=1, bias=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        value = self.dot(self.wide(tokens).tanh()).tanh()
        value = self.point(self.flat(value.unsqueeze(2)).tanh()).tanh() + self.grouped(value.unsqueeze(2))
        deep = self.deep(value.unsqueeze(2)).sum((1, 2, 3, 4))
        value = value.squeeze(2).transpose(1, 2)
        return self.linear(self.attention(value, value, value)[0]) + deep.view(-1, 1, 1)


@pytest.fixture(scope="module")
def net(lab: Lab) -> Path:
    folder = lab.out()
    folder.mkdir()
    torch.manual_seed(0)
    save_file({name: value.contiguous() for name, value in Net().state_dict().items()}, folder / "model.safetensors")
    return folder


def with_noise(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model.eval()


def tuned(lab: Lab, base: Path, config: Any) -> tuple[Path, Any]:
    """A saved adapter of the net, and the model that it was saved from."""
    model = Net()
    model.load_state_dict(load_file(base / "model.safetensors"))
    folder = lab.out()
    with lab.quiet():
        model = with_noise(peft.get_peft_model(model, config))
        model.save_pretrained(folder)
    return folder, model


def outputs(lab: Lab, model: Any) -> torch.Tensor:
    with torch.no_grad(), lab.quiet():
        return model.eval()(torch.randn(2, 6, 7, generator=torch.Generator().manual_seed(3)))


def close(ours: torch.Tensor, theirs: torch.Tensor, within: float) -> bool:
    return bool((ours - theirs).abs().max() <= within * theirs.abs().max())


def check_net(lab: Lab, base: Path, folder: Path, model: Any, targets: list[str]) -> dict[str, torch.Tensor]:
    """The fold equals PEFT's merge, changes only the targets, and its output equals the unmerged model's."""
    ours = load_file(
        mergeforge.merge(base_model=str(base), adapters=[str(folder)], out=lab.out()) / "model.safetensors"
    )
    before = load_file(base / "model.safetensors")
    changed = {name for name, value in ours.items() if not value.equal(before[name])}
    assert {name.partition(".")[0] for name in changed} == set(targets)
    merged = Net()
    merged.load_state_dict(ours)
    assert close(outputs(lab, merged), outputs(lab, model), 1e-5)
    with lab.quiet():
        theirs = copy.deepcopy(model).merge_and_unload().state_dict()
    assert [name for name, value in ours.items() if not close(value, theirs[name], 1e-6)] == []
    return ours


LORA: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True, "target_modules": CONVOLUTIONS[:3]},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"flat": 2}, "alpha_pattern": {"wide": 3}},
    "bias": {"bias": "lora_only"},
}


@pytest.mark.parametrize("case", LORA)
def test_lora_on_convolutions(lab: Lab, net: Path, case: str) -> None:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": CONVOLUTIONS} | LORA[case]
    check_net(lab, net, *tuned(lab, net, peft.LoraConfig(**settings)), settings["target_modules"])


def test_convolutions_do_not_depend_on_the_blocks(lab: Lab, net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, which split a Conv1d's output channels, give the same as whole tensors."""
    from mergeforge.core import tensor_info

    config = peft.LoraConfig(r=4, use_dora=True, target_modules=CONVOLUTIONS)
    folder, model = tuned(lab, net, config)
    whole = check_net(lab, net, folder, model, CONVOLUTIONS)
    monkeypatch.setattr(tensor_info, "BLOCK_ELEMENTS", 15)
    for name, value in check_net(lab, net, folder, model, CONVOLUTIONS).items():
        assert close(value, whole[name], 1e-6), name


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "loha": ("LoHaConfig", {"r": 4, "alpha": 9, "target_modules": ["flat", "point", "wide", "dot"]}),
    "loha core": (
        "LoHaConfig",
        {"r": 4, "alpha": 9, "use_effective_conv2d": True, "target_modules": ["flat", "point", "wide"]},
    ),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 9, "target_modules": ["flat", "point", "wide", "dot"]}),
    "lokr core": (  # PEFT's own product fails on a Conv1d with a core
        "LoKrConfig",
        {"r": 1, "alpha": 9, "use_effective_conv2d": True, "target_modules": ["flat", "point"]},
    ),
    "ia3": ("IA3Config", {"target_modules": ["flat", "point", "deep"], "feedforward_modules": ["deep"]}),
    "oft": ("OFTConfig", {"oft_block_size": 4, "target_modules": ["point"]}),
    "boft": ("BOFTConfig", {"boft_block_size": 4, "target_modules": ["flat", "point"]}),
    "hra": ("HRAConfig", {"r": 4, "target_modules": ["flat", "point"]}),
    "adalora": ("AdaLoraConfig", {"init_r": 6, "total_step": 10, "target_modules": ["linear"]}),
    "hira": ("HiraConfig", {"r": 4, "target_modules": ["flat", "point", "wide", "deep"]}),
}


@pytest.mark.parametrize("case", KINDS)
def test_other_methods_on_convolutions(lab: Lab, net: Path, case: str) -> None:
    name, settings = KINDS[case]
    check_net(lab, net, *tuned(lab, net, getattr(peft, name)(**settings)), settings["target_modules"])


def test_oft_on_convolutions_is_refused(lab: Lab, net: Path) -> None:
    """PEFT's merge differs from its forward pass there."""
    folder, _ = tuned(lab, net, peft.OFTConfig(oft_block_size=4, target_modules=["flat"]))
    with pytest.raises(
        SourceError, match=r"flat is a convolution with weight \[12, 8, 3, 3\]: PEFT trains OFT on sums"
    ):
        mergeforge.plan({"base_model": str(net), "adapters": [str(folder)]}, out=lab.out())


def test_grouped_convolution_is_refused(lab: Lab, net: Path) -> None:
    folder, _ = tuned(lab, net, peft.LoraConfig(r=4, target_modules=["grouped"]))
    with pytest.raises(SourceError, match="grouped is a convolution with 2 groups, and its lora_A mixes"):
        mergeforge.plan({"base_model": str(net), "adapters": [str(folder)]}, out=lab.out())


def test_attention_out_proj_delta_is_applied_twice(lab: Lab, net: Path) -> None:
    """As PEFT does in training and in its merge; the plan has a note."""
    folder, model = tuned(lab, net, peft.LoraConfig(r=4, target_modules=["attention", "linear"]))
    check_net(lab, net, folder, model, ["attention", "linear"])
    plan = mergeforge.plan({"base_model": str(net), "adapters": [str(folder)]}, out=lab.out())
    assert any("the delta of attention.out_proj is applied twice" in note for note in plan.notes)


def test_attention_with_trained_biases(lab: Lab, net: Path) -> None:
    """PEFT saves out_proj's bias inside its wrapper, and trains in_proj_bias without saving it."""
    folder, model = tuned(lab, net, peft.LoraConfig(r=4, target_modules=["attention"], bias="lora_only"))
    with torch.no_grad():
        start = load_file(net / "model.safetensors")["attention.in_proj_bias"]
        model.base_model.model.attention.base_layer.in_proj_bias.copy_(start)
    check_net(lab, net, folder, model, ["attention"])


# variants of linear layers, on a tiny Llama

STARTS = ["pissa", "olora", "gaussian", "orthogonal", "mica", False]
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"start {start}": {"init_lora_weights": start} for start in STARTS},
    "pissa, rslora": {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "olora, rslora": {"init_lora_weights": "olora", "use_rslora": True, "alpha_pattern": {"q_proj": 2}},
    "kasa": {"kasa_config": peft.tuners.lora.config.KasaConfig()},
    "eva": {"init_lora_weights": "eva", "eva_config": peft.EvaConfig()},
    "montecarlo": {"monteclora_config": peft.tuners.lora.config.MontecloraConfig()},
    "velora": {"velora_config": peft.tuners.lora.config.VeloraConfig()},
    "blocks of B": {"use_bdlora": BLOCKS(target_modules_bd_b=LINEAR, nblocks=2)},
    "blocks of A": {"use_bdlora": BLOCKS(target_modules_bd_a=LINEAR, nblocks=4)},
    "blocks of some": {"use_bdlora": BLOCKS(target_modules_bd_a=["down_proj"], nblocks=2, match_strict=False)},
}


def fold(lab: Lab, base: Path, *adapters: Path) -> Path:
    return mergeforge.merge(base_model=str(base), adapters=[str(adapter) for adapter in adapters], out=lab.out())


@pytest.mark.parametrize("case", VARIANTS)
def test_variants_on_the_original_base(lab: Lab, case: str) -> None:
    base = lab.base("llama")
    adapter = lab.train(base, target_modules=LINEAR, **VARIANTS[case])
    out = fold(lab, base, adapter.folder)
    ours, theirs = load_file(out / "model.safetensors"), adapter.merged_by_peft()
    within = 1e-5 if any(name in case for name in ("pissa", "olora", "kasa")) else 1e-6
    assert [name for name, value in ours.items() if not close(value, theirs[name], within)] == []
    assert close(lab.logits(lab.load(out)), lab.logits(adapter.model), 5 * within)


@pytest.mark.parametrize("start", ["pissa", "kasa", "olora"])
def test_residual_init_does_not_depend_on_the_blocks(lab: Lab, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 3 rows give the same as the whole tensor."""
    from mergeforge.core import tensor_info

    base = lab.base("llama")
    adapter = lab.train(base, target_modules=LINEAR, **VARIANTS.get(start, {"init_lora_weights": start}))
    monkeypatch.setattr(tensor_info, "BLOCK_ELEMENTS", 100)
    ours = load_file(fold(lab, base, adapter.folder) / "model.safetensors")
    theirs = adapter.merged_by_peft()
    assert [name for name, value in ours.items() if not close(value, theirs[name], 1e-5)] == []


def test_residual_init_is_noted_in_the_plan(lab: Lab) -> None:
    adapter = lab.train(lab.base("llama"), init_lora_weights="pissa")
    plan = mergeforge.plan({"base_model": str(lab.base("llama")), "adapters": [str(adapter.folder)]}, out=lab.out())
    assert any(
        "what its initialization (pissa) subtracted from the original base is subtracted again" in note
        for note in plan.notes
    )


def test_pissa_on_a_conv1d(lab: Lab) -> None:
    """GPT-2 stores its weights (in, out)."""
    base = lab.base("gpt2")
    targets = ["c_attn", "c_proj", "c_fc"]
    adapter = lab.train(base, target_modules=targets, fan_in_fan_out=True, init_lora_weights="pissa")
    out = fold(lab, base, adapter.folder)
    ours, theirs = load_file(out / "model.safetensors"), adapter.merged_by_peft()
    assert [name for name, value in ours.items() if not close(value, theirs[name], 1e-5)] == []
    assert close(lab.logits(lab.load(out)), lab.logits(adapter.model), 5e-5)


def converted(lab: Lab, base: Path, start: str) -> tuple[Trained, Path]:
    """An adapter with this initialization, converted by PEFT to a plain one of twice the rank."""
    import transformers

    first = lab.out()
    with lab.quiet():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR, init_lora_weights=start)
        model = peft.get_peft_model(model, settings)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(first)
        model.peft_config["default"].init_lora_weights = start
        with_noise(model)
        folder = lab.out()
        model.save_pretrained(folder, path_initial_model_for_weight_conversion=str(first))
    return model, folder


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_converted_adapter_folds_into_the_original_base(lab: Lab, start: str) -> None:
    base = lab.base("llama")
    model, folder = converted(lab, base, start)
    out = fold(lab, base, folder)
    assert close(lab.logits(lab.load(out)), lab.logits(model), 2e-5)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "kasa"])
def test_adapter_folds_into_its_saved_residual_base(lab: Lab, start: str, tmp_path: Path) -> None:
    """On the residual base that PEFT leaves, the delta is s B A (with KaSA's diagonal)."""
    base = lab.base("llama")
    settings = VARIANTS.get(start, {"init_lora_weights": start})
    adapter = lab.train(base, target_modules=LINEAR, **settings)
    remaining = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value.contiguous()
        for name, value in adapter.model.state_dict().items()
        if "lora_" not in name
    }
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    save_file(remaining, tmp_path / "model.safetensors", {"format": "pt"})
    opened = open_checkpoint(tmp_path, "base")
    if start == "pissa_niter_4":
        with pytest.raises(SourceError, match=r"pissa_niter_4, so it is relative.*base_is_residual: true"):
            open_adapter(adapter.folder, "adapter", opened)
    opened_adapter = open_adapter(adapter.folder, "adapter", opened, base_is_residual=True)
    assert any("the base is treated as the residual that its initialization" in note for note in opened_adapter.notes)
    theirs = adapter.merged_by_peft()
    for name, (delta,) in opened_adapter.deltas.items():
        ours = evaluated(AdaptedTensor(opened.tensors[name], ((1.0, delta),)))
        assert close(ours, theirs[name], 1e-6), name


def evaluated(lazy_tensor: LazyTensor) -> torch.Tensor:
    """Compute a whole tensor as a merge does."""
    worker = Worker("cpu", 1 << 20)
    rows = range(lazy_tensor.info.rows)
    return lazy_tensor.load(rows, worker, {}, torch.float32)(0, len(rows))


def test_error_lists_several_mismatches(lab: Lab) -> None:
    """The error names five mismatched tensors and the number of the others."""
    base = lab.base("llama")
    adapter = lab.train(base)

    def halve(saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        short = {name for name in saved if name.endswith("q_proj.lora_B.weight")}
        return {name: value[:16].contiguous() if name in short else value for name, value in saved.items()}

    folder = lab.edited(adapter, tensors=halve)
    with pytest.raises(SourceError, match=r"0\.self_attn\.q_proj is made.*; .*1\.self_attn\.q_proj is made") as caught:
        fold(lab, base, folder)
    assert caught.value.exit_code == 3
    with pytest.raises(SourceError, match=r"matches no tensor.*; and 1 more"):
        fold(lab, base, lab.train(lab.base("gpt2"), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True).folder)


def test_other_base_and_revision_are_noted(lab: Lab) -> None:
    adapter = lab.train(lab.base("llama"))
    folder = lab.edited(adapter, {"base_model_name_or_path": "someone/model", "revision": "0123abc"})
    base = open_checkpoint(lab.base("llama"), "someone/model@fedcba", revision="fedcba98")
    notes = open_adapter(folder, "adapter", base).notes
    assert notes == ("adapter was trained on revision 0123abc of someone/model, but is folded into fedcba98",)
    same = open_checkpoint(lab.base("llama"), "someone/model@0123abc", revision="0123abcdef")
    assert open_adapter(folder, "adapter", same).notes == ()


def test_lora_bias_on_a_layer_without_bias_is_refused(lab: Lab) -> None:
    base = lab.base("llama")
    adapter = lab.train(base, target_modules=["q_proj"])
    bias = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"
    folder = lab.edited(adapter, tensors=lambda saved: {**saved, bias: torch.ones(32)})
    with pytest.raises(SourceError, match=r"changes a bias, but model\.layers\.0\.self_attn\.q_proj of .* has none"):
        fold(lab, base, folder)


def test_adapter_of_replicated_layers_on_a_stacked_base(lab: Lab) -> None:
    """Layers 0, 1, 1 stacked with slices take an adapter that PEFT trained on the same replicated layers.

    PEFT's own merge writes into the shared weights; the unmerged model's logits are the reference.
    """
    base = lab.base("llama")
    adapter = lab.train(base, target_modules=LINEAR, layer_replication=[[0, 2], [1, 2]])
    slices = [{"sources": [{"model": str(base), "layer_range": pair}]} for pair in ([0, 2], [1, 2])]
    stack = mergeforge.merge({"merge_method": "passthrough", "slices": slices}, out=lab.out())
    out = fold(lab, stack, lab.edited(adapter, {"layer_replication": None}))
    assert close(lab.logits(lab.load(out)), lab.logits(adapter.model), 1e-5)
    opened = open_adapter(adapter.folder, "adapter", open_checkpoint(stack, "stack"), base_is_stacked=True)
    assert len(opened.deltas) == 3 * len(LINEAR)
    assert replicated_layers([[0, 2], [1, 2]]) == [0, 1, 1]
    with pytest.raises(SourceError, match="layer_replication: it repeats layers of the base; stack these layers first"):
        open_adapter(adapter.folder, "adapter", open_checkpoint(stack, "stack"))
    started = lab.edited(adapter, {"init_lora_weights": "pissa"})
    with pytest.raises(SourceError, match="both layer_replication and the pissa initialization"):
        open_adapter(started, "adapter", open_checkpoint(stack, "stack"), base_is_stacked=True)


# through a recipe


@pytest.mark.parametrize("dora", [False, True])
def test_recipe_repeats_the_layers_of_layer_replication(lab: Lab, dora: bool) -> None:
    """Each replica becomes a separate layer with its own delta, and config.json has the new number of layers."""
    base = lab.base("llama")
    adapter = lab.train(base, layer_replication=[[0, 2], [1, 2], [0, 1]], use_dora=dora)
    out = mergeforge.merge(base_model=str(base), adapters=[str(adapter.folder)], out=lab.out())
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 4
    with lab.quiet():
        expected, ours = lab.logits(adapter.model), lab.logits(lab.load(out))
    assert float((ours - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_layer_replication_that_does_not_fit_the_base_is_refused(lab: Lab) -> None:
    base = lab.base("llama")
    adapter = lab.edited(lab.train(base), config={"layer_replication": [[0, 2], [1, 7]]})
    with pytest.raises(SourceError, match=r"repeats layer 2, which .* does not have"):
        mergeforge.plan({"base_model": str(base), "adapters": [str(adapter)]}, out=lab.out())
    odd = [str(adapter), str(lab.train(base).folder)]
    with pytest.raises(SourceError, match="were trained with different layer_replication"):
        mergeforge.plan({"base_model": str(base), "adapters": odd}, out=lab.out())


def test_base_is_residual_in_a_recipe(lab: Lab) -> None:
    base = lab.base("llama")
    plain = lab.train(base)
    marked = str(lab.edited(plain, config={"init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(SourceError, match="base_is_residual"):
        mergeforge.plan({"base_model": str(base), "adapters": [marked]}, out=lab.out())
    entry = {"adapter": marked, "base_is_residual": True}
    out = mergeforge.merge({"base_model": str(base), "adapters": [entry]}, out=lab.out())
    same = mergeforge.merge(base_model=str(base), adapters=[str(plain.folder)], out=lab.out())
    assert (out / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes()


def test_two_adapters_that_replace_one_tensor_need_weights_that_sum_to_1(lab: Lab) -> None:
    """With weights of 0.5 the result is their mean; a plain sum is refused."""
    base = lab.base("llama")
    trained = [lab.train(base, modules_to_save=["lm_head"], seed=seed) for seed in (1, 2)]
    both = [str(adapter.folder) for adapter in trained]
    with pytest.raises(SourceError, match=r"2 adapters each replace lm_head.weight"):
        mergeforge.plan({"base_model": str(base), "adapters": both}, out=lab.out())
    weighted = [{"adapter": adapter, "weight": 0.5} for adapter in both]
    out = mergeforge.merge({"base_model": str(base), "adapters": weighted}, out=lab.out())
    heads = [adapter.tensors["base_model.model.lm_head.weight"] for adapter in trained]
    merged = load_file(out / "model.safetensors")["lm_head.weight"]
    torch.testing.assert_close(merged, (heads[0] + heads[1]) / 2, rtol=1e-5, atol=1e-6)
