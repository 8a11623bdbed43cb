"""train.yaml's language: which keys there are, and what each may hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergeforge.data import FIELDS as DATA_FIELDS
from mergeforge.recipe.schema import (
    Boolean,
    Enum,
    Integer,
    ListOf,
    MapOf,
    Number,
    Object,
    ReportProblem,
    Schema,
    Size,
    String,
)
from mergeforge.recipe.yaml_reader import Path

AUTO = "auto"
OPTIMIZERS = (
    "adamw",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "lion_8bit",
    "paged_lion_8bit",
    "adafactor",
    "sgd",
)
NUMERICS = ("auto", "original", "dequant_nf4")


@dataclass(frozen=True)
class Auto:
    """`auto` (decided from the model and the machine), or a value of another shape."""

    item: Schema

    def read(self, value: Any, path: Path, report: ReportProblem) -> Any:
        return None if value == AUTO else self.item.read(value, path, report)

    def json_schema(self) -> dict[str, Any]:
        described = self.item.json_schema()
        about = {"description": described.pop("description")} if "description" in described else {}
        return {"anyOf": [{"const": AUTO}, described]} | about


@dataclass(frozen=True)
class FractionOrSteps:
    """How often: a share of an epoch or run below 1, or a whole number of steps."""

    description: str = ""

    def read(self, value: Any, path: Path, report: ReportProblem) -> Any:
        number = not isinstance(value, bool) and isinstance(value, int | float)
        if not number or not 0 <= value < math.inf or (value >= 1 and value != int(value)):
            report(path, f"'{path[-1]}' must be a share below 1 or a whole number of steps, not {value!r}", "")
            return None
        return value

    def json_schema(self) -> dict[str, Any]:
        return {"type": "number", "minimum": 0, "description": self.description}


@dataclass(frozen=True)
class OneOf:
    """One of two shapes: lists and mappings go to the second, all else to the first."""

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
        "dropout": Number(0, 1, "of the adapter's input (default 0)"),
        "targets": OneOf(String("all-linear, or a regular expression"), ListOf(String("a module's name"))),
        "rslora": Boolean("alpha / sqrt(r) instead of alpha / r"),
        "dora": Boolean("weight-decomposed: a trained magnitude for each output"),
        "init": Enum(("default", "gaussian", "pissa", "olora"), "how A and B start"),
        "rank_pattern": MapOf(Integer(1), "module name or regular expression -> rank"),
        "alpha_pattern": MapOf(Number(0, None), "module name or regular expression -> alpha"),
        "layers": ListOf(Integer(0), "only these layers"),
        "modules_to_save": ListOf(String(), "modules trained whole and saved with the adapter"),
    }
)
_TOKENS = Object(
    {
        "add": ListOf(String("a special token"), "tokens added to the vocabulary; only their rows are trained"),
    }
)
_BATCH = Object(
    {
        "size": Integer(1, "rows of data for one optimiser step, on all devices together (default 16)"),
        "micro": Auto(Integer(1, "sequences in one forward pass")),
    }
)
_MEMORY = Object(
    {
        "budget": Auto(Size("of the device; default: what is free")),
        "ce_chunk": Auto(Integer(0, "rows of logits that exist at once; 0: all")),
        "checkpointing": Auto(Boolean("compute activations again in the backward pass")),
        "offload_activations": Auto(Boolean("keep checkpointed activations in host memory")),
        "embed_on_cpu": Auto(Boolean("keep the frozen input embedding in host memory")),
    }
)
_EVAL = Object(
    {
        "every": FractionOrSteps("validate this often: a share of an epoch, or steps; 0: at the end (default 0.5)"),
        "samples": OneOf(String("a file with a prompt on each line"), ListOf(String("a prompt"))),
        "max_tokens": Integer(1, "of a sample (default 128)"),
        "stop": ListOf(String(), "texts that end a sample", allow_scalar=True),
    }
)
_SAVE = Object(
    {
        "every": FractionOrSteps("a checkpoint this often: a share of an epoch, or steps; 0: at the end (default 0.5)"),
        "keep": Integer(1, "checkpoints that stay (default 2)"),
        "best": Boolean("end with the checkpoint of the lowest validation loss (default: where there is validation)"),
    }
)
_MERGE = Object(
    {
        "path": String("the folder (default: merged/ in the run)"),
        "base_numerics": Enum(NUMERICS, "what the adapter is folded into; auto: what validates better"),
        "dtype": String("of the merged model"),
        "evaluate": Boolean("measure the merged model's validation loss (default true)"),
    }
)
_AFTER = Object(
    {
        "merge": OneOf(Boolean("fold the adapter into its base"), _MERGE),
        "gguf": ListOf(String("q4_k_m, q8_0, ..."), "GGUF files written in the same pass", allow_scalar=True),
        "publish": Object(
            {"repo": String("owner/name"), "private": Boolean("default true"), "revision": String("the branch")},
            required=("repo",),
            shorthand="repo",
        ),
    }
)
FIELDS: dict[str, Schema] = {
    "model": String("a folder, a Hub repo id with optional @revision, or sample:tiny"),
    **DATA_FIELDS,
    "seq_len": Auto(Integer(8, "tokens of the longest sequence")),
    "pack": Auto(Boolean("put several rows into one sequence; they do not see each other")),
    "method": Enum(("qlora", "lora", "dora", "full"), "what is trained (default qlora)"),
    "lora": _LORA,
    "tokens": _TOKENS,
    "batch": _BATCH,
    "lr": Auto(Number(0, None, "learning rate")),
    "schedule": Enum(("cosine", "linear", "constant"), "of the learning rate (default cosine)"),
    "warmup": FractionOrSteps("a share of all steps, or steps (default 0.03)"),
    "epochs": Auto(Number(0, None, "how often the data is seen")),
    "max_steps": Integer(1, "stop after so many optimiser steps"),
    "weight_decay": Number(0, None, "default 0"),
    "max_grad_norm": Number(0, None, "gradients are scaled down to this norm (default 1)"),
    "optimizer": Auto(Enum(OPTIMIZERS)),
    "dtype": Auto(Enum(("bf16", "fp16", "fp32"), "of the computation")),
    "attention": Enum(("sdpa", "eager", "flash_attention_2"), "default: the model's own choice"),
    "memory": _MEMORY,
    "loss": String("module.function(logits, labels, count) instead of cross-entropy"),
    "loop": Enum(("trainer", "simple"), "transformers' Trainer, or the short readable loop"),
    "eval": _EVAL,
    "save": _SAVE,
    "early_stop": Object({"patience": Integer(1, "validations without improvement"), "threshold": Number(0, None)}),
    "seed": Integer(0, "default 0"),
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
