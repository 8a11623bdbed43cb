"""Adapters in other formats than PEFT's: their deltas, compared with formulas and with PEFT's format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergeforge
from mergeforge import SourceError

Tensors = dict[str, torch.Tensor]
BLOCK = "down_blocks.0.attentions.0"
SHAPES = {
    f"{BLOCK}.proj_in.weight": (8, 6, 1, 1),
    f"{BLOCK}.attn1.to_q.weight": (8, 8),
    f"{BLOCK}.attn1.to_out.0.weight": (8, 8),
    f"{BLOCK}.attn1.to_out.0.bias": (8,),
    f"{BLOCK}.norm.weight": (8,),
    "conv_in.weight": (6, 4, 3, 3),
    "wide.weight": (6, 4, 5),
    "square.weight": (6, 6),
    "time_embedding.linear_1.weight": (12, 6),
}
FLAT = BLOCK.replace(".", "_")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    folder = tmp_path / "unet"
    folder.mkdir()
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    return folder


def changes(base: Path, adapter: Path, **options: Any) -> Tensors:
    """W' - W of the tensors that change."""
    out = mergeforge.merge(base_model=str(base), adapters=[str(adapter)], out=base.parent / "out", **options)
    before = load_file(next(base.glob("*.safetensors")))
    after = load_file(next(out.glob("*.safetensors")))
    return {name: after[name] - value for name, value in before.items() if not after[name].equal(value)}


