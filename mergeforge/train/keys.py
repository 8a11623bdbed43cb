"""train.yaml's language: which keys there are, and what each may hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergeforge.data import FIELDS as DATA_FIELDS
from mergeforge.recipe.schema import (
    Choice,
    Flag,
    ListOf,
    MapOf,
    Number,
    Record,
    Report,
    Shape,
    Size,
    Text,
    Whole,
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

    item: Shape

    def read(self, value: Any, path: Path, report: Report) -> Any:
        return None if value == AUTO else self.item.read(value, path, report)

    def json(self) -> dict[str, Any]:
        described = self.item.json()
        about = {"description": described.pop("description")} if "description" in described else {}
        return {"anyOf": [{"const": AUTO}, described]} | about


@dataclass(frozen=True)
class Share:
    """How often: a share of an epoch or run below 1, or a whole number of steps."""

    about: str = ""

    def read(self, value: Any, path: Path, report: Report) -> Any:
        number = not isinstance(value, bool) and isinstance(value, int | float)
        if not number or not 0 <= value < math.inf or (value >= 1 and value != int(value)):
            report(path, f"'{path[-1]}' must be a share below 1 or a whole number of steps, not {value!r}", "")
            return None
        return value

    def json(self) -> dict[str, Any]:
        return {"type": "number", "minimum": 0, "description": self.about}


@dataclass(frozen=True)
class Either:
    """One of two shapes: lists and mappings go to the second, all else to the first."""

    plain: Shape
    nested: Shape

    def read(self, value: Any, path: Path, report: Report) -> Any:
        return (self.nested if isinstance(value, list | Mapping) else self.plain).read(value, path, report)

    def json(self) -> dict[str, Any]:
        return {"anyOf": [self.plain.json(), self.nested.json()]}


_LORA = Record(
    {
        "r": Auto(Whole(1, "rank (default 16)")),
        "alpha": Number(0, None, "the delta is B A alpha / r (default 2 r)"),
        "dropout": Number(0, 1, "of the adapter's input (default 0)"),
        "targets": Either(Text("all-linear, or a regular expression"), ListOf(Text("a module's name"))),
        "rslora": Flag("alpha / sqrt(r) instead of alpha / r"),
        "dora": Flag("weight-decomposed: a trained magnitude for each output"),
        "init": Choice(("default", "gaussian", "pissa", "olora"), "how A and B start"),
        "rank_pattern": MapOf(Whole(1), "module name or regular expression -> rank"),
        "alpha_pattern": MapOf(Number(0, None), "module name or regular expression -> alpha"),
        "layers": ListOf(Whole(0), "only these layers"),
        "modules_to_save": ListOf(Text(), "modules trained whole and saved with the adapter"),
    }
)
_TOKENS = Record(
    {
        "add": ListOf(Text("a special token"), "tokens added to the vocabulary; only their rows are trained"),
    }
)
_BATCH = Record(
    {
        "size": Whole(1, "rows of data for one optimiser step, on all devices together (default 16)"),
        "micro": Auto(Whole(1, "sequences in one forward pass")),
    }
)
_MEMORY = Record(
    {
        "budget": Auto(Size("of the device; default: what is free")),
        "ce_chunk": Auto(Whole(0, "rows of logits that exist at once; 0: all")),
        "checkpointing": Auto(Flag("compute activations again in the backward pass")),
        "offload_activations": Auto(Flag("keep checkpointed activations in host memory")),
        "embed_on_cpu": Auto(Flag("keep the frozen input embedding in host memory")),
    }
)
_EVAL = Record(
    {
        "every": Share("validate this often: a share of an epoch, or steps; 0: at the end (default 0.5)"),
        "samples": Either(Text("a file with a prompt on each line"), ListOf(Text("a prompt"))),
        "max_tokens": Whole(1, "of a sample (default 128)"),
        "stop": ListOf(Text(), "texts that end a sample", lone=True),
    }
)
_SAVE = Record(
    {
        "every": Share("a checkpoint this often: a share of an epoch, or steps; 0: at the end (default 0.5)"),
        "keep": Whole(1, "checkpoints that stay (default 2)"),
        "best": Flag("end with the checkpoint of the lowest validation loss (default: where there is validation)"),
    }
)
_MERGE = Record(
    {
        "path": Text("the folder (default: merged/ in the run)"),
        "base_numerics": Choice(NUMERICS, "what the adapter is folded into; auto: what validates better"),
        "dtype": Text("of the merged model"),
        "evaluate": Flag("measure the merged model's validation loss (default true)"),
    }
)
_AFTER = Record(
    {
        "merge": Either(Flag("fold the adapter into its base"), _MERGE),
        "gguf": ListOf(Text("q4_k_m, q8_0, ..."), "GGUF files written in the same pass", lone=True),
        "publish": Record(
            {"repo": Text("owner/name"), "private": Flag("default true"), "revision": Text("the branch")},
            required=("repo",),
            short="repo",
        ),
    }
)
FIELDS: dict[str, Shape] = {
    "model": Text("a folder, a Hub repo id with optional @revision, or sample:tiny"),
    **DATA_FIELDS,
    "seq_len": Auto(Whole(8, "tokens of the longest sequence")),
    "pack": Auto(Flag("put several rows into one sequence; they do not see each other")),
    "method": Choice(("qlora", "lora", "dora", "full"), "what is trained (default qlora)"),
    "lora": _LORA,
    "tokens": _TOKENS,
    "batch": _BATCH,
    "lr": Auto(Number(0, None, "learning rate")),
    "schedule": Choice(("cosine", "linear", "constant"), "of the learning rate (default cosine)"),
    "warmup": Share("a share of all steps, or steps (default 0.03)"),
    "epochs": Auto(Number(0, None, "how often the data is seen")),
    "max_steps": Whole(1, "stop after so many optimiser steps"),
    "weight_decay": Number(0, None, "default 0"),
    "max_grad_norm": Number(0, None, "gradients are scaled down to this norm (default 1)"),
    "optimizer": Auto(Choice(OPTIMIZERS)),
    "dtype": Auto(Choice(("bf16", "fp16", "fp32"), "of the computation")),
    "attention": Choice(("sdpa", "eager", "flash_attention_2"), "default: the model's own choice"),
    "memory": _MEMORY,
    "loss": Text("module.function(logits, labels, count) instead of cross-entropy"),
    "loop": Choice(("trainer", "simple"), "transformers' Trainer, or the short readable loop"),
    "eval": _EVAL,
    "save": _SAVE,
    "early_stop": Record({"patience": Whole(1, "validations without improvement"), "threshold": Number(0, None)}),
    "seed": Whole(0, "default 0"),
    "track": ListOf(Choice(("tensorboard", "wandb", "mlflow")), "where metrics go besides metrics.jsonl", lone=True),
    "output": Text("the run's folder (default: runs/NAME-OF-THIS-FILE)"),
    "after": _AFTER,
}
TRAIN = Record(FIELDS, required=("model", "data"), about="a mergeforge training run")


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of train.yaml, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "mergeforge train"} | TRAIN.json()
