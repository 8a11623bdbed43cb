"""Models as llama-quantize's type rules see them: hyperparameters, tensor names and shapes."""

from __future__ import annotations

from dataclasses import dataclass, field

from mergeforge.gguf.file_types import ModelHparams, Shape

ODD = {
    "per_layer_token_embd.weight": (4, 256),
    "position_embd.weight": (4, 256),
    "rope_freqs.weight": (128,),
    "blk.0.altup_proj.weight": (4, 256),
    "blk.0.attn_q_norm.weight": (2, 256),
    "blk.0.attn_k_b.weight": (4, 256),
    "blk.0.attn_rel_b.weight": (4, 256),
    "blk.0.cross_attn_v.weight": (4, 256),
    "blk.0.ffn_down.bias": (4, 256),
    "blk.0.ffn_gate_inp_shexp.weight": (1, 256),
    "blk.0.ffn_gate_inp.weight": (4, 256),
    "blk.0.indexer.k_proj.weight": (4, 256),
    "blk.0.indexer.proj.weight": (4, 256),
    "blk.0.ssm_conv1d.weight": (256, 4),
    "blk.0.ssm_in.weight": (4, 256),
    "blk.0.ssm_out.weight": (4, 33),
    "blk.0.time_mix_w1.weight": (4, 256),
    "blk.10.attn_v.weight": (4, 256),
    "blk.1.laurel_l.weight": (4, 256),
}


@dataclass(frozen=True)
class RuleModel:
    """`attention` names the matrices of a layer. With `experts`, layers from number `dense` on have experts."""

    hparams: ModelHparams
    columns: int = 256
    tied: bool = False
    attention: tuple[str, ...] = ("q", "k", "v", "output")
    experts: bool = False
    shared: bool = False
    dense: int = 0
    extra: dict[str, Shape] = field(default_factory=dict)

    def tensors(self) -> dict[str, Shape]:
        tensors: dict[str, Shape] = {"token_embd.weight": (4, self.columns), "output_norm.weight": (self.columns,)}
        if not self.tied:
            tensors["output.weight"] = (4, self.columns)
        for layer in range(self.hparams.block_count):
            tensors |= {f"blk.{layer}.{name}": shape for name, shape in self._layer(layer).items()}
        return tensors | self.extra

    def _layer(self, layer: int) -> dict[str, Shape]:
        matrix = (2, self.columns)
        names: dict[str, Shape] = {"attn_norm.weight": (self.columns,)}
        names |= {f"attn_{part}.weight": matrix for part in self.attention}
        ffn = ("ffn_gate", "ffn_up", "ffn_down")
        if not self.experts or layer < self.dense:
            return names | {f"{name}.weight": matrix for name in ffn}
        names |= {f"{name}_exps.weight": (2, *matrix) for name in ffn} | {"ffn_gate_inp.weight": matrix}
        return names | ({f"{name}_shexp.weight": matrix for name in ffn} if self.shared else {})


MLA = ("q_a", "q_b", "kv_a_mqa", "kv_b", "output")
MODELS = {
    "llama-32": RuleModel(ModelHparams("llama", 32, 0, 32, 8)),
    "llama-tied-17": RuleModel(ModelHparams("llama", 17, 0, 32, 32), tied=True),
    "llama-80": RuleModel(ModelHparams("llama", 80, 0, 64, 8)),
    "llama-80-mha": RuleModel(ModelHparams("llama", 80, 0, 64, 64)),
    "qwen2-80": RuleModel(ModelHparams("qwen2", 80, 0, 64, 64)),
    "mixtral-12": RuleModel(ModelHparams("llama", 12, 8, 32, 8), experts=True),
    "qwen3moe-12": RuleModel(ModelHparams("qwen3moe", 12, 128, 32, 4), experts=True, tied=True),
    "deepseek2-27": RuleModel(
        ModelHparams("deepseek2", 27, 64, 16, 16), attention=MLA, experts=True, shared=True, dense=1
    ),
    "falcon-32": RuleModel(ModelHparams("falcon", 32, 0, 71, 1), attention=("qkv", "output")),
    "phi3-16": RuleModel(ModelHparams("phi3", 16, 0, 32, 32), attention=("qkv", "output")),
    "odd-columns-9": RuleModel(ModelHparams("llama", 9, 0, 4, 2), columns=288),
    "odder-columns-9": RuleModel(ModelHparams("llama", 9, 0, 4, 2), columns=40, tied=True),
    "odd-names-11": RuleModel(ModelHparams("llama", 11, 0, 8, 2), extra=ODD),
}