def written(base: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    path = base.parent / "adapter.safetensors"
    save_file(tensors, path, metadata)
    return path


def same(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5, msg=name)


# kohya and LyCORIS


def test_kohya_linear_and_convolutions(unet: Path) -> None:
    """alpha / r * up down; the scale is 1 without alpha; 1x1 kernels may be stored as matrices and vice versa."""
    down, up = random(2, 8), random(8, 2)
    tensors = {
        f"lora_unet_{FLAT}_attn1_to_q.lora_down.weight": down,
        f"lora_unet_{FLAT}_attn1_to_q.lora_up.weight": up,
        f"lora_unet_{FLAT}_attn1_to_q.alpha": torch.tensor(6.0),
        "lora_unet_conv_in.lora_down.weight": random(3, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": random(6, 3, 1, 1),
        f"lora_unet_{FLAT}_proj_in.lora_down.weight": random(2, 6),
        f"lora_unet_{FLAT}_proj_in.lora_up.weight": random(8, 2),
        "lora_unet_square.lora_down.weight": random(2, 6, 1, 1),
        "lora_unet_square.lora_up.weight": random(6, 2, 1, 1),
    }
    expected = {
        f"{BLOCK}.attn1.to_q.weight": 3 * up @ down,
        f"{BLOCK}.proj_in.weight": (random(8, 2) @ random(2, 6)).view(8, 6, 1, 1),
        "square.weight": random(6, 2, 1, 1).view(6, 2) @ random(2, 6, 1, 1).view(2, 6),
    }
    flat = [tensors[f"lora_unet_conv_in.lora_{side}.weight"] for side in ("up", "down")]
    expected["conv_in.weight"] = (flat[0].view(6, 3) @ flat[1].view(3, 36)).view(6, 4, 3, 3)
    same(changes(unet, written(unet, tensors)), expected)


@pytest.mark.parametrize(("module", "kernel"), [("conv_in", (3, 3)), ("wide", (5,))])
def test_kohya_with_lora_mid(unet: Path, module: str, kernel: tuple[int, ...]) -> None:
    """lora_mid: up (out, r), mid (r, r, *kernel), down (r, in)."""
    ones = (1,) * len(kernel)
    down, middle, up = random(3, 4, *ones), random(3, 3, *kernel), random(6, 3, *ones)
    names = {"lora_down.weight": down, "lora_mid.weight": middle, "lora_up.weight": up, "alpha": torch.tensor(1.5)}
    actual = changes(unet, written(unet, {f"lora_unet_{module}.{name}": value for name, value in names.items()}))
    spread = torch.einsum("op,pq...,qc->oc...", up.flatten(1), middle, down.flatten(1))
    same(actual, {f"{module}.weight": 0.5 * spread})


@pytest.mark.parametrize("module", ["conv_in", "square", "wide"])
@pytest.mark.parametrize("inputs", [False, True])
def test_kohya_dora_scale(unet: Path, module: str, inputs: bool) -> None:
    """W' = m / |V| * V, the norm over each output's weights; over each input's for matrices."""
    shape = SHAPES[f"{module}.weight"]
    rest = (1,) * (len(shape) - 2)
    names = {
        "lora_down.weight": random(2, *shape[1:]),
        "lora_up.weight": random(shape[0], 2, *rest),
        "dora_scale": random(*((1, shape[1]) if inputs else (shape[0], 1)), *rest).abs(),
    }
    adapter = written(unet, {f"lora_unet_{module}.{name}": value for name, value in names.items()})
    if inputs and module != "square":
        with pytest.raises(SourceError, match="magnitude does not fit its weight"):
            changes(unet, adapter)
        return
    weight = load_file(unet / "diffusion_pytorch_model.safetensors")[f"{module}.weight"]
    low = (names["lora_up.weight"].flatten(1) @ names["lora_down.weight"].flatten(1)).view(shape)
    value = (weight + low).transpose(0, 1) if inputs else weight + low
    norm = value.flatten(1).norm(dim=1).view(-1, 1, *rest)
    norm = norm.transpose(0, 1) if inputs else norm
    same(changes(unet, adapter), {f"{module}.weight": names["dora_scale"] / norm * (weight + low) - weight})


def product(matrix: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """The Kronecker product of a matrix and a convolution kernel."""
    return torch.kron(matrix.view(*matrix.shape, *(1,) * (kernel.dim() - 2)), kernel.contiguous())


CORE = "pq...,po,qc->oc..."
LYCORIS: dict[str, tuple[str, Tensors, Callable[[Tensors], torch.Tensor]]] = {
    "loha": (
        "square",
        {"hada_w1_a": random(6, 2), "hada_w1_b": random(2, 6), "hada_w2_a": random(6, 2), "hada_w2_b": random(2, 6)},
        lambda one: 2 * (one["hada_w1_a"] @ one["hada_w1_b"]) * (one["hada_w2_a"] @ one["hada_w2_b"]),
    ),
    "loha, core": (
        "conv_in",
        {f"hada_w{at}_{side}": random(2, size) + int(at) for at in "12" for side, size in (("a", 6), ("b", 4))}
        | {"hada_t1": random(2, 2, 3, 3), "hada_t2": random(2, 2, 3, 3) + 1},
        lambda one: (
            2
            * torch.einsum(CORE, one["hada_t1"], one["hada_w1_a"], one["hada_w1_b"])
            * torch.einsum(CORE, one["hada_t2"], one["hada_w2_a"], one["hada_w2_b"])
        ),
    ),
    "loha, core on a conv1d": (
        "wide",
        {f"hada_w{at}_{side}": random(2, size) + int(at) for at in "12" for side, size in (("a", 6), ("b", 4))}
        | {"hada_t1": random(2, 2, 5), "hada_t2": random(2, 2, 5) + 1},
        lambda one: (
            2
            * torch.einsum(CORE, one["hada_t1"], one["hada_w1_a"], one["hada_w1_b"])
            * torch.einsum(CORE, one["hada_t2"], one["hada_w2_a"], one["hada_w2_b"])
        ),
    ),
    "lokr, whole": (  # alpha means nothing there
        "square",
        {"lokr_w1": random(2, 3), "lokr_w2": random(3, 2)},
        lambda one: torch.kron(one["lokr_w1"], one["lokr_w2"]),
    ),
    "lokr": (
        "square",
        {"lokr_w1": random(2, 3), "lokr_w2_a": random(3, 2), "lokr_w2_b": random(2, 2)},
        lambda one: 2 * torch.kron(one["lokr_w1"], one["lokr_w2_a"] @ one["lokr_w2_b"]),
    ),
    "lokr on a convolution": (
        "conv_in",
        {"lokr_w1_a": random(2, 2), "lokr_w1_b": random(2, 2), "lokr_w2": random(3, 2, 3, 3)},
        lambda one: 2 * product(one["lokr_w1_a"] @ one["lokr_w1_b"], one["lokr_w2"]),
    ),
    "lokr on a conv1d": (
        "wide",
        {"lokr_w1": random(2, 2), "lokr_w2": random(3, 2, 5)},
        lambda one: product(one["lokr_w1"], one["lokr_w2"]),
    ),
    "lokr, core": (
        "conv_in",
        {"lokr_w1": random(2, 2), "lokr_w2_a": random(2, 3), "lokr_w2_b": random(2, 2), "lokr_t2": random(2, 2, 3, 3)},
        lambda one: (
            2 * product(one["lokr_w1"], torch.einsum(CORE, *(one[f"lokr_{x}"] for x in ("t2", "w2_a", "w2_b"))))
        ),
    ),
}


@pytest.mark.parametrize("case", LYCORIS)
@pytest.mark.parametrize("decomposed", [False, True])
def test_lycoris(unet: Path, case: str, decomposed: bool) -> None:
    """alpha / r (here 4 / 2) times the product, computed with torch; dora_scale applies DoRA to the sum."""
    module, limited, formula = LYCORIS[case]
    expected = formula(limited)
    weight = load_file(unet / "diffusion_pytorch_model.safetensors")[f"{module}.weight"]
    scale = random(len(weight), *(1,) * (weight.dim() - 1)).abs()
    if decomposed:
        value = weight + expected
        expected = scale / value.flatten(1).norm(dim=1).view(scale.shape) * value - weight
    more = {"alpha": torch.tensor(4.0)} | ({"dora_scale": scale} if decomposed else {})
    names = {f"lycoris_{module}.{name}": value for name, value in {**limited, **more}.items()}
    same(changes(unet, written(unet, names)), {f"{module}.weight": expected})


def test_full_differences(unet: Path) -> None:
    """diff and diff_b of a linear layer, w_norm of a norm."""
    tensors = {
        f"lora_unet_{FLAT}_attn1_to_out_0.diff": random(8, 8),
        f"lora_unet_{FLAT}_attn1_to_out_0.diff_b": random(8),
        f"lora_unet_{FLAT}_norm.w_norm": random(8),
    }
    expected = {
        f"{BLOCK}.attn1.to_out.0.weight": random(8, 8),
        f"{BLOCK}.attn1.to_out.0.bias": random(8),
        f"{BLOCK}.norm.weight": random(8),
    }
    same(changes(unet, written(unet, tensors)), expected)


def test_component_of_another_model_is_skipped_with_a_note(unet: Path) -> None:
    tensors = {
        f"{module}.lora_{side}.weight": random(*shape)
        for module in ("lora_unet_square", "lora_te_text_model_encoder_layers_0_mlp_fc1")
        for side, shape in (("down", (2, 6)), ("up", (6, 2)))
    }
    path = written(unet, tensors)
    plan = mergeforge.plan({"base_model": str(unet), "adapters": [str(path)]}, out=unet.parent / "planned")
    assert any(f"skipping its 2 tensors for lora_te: {unet} has none of them" in note for note in plan.notes)
    same(changes(unet, path), {"square.weight": random(6, 2) @ random(2, 6)})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("lora_te_layers_0.lora_down.weight",), "has none of its modules"),
        (
            ("lora_unet_square.lora_down.weight", "lora_unet_round.lora_up.weight"),
            "round.lora_up.weight match no tensor",
        ),
        (("lora_unet_square.oft_blocks",), r"unknown tensor .*oft_blocks"),
        (("lora_unet_square.lora_down.weight",), "has no matching factor"),
    ],
)
def test_unknown_names_are_refused(unet: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        changes(unet, written(unet, {name: random(6, 6) for name in names}))


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("lora_unet_input_blocks_5_1_norm_ff_net_2", "down_blocks.1.attentions.1.norm.ff.net.2"),
        ("lora_unet_input_blocks_4_0_in_layers_2", "down_blocks.1.resnets.0.conv1"),
        ("lora_unet_input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("lora_unet_middle_block_1_proj_in", "mid_block.attentions.0.proj_in"),
        ("lora_unet_middle_block_2_emb_layers_1", "mid_block.resnets.1.time_emb_proj"),
        ("lora_unet_output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_output_blocks_5_1_conv", "up_blocks.1.upsamplers.0.conv"),
        ("lora_unet_output_blocks_2_1_proj_out", "up_blocks.0.attentions.2.proj_out"),
        ("lora_unet_output_blocks_8_0_skip_connection", "up_blocks.2.resnets.2.conv_shortcut"),
        ("lora_unet_time_embed_2", "time_embedding.linear_2"),
        ("diffusion_model.input_blocks.0.0", "conv_in"),
    ],
)  # fmt: skip
def test_original_names_of_a_unet(unet: Path, name: str, module: str) -> None:
    """kohya's SDXL files use the module names of the original UNet, not of diffusers."""
    more = ["up_blocks.0.attentions.2.proj_out", "up_blocks.1.resnets.0.conv1", module]
    save_file({f"{path}.weight": torch.zeros(8, 8) for path in more}, unet / "diffusion_pytorch_model.safetensors")
    adapter = written(unet, {f"{name}.lora_down.weight": random(2, 8), f"{name}.lora_up.weight": random(8, 2)})
    same(changes(unet, adapter), {f"{module}.weight": random(8, 2) @ random(2, 8)})


