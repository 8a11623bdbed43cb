"""Values that transformers uses for keys missing from config.json, by model type.

Only keys that a GGUF file or a tensor's target depends on. The values are the defaults of the config classes of
transformers 5 (tests/gguf/architectures/test_architectures.py compares them), written down here because the output must
not depend on the installed transformers. `null` for key-value heads means as many as query heads; for head_dim see
hf_config.py.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

_TABLE = """
llama vocab_size=32000 hidden_size=4096 num_hidden_layers=32 num_attention_heads=32 num_key_value_heads=null
  head_dim=null intermediate_size=11008 max_position_embeddings=2048 rms_norm_eps=1e-06 tie_word_embeddings=false
  rope_theta=10000.0
mistral vocab_size=32000 hidden_size=4096 num_hidden_layers=32 num_attention_heads=32 num_key_value_heads=8
  head_dim=null intermediate_size=14336 max_position_embeddings=131072 rms_norm_eps=1e-06 tie_word_embeddings=false
  rope_theta=10000.0
mixtral vocab_size=32000 hidden_size=4096 num_hidden_layers=32 num_attention_heads=32 num_key_value_heads=8
  head_dim=null intermediate_size=14336 max_position_embeddings=131072 rms_norm_eps=1e-05 tie_word_embeddings=false
  num_local_experts=8 num_experts_per_tok=2 rope_theta=1000000.0
ministral3 vocab_size=131072 hidden_size=4096 num_hidden_layers=34 num_attention_heads=32 num_key_value_heads=8
  head_dim=128 intermediate_size=14336 max_position_embeddings=262144 rms_norm_eps=1e-05 tie_word_embeddings=false
  rope_theta=1000000.0
qwen2 vocab_size=151936 hidden_size=4096 num_hidden_layers=32 num_attention_heads=32 num_key_value_heads=32
  intermediate_size=22016 max_position_embeddings=32768 rms_norm_eps=1e-06 tie_word_embeddings=false
  rope_theta=10000.0
qwen2_moe vocab_size=151936 hidden_size=2048 num_hidden_layers=24 num_attention_heads=16 num_key_value_heads=16
  intermediate_size=5632 max_position_embeddings=32768 rms_norm_eps=1e-06 tie_word_embeddings=false num_experts=60
  num_experts_per_tok=4 moe_intermediate_size=1408 shared_expert_intermediate_size=5632 norm_topk_prob=false
  rope_theta=10000.0
qwen3 vocab_size=151936 hidden_size=4096 num_hidden_layers=32 num_attention_heads=32 num_key_value_heads=32
  head_dim=128 intermediate_size=22016 max_position_embeddings=32768 rms_norm_eps=1e-06 tie_word_embeddings=false
  rope_theta=10000.0
qwen3_moe vocab_size=151936 hidden_size=2048 num_hidden_layers=24 num_attention_heads=32 num_key_value_heads=4
  intermediate_size=6144 max_position_embeddings=32768 rms_norm_eps=1e-06 tie_word_embeddings=false
  num_local_experts=128 num_experts_per_tok=8 moe_intermediate_size=768 norm_topk_prob=false rope_theta=10000.0
qwen3_next vocab_size=151936 hidden_size=2048 num_hidden_layers=48 num_attention_heads=16 num_key_value_heads=2
  head_dim=256 intermediate_size=5632 max_position_embeddings=32768 rms_norm_eps=1e-06 tie_word_embeddings=false
  num_experts=512 num_experts_per_tok=10 moe_intermediate_size=512 shared_expert_intermediate_size=512
  norm_topk_prob=true linear_conv_kernel_dim=4 linear_key_head_dim=128 linear_value_head_dim=128
  linear_num_key_heads=16 linear_num_value_heads=32 rope_theta=10000.0 partial_rotary_factor=0.25
gemma vocab_size=256000 hidden_size=3072 num_hidden_layers=28 num_attention_heads=16 num_key_value_heads=16
  head_dim=256 intermediate_size=24576 max_position_embeddings=8192 rms_norm_eps=1e-06 tie_word_embeddings=true
  rope_theta=10000.0
gemma2 vocab_size=256000 hidden_size=2304 num_hidden_layers=26 num_attention_heads=8 num_key_value_heads=4
  head_dim=256 intermediate_size=9216 max_position_embeddings=8192 rms_norm_eps=1e-06 tie_word_embeddings=true
  sliding_window=4096 attn_logit_softcapping=50.0 final_logit_softcapping=30.0 query_pre_attn_scalar=256
  rope_theta=10000.0
gemma3_text vocab_size=262208 hidden_size=2304 num_hidden_layers=26 num_attention_heads=8 num_key_value_heads=4
  head_dim=256 intermediate_size=9216 max_position_embeddings=131072 rms_norm_eps=1e-06 tie_word_embeddings=true
  sliding_window=4096 attn_logit_softcapping=null final_logit_softcapping=null query_pre_attn_scalar=256
  rope_theta=1000000.0
