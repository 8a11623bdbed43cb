"""Every PEFT method other than LoRA: mergeforge's merge, PEFT's merge, and the unmerged model's logits.

The adapters are made by PEFT on a tiny Llama or Qwen2 (biases), with random values in all trainable tensors.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergeforge
from mergeforge.adapters.peft.kind import PEFT_METHODS
from mergeforge.adapters.peft.unsupported import UNSUPPORTED
from mergeforge.errors import SourceError

if TYPE_CHECKING:
    from support.peft_lab import Lab

ALL = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adalora": ("AdaLoraConfig", {"init_r": 6, "target_r": 3, "total_step": 10, "lora_alpha": 7}),
    "loha": ("LoHaConfig", {"r": 4, "alpha": 9}),
    "loha patterns": (
        "LoHaConfig",
        {"r": 4, "alpha": 9, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ),
    "lokr": ("LoKrConfig", {"r": 4, "alpha": 9}),
    "lokr both": ("LoKrConfig", {"r": 2, "alpha": 9, "decompose_both": True}),
    "lokr whole": ("LoKrConfig", {"r": 64, "alpha": 9}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "oft": ("OFTConfig", {"oft_block_size": 8}),
    "oft exact": ("OFTConfig", {"oft_block_size": 4, "use_cayley_neumann": False}),
    "oft terms": ("OFTConfig", {"oft_block_size": 4, "num_cayley_neumann_terms": 3}),
    "oft shared": ("OFTConfig", {"oft_block_size": 8, "block_share": True}),
    "oft bounded": ("OFTConfig", {"oft_block_size": 8, "coft": True, "eps": 1e-2}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "vera": ("VeraConfig", {"r": 5}),
    "vera drawn again": ("VeraConfig", {"r": 5, "save_projection": False, "projection_prng_key": 11}),
    "pvera": ("PveraConfig", {"r": 5}),
    "vblora": ("VBLoRAConfig", {"r": 4, "num_vectors": 9, "vector_length": 16, "topk": 2}),
    "vblora top k": (
        "VBLoRAConfig",
        {"r": 4, "num_vectors": 9, "vector_length": 16, "topk": 3, "save_only_topk_weights": True},
    ),
    "fourierft": ("FourierFTConfig", {"n_frequency": 40, "scaling": 30.0, "random_loc_seed": 5}),
    "hra": ("HRAConfig", {"r": 4}),
    "hra orthogonal": ("HRAConfig", {"r": 4, "apply_GS": True}),
    "miss": ("MissConfig", {"r": 8}),
    "miss uneven": ("MissConfig", {"r": 5}),
    "miss bat": ("MissConfig", {"r": 8, "init_weights": "bat", "target_modules": ["q_proj", "o_proj"]}),
    "miss mini": ("MissConfig", {"r": 8, "init_weights": "mini", "mini_r": 4}),
    "shira": ("ShiraConfig", {"r": 2}),
    "c3a": ("C3AConfig", {"block_size": 8}),
    "delora": ("DeloraConfig", {"r": 4, "delora_lambda": 6}),
    "randlora": ("RandLoraConfig", {"r": 4, "randlora_alpha": 50}),
    "road 1": ("RoadConfig", {"group_size": 16}),
    "road 2": ("RoadConfig", {"variant": "road_2", "group_size": 8}),
    "road 4": ("RoadConfig", {"variant": "road_4", "group_size": 16}),
    "gralora": ("GraloraConfig", {"r": 8, "alpha": 5, "gralora_k": 2}),
    "gralora hybrid": ("GraloraConfig", {"r": 8, "alpha": 5, "gralora_k": 4, "hybrid_r": 4}),
    "hira": ("HiraConfig", {"r": 4}),
    "glora": ("GloraConfig", {"r": 4}),
    "glora vectors": ("GloraConfig", {"r": 4, "config_A_B": "vector"}),
    "glora numbers": ("GloraConfig", {"r": 4, "config_A_B": "constant"}),
    "supertuning": ("SupertuningConfig", {"sparsity": 0.9}),
    "supertuning with lora": ("SupertuningConfig", {"sparsity": 0.9, "r": 3, "lora_alpha": 5}),
    "deft": ("DeftConfig", {"r": 4}),
    "deft orthogonal": ("DeftConfig", {"r": 4, "decomposition_method": "qr", "alpha": 6}),
    "deft without injection": ("DeftConfig", {"r": 4, "decomposition_method": "qr", "para": True}),
    "peanut": ("PeanutConfig", {"r": 4, "scaling": 0.7}),
    "peanut deep": ("PeanutConfig", {"r": 4, "depth": 2, "act_fn": "gelu"}),
    "osf": ("OSFConfig", {"effective_rank": 10}),
    "osf fractions": ("OSFConfig", {"effective_rank": 0.25, "rank_pattern": {"up_proj": 30, "down_proj": 2}}),
    "osf that leaves k_proj": ("OSFConfig", {"effective_rank": 20, "target_modules": ["q_proj", "k_proj"]}),
    "waveft": ("WaveFTConfig", {"n_frequency": 40}),
    "waveft db2": ("WaveFTConfig", {"n_frequency": 60, "wavelet_family": "db2", "scaling": 3.0}),
    "waveft sym5": ("WaveFTConfig", {"n_frequency": 90, "wavelet_family": "sym5", "random_loc_seed": 5}),
    "waveft coif3": ("WaveFTConfig", {"n_frequency": 90, "wavelet_family": "coif3"}),
    "waveft entries": ("WaveFTConfig", {"n_frequency": 50, "use_idwt": False}),
    "waveft proportional": ("WaveFTConfig", {"n_frequency": 50, "proportional_parameters": True}),
    "unilora": ("UniLoraConfig", {"r": 4, "theta_d_length": 50, "save_indices": True}),
    "unilora without its indices": ("UniLoraConfig", {"r": 4, "theta_d_length": 50}),
    "unilora in one layer": (
        "UniLoraConfig",
        {
            "r": 3,
            "theta_d_length": 300,
            "proj_seed": 7,
            "target_modules": ["k_proj", "mlp.up_proj", "lm_head"],
            "layers_to_transform": [1],
            "modules_to_save": ["lm_head"],
        },
    ),
    "unilora everywhere": ("UniLoraConfig", {"target_modules": "all-linear", "r": 2, "theta_d_length": 999}),
    "frod": ("FrodConfig", {"sparse_rate": 0.1}),
    "frod without the sparse part": ("FrodConfig", {"sparse_rate": 0.0}),
    "psoft": ("PsoftConfig", {"r": 6, "psoft_alpha": 6}),
    "psoft as pissa": ("PsoftConfig", {"r": 6, "psoft_alpha": 12, "ab_svd_init": "pissa_init", "psoft_mag_a": False}),
    "psoft lowrank": ("PsoftConfig", {"r": 6, "psoft_svd": "lowrank", "random_seed": 4, "psoft_svd_lowrank_niter": 5}),
    "psoft series": (
        "PsoftConfig",
        {"r": 6, "use_cayley_neumann": True, "num_cayley_neumann_terms": 6, "cayley_neumann_eps": 0.5},
    ),
    "psoft two terms": ("PsoftConfig", {"r": 6, "use_cayley_neumann": True, "num_cayley_neumann_terms": 2}),
    "psoft not orthogonal": ("PsoftConfig", {"r": 6, "psoft_orth": False}),
    "tinylora": ("TinyLoraConfig", {"r": 3, "u": 5}),
    "tinylora tied": ("TinyLoraConfig", {"r": 3, "u": 5, "weight_tying": 1.0}),
    "tinylora in groups": ("TinyLoraConfig", {"r": 3, "u": 5, "weight_tying": 0.6, "save_projection": False}),
    "adamss": ("AdamssConfig", {"r": 10, "num_subspaces": 3, "subspace_rank": 2}),
    "adamss with ranks of its own": (
        "AdamssConfig",
        {"r": 6, "num_subspaces": 2, "subspace_rank": 4, "use_dynamic_rank": True, "random_seed": 5},
    ),
    "ln tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm", "post_attention_layernorm", "model.norm"]}),
    "trainable tokens": ("TrainableTokensConfig", {"token_indices": [3, 7, 41], "target_modules": ["embed_tokens"]}),
    "loha and saved head": ("LoHaConfig", {"r": 4, "alpha": 9, "modules_to_save": ["lm_head"]}),
}
BIASES = {
    "ia3 on biases": ("IA3Config", {"feedforward_modules": []}),
    "road on biases": ("RoadConfig", {"group_size": 8}),
    "glora on biases": ("GloraConfig", {"r": 4, "config_C": "none", "config_D_E": "vector"}),
    "glora, biases by numbers": ("GloraConfig", {"r": 4, "config_C": "none", "config_A_B": "none"}),
    "glora, biases from the weight": ("GloraConfig", {"r": 4, "config_C": "lora"}),
    "glora, biases from the weight by a vector": ("GloraConfig", {"config_C": "vector", "config_D_E": "vector"}),
    "glora, only biases from the weight": (
        "GloraConfig",
        {"config_A_B": "none", "config_C": "vector", "config_D_E": "none"},
    ),
    "adamss with biases": ("AdamssConfig", {"r": 10, "num_subspaces": 3, "subspace_rank": 2}),
    "beft": ("BeftConfig", {"target_modules": ["q_proj", "v_proj"]}),
    "gralora beside biases": ("GraloraConfig", {"r": 8, "alpha": 5, "gralora_k": 2}),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """PEFT's SVDs in float32 depend on the number of threads: with two, PSOFT's low-rank one moves weights by 4e-6."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(lab: Lab, kind: str, name: str, config: dict[str, Any], **options: Any) -> float:
    """Compare with PEFT's merge and the unmerged model's logits; returns the largest relative error."""
    base = lab.base(kind)
    adapter = lab.tune(base, name, {"target_modules": ALL} | config)
    out = mergeforge.merge(base_model=str(base), adapters=[str(adapter.folder)], out=lab.out(), **options)
    ours, theirs = load_file(out / "model.safetensors"), adapter.merged_by_peft()
    worst = 0.0
    for key, value in ours.items():
        other = theirs[key if key in theirs else f"model.{key}"]
        worst = max(worst, float((value - other).abs().max() / other.abs().max()))
    # PEFT's SVD in float32 has errors of 1e-5 where singular values are close; ours is in float64
    assert worst <= (2e-5 if name == "OSFConfig" else 1e-6), worst
    with lab.quiet():
        apart = (lab.logits(lab.load(out)) - lab.logits(adapter.model)).abs().max()
    assert float(apart) <= 2e-5 * float(lab.logits(adapter.model).abs().max())
    changed = [key for key, value in load_file(base / "model.safetensors").items() if not torch.equal(value, ours[key])]
    assert changed
    return worst