# diffusers


def factors(prefix: str, roles: tuple[str, str] = ("lora_A.weight", "lora_B.weight"), rank: int = 2) -> Tensors:
    return {f"{prefix}.{roles[0]}": random(rank, 8), f"{prefix}.{roles[1]}": random(8, rank)}


@pytest.mark.parametrize(
    ("name", "roles", "target"),
    [
        (f"unet.{BLOCK}.attn1.to_q", ("lora_A.weight", "lora_B.weight"), "attn1.to_q"),
        (f"unet.{BLOCK}.attn1.to_out.0", ("lora.down.weight", "lora.up.weight"), "attn1.to_out.0"),
        (f"unet.{BLOCK}.attn1.processor", ("to_q_lora.down.weight", "to_q_lora.up.weight"), "attn1.to_q"),
        (f"unet.{BLOCK}.attn1.processor", ("to_out_lora.down.weight", "to_out_lora.up.weight"), "attn1.to_out.0"),
        (f"diffusion_model.{BLOCK}.attn1.to_q", ("lora_down.weight", "lora_up.weight"), "attn1.to_q"),
        (f"{BLOCK}.attn1.to_q", ("lora_A.weight", "lora_B.weight"), "attn1.to_q"),
    ],
)
def test_diffusers_names(unet: Path, name: str, roles: tuple[str, str], target: str) -> None:
    expected = {f"{BLOCK}.{target}.weight": random(8, 2) @ random(2, 8)}
    same(changes(unet, written(unet, factors(name, roles))), expected)


