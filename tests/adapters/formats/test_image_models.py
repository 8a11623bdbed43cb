"""Adapters of Stable Diffusion, SDXL and Flux in every trainer's names, on single files and on diffusers' folders.

Expected values are low-rank products added to slices that are written out here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergeforge
from mergeforge import SourceError
from mergeforge.adapters.formats.ldm_names import diffusers_names, ldm_names

Tensors = dict[str, torch.Tensor]
GENERATOR = torch.Generator().manual_seed(0)


def some(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


def lora(modules: dict[str, tuple[int, int]], roles: tuple[str, str]) -> tuple[Tensors, Tensors]:
    """Factors of rank 2 for modules (out, in), under names with these roles, and the products by module."""
    tensors: Tensors = {}
    products = {}
    for module, (rows, columns) in modules.items():
        down, up = some(2, columns), some(rows, 2)
        tensors |= {roles[0].format(module): down, roles[1].format(module): up}
        products[module] = up @ down
    return tensors, products


def fold(base: Path, tensors: Tensors, **options: object) -> Tensors:
    path = base.parent / "lora.safetensors"
    save_file(tensors, path)
    source = next(base.glob("*.safetensors")) if not (base / "config.json").exists() else base
    options = {"device": "cpu", "threads": 1, "overwrite": True} | options
    out = mergeforge.merge(base_model=str(source), adapters=[str(path)], out=base.parent / "out", **options)
    return load_file(next(out.glob("*.safetensors")))


def model(folder: Path, tensors: Tensors, config: dict[str, object] | None = None) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def same(found: Tensors, base: Tensors, added: dict[str, torch.Tensor]) -> None:
    """The base plus what is added, and nothing else."""
    assert found.keys() == base.keys()
    for name, value in base.items():
        torch.testing.assert_close(found[name], value + added.get(name, 0), rtol=1e-5, atol=1e-5, msg=name)


# UNets


def unet_modules(levels: int, layers: int, attention: tuple[int, ...]) -> list[str]:
    """Modules of a diffusers UNet; `attention`: the levels with attentions."""
    inner = {"resnets": ["norm1", "conv1", "time_emb_proj", "norm2", "conv2"], "attentions": ["proj_in", "norm"]}
    inner["attentions"].append("transformer_blocks.0.attn1.to_q")
    modules = ["conv_in", "conv_out", "conv_norm_out", "time_embedding.linear_1"]
    for direction, count in (("down", layers), ("up", layers + 1)):
        for level in range(levels):
            with_attention = (level if direction == "down" else levels - 1 - level) in attention
            for kind in ("resnets", "attentions") if with_attention else ("resnets",):
                for layer in range(count):
                    modules += [f"{direction}_blocks.{level}.{kind}.{layer}.{leaf}" for leaf in inner[kind]]
            resize = f"{direction}_blocks.{level}.{direction}samplers.0.conv"
            modules += [resize] if level < levels - 1 else []
    for kind, count in (("resnets", 2), ("attentions", 1)):
        modules += [f"mid_block.{kind}.{layer}.{leaf}" for layer in range(count) for leaf in inner[kind]]
    return modules


@pytest.mark.parametrize(("levels", "layers", "attention"), [(4, 2, (0, 1, 2)), (3, 2, (1, 2)), (3, 1, (0,))])
def test_names_of_a_unet_there_and_back(levels: int, layers: int, attention: tuple[int, ...]) -> None:
    """SD 1.5, SDXL and a shallow one: diffusers -> original -> diffusers."""
    modules = unet_modules(levels, layers, attention)
    original = ldm_names(modules, layers)
    assert sorted(original.values()) == sorted(modules)
    assert diffusers_names(original) == {name: module for module, name in original.items()}


@pytest.mark.parametrize("style", ["kohya, diffusers' blocks", "kohya, original blocks", "diffusers"])
@pytest.mark.parametrize("number", ["", "1"])
def test_sd15_single_file(tmp_path: Path, style: str, number: str) -> None:
    """Every spelling of one UNet module and one text encoder module."""
    module = "input_blocks.7.1.transformer_blocks.0.attn2.to_k"
    theirs = "down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_k"
    text = "text_model.encoder.layers.0.mlp.fc1"
    names = {f"model.diffusion_model.{module}.weight": (8, 6), f"cond_stage_model.transformer.{text}.weight": (12, 4)}
    names |= {f"model.diffusion_model.input_blocks.{at}.0.op.weight": (4, 4) for at in (3, 6, 9)}
    base = {name: some(*shape) for name, shape in names.items()}
    inner = module if "original" in style else theirs
    unet_name, text_name = f"unet.{inner}", f"text_encoder.{text}"
    if style != "diffusers":
        unet_name, text_name = f"lora_unet_{inner}".replace(".", "_"), f"lora_te{number}_{text}".replace(".", "_")
    tensors, products = lora({unet_name: (8, 6), text_name: (12, 4)}, ("{}.lora_down.weight", "{}.lora_up.weight"))
    found = fold(model(tmp_path / "sd15", base), tensors)
    same(found, base, dict(zip(list(names)[:2], products.values(), strict=True)))


# text encoders


CLIP = {
    "self_attn.q_proj": (8, 8),
    "self_attn.k_proj": (8, 8),
    "self_attn.v_proj": (8, 8),
    "self_attn.out_proj": (8, 8),
    "mlp.fc1": (16, 8),
    "mlp.fc2": (8, 16),
}


def open_clip(prefix: str, layers: int = 2) -> Tensors:
    """An encoder in OpenCLIP's names."""
    tensors = {}
    for at in range(layers):
        block = f"{prefix}transformer.resblocks.{at}"
        tensors |= {f"{block}.attn.in_proj_weight": some(24, 8), f"{block}.attn.out_proj.weight": some(8, 8)}
        tensors |= {f"{block}.mlp.c_fc.weight": some(16, 8), f"{block}.mlp.c_proj.weight": some(8, 16)}
        tensors |= {f"{block}.attn.in_proj_bias": some(24), f"{block}.ln_1.weight": some(8)}
    return tensors


