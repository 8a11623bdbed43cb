"""TrainSettings: what a training run is to do, read strictly from train.yaml or a dict.

None stands for `auto`: deciding.py fills it from the model and the machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergeforge.data import DataSettings, data_settings
from mergeforge.errors import Problem, RecipeError
from mergeforge.recipe import yaml_reader
from mergeforge.recipe.overrides import apply_override, plain_value, read_recipe_file
from mergeforge.train.keys import TRAIN

DURING = ("output", "after", "track", "max_steps", "epochs")  # not part of the fingerprint
SAME: tuple[str, ...] = (
    "model",
    "method",
    "seq_len",
    "pack",
    "lr",
    "schedule",
    "warmup",
    "epochs",
    "max_steps",
    "weight_decay",
)
SAME += ("max_grad_norm", "optimizer", "dtype", "attention", "loss", "loop", "seed")  # called alike in TrainSettings


@dataclass(frozen=True)
class LoraOptions:
    """peft.LoraConfig's settings under their short names; `targets` None: by the architecture."""

    r: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | tuple[str, ...] | None = None
    rslora: bool = False
    dora: bool = False
    init: str = "default"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers: tuple[int, ...] = ()
    modules_to_save: tuple[str, ...] = ()


@dataclass(frozen=True)
class MemorySettings:
    """The device's memory in bytes, and what may be given up for it."""

    budget: int | None = None
    ce_chunk: int | None = None
    checkpointing: bool | None = None
    offload_activations: bool | None = None
    embed_on_cpu: bool | None = None


@dataclass(frozen=True)
class EvalSettings:
    """How often to validate (share of an epoch, or steps), and the samples taken before and after."""

    every: float = 0.5
    samples: tuple[str, ...] = ()
    max_tokens: int = 128
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class SaveSettings:
    """How often a checkpoint is written (share of an epoch, or steps), how many stay, whether the best one counts."""

    every: float = 0.5
    keep: int = 2
    best: bool | None = None


@dataclass(frozen=True)
class EarlyStopSettings:
    """Stop after `patience` validations that improve by less than `threshold` nats."""

    patience: int
    threshold: float = 0.0


@dataclass(frozen=True)
class MergeAfterTraining:
    """How the adapter is folded into its base when training is done."""

    path: str | None = None
    base_numerics: str = "auto"
    dtype: str | None = None
    evaluate: bool = True


@dataclass(frozen=True)
class PostTraining:
    """What follows a finished run."""

    merge: MergeAfterTraining | None = None
    gguf: tuple[str, ...] = ()
    publish: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class TrainSettings:
    """A training run as its file asks for it."""

    model: str
    data: DataSettings
    output: Path
    method: str = "qlora"
    seq_len: int | None = None
    pack: bool | None = None
    lora: LoraOptions = field(default_factory=LoraOptions)
    added_tokens: tuple[str, ...] = ()
    batch_size: int = 16
    micro_batch: int | None = None
    lr: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.03
    epochs: float | None = None
    max_steps: int | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: str | None = None
    dtype: str | None = None
    attention: str | None = None
    memory: MemorySettings = field(default_factory=MemorySettings)
    loss: str | None = None
    loop: str = "trainer"
    eval: EvalSettings = field(default_factory=EvalSettings)
    save: SaveSettings = field(default_factory=SaveSettings)
    early_stop: EarlyStopSettings | None = None
    seed: int = 0
    track: tuple[str, ...] = ()
    after: PostTraining = field(default_factory=PostTraining)
    raw: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trains_adapter(self) -> bool:
        return self.method != "full"

    @property
    def fingerprint(self) -> str:
        """Of everything that decides the trained weights; a resumed run must have the same."""
        kept = {key: value for key, value in self.raw.items() if key not in DURING}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def read(source: str | Path | Mapping[str, Any], sets: Sequence[str] = ()) -> TrainSettings:
    """Read train.yaml (or a dict with its keys) with PATH=VALUE overrides.

    Raises RecipeError with every mistake, each with its line and column.
    """
    name = "the settings"
    parsed: yaml_reader.ParsedDocument = (source, {}, [])
    if isinstance(source, Mapping):
        parsed = (plain_value(source), {}, [])
    else:
        name = str(source)
        parsed, *more = yaml_reader.parse(read_recipe_file(Path(source)), name)
        if more:
            raise RecipeError(f"{name} holds more than one document", hint="a file for each run")
    value, places, problems = parsed
    for override in sets:
        value = apply_override(value, override)
    found = _checked(value, places, problems)
    if problems:
        raise RecipeError(f"{name} has mistakes:", problems=sorted(set(problems)))
    return _settings(found, value, name)