def test_diffusers_metadata_gives_the_scale(unet: Path) -> None:
    """lora_adapter_metadata: a PEFT configuration under the component's name."""
    config = {"unet.r": 2, "unet.lora_alpha": 8, "unet.use_rslora": True, "unet.alpha_pattern": {"to_q": 6}}
    config |= {"text_encoder.r": 2, "text_encoder.lora_alpha": 1}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
    tensors = factors(f"unet.{BLOCK}.attn1.to_q") | factors(f"unet.{BLOCK}.attn1.to_out.0")
    tensors |= factors("text_encoder.text_model.encoder.layers.0.self_attn.q_proj")
    actual = changes(unet, written(unet, tensors, metadata))
    low = random(8, 2) @ random(2, 8)
    expected = {f"{BLOCK}.attn1.to_q.weight": 6 / 2**0.5 * low, f"{BLOCK}.attn1.to_out.0.weight": 8 / 2**0.5 * low}
    same(actual, expected)


def test_diffusers_metadata_without_a_component(unet: Path) -> None:
    """save_lora_adapter writes names and configuration without a component."""
    config = {"r": 2, "lora_alpha": 8, "rank_pattern": {}, "lora_bias": False, "peft_type": "LORA"}
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    actual = changes(unet, written(unet, factors(f"{BLOCK}.attn1.to_q"), metadata))
    same(actual, {f"{BLOCK}.attn1.to_q.weight": 4 * random(8, 2) @ random(2, 8)})