@pytest.mark.parametrize("case", CASES)
def test_weights_equal_pefts_merge_and_logits_the_unmerged_models(lab: Lab, case: str) -> None:
    check(lab, "llama", *CASES[case])


@pytest.mark.parametrize("case", BIASES)
def test_methods_on_biases(lab: Lab, case: str) -> None:
    check(lab, "qwen2", *BIASES[case])


@pytest.mark.parametrize(
    "case", ["loha", "road 1", "oft", "gralora hybrid", "miss bat", "c3a", "lokr", "fourierft", "deft", "osf", "peanut"]
)
def test_result_does_not_depend_on_the_blocks(lab: Lab, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 3 rows give the same result as whole tensors."""
    from mergeforge.core import tensor_info

    name, config = CASES[case]
    monkeypatch.setattr(tensor_info, "BLOCK_ELEMENTS", 100)
    check(lab, "llama", name, config, threads=1)


def test_osf_against_a_decomposition_in_float64(lab: Lab) -> None:
    """W with its smallest triplets replaced, for weights of both orientations."""
    base = lab.base("llama")
    adapter = lab.tune(base, "OSFConfig", {"target_modules": ALL, "effective_rank": 10})
    out = mergeforge.merge(base_model=str(base), adapters=[str(adapter.folder)], out=lab.out())
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    for name in (f"model.layers.1.{module}" for module in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")):
        u, s, v = torch.linalg.svd(before[f"{name}.weight"].double(), full_matrices=False)
        key = f"base_model.model.{name}.osf_svd_params"
        low = [adapter.tensors[f"{key}.{part}"].double() for part in ("U_low", "S_low", "V_low")]
        expected = u[:, :10] * s[:10] @ v[:10] + low[0] * low[1] @ low[2]
        torch.testing.assert_close(after[f"{name}.weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_every_method_is_tested() -> None:
    tested = {name.replace("Config", "").upper() for name, _ in (*CASES.values(), *BIASES.values())}
    assert {name.replace("_", "") for name in PEFT_METHODS} - {"BONE"} <= tested


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported_methods_are_refused(lab: Lab, kind: str) -> None:
    base = lab.base("llama")
    adapter = lab.edited(lab.train(base), config={"peft_type": kind})
    with pytest.raises(SourceError, match=f"{kind} adapters cannot be merged: "):
        mergeforge.plan({"base_model": str(base), "adapters": [str(adapter)]}, out=lab.out())


def test_unknown_config_field_is_refused(lab: Lab) -> None:
    base = lab.base("llama")
    adapter = lab.edited(lab.tune(base, "LoHaConfig", {"target_modules": ALL, "r": 4}), config={"new_field": 3})
    with pytest.raises(SourceError, match="sets new_field = 3, and this version does not know that field"):
        mergeforge.plan({"base_model": str(base), "adapters": [str(adapter)]}, out=lab.out())


def test_factors_of_another_model_are_refused(lab: Lab, tmp_path: Path) -> None:
    base = lab.base("llama")
    adapter = lab.tune(base, "HiraConfig", {"target_modules": ALL, "r": 4})

    def cut(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: (value[:-1] if "hira_B" in name else value).contiguous() for name, value in tensors.items()}

    with pytest.raises(SourceError, match=r"hira_B is .*, but its weight .* needs"):
        mergeforge.plan({"base_model": str(base), "adapters": [str(lab.edited(adapter, tensors=cut))]}, out=lab.out())


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("FrodConfig", {"save_projection": False}, "does not contain the projections"),
    ],
)
def test_files_that_do_not_say_what_they_change_are_refused(
    lab: Lab, name: str, config: dict[str, Any], message: str
) -> None:
    base = lab.base("llama")
    adapter = lab.tune(base, name, {"target_modules": ALL} | config)
    with pytest.raises(SourceError, match=message):
        mergeforge.plan({"base_model": str(base), "adapters": [str(adapter.folder)]}, out=lab.out())


def test_psoft_warns_about_singular_vectors(lab: Lab) -> None:
    base = lab.base("llama")
    adapter = lab.tune(base, "PsoftConfig", {"target_modules": ALL, "r": 6})
    plan = mergeforge.plan({"base_model": str(base), "adapters": [str(adapter.folder)]}, out=lab.out())
    assert sum("singular vectors that it rotates" in text for text in plan.warnings) == 1


def test_an_adapter_without_trained_parts_is_a_warning(lab: Lab) -> None:
    """OSF whose effective_rank keeps all singular directions of every weight."""
    base = lab.base("llama")
    adapter = lab.tune(base, "OSFConfig", {"target_modules": ALL, "effective_rank": 99})
    plan = mergeforge.plan({"base_model": str(base), "adapters": [str(adapter.folder)]}, out=lab.out())
    assert any("changes nothing: none of its modules has a trained part" in text for text in plan.warnings)


@pytest.mark.parametrize(
    ("module", "other", "message"),
    [
        ("up_proj", {"random_seed": 1}, r"up_proj: the random singular directions .* cannot be drawn again"),
        ("down_proj", {}, r"down_proj: the clusters of the weight's rows do not have the sizes"),
    ],
)
def test_adamss_whose_clusters_cannot_be_found_is_refused(
    lab: Lab, module: str, other: dict[str, Any], message: str
) -> None:
    """Other random numbers, as a GPU draws them; another base with an adapter made for the first one."""
    base = lab.base("llama")
    adapter = lab.tune(base, "AdamssConfig", {"target_modules": [module], "r": 8, "num_subspaces": 3})
    edited = lab.edited(adapter, config=other)
    into = base if other else lab.base("llama-tied")
    if not other:
        weights = load_file(into / "model.safetensors")
        changed = {name: value.flip(0).contiguous() * torch.rand(value.shape) for name, value in weights.items()}
        into = lab.out()
        shutil.copytree(lab.base("llama-tied"), into)
        save_file(changed, into / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=message):
        mergeforge.merge(base_model=str(into), adapters=[str(edited)], out=lab.out())


def test_unilora_with_and_without_saved_indices(lab: Lab) -> None:
    """The same bytes for a bfloat16 base, in whose dtype PEFT holds the scales."""
    base = lab.base("llama", "bfloat16")
    outs = []
    for saved in (True, False):
        config = {"target_modules": ALL, "r": 4, "theta_d_length": 50, "save_indices": saved}
        adapter = lab.tune(base, "UniLoraConfig", config)
        recipe = {"base_model": str(base), "adapters": [str(adapter.folder)], "dtype": "float32"}
        outs.append(load_file(mergeforge.merge(recipe, out=lab.out()) / "model.safetensors"))
    assert all(value.equal(outs[1][name]) for name, value in outs[0].items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["q_proj", "input_layernorm"]}, "is a LlamaRMSNorm, not a linear layer"),
        ({"target_modules": ["nowhere"]}, "its target_modules match no module of LlamaForCausalLM"),
        ({"theta_d_length": 51}, "unilora_theta_d has 50 values, but its config sets theta_d_length otherwise"),
    ],
)
def test_unilora_whose_config_does_not_fit_is_refused(lab: Lab, config: dict[str, Any], message: str) -> None:
    base = lab.base("llama")
    adapter = lab.tune(base, "UniLoraConfig", {"target_modules": ALL, "r": 4, "theta_d_length": 50})
    recipe = {"base_model": str(base), "adapters": [str(lab.edited(adapter, config=config))]}
    with pytest.raises(SourceError, match=message):
        mergeforge.plan(recipe, out=lab.out())
