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
qwen2_vl_text vocab_size=152064 hidden_size=8192 num_hidden_layers=80 num_attention_heads=64 num_key_value_heads=8
  intermediate_size=29568 max_position_embeddings=32768 rms_norm_eps=1e-05 rope_theta=1000000.0
qwen2_5_vl_text vocab_size=152064 hidden_size=8192 num_hidden_layers=80 num_attention_heads=64 num_key_value_heads=8
  intermediate_size=29568 max_position_embeddings=32768 rms_norm_eps=1e-05 rope_theta=1000000.0
qwen3_vl_text vocab_size=151936 hidden_size=4096 num_hidden_layers=32 num_attention_heads=32 num_key_value_heads=32
  head_dim=128 intermediate_size=22016 max_position_embeddings=128000 rms_norm_eps=1e-06 rope_theta=500000.0
qwen3_vl_moe_text vocab_size=151936 hidden_size=2048 num_hidden_layers=24 num_attention_heads=16
  num_key_value_heads=16 head_dim=128 intermediate_size=5632 max_position_embeddings=128000 rms_norm_eps=1e-06
  tie_word_embeddings=true num_local_experts=60 num_experts_per_tok=4 moe_intermediate_size=1408 rope_theta=500000.0
qwen3_5_text vocab_size=248320 hidden_size=4096 num_hidden_layers=32 num_attention_heads=16 num_key_value_heads=4
  head_dim=256 intermediate_size=12288 max_position_embeddings=32768 rms_norm_eps=1e-06 tie_word_embeddings=false
  linear_conv_kernel_dim=4 linear_key_head_dim=128 linear_value_head_dim=128 linear_num_key_heads=16
  linear_num_value_heads=32 rope_theta=10000.0 partial_rotary_factor=0.25
qwen3_5_moe_text vocab_size=248320 hidden_size=2048 num_hidden_layers=40 num_attention_heads=16 num_key_value_heads=2
  head_dim=256 max_position_embeddings=32768 rms_norm_eps=1e-06 tie_word_embeddings=false num_experts=256
  num_experts_per_tok=8 moe_intermediate_size=512 shared_expert_intermediate_size=512 linear_conv_kernel_dim=4
  linear_key_head_dim=128 linear_value_head_dim=128 linear_num_key_heads=16 linear_num_value_heads=32
  rope_theta=10000.0 partial_rotary_factor=0.25
nemotron vocab_size=256000 hidden_size=6144 num_hidden_layers=32 num_attention_heads=48 num_key_value_heads=null
  head_dim=128 intermediate_size=24576 max_position_embeddings=4096 norm_eps=1e-05 tie_word_embeddings=false
  rope_theta=10000.0 partial_rotary_factor=0.5
glm vocab_size=151552 hidden_size=4096 num_hidden_layers=40 num_attention_heads=32 num_key_value_heads=2 head_dim=128
  intermediate_size=13696 max_position_embeddings=131072 rms_norm_eps=1.5625e-07 tie_word_embeddings=false
  pad_token_id=151329 rope_theta=10000.0 partial_rotary_factor=0.5
glm4 vocab_size=151552 hidden_size=4096 num_hidden_layers=40 num_attention_heads=32 num_key_value_heads=2 head_dim=128
  intermediate_size=13696 max_position_embeddings=131072 rms_norm_eps=1.5625e-07 tie_word_embeddings=false
  pad_token_id=151329 rope_theta=10000.0 partial_rotary_factor=0.5
glm4_moe vocab_size=151552 hidden_size=4096 num_hidden_layers=46 num_attention_heads=96 num_key_value_heads=8
  intermediate_size=10944 max_position_embeddings=131072 rms_norm_eps=1e-05 tie_word_embeddings=false
  n_routed_experts=128 num_experts_per_tok=8 moe_intermediate_size=1408 n_shared_experts=1 norm_topk_prob=true
  routed_scaling_factor=1.0 n_group=1 topk_group=1 first_k_dense_replace=1 rope_theta=10000.0
  partial_rotary_factor=0.5 num_nextn_predict_layers=1
glm4v_text vocab_size=151552 hidden_size=4096 num_hidden_layers=40 num_attention_heads=32 num_key_value_heads=2
  intermediate_size=13696 max_position_embeddings=32768 rms_norm_eps=1e-05 rope_theta=10000.0