def test_different_ranks_need_alphas(unet: Path) -> None:
    """diffusers uses the first module's rank for every alpha; other programs use each module's rank."""
    tensors = factors(f"unet.{BLOCK}.attn1.to_q") | factors(f"unet.{BLOCK}.attn1.to_out.0", rank=3)
    with pytest.raises(SourceError, match="have ranks 2, 3, but the file has no scales"):
        changes(unet, written(unet, tensors))
    alphas = {f"unet.{BLOCK}.attn1.{projection}.alpha": torch.tensor(6.0) for projection in ("to_q", "to_out.0")}
    low = {f"{BLOCK}.attn1.to_q.weight": 3 * random(8, 2) @ random(2, 8)}
    low[f"{BLOCK}.attn1.to_out.0.weight"] = 2 * random(8, 3) @ random(3, 8)
    same(changes(unet, written(unet, tensors | alphas)), low)


def test_residual_init_in_the_metadata_is_refused(unet: Path) -> None:
    config = {"unet.r": 2, "unet.lora_alpha": 8, "unet.init_lora_weights": "pissa"}
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    with pytest.raises(SourceError, match="init_lora_weights: pissa, which is not supported there"):
        changes(unet, written(unet, factors(f"unet.{BLOCK}.attn1.to_q"), metadata))