phi3 vocab_size=32064 hidden_size=3072 num_hidden_layers=32 num_attention_heads=32 num_key_value_heads=null
  intermediate_size=8192 max_position_embeddings=4096 original_max_position_embeddings=4096 rms_norm_eps=1e-05
  tie_word_embeddings=false sliding_window=null rope_theta=10000.0 partial_rotary_factor=1.0
phi vocab_size=51200 hidden_size=2048 num_hidden_layers=24 num_attention_heads=32 num_key_value_heads=null
  intermediate_size=8192 max_position_embeddings=2048 layer_norm_eps=1e-05 tie_word_embeddings=false
  rope_theta=10000.0 partial_rotary_factor=0.5
phimoe vocab_size=32064 hidden_size=4096 num_hidden_layers=32 num_attention_heads=32 num_key_value_heads=8
  intermediate_size=6400 max_position_embeddings=131072 rms_norm_eps=1e-05 tie_word_embeddings=false
  sliding_window=null num_local_experts=16 num_experts_per_tok=2 rope_theta=1000000.0
gpt2 vocab_size=50257 n_embd=768 n_layer=12 n_head=12 n_inner=null n_positions=1024 layer_norm_epsilon=1e-05
  tie_word_embeddings=true
gpt_neox vocab_size=50432 hidden_size=6144 num_hidden_layers=44 num_attention_heads=64 intermediate_size=24576
  max_position_embeddings=2048 layer_norm_eps=1e-05 tie_word_embeddings=false use_parallel_residual=true
  rope_theta=10000.0 partial_rotary_factor=0.25
starcoder2 vocab_size=49152 hidden_size=3072 num_hidden_layers=30 num_attention_heads=24 num_key_value_heads=2
  intermediate_size=12288 max_position_embeddings=4096 norm_epsilon=1e-05 tie_word_embeddings=true
  rope_theta=10000.0
stablelm vocab_size=50304 hidden_size=2560 num_hidden_layers=32 num_attention_heads=32 num_key_value_heads=32
  intermediate_size=6912 max_position_embeddings=4096 layer_norm_eps=1e-05 tie_word_embeddings=false
  use_parallel_residual=false rope_theta=10000.0 partial_rotary_factor=0.25
olmo vocab_size=50304 hidden_size=4096 num_hidden_layers=32 num_attention_heads=32 num_key_value_heads=null
  intermediate_size=11008 max_position_embeddings=2048 tie_word_embeddings=false rope_theta=10000.0
olmo2 vocab_size=50304 hidden_size=4096 num_hidden_layers=32 num_attention_heads=32 num_key_value_heads=null
  intermediate_size=11008 max_position_embeddings=2048 rms_norm_eps=1e-05 tie_word_embeddings=false
  rope_theta=10000.0
olmo3 vocab_size=50304 hidden_size=4096 num_hidden_layers=32 num_attention_heads=32 num_key_value_heads=null
  intermediate_size=11008 max_position_embeddings=2048 rms_norm_eps=1e-05 tie_word_embeddings=false
  sliding_window=4096 rope_theta=500000.0
olmoe vocab_size=50304 hidden_size=2048 num_hidden_layers=16 num_attention_heads=16 num_key_value_heads=null
  intermediate_size=2048 max_position_embeddings=4096 rms_norm_eps=1e-05 tie_word_embeddings=false num_experts=64
  num_experts_per_tok=8 norm_topk_prob=false rope_theta=10000.0
deepseek_v2 vocab_size=102400 hidden_size=4096 num_hidden_layers=32 num_attention_heads=32 num_key_value_heads=null
  head_dim=null intermediate_size=11008 max_position_embeddings=2048 rms_norm_eps=1e-06 tie_word_embeddings=false
  n_routed_experts=64 num_experts_per_tok=null n_group=null topk_group=null moe_intermediate_size=1407
  n_shared_experts=2 first_k_dense_replace=0 kv_lora_rank=512 q_lora_rank=1536 qk_rope_head_dim=64
  qk_nope_head_dim=128 v_head_dim=128 routed_scaling_factor=1.0 norm_topk_prob=false rope_theta=10000.0
deepseek_v3 vocab_size=129280 hidden_size=7168 num_hidden_layers=61 num_attention_heads=128 num_key_value_heads=128
  head_dim=64 intermediate_size=18432 max_position_embeddings=4096 rms_norm_eps=1e-06 tie_word_embeddings=false
  n_routed_experts=256 num_experts_per_tok=8 n_group=8 topk_group=4 moe_intermediate_size=2048 n_shared_experts=1
  first_k_dense_replace=3 kv_lora_rank=512 q_lora_rank=1536 qk_rope_head_dim=64 qk_nope_head_dim=128 v_head_dim=128
  routed_scaling_factor=2.5 norm_topk_prob=true rope_theta=10000.0
gpt_oss vocab_size=201088 hidden_size=2880 num_hidden_layers=36 num_attention_heads=64 num_key_value_heads=8
  head_dim=64 intermediate_size=2880 max_position_embeddings=131072 rms_norm_eps=1e-05 tie_word_embeddings=false
  sliding_window=128 num_local_experts=128 num_experts_per_tok=4 rope_theta=150000.0