def into_open_clip(prefix: str, at: int, products: list[torch.Tensor]) -> Tensors:
    """Products of CLIP's modules, in its order, by OpenCLIP's tensors."""
    block = f"{prefix}transformer.resblocks.{at}"
    names = (f"{block}.attn.out_proj.weight", f"{block}.mlp.c_fc.weight", f"{block}.mlp.c_proj.weight")
    return {f"{block}.attn.in_proj_weight": torch.cat(products[:3]), **dict(zip(names, products[3:], strict=True))}


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_sdxl_single_file_with_both_text_encoders(tmp_path: Path, style: str) -> None:
    """te1 changes embedders.0, te2 embedders.1 with its fused in_proj_weight; sizes are alike, so only names decide."""
    first, second = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
    base = {f"{first}text_model.encoder.layers.1.{name}.weight": some(*shape) for name, shape in CLIP.items()}
    base |= open_clip(second)
    base["model.diffusion_model.middle_block.1.proj_in.weight"] = some(8, 8)
    layer = "text_model.encoder.layers.1."
    if style == "kohya":
        modules = {f"lora_te{n}_{layer}{name}".replace(".", "_"): size for n in "12" for name, size in CLIP.items()}
        modules["lora_unet_mid_block_attentions_0_proj_in"] = (8, 8)
        roles = ("{}.lora_down.weight", "{}.lora_up.weight")
    else:
        modules = {f"text_encoder{n}.{layer}{name}": size for n in ("", "_2") for name, size in CLIP.items()}
        modules["unet.mid_block.attentions.0.proj_in"] = (8, 8)
        roles = ("{}.lora_A.weight", "{}.lora_B.weight")
    tensors, products = lora(modules, roles)
    values = list(products.values())
    added = dict(zip(list(base)[:6], values[:6], strict=True)) | into_open_clip(second, 1, values[6:12])
    added["model.diffusion_model.middle_block.1.proj_in.weight"] = values[12]
    same(fold(model(tmp_path / "sdxl", base), tensors), base, added)


@pytest.mark.parametrize("prefix", ["cond_stage_model.model.", "conditioner.embedders.0.model."])
def test_sd2_and_the_refiner_have_open_clip_alone(tmp_path: Path, prefix: str) -> None:
    base = open_clip(prefix)
    te = "lora_te" if prefix.startswith("cond_") else "lora_te2"
    modules = {f"{te}_text_model_encoder_layers_0_{name}".replace(".", "_"): size for name, size in CLIP.items()}
    tensors, products = lora(modules, ("{}.lora_down.weight", "{}.lora_up.weight"))
    same(fold(model(tmp_path / "sd2", base), tensors), base, into_open_clip(prefix, 0, list(products.values())))


@pytest.mark.parametrize(("folder", "chosen"), [("text_encoder", "1"), ("text_encoder_2", "2")])
@pytest.mark.parametrize("sizes", [(8, 8), (8, 6)])
def test_a_folder_of_one_text_encoder_takes_its_own(
    tmp_path: Path, folder: str, chosen: str, sizes: tuple[int, int]
) -> None:
    """The sizes of the factors decide between te1 and te2; where both fit, the folder's name."""
    width = sizes[int(chosen) - 1]
    base = {"text_model.encoder.layers.0.self_attn.q_proj.weight": some(width, width)}
    modules = {
        f"lora_te{n}_text_model_encoder_layers_0_self_attn_q_proj": (size, size)
        for n, size in zip("12", sizes, strict=True)
    }
    tensors, products = lora(modules, ("{}.lora_down.weight", "{}.lora_up.weight"))
    found = fold(model(tmp_path / folder, base, {"architectures": ["CLIPTextModel"]}), tensors)
    same(found, base, {next(iter(base)): products[f"lora_te{chosen}_text_model_encoder_layers_0_self_attn_q_proj"]})