def _checked(value: Any, places: yaml_reader.Positions, problems: list[Problem]) -> dict[str, Any]:
    """The values read by the language; adds to `problems`."""

    def report(path: yaml_reader.Path, message: str, hint: str = "") -> None:
        at = path
        while at and at not in places:
            at = at[:-1]
        problems.append(Problem(*places.get(at, (0, 0)), message.replace("the recipe", "train.yaml"), hint))

    found: dict[str, Any] = TRAIN.read(value, (), report)
    if problems:
        return found
    lora, method = found.get("lora", {}), found.get("method", "qlora")
    if method == "full" and lora:
        report(("lora",), "full training has no adapter", "take 'lora' out, or take method: lora")
    if method == "qlora" and lora.get("init") in ("pissa", "olora"):
        report(("lora", "init"), f"{lora['init']} needs the base in 16 bit", "method: lora")
    if method == "full" and (found.get("after") or {}).get("merge"):
        report(("after", "merge"), "full training leaves a whole model: there is nothing to merge", "take it out")
    if found.get("early_stop") and not found.get("val"):
        report(("early_stop",), "early_stop needs validation data", "add val: 0.05")
    if (found.get("save") or {}).get("best") and not found.get("val"):
        report(("save", "best"), "'best' needs validation data", "add val: 0.05")
    if found.get("loop") == "simple" and found.get("track"):
        report(("track",), "the simple loop writes metrics.jsonl only", "loop: trainer")
    return found


def _settings(found: Mapping[str, Any], raw: Mapping[str, Any], name: str) -> TrainSettings:
    """The settings that checked values stand for; keys that mean the same under another name are moved."""
    lora: dict[str, Any] = {key: _tuple(item) for key, item in found.get("lora", {}).items()}
    if found.get("method") == "dora":
        lora["dora"] = True
    batch, stop = found.get("batch", {}), found.get("early_stop")
    return TrainSettings(
        **{key: found[key] for key in SAME if key in found},
        data=data_settings(found, seq_len=found.get("seq_len"), seed=found.get("seed", 0)),
        output=Path(found.get("output") or Path("runs") / Path(name).stem.replace(" ", "-")),
        lora=LoraOptions(**lora),
        added_tokens=tuple((found.get("tokens") or {}).get("add", ())),
        batch_size=batch.get("size", 16),
        micro_batch=batch.get("micro"),
        memory=MemorySettings(**found.get("memory", {})),
        eval=_evaluation(found.get("eval", {})),
        save=SaveSettings(**found.get("save", {})),
        early_stop=EarlyStopSettings(**stop) if stop else None,
        track=tuple(found.get("track", ())),
        after=after_of(found.get("after") or {}),
        raw=raw,
    )


def _tuple(item: Any) -> Any:
    return tuple(item) if isinstance(item, list) else item


def _evaluation(found: Mapping[str, Any]) -> EvalSettings:
    samples = found.get("samples", ())
    if isinstance(samples, str):
        samples = [line for line in read_recipe_file(Path(samples)).splitlines() if line.strip()]
    return EvalSettings(**{**found, "samples": tuple(samples), "stop": tuple(found.get("stop", ()))})


def after_of(found: Mapping[str, Any]) -> PostTraining:
    """What follows, from a checked `after` record."""
    merge = found.get("merge")
    if merge is None and (found.get("gguf") or found.get("publish")):
        merge = True  # both need a merged model
    wanted = MergeAfterTraining(**merge) if isinstance(merge, Mapping) else MergeAfterTraining() if merge else None
    return PostTraining(merge=wanted, gguf=tuple(found.get("gguf", ())), publish=found.get("publish"))