glm4v_moe_text vocab_size=151424 hidden_size=4096 num_hidden_layers=46 num_attention_heads=96 num_key_value_heads=8
  intermediate_size=10944 max_position_embeddings=65536 rms_norm_eps=1e-05 tie_word_embeddings=false
  n_routed_experts=128 num_experts_per_tok=8 moe_intermediate_size=1408 n_shared_experts=1 norm_topk_prob=true
  routed_scaling_factor=1.0 n_group=1 topk_group=1 first_k_dense_replace=1 rope_theta=10000.0
  partial_rotary_factor=0.5
ernie4_5 vocab_size=103424 hidden_size=1024 num_hidden_layers=18 num_attention_heads=16 num_key_value_heads=2
  head_dim=128 intermediate_size=3072 max_position_embeddings=131072 rms_norm_eps=1e-05 tie_word_embeddings=true
  pad_token_id=0 rope_theta=500000.0
ernie4_5_moe vocab_size=103424 hidden_size=2560 num_hidden_layers=28 num_attention_heads=20 num_key_value_heads=4
  intermediate_size=12288 max_position_embeddings=131072 rms_norm_eps=1e-05 tie_word_embeddings=true
  moe_intermediate_size=1536 pad_token_id=0 moe_num_experts=64 moe_k=6 moe_layer_interval=1 moe_layer_start_index=1
  moe_num_shared_experts=2 moe_layer_end_index=27 rope_theta=500000.0
hunyuan_v1_dense vocab_size=290943 hidden_size=4096 num_hidden_layers=32 num_attention_heads=32 num_key_value_heads=32
  head_dim=null intermediate_size=11008 max_position_embeddings=2048 rms_norm_eps=1e-05 tie_word_embeddings=false
  pad_token_id=0 rope_theta=10000.0
minimax_m2 vocab_size=200064 hidden_size=3072 num_hidden_layers=62 num_attention_heads=48 num_key_value_heads=8
  head_dim=128 intermediate_size=1536 max_position_embeddings=196608 rms_norm_eps=1e-06 tie_word_embeddings=false
  num_local_experts=256 num_experts_per_tok=8 rope_theta=5000000.0
dots1 vocab_size=152064 hidden_size=4608 num_hidden_layers=62 num_attention_heads=32 num_key_value_heads=32
  intermediate_size=10944 max_position_embeddings=2048 rms_norm_eps=1e-06 tie_word_embeddings=false
  sliding_window=4096 moe_intermediate_size=1408 norm_topk_prob=false routed_scaling_factor=1.0 n_group=1 topk_group=1
  first_k_dense_replace=0 rope_theta=10000.0
afmoe vocab_size=200192 hidden_size=2048 num_hidden_layers=32 num_attention_heads=16 num_key_value_heads=16
  head_dim=128 intermediate_size=6144 max_position_embeddings=16384 rms_norm_eps=1e-05 tie_word_embeddings=false
  sliding_window=1024 num_experts=64 num_experts_per_tok=6 moe_intermediate_size=1408 num_shared_experts=2
  num_dense_layers=1 global_attn_every_n_layers=4 rope_theta=10000.0 route_scale=1.0
solar_open vocab_size=196608 hidden_size=4096 num_hidden_layers=48 num_attention_heads=64 num_key_value_heads=8
  head_dim=128 max_position_embeddings=131072 rms_norm_eps=1e-05 tie_word_embeddings=false n_routed_experts=128
  num_experts_per_tok=8 moe_intermediate_size=1280 n_shared_experts=1 norm_topk_prob=true routed_scaling_factor=1.0
  n_group=1 topk_group=1 rope_theta=1000000.0
mamba vocab_size=50280 hidden_size=768 num_hidden_layers=32 intermediate_size=1536 layer_norm_epsilon=1e-05
  tie_word_embeddings=true pad_token_id=0 conv_kernel=4 state_size=16 time_step_rank=48 expand=2
falcon_mamba vocab_size=50280 hidden_size=768 num_hidden_layers=32 intermediate_size=1536 layer_norm_epsilon=1e-05
  tie_word_embeddings=true pad_token_id=0 conv_kernel=4 state_size=16 time_step_rank=48 expand=2
jamba vocab_size=65536 hidden_size=4096 num_hidden_layers=32 num_attention_heads=32 num_key_value_heads=8
  intermediate_size=14336 max_position_embeddings=262144 rms_norm_eps=1e-06 tie_word_embeddings=false num_experts=16
  num_experts_per_tok=2 pad_token_id=0 mamba_d_conv=4 mamba_d_state=16 mamba_expand=2 mamba_dt_rank=256
  attn_layer_offset=4 attn_layer_period=8 expert_layer_offset=1 expert_layer_period=2