# Flux


H, MLP = 8, 32
DOUBLE = {  # diffusers' module -> (original, first row) and its size
    "norm1.linear": ("img_mod.lin", 0, 6 * H, H),
    "norm1_context.linear": ("txt_mod.lin", 0, 6 * H, H),
    "attn.to_q": ("img_attn.qkv", 0, H, H),
    "attn.to_k": ("img_attn.qkv", H, H, H),
    "attn.to_v": ("img_attn.qkv", 2 * H, H, H),
    "attn.add_q_proj": ("txt_attn.qkv", 0, H, H),
    "attn.add_k_proj": ("txt_attn.qkv", H, H, H),
    "attn.add_v_proj": ("txt_attn.qkv", 2 * H, H, H),
    "attn.to_out.0": ("img_attn.proj", 0, H, H),
    "attn.to_add_out": ("txt_attn.proj", 0, H, H),
    "ff.net.0.proj": ("img_mlp.0", 0, MLP, H),
    "ff.net.2": ("img_mlp.2", 0, H, MLP),
    "ff_context.net.0.proj": ("txt_mlp.0", 0, MLP, H),
    "ff_context.net.2": ("txt_mlp.2", 0, H, MLP),
}
SINGLE = {
    "norm.linear": ("modulation.lin", 0, 3 * H, H),
    "attn.to_q": ("linear1", 0, H, H),
    "attn.to_k": ("linear1", H, H, H),
    "attn.to_v": ("linear1", 2 * H, H, H),
    "proj_mlp": ("linear1", 3 * H, MLP, H),
    "proj_out": ("linear2", 0, H, H + MLP),
}
PARTS = {f"transformer_blocks.1.{name}": (f"double_blocks.1.{part[0]}", *part[1:]) for name, part in DOUBLE.items()}
PARTS |= {f"single_transformer_blocks.0.{n}": (f"single_blocks.0.{part[0]}", *part[1:]) for n, part in SINGLE.items()}
PARTS |= {
    "x_embedder": ("img_in", 0, H, 4),
    "context_embedder": ("txt_in", 0, H, 6),
    "proj_out": ("final_layer.linear", 0, 4, H),
}
PARTS |= {"time_text_embed.guidance_embedder.linear_2": ("guidance_in.out_layer", 0, H, H)}
SWAPPED = ("norm_out.linear", "final_layer.adaLN_modulation.1")  # the halves are swapped


def to_original(values: Tensors) -> Tensors:
    """Matrices by diffusers' modules -> by the original's; missing parts are zero."""
    fused: Tensors = {}
    for name, (module, start, rows, columns) in PARTS.items():
        if name in values:
            total = max(part[1] + part[2] for part in PARTS.values() if part[0] == module)
            fused.setdefault(module, torch.zeros(total, columns))[start : start + rows] = values[name]
    if SWAPPED[0] in values:
        fused[SWAPPED[1]] = torch.cat(values[SWAPPED[0]].chunk(2)[::-1])
    return fused


def to_diffusers(values: Tensors) -> Tensors:
    """Matrices by the original's modules -> by diffusers'."""
    split = {name: values[part[0]][part[1] : part[1] + part[2]] for name, part in PARTS.items() if part[0] in values}
    return split | ({SWAPPED[0]: torch.cat(values[SWAPPED[1]].chunk(2)[::-1])} if SWAPPED[1] in values else {})