smollm3 vocab_size=128256 hidden_size=2048 num_hidden_layers=36 num_attention_heads=16 num_key_value_heads=4
  intermediate_size=11008 max_position_embeddings=32768 rms_norm_eps=1e-06 tie_word_embeddings=true
  rope_theta=2000000.0
granite vocab_size=32000 hidden_size=4096 num_hidden_layers=32 num_attention_heads=32 num_key_value_heads=null
  intermediate_size=11008 max_position_embeddings=2048 rms_norm_eps=1e-06 tie_word_embeddings=false
  embedding_multiplier=1.0 logits_scaling=1.0 residual_multiplier=1.0 attention_multiplier=1.0 rope_theta=10000.0
granitemoe vocab_size=32000 hidden_size=4096 num_hidden_layers=32 num_attention_heads=32 num_key_value_heads=null
  intermediate_size=11008 max_position_embeddings=2048 rms_norm_eps=1e-06 tie_word_embeddings=false
  num_local_experts=8 num_experts_per_tok=2 embedding_multiplier=1.0 logits_scaling=1.0 residual_multiplier=1.0
  attention_multiplier=1.0 rope_theta=10000.0
granitemoeshared vocab_size=32000 hidden_size=4096 num_hidden_layers=32 num_attention_heads=32
  num_key_value_heads=null intermediate_size=11008 max_position_embeddings=2048 rms_norm_eps=1e-06
  tie_word_embeddings=false num_local_experts=8 num_experts_per_tok=2 shared_intermediate_size=0
  embedding_multiplier=1.0 logits_scaling=1.0 residual_multiplier=1.0 attention_multiplier=1.0 rope_theta=10000.0
falcon vocab_size=65024 hidden_size=4544 num_hidden_layers=32 num_attention_heads=71 num_kv_heads=null
  max_position_embeddings=2048 layer_norm_epsilon=1e-05 tie_word_embeddings=true new_decoder_architecture=false
  multi_query=true alibi=false bias=false rope_theta=10000.0
cohere vocab_size=256000 hidden_size=8192 num_hidden_layers=40 num_attention_heads=64 num_key_value_heads=null
  intermediate_size=22528 max_position_embeddings=8192 layer_norm_eps=1e-05 tie_word_embeddings=true
  logit_scale=0.0625 rope_theta=500000.0
cohere2 vocab_size=256000 hidden_size=8192 num_hidden_layers=40 num_attention_heads=64 num_key_value_heads=null
  head_dim=128 intermediate_size=22528 max_position_embeddings=8192 layer_norm_eps=1e-05 tie_word_embeddings=true
  sliding_window=4096 logit_scale=0.0625 rope_theta=10000.0
llama4_text vocab_size=202048 hidden_size=5120 num_hidden_layers=48 num_attention_heads=40 num_key_value_heads=8
  head_dim=128 intermediate_size=8192 intermediate_size_mlp=16384 max_position_embeddings=131072 rms_norm_eps=1e-05
  tie_word_embeddings=false num_local_experts=16 num_experts_per_tok=1 interleave_moe_layer_step=1
  rope_theta=500000.0
exaone4 vocab_size=102400 hidden_size=4096 num_hidden_layers=32 num_attention_heads=32 num_key_value_heads=32
  intermediate_size=16384 max_position_embeddings=2048 rms_norm_eps=1e-05 tie_word_embeddings=false
  sliding_window=4096 rope_theta=10000.0
bert vocab_size=30522 hidden_size=768 num_hidden_layers=12 num_attention_heads=12 intermediate_size=3072
  max_position_embeddings=512 layer_norm_eps=1e-12 tie_word_embeddings=true type_vocab_size=2
roberta vocab_size=50265 hidden_size=768 num_hidden_layers=12 num_attention_heads=12 intermediate_size=3072
  max_position_embeddings=512 layer_norm_eps=1e-12 tie_word_embeddings=true type_vocab_size=2 pad_token_id=1
xlm-roberta vocab_size=30522 hidden_size=768 num_hidden_layers=12 num_attention_heads=12 intermediate_size=3072
  max_position_embeddings=512 layer_norm_eps=1e-12 tie_word_embeddings=true type_vocab_size=2 pad_token_id=1
arcee vocab_size=32000 hidden_size=2560 num_hidden_layers=32 num_attention_heads=32 num_key_value_heads=null
  head_dim=null intermediate_size=18432 max_position_embeddings=4096 rms_norm_eps=1e-05 tie_word_embeddings=false
  rope_theta=10000.0
seed_oss vocab_size=155136 hidden_size=4096 num_hidden_layers=64 num_attention_heads=80 num_key_value_heads=8
  head_dim=128 intermediate_size=27648 max_position_embeddings=524288 rms_norm_eps=1e-06 tie_word_embeddings=false
  rope_theta=10000.0
"""


@cache
def hf_defaults() -> dict[str, dict[str, Any]]:
    """Model type -> key -> default."""
    table: dict[str, dict[str, Any]] = {}
    row: dict[str, Any] = {}
    for word in _TABLE.split():
        key, equals, value = word.partition("=")
        if equals:
            row[key] = json.loads(value)
        else:
            row = table[word] = {}
    return table
