"""Keys of transformers' TrainingArguments, TRL, PEFT, axolotl and LLaMA-Factory, read as the keys of train.yaml.

Sources: transformers 5 `TrainingArguments`, peft `LoraConfig`, axolotl's configuration reference and LLaMA-Factory's
arguments. A key that has no equal here is named with what to write instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergeforge.errors import RecipeError
from mergeforge.recipe.schema import ReportProblem
from mergeforge.recipe.yaml_reader import Path, Positions

ALIASES: dict[str, str] = {
    **dict.fromkeys(("base_model", "model_name_or_path", "model_name"), "model"),
    **dict.fromkeys(("learning_rate",), "lr"),
    **dict.fromkeys(("num_train_epochs", "num_epochs"), "epochs"),
    **dict.fromkeys(("sequence_len", "max_seq_length", "max_seq_len", "max_length", "cutoff_len"), "seq_len"),
    **dict.fromkeys(("sample_packing", "packing"), "pack"),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler"), "schedule"),
    **dict.fromkeys(("warmup_ratio", "warmup_steps"), "warmup"),
    **dict.fromkeys(("optim",), "optimizer"),
    **dict.fromkeys(("optim_args",), "optimizer_options"),
    **dict.fromkeys(("output_dir",), "output"),
    **dict.fromkeys(("dataset", "train_file"), "data"),
    **dict.fromkeys(("val_set_size", "val_size", "validation_file"), "val"),
    **dict.fromkeys(("chat_template",), "template"),
    **dict.fromkeys(("attn_implementation",), "attention"),
    **dict.fromkeys(("report_to",), "track"),
    **dict.fromkeys(("lora_r", "lora_rank"), "lora.r"),
    **dict.fromkeys(("lora_alpha",), "lora.alpha"),
    **dict.fromkeys(("lora_dropout",), "lora.dropout"),
    **dict.fromkeys(("lora_target_modules", "lora_target", "target_modules"), "lora.targets"),
    **dict.fromkeys(("lora_modules_to_save", "modules_to_save"), "lora.modules_to_save"),
    **dict.fromkeys(("peft_use_rslora", "use_rslora"), "lora.rslora"),
    **dict.fromkeys(("peft_use_dora", "use_dora"), "lora.dora"),
    **dict.fromkeys(("loraplus_lr_ratio",), "lora.lr_ratio"),
    **dict.fromkeys(("neftune_noise_alpha",), "neftune"),
    **dict.fromkeys(("micro_batch_size", "per_device_train_batch_size"), "batch.micro"),
    **dict.fromkeys(("gradient_checkpointing",), "memory.checkpointing"),
    **dict.fromkeys(("eval_steps",), "eval.every"),
    **dict.fromkeys(("save_steps",), "save.every"),
    **dict.fromkeys(("save_total_limit",), "save.keep"),
    **dict.fromkeys(("load_best_model_at_end",), "save.best"),
    **dict.fromkeys(("early_stopping_patience",), "early_stop.patience"),
}
# Values with another name here.
_VALUES: dict[str, dict[Any, Any]] = {
    "optimizer": {
        **dict.fromkeys(("adamw_torch", "adamw_torch_fused"), "adamw"),
        **dict.fromkeys(("adamw_bnb_8bit",), "adamw_8bit"),
        **dict.fromkeys(("paged_adamw",), "paged_adamw_32bit"),
    },
    "schedule": {"constant_with_warmup": "constant", "warmup_stable_decay": "wsd"},
    "track": {"none": None},
}
# intervals whose fractions mean something else
EVERY = {"eval_steps": "eval: {every: 0.5}", "save_steps": "save: {every: 0.5}"}
ADAPTER, METHODS = "adapter", ("lora", "qlora", "dora")  # axolotl's `adapter: qlora` is `method: qlora`
ACCUMULATION = "gradient_accumulation_steps"
# Keys that say something else than any key here, and what to write for them.
INSTEAD = {
    "datasets": "data: [{path: FILE, format: alpaca}]",
    "finetuning_type": "method: qlora, lora, dora or full",
    "load_in_4bit": "method: qlora trains on a 4-bit base, method: lora on a 16-bit one",
    "load_in_8bit": "method: qlora trains on a 4-bit base, method: lora on a 16-bit one",
    "lora_target_linear": "lora: {targets: all-linear}, which is the default for most models",
    "train_on_inputs": "loss_on: assistant, last or all",
    "assistant_only_loss": "loss_on: assistant, last or all",
    "bf16": "dtype: bf16, fp16 or fp32",
    "fp16": "dtype: bf16, fp16 or fp32",
    "flash_attention": "attention: flash_attention_2",
    "per_device_eval_batch_size": "validation uses batch: {micro: N}",
    "special_tokens": "tokens: {add: [...]}",
    "tokens_to_add": "tokens: {add: [...]}",
    "deepspeed": "start several processes with torchrun",
    "fsdp": "start several processes with torchrun",
    "optim_target_modules": "all linear modules but lm_head are projected",
    "wandb_project": "track: wandb",
}


def rename(raw: Any, positions: Positions, report: ReportProblem, known: Mapping[str, Any]) -> tuple[Any, Positions]:
    """The settings, and the positions of their values, under the names of train.yaml.

    known: the keys of train.yaml. Reports keys that contradict each other, and keys without an equal.
    """
    if not isinstance(raw, Mapping):
        return raw, positions
    named = {key: value for key, value in raw.items() if key in known or not _is_foreign(key)}
    moved: dict[Path, Path] = {}
    for key in (key for key in raw if key not in named):
        if key in INSTEAD:
            report((key,), f"'{key}' is a key of another trainer", INSTEAD[key])
        elif key in EVERY and isinstance(raw[key], float) and raw[key] < 1:
            text = f"'{key}' below 1 is a fraction of the run in transformers, but of an epoch here"
            report((key,), text, f"set {EVERY[key]}")
        elif key != ACCUMULATION:
            path = tuple(ALIASES[key].split("."))
            _insert(named, path, _value(ALIASES[key], raw[key]), key, report)
            moved[key,] = path
    if _names_method(raw.get(ADAPTER), report):
        _insert(named, ("method",), named.pop(ADAPTER), ADAPTER, report)
        moved[ADAPTER,] = ("method",)
    if ACCUMULATION in raw:
        _set_batch_size(named, raw[ACCUMULATION], report)
    return named, {_moved(path, moved): position for path, position in positions.items()}


def rename_override(override: str) -> str:
    """A PATH=VALUE with the path under the name of train.yaml. Raises RecipeError for a key without an equal."""
    path, equals, value = override.partition("=")
    if path in INSTEAD or path == ACCUMULATION:
        hint = INSTEAD.get(path, "batch.size: rows in one optimizer step")
        raise RecipeError(f"'{path}' is a key of another trainer", hint=hint)
    name = "method" if path == ADAPTER and value in METHODS else ALIASES.get(path)
    if name is None:
        return override
    value = _VALUES.get(name, {}).get(value, value)
    return f"{name}{equals}{'null' if value is None else value}"


def _names_method(adapter: Any, report: ReportProblem) -> bool:
    """Whether `adapter` is the name of a method, as in axolotl; reports such a name as the type of an adapter."""
    kind = adapter.get("type") if isinstance(adapter, Mapping) else None
    if kind in METHODS:
        hint = f"set method: {kind}, and lora: {{targets: ..., r: 16}}"
        report((ADAPTER, "type"), f"'adapter' is for kinds besides LoRA: {kind} is a method here", hint)
    return isinstance(adapter, str) and adapter in METHODS


def _is_foreign(key: Any) -> bool:
    return key in ALIASES or key in INSTEAD or key == ACCUMULATION


def _value(name: str, value: Any) -> Any:
    return _VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value


def _insert(named: dict[str, Any], path: Path, value: Any, key: str, report: ReportProblem) -> None:
    """Set a value under one or two keys."""
    name = ".".join(map(str, path))
    if len(path) == 1:
        inner, last = named, path[0]
    else:
        group = named.get(str(path[0])) or {}
        if not isinstance(group, Mapping):
            return  # the schema reports it
        inner, last = dict(group), path[1]
        named[str(path[0])] = inner
    if last in inner:
        report((key,), f"'{key}' repeats '{name}'", "keep one of them")
    inner[str(last)] = value


def _set_batch_size(named: dict[str, Any], steps: Any, report: ReportProblem) -> None:
    """`batch.size` is the micro-batch times the accumulation steps."""
    batch = dict(named["batch"]) if isinstance(named.get("batch"), Mapping) else {}
    micro = batch.get("micro")
    if not (_is_whole(micro) and _is_whole(steps)) or "size" in batch:
        hint = "batch: {size: rows in one optimizer step}"
        report((ACCUMULATION,), f"'{ACCUMULATION}' needs micro_batch_size, and no batch.size beside it", hint)
        return
    named["batch"] = {**batch, "size": micro * steps}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _moved(path: Path, moved: Mapping[Path, Path]) -> Path:
    return (*moved[path[:1]], *path[1:]) if path[:1] in moved else path