# MLX


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    folder.mkdir()
    torch.manual_seed(0)
    layer = "model.layers.0.self_attn"
    shapes = {"model.embed_tokens": (12, 8), f"{layer}.q_proj": (8, 8), f"{layer}.k_proj": (4, 8), "lm_head": (12, 8)}
    save_file({f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    return folder


def mlx(base: Path, tensors: Tensors, **config: Any) -> Path:
    folder = base.parent / "mlx"
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors")
    parameters = {"lora_parameters": {"rank": 2, "scale": 5.0, "dropout": 0.0}}
    (folder / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora", **parameters, **config}))
    return folder


K = "model.layers.0.self_attn.k_proj"
Q = "model.layers.0.self_attn.q_proj"
E = "model.embed_tokens"


@pytest.mark.parametrize("dora", [False, True])
def test_mlx_lora_and_dora(llama: Path, dora: bool) -> None:
    """scale * (a b)^T; a square weight and an embedding, whose change is scale * a b; DoRA over rows everywhere."""
    tensors = {f"{K}.lora_a": random(8, 2), f"{K}.lora_b": random(2, 4)}
    tensors |= {f"{Q}.lora_a": random(8, 2), f"{Q}.lora_b": random(2, 8)}
    tensors |= {f"{E}.lora_a": random(12, 2), f"{E}.lora_b": random(2, 8)}
    expected = {f"{name}.weight": 5 * (tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"]) for name in (K, Q, E)}
    expected |= {f"{name}.weight": expected[f"{name}.weight"].t() for name in (K, Q)}
    if dora:
        before = load_file(llama / "model.safetensors")
        for name in (K, Q, E):
            value = before[f"{name}.weight"] + expected[f"{name}.weight"]
            tensors[f"{name}.m"] = random(len(value)).abs()
            length = tensors[f"{name}.m"] / value.norm(dim=1)
            expected[f"{name}.weight"] = length.unsqueeze(1) * value - before[f"{name}.weight"]
    same(changes(llama, mlx(llama, tensors, fine_tune_type="dora" if dora else "lora")), expected)


def test_mlx_of_early_2024_scales_by_alpha(llama: Path) -> None:
    tensors = {f"{K}.lora_a": random(8, 2), f"{K}.lora_b": random(2, 4)}
    folder = mlx(llama, tensors, lora_parameters={"rank": 2, "alpha": 6.0, "scale": 5.0})
    same(changes(llama, folder), {f"{K}.weight": 15 * (random(8, 2) @ random(2, 4)).t()})


def test_mlx_equals_peft(llama: Path) -> None:
    """The same adapter in both formats; PEFT's is given as a file."""
    a, b = random(8, 2), random(2, 4)
    folder = llama.parent / "peft"
    folder.mkdir()
    name = f"base_model.model.{K}"
    save_file(
        {f"{name}.lora_A.weight": a.t().contiguous(), f"{name}.lora_B.weight": b.t().contiguous()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 10}))
    theirs = changes(llama, folder / "adapter_model.safetensors")
    (llama.parent / "out").rename(llama.parent / "first")
    ours = changes(llama, mlx(llama, {f"{K}.lora_a": a, f"{K}.lora_b": b}))
    same(ours, theirs)
    assert ours.keys() == {f"{K}.weight"}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("kind", "name"),
    [("qwen3_moe", "mlp.experts.{}.up_proj"), ("mixtral", "block_sparse_moe.experts.{}.w3")],
)
def test_mlx_experts(llama: Path, kind: str, name: str, flat: bool) -> None:
    """W_e + scale * b_e a_e of each expert; mlx-lm stacks the experts, the checkpoint stores them separately."""
    weights = {f"model.layers.0.{name.format(at)}.weight": torch.randn(6, 8) for at in range(3)}
    save_file(weights, llama / "model.safetensors")
    (llama / "config.json").write_text(json.dumps({"model_type": kind}))
    a, b = random(3, 2, 8), random(3, 6, 2)
    module = f"model.layers.0.{name.partition('.')[0]}.switch_mlp.up_proj"
    folder = mlx(llama, {f"{module}.lora_a": a.flatten(0, 1) if flat else a, f"{module}.lora_b": b})
    same(changes(llama, folder), {weight_name: 5 * b[at] @ a[at] for at, weight_name in enumerate(weights)})


def test_mlx_full(llama: Path) -> None:
    folder = mlx(llama, {f"{K}.weight": random(4, 8)}, fine_tune_type="full")
    before = load_file(llama / "model.safetensors")[f"{K}.weight"]
    same(changes(llama, folder), {f"{K}.weight": random(4, 8) - before})


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({f"{K}.lora_a": random(2, 2, 8), f"{K}.lora_b": random(2, 4, 2)}, {}, "experts with unknown names"),
        ({f"{K}.lora_a": random(8, 2), f"{K}.lora_b": random(2, 4)}, {"fine_tune_type": "dora"}, "has no magnitude m"),
        ({f"{K}.lora_a": random(8, 2), f"{K}.lora_b": random(2, 4)}, {"fine_tune_type": "vera"}, "vera"),
        ({f"{K}.lora_a": random(8, 2), f"{K}.lora_b": random(2, 4)}, {"lora_parameters": {}}, "need a numeric scale"),
        ({f"{K}.lora_a": random(8, 2), f"{K}.lora_b": random(2, 5)}, {}, r"shape \[5, 8\]"),
        ({f"{K}.lora_a": random(8, 2)}, {}, "has no matching factor"),
    ],
)
def test_unsupported_mlx_adapters_are_refused(llama: Path, tensors: Tensors, config: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        changes(llama, mlx(llama, tensors, **config))


def test_folder_without_adapter_config_is_refused(llama: Path) -> None:
    folder = llama.parent / "bare"
    folder.mkdir()
    save_file({"a": random(2, 2)}, folder / "adapter_model.safetensors")
    with pytest.raises(SourceError, match=r"adapter_config\.json does not exist"):
        changes(llama, folder)