DIFFUSERS = {name: part[2:] for name, part in PARTS.items()} | {SWAPPED[0]: (2 * H, H)}
ORIGINAL = {
    name: tuple(value.shape) for name, value in to_original({n: torch.zeros(s) for n, s in DIFFUSERS.items()}).items()
}
PEFT, KOHYA = ("{}.lora_A.weight", "{}.lora_B.weight"), ("{}.lora_down.weight", "{}.lora_up.weight")
DIALECTS = {  # adapters' module names, roles, whether they are diffusers'
    "diffusers, ai-toolkit": (lambda name: f"transformer.{name}", PEFT, True),
    "kohya": (lambda name: f"lora_unet_{name}".replace(".", "_"), KOHYA, False),
    "OneTrainer": (lambda name: f"lora_transformer_{name}".replace(".", "_"), KOHYA, True),
    "kohya, diffusers' blocks": (lambda name: f"lora_unet_{name}".replace(".", "_"), KOHYA, True),
    "ComfyUI": (lambda name: f"diffusion_model.{name}", PEFT, False),
    "Black Forest Labs": (lambda name: name, PEFT, False),
    "PEFT": (lambda name: f"base_model.model.{name}", PEFT, True),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("base", ["diffusers", "original", "single file"])
def test_flux(tmp_path: Path, dialect: str, base: str) -> None:
    """Each dialect's modules, on diffusers' folder, the original file, and one with model.diffusion_model before it."""
    naming, roles, is_diffusers = DIALECTS[dialect]
    sizes = DIFFUSERS if is_diffusers else ORIGINAL
    tensors, products = lora({naming(name): size for name, size in sizes.items()}, roles)
    added = {name: products[naming(name)] for name in sizes}
    stored = DIFFUSERS if base == "diffusers" else ORIGINAL
    if is_diffusers != (base == "diffusers"):
        added = to_original(added) if is_diffusers else to_diffusers(added)
    prefix = "model.diffusion_model." if base == "single file" else ""
    weights = {f"{prefix}{name}.weight": some(*size) for name, size in stored.items()}
    config = {"_class_name": "FluxTransformer2DModel"} if base == "diffusers" else None
    found = fold(model(tmp_path / "flux", weights, config), tensors)
    same(found, weights, {f"{prefix}{name}.weight": value for name, value in added.items()})


@pytest.mark.parametrize("base", ["diffusers", "original"])
def test_flux_in_the_names_of_x_flux(tmp_path: Path, base: str) -> None:
    """qkv_lora1 is the image's, qkv_lora2 the text's; in single blocks qkv_lora changes the first rows of linear1."""
    modules = {
        "double_blocks.1.processor.qkv_lora1": (3 * H, H),
        "double_blocks.1.processor.qkv_lora2": (3 * H, H),
        "double_blocks.1.processor.proj_lora1": (H, H),
        "double_blocks.1.processor.proj_lora2": (H, H),
        "single_blocks.0.processor.qkv_lora": (3 * H, H),
        "single_blocks.0.processor.proj_lora": (H, H + MLP),
    }
    tensors, products = lora(modules, ("{}.down.weight", "{}.up.weight"))
    names = ("img_attn.qkv", "txt_attn.qkv", "img_attn.proj", "txt_attn.proj", "linear1", "linear2")
    blocks = [f"{'double_blocks.1' if '_' in name else 'single_blocks.0'}.{name}" for name in names]
    added = dict(zip(blocks, products.values(), strict=True))
    added["single_blocks.0.linear1"] = torch.cat([added["single_blocks.0.linear1"], torch.zeros(MLP, H)])
    stored = DIFFUSERS if base == "diffusers" else ORIGINAL
    weights = {f"{name}.weight": some(*size) for name, size in stored.items()}
    found = fold(model(tmp_path / "flux", weights, {} if base == "diffusers" else None), tensors)
    added = to_diffusers(added) if base == "diffusers" else added
    same(found, weights, {f"{name}.weight": value for name, value in added.items()})


@pytest.mark.parametrize("role", ["lokr_w1", "dora_scale", "diff"])
def test_other_methods_on_a_part_of_a_fused_weight_are_refused(tmp_path: Path, role: str) -> None:
    """The error names the fused weight; it does not say that the adapter is for another model."""
    name = "transformer.transformer_blocks.1.attn.to_q"
    tensors, _ = lora({name: (H, H)}, PEFT)
    extra = {"lokr_w1": some(2, 2), "dora_scale": some(H, 1), "diff": some(H, H)}[role]
    tensors = {f"{name}.{role}": extra} | (tensors if role == "dora_scale" else {})
    tensors |= {f"{name}.lokr_w2": some(4, 4)} if role == "lokr_w1" else {}
    base = model(tmp_path / "flux", {f"{name}.weight": some(*size) for name, size in ORIGINAL.items()})
    with pytest.raises(SourceError, match=r"fused tensor") as error:
        fold(base, tensors)
    assert "another model" not in f"{error.value} {error.value.hint}"


def test_unknown_names_are_not_called_another_models(tmp_path: Path) -> None:
    base = model(tmp_path / "sd", {"model.diffusion_model.input_blocks.4.1.proj_in.weight": some(8, 8)})
    tensors, _ = lora({"lora_unet_odd_blocks_0": (8, 8)}, KOHYA)
    with pytest.raises(SourceError, match="has none of its modules") as error:
        fold(base, tensors)
    assert "it is for another model" not in str(error.value.hint)
