"""Well-known base models: sizes, license, and the memory that training each of them takes.

Sizes, licenses and numbers of parameters were written down from memory in 2026-11, and not checked against the models'
pages. A test checks only that they agree with each other: that the sizes give the number of parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from mergeforge.train.estimate import estimate_memory
from mergeforge.train.gpus import GPU, GPUS
from mergeforge.train.model_stats import LinearModule, ModelStats
from mergeforge.train.settings import LoraOptions
from mergeforge.train.training_setup import TrainingSetup

DATE = "2026-11"
SOURCE = f"written down from memory in {DATE}, not checked against the models' pages or NVIDIA's datasheets"
METHODS = ("qlora", "lora", "full")
SEQ_LEN, RANK = 1024, 16  # of the estimates
Sizes = tuple[int, int, int, int, int, int]  # hidden, intermediate, layers, heads, kv_heads, vocabulary


@dataclass(frozen=True)
class KnownModel:
    """A dense model with gated MLPs. `head_dim` 0: hidden / heads; `norms`: vectors of the hidden size in a layer.

    `qk_norm`: elements of the norms of queries and keys in a layer; `qkv_bias`: whether the three projections have one.
    """

    repo: str
    license: str
    parameters: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_dim: int = 0
    tied: bool = False
    norms: int = 2
    qk_norm: int = 0
    qkv_bias: bool = False

    def stats(self) -> ModelStats:
        """The sizes as `model_stats` counts them on the model itself."""
        query = self.heads * (self.head_dim or self.hidden // self.heads)
        key = self.kv_heads * (self.head_dim or self.hidden // self.heads)
        sizes = {
            "self_attn.q_proj": (self.hidden, query),
            "self_attn.k_proj": (self.hidden, key),
            "self_attn.v_proj": (self.hidden, key),
            "self_attn.o_proj": (query, self.hidden),
            "mlp.gate_proj": (self.hidden, self.intermediate),
            "mlp.up_proj": (self.hidden, self.intermediate),
            "mlp.down_proj": (self.intermediate, self.hidden),
        }
        linears = [
            LinearModule(f"model.layers.{layer}.{name}", inputs, outputs)
            for layer in range(self.layers)
            for name, (inputs, outputs) in sizes.items()
        ]
        biases = query + 2 * key if self.qkv_bias else 0
        vectors = self.layers * (self.norms * self.hidden + self.qk_norm + biases) + self.hidden
        embedding = self.vocabulary * self.hidden
        return ModelStats(
            linears=tuple(linears),
            embedding=embedding,
            head=0 if self.tied else embedding,
            other_parameters=vectors,
            vocabulary=self.vocabulary,
            hidden=self.hidden,
            intermediate=self.intermediate,
            layers=self.layers,
            max_positions=1 << 20,
        )

    def memory(self, method: str) -> int:
        """Bytes on a GPU for one sequence of SEQ_LEN tokens at a time, with recomputed activations."""
        setup = TrainingSetup(
            method=method,
            lora=LoraOptions(r=RANK),
            seq_len=SEQ_LEN,
            micro_batch=1,
            optimizer="adamw",
            dtype_bytes=2,
            ce_chunk=256,
            checkpointing=True,
        )
        return estimate_memory(self.stats(), setup).total

    def smallest_gpu(self, method: str) -> GPU | None:
        """The GPU of the table with the least memory that is enough; of several such, the fastest."""
        large = [gpu for gpu in GPUS if gpu.usable >= self.memory(method)]
        return min(large, key=lambda gpu: (gpu.memory, -gpu.tflops), default=None)


def _llama(
    repo: str, license: str, parameters: int, *sizes: *Sizes, head_dim: int = 0, tied: bool = False
) -> KnownModel:
    return KnownModel(repo, license, parameters, *sizes, head_dim=head_dim, tied=tied)


def _qwen2(repo: str, license: str, parameters: int, *sizes: *Sizes, tied: bool = False) -> KnownModel:
    return KnownModel(repo, license, parameters, *sizes, tied=tied, qkv_bias=True)


def _qwen3(repo: str, parameters: int, *sizes: *Sizes, tied: bool = False) -> KnownModel:
    return KnownModel(repo, "apache-2.0", parameters, *sizes, head_dim=128, tied=tied, qk_norm=256)


def _gemma(repo: str, parameters: int, *sizes: *Sizes, head_dim: int = 256, qk_norm: int = 0) -> KnownModel:
    return KnownModel(repo, "gemma", parameters, *sizes, head_dim=head_dim, tied=True, norms=4, qk_norm=qk_norm)


def _olmo2(repo: str, parameters: int, *sizes: *Sizes, qk_norm: int) -> KnownModel:
    return KnownModel(repo, "apache-2.0", parameters, *sizes, qk_norm=qk_norm)


KNOWN_MODELS = (
    _llama("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0", 134515008, 576, 1536, 30, 9, 3, 49152, tied=True),
    _llama("HuggingFaceTB/SmolLM2-360M-Instruct", "apache-2.0", 361821120, 960, 2560, 32, 15, 5, 49152, tied=True),
    _qwen2("Qwen/Qwen2.5-0.5B-Instruct", "apache-2.0", 494032768, 896, 4864, 24, 14, 2, 151936, tied=True),
    _qwen3("Qwen/Qwen3-0.6B", 596049920, 1024, 3072, 28, 16, 8, 151936, tied=True),
    _gemma("google/gemma-3-1b-it", 999885952, 1152, 6912, 26, 4, 1, 262144, qk_norm=512),
    _llama("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "apache-2.0", 1100048384, 2048, 5632, 22, 32, 4, 32000),
    _llama("meta-llama/Llama-3.2-1B-Instruct", "llama3.2", 1235814400, 2048, 8192, 16, 32, 8, 128256, tied=True),
    _olmo2("allenai/OLMo-2-0425-1B-Instruct", 1484916736, 2048, 8192, 16, 16, 16, 100352, qk_norm=4096),
    _qwen2("Qwen/Qwen2.5-1.5B-Instruct", "apache-2.0", 1543714304, 1536, 8960, 28, 12, 2, 151936, tied=True),
    _llama("HuggingFaceTB/SmolLM2-1.7B-Instruct", "apache-2.0", 1711376384, 2048, 8192, 24, 32, 32, 49152, tied=True),
    _qwen3("Qwen/Qwen3-1.7B", 1720574976, 2048, 6144, 28, 16, 8, 151936, tied=True),
    _llama("ibm-granite/granite-3.1-2b-instruct", "apache-2.0", 2533531648, 2048, 8192, 40, 32, 8, 49155, tied=True),
    _gemma("google/gemma-2-2b-it", 2614341888, 2304, 9216, 26, 8, 4, 256000),
    _llama("HuggingFaceTB/SmolLM3-3B", "apache-2.0", 3075098624, 2048, 11008, 36, 16, 4, 128256, tied=True),
    _qwen2("Qwen/Qwen2.5-3B-Instruct", "qwen-research", 3085938688, 2048, 11008, 36, 16, 2, 151936, tied=True),
    _llama(
        *("meta-llama/Llama-3.2-3B-Instruct", "llama3.2", 3212749824, 3072, 8192, 28, 24, 8, 128256),
        head_dim=128,
        tied=True,
    ),
    _llama("microsoft/Phi-3.5-mini-instruct", "mit", 3821079552, 3072, 8192, 32, 32, 32, 32064),
    _qwen3("Qwen/Qwen3-4B", 4022468096, 2560, 9728, 36, 32, 8, 151936, tied=True),
    _llama("meta-llama/Llama-2-7b-chat-hf", "llama2", 6738415616, 4096, 11008, 32, 32, 32, 32000),
    _llama("mistralai/Mistral-7B-Instruct-v0.3", "apache-2.0", 7248023552, 4096, 14336, 32, 32, 8, 32768),
    _olmo2("allenai/OLMo-2-1124-7B-Instruct", 7298617344, 4096, 11008, 32, 32, 32, 100352, qk_norm=8192),
    _qwen2("Qwen/Qwen2.5-7B-Instruct", "apache-2.0", 7615616512, 3584, 18944, 28, 28, 4, 152064),
    _llama("meta-llama/Llama-3.1-8B-Instruct", "llama3.1", 8030261248, 4096, 14336, 32, 32, 8, 128256),
    _llama("ibm-granite/granite-3.1-8b-instruct", "apache-2.0", 8170848256, 4096, 12800, 40, 32, 8, 49155, tied=True),
    _qwen3("Qwen/Qwen3-8B", 8190735360, 4096, 12288, 36, 32, 8, 151936),
    _gemma("google/gemma-2-9b-it", 9241705984, 3584, 14336, 42, 16, 8, 256000),
    _llama(
        *("mistralai/Mistral-Nemo-Instruct-2407", "apache-2.0", 12247782400, 5120, 14336, 40, 32, 8, 131072),
        head_dim=128,
    ),
    _llama("microsoft/phi-4", "mit", 14659507200, 5120, 17920, 40, 40, 10, 100352),
    _qwen3("Qwen/Qwen3-14B", 14768307200, 5120, 17408, 40, 40, 8, 151936),
    _qwen2("Qwen/Qwen2.5-14B-Instruct", "apache-2.0", 14770033664, 5120, 13824, 48, 40, 8, 152064),
    _llama(
        *("mistralai/Mistral-Small-24B-Instruct-2501", "apache-2.0", 23572403200, 5120, 32768, 40, 32, 8, 131072),
        head_dim=128,
    ),
    _gemma("google/gemma-2-27b-it", 27227128320, 4608, 36864, 46, 32, 16, 256000, head_dim=128),
    _qwen3("Qwen/Qwen3-32B", 32762123264, 5120, 25600, 64, 64, 8, 151936),
    _qwen2("Qwen/Qwen2.5-32B-Instruct", "apache-2.0", 32763876352, 5120, 27648, 64, 40, 8, 152064),
    _llama("meta-llama/Llama-3.1-70B-Instruct", "llama3.1", 70553706496, 8192, 28672, 80, 64, 8, 128256),
    _qwen2("Qwen/Qwen2.5-72B-Instruct", "qwen", 72706203648, 8192, 29568, 80, 64, 8, 152064),
)