lfm2 vocab_size=65536 hidden_size=2560 num_hidden_layers=32 num_attention_heads=32 num_key_value_heads=8
  intermediate_size=12288 max_position_embeddings=128000 norm_eps=1e-05 tie_word_embeddings=true pad_token_id=0
  conv_L_cache=3 block_auto_adjust_ff_dim=true block_ffn_dim_multiplier=1.0 block_multiple_of=256 rope_theta=1000000.0
lfm2_moe vocab_size=65536 hidden_size=2048 num_hidden_layers=32 num_attention_heads=32 num_key_value_heads=8
  intermediate_size=7168 max_position_embeddings=128000 norm_eps=1e-05 tie_word_embeddings=true num_experts=32
  num_experts_per_tok=4 moe_intermediate_size=1792 norm_topk_prob=true routed_scaling_factor=1.0 num_dense_layers=2
  pad_token_id=0 conv_L_cache=3 rope_theta=1000000.0
camembert vocab_size=30522 hidden_size=768 num_hidden_layers=12 num_attention_heads=12 intermediate_size=3072
  max_position_embeddings=512 layer_norm_eps=1e-12 tie_word_embeddings=true type_vocab_size=2 pad_token_id=1
distilbert vocab_size=30522 dim=768 n_layers=6 n_heads=12 hidden_dim=3072 max_position_embeddings=512
  tie_word_embeddings=true pad_token_id=0
modernbert vocab_size=50368 hidden_size=768 num_hidden_layers=22 num_attention_heads=12 intermediate_size=1152
  max_position_embeddings=8192 norm_eps=1e-05 tie_word_embeddings=true pad_token_id=50283 local_attention=128
  hidden_activation="gelu" rope_theta=160000.0
eurobert vocab_size=128256 hidden_size=768 num_hidden_layers=12 num_attention_heads=12 num_key_value_heads=12
  head_dim=64 intermediate_size=3072 max_position_embeddings=8192 rms_norm_eps=1e-05 tie_word_embeddings=false
  pad_token_id=128001 rope_theta=10000.0
bloom vocab_size=250880 hidden_size=64 n_layer=2 n_head=8 layer_norm_epsilon=1e-05 tie_word_embeddings=true
mellum vocab_size=98304 hidden_size=2304 num_hidden_layers=28 num_attention_heads=32 num_key_value_heads=4 head_dim=128
  max_position_embeddings=131072 intermediate_size=7168 rms_norm_eps=1e-06 tie_word_embeddings=false
  sliding_window=1024 moe_intermediate_size=896 num_experts_per_tok=8 num_local_experts=64 rope_theta=500000.0
granite_swa vocab_size=100352 hidden_size=2560 num_hidden_layers=24 num_attention_heads=20 num_key_value_heads=4
  intermediate_size=8192 max_position_embeddings=8192 rms_norm_eps=1e-05 tie_word_embeddings=true sliding_window=128
  embedding_multiplier=1.0 logits_scaling=1.0 residual_multiplier=1.0 attention_multiplier=1.0 rope_theta=10000.0
granitemoe_swa vocab_size=32000 hidden_size=4096 num_hidden_layers=32 num_attention_heads=32 num_key_value_heads=null
  intermediate_size=11008 max_position_embeddings=2048 rms_norm_eps=1e-06 tie_word_embeddings=false sliding_window=128
  num_local_experts=8 num_experts_per_tok=2 shared_intermediate_size=0 embedding_multiplier=1.0 logits_scaling=1.0
  residual_multiplier=1.0 attention_multiplier=1.0 rope_theta=10000.0
chameleon vocab_size=65536 hidden_size=4096 num_hidden_layers=32 num_attention_heads=32 num_key_value_heads=32
  intermediate_size=11008 max_position_embeddings=4096 rms_norm_eps=1e-05 tie_word_embeddings=false swin_norm=false
  rope_theta=10000.0
t5 vocab_size=32128 d_model=512 d_kv=64 d_ff=2048 num_layers=6 num_decoder_layers=null num_heads=8
  relative_attention_num_buckets=32 layer_norm_epsilon=1e-06 tie_word_embeddings=true
mt5 vocab_size=250112 d_model=512 d_kv=64 d_ff=1024 num_layers=8 num_decoder_layers=null num_heads=6
  relative_attention_num_buckets=32 layer_norm_epsilon=1e-06 tie_word_embeddings=true decoder_start_token_id=0
umt5 vocab_size=250112 d_model=512 d_kv=64 d_ff=1024 num_layers=8 num_decoder_layers=null num_heads=6
  relative_attention_num_buckets=32 layer_norm_epsilon=1e-06 tie_word_embeddings=true decoder_start_token_id=0
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
