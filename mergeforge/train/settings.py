"""TrainSettings: what a training run should do, read strictly from train.yaml or a dict.

None means `auto`: auto_config.py resolves it from the model, the data and the machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mergeforge.data import DataSettings, data_settings, row_source
from mergeforge.errors import Problem, RecipeError
from mergeforge.recipe import yaml_reader
from mergeforge.recipe.overrides import apply_override, plain_value, read_recipe_file
from mergeforge.recipe.schema import ReportProblem
from mergeforge.train import aliases
from mergeforge.train.adapter_kinds import AdapterOptions, check_adapter
from mergeforge.train.keys import FIELDS, TRAIN
from mergeforge.train.low_rank import check_low_rank
from mergeforge.train.objectives import OBJECTIVES, SFT, PreferenceOptions, check_objective

NOT_FINGERPRINTED = ("output", "after", "track", "max_steps", "epochs", "allow_skips")  # a resumed run may change these
DATA_INITS = ("eva", "loftq")  # initializations that need data or weights, done once the base is loaded
SAME_NAME: tuple[str, ...] = (  # keys whose field in TrainSettings has the same name and value
    "model",
    "method",
    "objective",
    "seq_len",
    "pack",
    "lr",
    "schedule",
    "min_lr_ratio",
    "decay",
    "neftune",
    "warmup",
    "epochs",
    "max_steps",
    "weight_decay",
    "max_grad_norm",
    "optimizer",
    "optimizer_options",
    "dtype",
    "attention",
    "loss",
    "loop",
    "seed",
    "allow_skips",
)


@dataclass(frozen=True)
class LoraOptions:
    """Settings of peft.LoraConfig under short names. `targets` None: chosen by the architecture."""

    r: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | tuple[str, ...] | None = None
    lr_ratio: float | None = None
    rslora: bool = False
    dora: bool = False
    init: str = "default"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers: tuple[int, ...] = ()
    modules_to_save: tuple[str, ...] = ()


@dataclass(frozen=True)
class RopeOptions:
    """How positions are scaled. `factor` None: as far as seq_len needs."""

    type: str
    factor: float | None = None


@dataclass(frozen=True)
class MemorySettings:
    """The device memory to use in bytes, and the measures that save memory."""

    budget: int | None = None
    ce_chunk: int | None = None
    checkpointing: bool | None = None
    offload_activations: bool | None = None
    embed_on_cpu: bool | None = None


@dataclass(frozen=True)
class EvalSettings:
    """How often to validate (a fraction of an epoch, or steps), and the samples generated before and after training."""

    every: float = 0.5
    samples: tuple[str, ...] = ()
    max_tokens: int = 128
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class SaveSettings:
    """How often to write a checkpoint (fraction of an epoch, or steps), how many to keep, whether the best one wins."""

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
    """How to fold the adapter into its base after training."""

    path: str | None = None
    base_numerics: str = "auto"
    dtype: str | None = None
    evaluate: bool = True


@dataclass(frozen=True)
class PostTraining:
    """What to do after a finished run."""

    merge: MergeAfterTraining | None = None
    gguf: tuple[str, ...] = ()
    publish: Mapping[str, Any] | None = None

    @property
    def any_step(self) -> bool:
        return bool(self.merge or self.gguf or self.publish)


@dataclass(frozen=True)
class TrainSettings:
    """A training run as its file describes it. `raw`: the file's own keys and values."""

    model: str
    data: DataSettings
    output: Path
    method: str = "qlora"
    objective: str = SFT
    preference: PreferenceOptions = field(default_factory=PreferenceOptions)
    seq_len: int | None = None
    rope_scaling: RopeOptions | None = None
    pack: bool | None = None
    lora: LoraOptions = field(default_factory=LoraOptions)
    adapter: AdapterOptions | None = None
    added_tokens: tuple[str, ...] = ()
    batch_size: int = 16
    micro_batch: int | None = None
    lr: float | None = None
    schedule: str = "cosine"
    min_lr_ratio: float = 0.0
    decay: float = 0.2
    neftune: float = 0.0
    warmup: float = 0.03
    epochs: float | None = None
    max_steps: int | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: str | None = None
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    attention: str | None = None
    memory: MemorySettings = field(default_factory=MemorySettings)
    loss: str | None = None
    loop: str = "trainer"
    eval: EvalSettings = field(default_factory=EvalSettings)
    save: SaveSettings = field(default_factory=SaveSettings)
    early_stop: EarlyStopSettings | None = None
    seed: int = 0
    allow_skips: bool = False
    track: tuple[str, ...] = ()
    after: PostTraining = field(default_factory=PostTraining)
    raw: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trains_adapter(self) -> bool:
        return self.method != "full"

    @property
    def answers(self) -> int:
        """Sequences of tokens that a row of data has."""
        return OBJECTIVES[self.objective].answers

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all settings that determine the trained weights; a resumed run must have the same."""
        determining = {key: value for key, value in self.raw.items() if key not in NOT_FINGERPRINTED}
        return hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest()


def read(source: str | Path | Mapping[str, Any], sets: Sequence[str] = ()) -> TrainSettings:
    """Read train.yaml (or a dict with its keys, whose `data` may be a list of rows) with PATH=VALUE overrides.

    Raises RecipeError with every mistake, each with its line and column.
    """
    name = "the settings"
    parsed: yaml_reader.ParsedDocument = (source, {}, [])
    rows = None
    if isinstance(source, Mapping):
        rows = row_source(source.get("data"))
        parsed = (plain_value({**source, "data": rows.path} if rows else source), {}, [])
    else:
        name = str(source)
        parsed = read_document(Path(source))
    raw, positions, problems = parsed
    raw, positions = aliases.rename(raw, positions, reporter(positions, problems), FIELDS)
    for override in sets:
        raw = apply_override(raw, aliases.rename_override(override), TRAIN)
    values = _check(raw, positions, problems)
    if problems:
        raise RecipeError(f"{name} has mistakes:", problems=sorted(set(problems)))
    settings = _settings(values, raw, name)
    return replace(settings, data=replace(settings.data, sources=(rows,))) if rows else settings


def read_document(path: Path) -> yaml_reader.ParsedDocument:
    """The one YAML document of a file. Raises RecipeError."""
    parsed, *more = yaml_reader.parse(read_recipe_file(path), str(path))
    if more:
        raise RecipeError(f"{path} has more than one YAML document", hint="write one file for each")
    return parsed


def _check(raw: Any, positions: yaml_reader.Positions, problems: list[Problem]) -> dict[str, Any]:
    """The checked values; appends every mistake to `problems`."""
    report = reporter(positions, problems)
    values: dict[str, Any] = TRAIN.read(raw, (), report)
    if problems:
        return values
    lora, method = values.get("lora", {}), values.get("method", "qlora")
    if method == "full" and lora:
        report(("lora",), "full training has no adapter", "remove 'lora', or set method: lora")
    _check_init(values, report)
    if method == "full" and (values.get("after") or {}).get("merge"):
        report(("after", "merge"), "full training makes a whole model: there is nothing to merge", "remove 'merge'")
    if values.get("early_stop") and not values.get("val"):
        report(("early_stop",), "early_stop needs validation data", "add val: 0.05")
    if (values.get("save") or {}).get("best") and not values.get("val"):
        report(("save", "best"), "'best' needs validation data", "add val: 0.05")
    if values.get("loop") == "simple" and values.get("track"):
        report(("track",), "the simple loop writes metrics.jsonl only", "set loop: trainer")
    check_objective(values, report)
    check_adapter(values, report)
    check_low_rank(values, report)
    _check_schedule(values, report)
    return values


def _check_init(values: Mapping[str, Any], report: ReportProblem) -> None:
    """Report what does not go with `lora.init`."""
    lora, method, path = values.get("lora") or {}, values.get("method", "qlora"), ("lora", "init")
    init, merge = lora.get("init"), (values.get("after") or {}).get("merge")
    if method == "qlora" and init in ("pissa", "olora"):
        report(path, f"{init} needs the base in 16 bit", "set method: lora")
    if init in DATA_INITS and (lora.get("dora") or method == "dora"):
        report(path, f"{init} does not set DoRA's magnitudes", "set method: lora, or remove 'init'")
    elif init == "loftq" and method != "qlora":
        text = "loftq starts from what 4 bit loses; on a 16-bit base, PEFT's LoftQ would replace the base's weights"
        report(path, f"{text}, and the adapter could not be folded into the original", "set method: qlora")
    if init == "loftq" and isinstance(merge, Mapping) and merge.get("base_numerics") == "original":
        text = "a loftq adapter holds what the 4-bit base lost: on the original base it would count twice"
        report(("after", "merge", "base_numerics"), text, "remove 'base_numerics'")


def _check_schedule(values: Mapping[str, Any], report: ReportProblem) -> None:
    schedule = values.get("schedule", "cosine")
    for key, schedules in (("min_lr_ratio", ("cosine", "wsd")), ("decay", ("wsd",))):
        if key in values and schedule not in schedules:
            report((key,), f"schedule: {schedule} has no {key}", f"it is for {' and '.join(schedules)}")
    if (values.get("lora") or {}).get("lr_ratio") == 0:
        report(("lora", "lr_ratio"), "lr_ratio must be more than 0", "LoRA+ recommends 2 to 16")


def _data_settings(values: Mapping[str, Any]) -> DataSettings:
    settings = data_settings(values, seq_len=values.get("seq_len"), seed=values.get("seed", 0))
    format = OBJECTIVES[values.get("objective", SFT)].format
    if format == "auto":
        return settings
    return replace(settings, sources=tuple(replace(source, format=format) for source in settings.sources))


def reporter(positions: yaml_reader.Positions, problems: list[Problem], file: str = "train.yaml") -> ReportProblem:
    """A function that appends a mistake with its position in a file to `problems`."""

    def report(path: yaml_reader.Path, message: str, hint: str = "") -> None:
        parent = path
        while parent and parent not in positions:
            parent = parent[:-1]
        problems.append(Problem(*positions.get(parent, (0, 0)), message.replace("the recipe", file), hint))

    return report


def _settings(values: Mapping[str, Any], raw: Mapping[str, Any], name: str) -> TrainSettings:
    """The settings for checked values; renames the keys whose fields have other names."""
    lora: dict[str, Any] = {
        key: tuple(item) if isinstance(item, list) else item for key, item in values.get("lora", {}).items()
    }
    if values.get("method") == "dora":
        lora["dora"] = True
    adapter = values.get("adapter")
    if adapter:
        adapter = {"type": adapter} if isinstance(adapter, str) else adapter
        lora = {key: tuple(adapter[key]) for key in ("targets", "layers") if isinstance(adapter.get(key), list)}
        lora |= {"targets": adapter["targets"]} if isinstance(adapter.get("targets"), str) else {}
    batch, early_stop = values.get("batch", {}), values.get("early_stop")
    return TrainSettings(
        **{key: values[key] for key in SAME_NAME if key in values},
        data=_data_settings(values),
        preference=PreferenceOptions(**(values.get("preference") or {})),
        output=Path(values.get("output") or Path("runs") / Path(name).stem.replace(" ", "-")),
        lora=LoraOptions(**lora),
        adapter=AdapterOptions(adapter["type"], adapter.get("options") or {}) if adapter else None,
        added_tokens=tuple((values.get("tokens") or {}).get("add", ())),
        rope_scaling=RopeOptions(**values["rope_scaling"]) if values.get("rope_scaling") else None,
        batch_size=batch.get("size", 16),
        micro_batch=batch.get("micro"),
        memory=MemorySettings(**values.get("memory", {})),
        eval=_eval_settings(values.get("eval", {})),
        save=SaveSettings(**values.get("save", {})),
        early_stop=EarlyStopSettings(**early_stop) if early_stop else None,
        track=tuple(values.get("track", ())),
        after=_post_training(values.get("after") or {}, trains_adapter=values.get("method") != "full"),
        raw=raw,
    )


def _eval_settings(values: Mapping[str, Any]) -> EvalSettings:
    samples = values.get("samples", ())
    if isinstance(samples, str):
        samples = [line for line in read_recipe_file(Path(samples)).splitlines() if line.strip()]
    return EvalSettings(**{**values, "samples": tuple(samples), "stop": tuple(values.get("stop", ()))})


def _post_training(values: Mapping[str, Any], *, trains_adapter: bool) -> PostTraining:
    merge = values.get("merge")
    if merge is None and trains_adapter and (values.get("gguf") or values.get("publish")):
        merge = True  # both need a whole model
    options = MergeAfterTraining(**merge) if isinstance(merge, Mapping) else MergeAfterTraining() if merge else None
    return PostTraining(merge=options, gguf=tuple(values.get("gguf", ())), publish=values.get("publish"))
