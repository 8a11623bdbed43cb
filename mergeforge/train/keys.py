"""The keys of train.yaml and the values that each takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergeforge.checkpoints.rope import ROPE_TYPES
from mergeforge.data import FIELDS as DATA_FIELDS
from mergeforge.recipe.schema import (
    Boolean,
    Enum,
    Integer,
    ListOf,
    MapOf,
    Number,
    Object,
    Pattern,
    ReportProblem,
    Schema,
    Size,
    String,
)
from mergeforge.recipe.yaml_reader import Path
from mergeforge.train.adapter_kinds import ADAPTER_KINDS
from mergeforge.train.low_rank import LOW_RANK_OPTIMIZERS, OptimizerOptions
from mergeforge.train.objectives import OBJECTIVES

AUTO = "auto"
DYNAMIC = "dynamic"  # NTK-aware scaling, which transformers computes anew for each batch
OPTIMIZERS = (
    "adamw",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "lion_8bit",
    "paged_lion_8bit",
    "adafactor",
    "sgd",
    *LOW_RANK_OPTIMIZERS,
)
INITS = ("default", "gaussian", "pissa", "olora", "orthogonal", "eva", "loftq")
SEEDS = 1 << 32
NUMERICS = ("auto", "original", "dequant_nf4")


@dataclass(frozen=True)
class Auto:
    """`auto` (resolved from the model and the machine; read as None), or a value of another schema."""

    item: Schema

    def read(self, value: Any, path: Path, report: ReportProblem) -> Any:
        return None if value == AUTO else self.item.read(value, path, report)

    def json_schema(self) -> dict[str, Any]:
        item = self.item.json_schema()
        description = {"description": item.pop("description")} if "description" in item else {}
        return {"anyOf": [{"const": AUTO}, item]} | description


@dataclass(frozen=True)
class FractionOrSteps:
    """An interval: a fraction of an epoch or of the run below 1, or a whole number of steps."""

    description: str = ""

    def read(self, value: Any, path: Path, report: ReportProblem) -> Any:
        is_number = not isinstance(value, bool) and isinstance(value, int | float)
        if not is_number or not 0 <= value < math.inf or (value >= 1 and value != int(value)):
            report(path, f"'{path[-1]}' must be a fraction below 1 or a whole number of steps, not {value!r}", "")
            return None
        return value

    def json_schema(self) -> dict[str, Any]:
        return {"type": "number", "minimum": 0, "description": self.description}


@dataclass(frozen=True)
class OneOf:
    """One of two schemas: lists and mappings are read by `nested`, everything else by `plain`."""

    plain: Schema
    nested: Schema

    def read(self, value: Any, path: Path, report: ReportProblem) -> Any:
        return (self.nested if isinstance(value, list | Mapping) else self.plain).read(value, path, report)

    def json_schema(self) -> dict[str, Any]:
        return {"anyOf": [self.plain.json_schema(), self.nested.json_schema()]}


_LORA = Object(
    {
        "r": Auto(Integer(1, "rank (default 16)")),
        "alpha": Number(0, None, "the delta is B A alpha / r (default 2 r)"),
        "dropout": Number(0, 1, "dropout on the adapter's input (default 0)"),
        "targets": OneOf(Pattern("all-linear, or a regular expression"), ListOf(String("a module name"))),
        "lr_ratio": Number(0, None, "LoRA+: learning rate of B divided by that of A, usually 2 to 16 (default 1)"),
        "rslora": Boolean("scale by alpha / sqrt(r) instead of alpha / r"),
        "dora": Boolean("DoRA: train a magnitude for each output as well"),
        "init": Enum(INITS, "how A and B are initialized; eva: from the training data; loftq: from what 4 bit loses"),
        "rank_pattern": MapOf(Integer(1), "module name or regular expression -> rank"),
        "alpha_pattern": MapOf(Number(0, None), "module name or regular expression -> alpha"),
        "layers": ListOf(Integer(0), "adapt only these layers"),
        "modules_to_save": ListOf(String(), "modules trained in full and saved with the adapter"),
    }
)


@dataclass(frozen=True)
class Scalar:
    """A number, a text, or true or false."""

    def read(self, value: Any, path: Path, report: ReportProblem) -> Any:
        if not isinstance(value, bool | int | float | str):
            report(path, f"'{path[-1]}' must be a number, a text, true or false, not {value!r}", "")
        return value

    def json_schema(self) -> dict[str, Any]:
        return {"type": ["number", "string", "boolean"]}


@dataclass(frozen=True)
class Seed:
    """A seed that numpy takes, too: below 2^32."""

    description: str = ""

    def read(self, value: Any, path: Path, report: ReportProblem) -> Any:
        seed = Integer(0).read(value, path, report)
        if seed is not None and seed >= SEEDS:
            report(path, f"'{path[-1]}' must be below {SEEDS}, not {value}", "")
        return seed

    def json_schema(self) -> dict[str, Any]:
        return Integer(0, self.description).json_schema() | {"maximum": SEEDS - 1}


_ADAPTER = Object(
    {
        "type": Enum(tuple(ADAPTER_KINDS), "kind of adapter, under PEFT's name"),
        "targets": OneOf(Pattern("all-linear, or a regular expression"), ListOf(String("a module name"))),
        "layers": ListOf(Integer(0), "adapt only these layers"),
        "options": MapOf(Scalar(), "fields of PEFT's settings for this kind, such as r"),
    },
    required=("type",),
    shorthand="type",
)


@dataclass(frozen=True)
class RopeScalingKeys:
    """Schema of `rope_scaling`, which transformers writes with `rope_type`."""

    description: str = ""

    def read(self, value: Any, path: Path, report: ReportProblem) -> Any:
        if isinstance(value, Mapping) and "rope_type" in value and "type" not in value:
            value = {"type" if key == "rope_type" else key: item for key, item in value.items()}
        scaling = _ROPE_SCALING.read(value, path, report)
        if scaling.get("type") == DYNAMIC:
            text = (
                "dynamic scales by the longest row of a batch, so the loss of a row would depend on the rows beside it"
            )
            report(path, text, f"use {' or '.join(ROPE_TYPES)}")
        return scaling

    def json_schema(self) -> dict[str, Any]:
        return _ROPE_SCALING.json_schema() | {"description": self.description}


_ROPE_SCALING = Object(
    {
        "type": Enum((*ROPE_TYPES, DYNAMIC), "how positions are scaled, under transformers' name"),
        "factor": Auto(Number(1, None, "how many times as many positions (default: seq_len divided by the base's)")),
    },
    required=("type",),
    shorthand="type",
)
_PREFERENCE = Object(
    {
        "beta": Number(0, None, "how closely to stay with the reference (default 0.1; simpo: scale of the reward, 2)"),
        "gamma": Number(0, None, "simpo: the margin to reach (default 1)"),
        "desirable_weight": Number(0, None, "kto: weight of good answers (default 1)"),
        "undesirable_weight": Number(0, None, "kto: weight of bad answers (default 1)"),
    }
)
_TOKENS = Object(
    {
        "add": ListOf(String("a special token"), "tokens added to the vocabulary; only their rows are trained"),
    }
)
_BATCH = Object(
    {
        "size": Integer(1, "rows of data in one optimizer step, over all devices (default 16)"),
        "micro": Auto(Integer(1, "sequences in one forward pass")),
    }
)
_MEMORY = Object(
    {
        "budget": Auto(Size("device memory to use (default: what is free)")),
        "ce_chunk": Auto(Integer(0, "rows of logits held at once; 0: all")),
        "checkpointing": Auto(Boolean("recompute activations in the backward pass")),
        "offload_activations": Auto(Boolean("keep checkpointed activations in host memory")),
        "embed_on_cpu": Auto(Boolean("keep the frozen input embedding in host memory")),
    }
)
_EVAL = Object(
    {
        "every": FractionOrSteps("validate this often: a fraction of an epoch, or steps; 0: at the end (default 0.5)"),
        "samples": OneOf(String("a file with one prompt per line"), ListOf(String("a prompt"))),
        "max_tokens": Integer(1, "length of a sample (default 128)"),
        "stop": ListOf(String(), "strings that end a sample", allow_scalar=True),
    }
)
_SAVE = Object(
    {
        "every": FractionOrSteps(
            "write a checkpoint this often: a fraction of an epoch, or steps; 0: at the end (default 0.5)"
        ),
        "keep": Integer(1, "number of checkpoints to keep (default 2)"),
        "best": Boolean("end with the checkpoint of the lowest validation loss (default: if there is validation data)"),
    }
)
_MERGE = Object(
    {
        "path": String("output folder (default: merged/ in the run's folder)"),
        "base_numerics": Enum(
            NUMERICS, "which form of the base the adapter is folded into; auto: the one that validates better"
        ),
        "dtype": String("dtype of the merged model"),
        "evaluate": Boolean("measure the merged model's validation loss (default true)"),
    }
)
_AFTER = Object(
    {
        "merge": OneOf(Boolean("fold the adapter into its base"), _MERGE),
        "gguf": ListOf(String("q4_k_m, q8_0, ..."), "GGUF files to write in the same pass", allow_scalar=True),
        "publish": Object(
            {
                "repo": String("owner/name"),
                "private": Boolean("create a private repo (default true)"),
                "revision": String("branch"),
            },
            required=("repo",),
            shorthand="repo",
        ),
    }
)
FIELDS: dict[str, Schema] = {
    "model": String("a folder, a Hub repo id with optional @revision, or sample:tiny"),
    **DATA_FIELDS,
    "allow_skips": Boolean("train even if more than 10 % of the rows are skipped"),
    "seq_len": Auto(Integer(8, "tokens in the longest sequence")),
    "rope_scaling": RopeScalingKeys("more positions than the base was trained on; written into config.json"),
    "pack": Auto(Boolean("put several rows into one sequence; they do not attend to each other")),
    "method": Enum(("qlora", "lora", "dora", "full"), "what is trained (default qlora)"),
    "objective": Enum(tuple(OBJECTIVES), "sft: imitate the answers (default); the others learn from preferences"),
    "preference": _PREFERENCE,
    "lora": _LORA,
    "adapter": _ADAPTER,
    "tokens": _TOKENS,
    "batch": _BATCH,
    "lr": Auto(Number(0, None, "learning rate")),
    "schedule": Enum(
        ("cosine", "linear", "constant", "wsd"), "learning rate schedule (default cosine); wsd: warmup, stable, decay"
    ),
    "min_lr_ratio": Number(0, 1, "cosine and wsd: the last learning rate divided by the highest (default 0)"),
    "decay": FractionOrSteps("wsd: the part at the end with a falling rate: a fraction, or steps (default 0.2)"),
    "warmup": FractionOrSteps("a fraction of all steps, or steps (default 0.03)"),
    "epochs": Auto(Number(0, None, "passes over the data")),
    "max_steps": Integer(1, "stop after this many optimizer steps"),
    "weight_decay": Number(0, None, "default 0"),
    "neftune": Number(0, None, "NEFTune: noise on the input embeddings, usually 5 to 15 (default 0)"),
    "max_grad_norm": Number(0, None, "clip gradients to this norm (default 1)"),
    "optimizer": Auto(Enum(OPTIMIZERS)),
    "optimizer_options": OptimizerOptions(
        "galore_adamw and apollo_adamw: rank (default 128), update_proj_gap, scale, ..."
    ),
    "dtype": Auto(Enum(("bf16", "fp16", "fp32"), "dtype to compute in")),
    "attention": Enum(("sdpa", "eager", "flash_attention_2"), "default: the model's own choice"),
    "memory": _MEMORY,
    "loss": String("module.function(logits, labels, count) instead of cross-entropy"),
    "loop": Enum(("trainer", "simple"), "transformers' Trainer, or a short loop to read and compare with"),
    "eval": _EVAL,
    "save": _SAVE,
    "early_stop": Object(
        {"patience": Integer(1, "validations without improvement"), "threshold": Number(0, None)},
        required=("patience",),
    ),
    "seed": Seed("default 0"),
    "track": ListOf(
        Enum(("tensorboard", "wandb", "mlflow")), "where metrics go besides metrics.jsonl", allow_scalar=True
    ),
    "output": String("the run's folder (default: runs/NAME-OF-THIS-FILE)"),
    "after": _AFTER,
}
TRAIN = Object(FIELDS, required=("model", "data"), description="a mergeforge training run")


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of train.yaml, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mergeforge train",
    } | TRAIN.json_schema()
