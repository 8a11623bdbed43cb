"""SweepSettings: which keys of a train.yaml to vary, over which ranges, and how many runs to try."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeforge.errors import RecipeError
from mergeforge.recipe import yaml_reader
from mergeforge.recipe.overrides import plain_value
from mergeforge.recipe.schema import Boolean, Integer, Number, Object, ReportProblem, Schema, String
from mergeforge.train import settings as train_settings
from mergeforge.train.aliases import ALIASES
from mergeforge.train.keys import Seed
from mergeforge.train.settings import TrainSettings

# keys of train.yaml that change what the validation loss measures
INCOMPARABLE = ("model", "template", "val", "loss_on", "loss", "objective", "preference")
Scalar = str | int | float | bool | None
_RANGE = Object(
    {
        "low": Number(None, None, "the smallest value"),
        "high": Number(None, None, "the largest value"),
        "step": Number(0, None, "try multiples of this above `low` only"),
        "log": Boolean("draw the logarithm evenly (default false)"),
    },
    required=("low", "high"),
)


@dataclass(frozen=True)
class SearchRange:
    """The values of one key: choices, or the numbers from `low` to `high`. `is_whole`: integers only."""

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    is_whole: bool = False

    def encode(self, choice: Any) -> Scalar:
        """A choice as Optuna stores it: lists and mappings as JSON."""
        return json.dumps(choice) if isinstance(choice, list | Mapping) else choice

    def decode(self, value: Scalar) -> Any:
        """The value of the key that a stored choice or number stands for."""
        return next((choice for choice in self.choices if self.encode(choice) == value), value)

    def extremes(self) -> tuple[Any, ...]:
        """Values that all others are between."""
        return self.choices or ((int(self.low), int(self.high)) if self.is_whole else (self.low, self.high))


@dataclass(frozen=True)
class SweepSettings:
    """`train`: the keys that all runs share; `ranges`: what varies; `trials`: runs in all, pruned ones included."""

    train: Mapping[str, Any]
    ranges: tuple[SearchRange, ...]
    output: Path
    trials: int = 20
    seed: int = 0
    prune: bool = True

    def shared_settings(self) -> TrainSettings:
        """What all runs share."""
        return train_settings.read(self.run_settings({}, self.output))

    def run_settings(self, values: Mapping[str, Any], output: Path) -> dict[str, Any]:
        """The train.yaml of one run."""
        raw: dict[str, Any] = {**self.train, "output": str(output)}
        for key, value in values.items():
            raw = _with_value(raw, key.split("."), value)
        return raw


class _Search:
    """The schema of `search`: key of train.yaml -> choices or a range."""

    def read(self, value: Any, path: yaml_reader.Path, report: ReportProblem) -> dict[str, SearchRange]:
        if not isinstance(value, Mapping) or not value:
            report(path, "'search' must map keys of train.yaml to choices or ranges", "lr: {low: 1e-4, high: 1e-3}")
            return {}
        for key in value:
            group = ALIASES.get(str(key), str(key)).partition(".")[0]
            if group == "output":
                report((*path, key), "every run has a folder of its own in the sweep's", "remove 'output'")
            if group in INCOMPARABLE:
                text = f"runs with another {group} have losses that do not say which is better"
                report((*path, key), text, "train them one by one, and compare them with `mergeforge compare`")
        return {str(key): self._range(str(key), item, (*path, key), report) for key, item in value.items()}

    def _range(self, key: str, value: Any, path: yaml_reader.Path, report: ReportProblem) -> SearchRange:
        if isinstance(value, list):
            if not value:
                report(path, f"'{key}' has no choices", "list at least two")
            return SearchRange(key, choices=tuple(value))
        limits = _RANGE.read(value, path, report)
        low, high, step = (limits.get(name) for name in ("low", "high", "step"))
        if low is None or high is None:
            return SearchRange(key)
        log = bool(limits.get("log"))
        if not low < high or (log and low <= 0):
            report(path, f"'{key}': low must be less than high" + (", and above 0 with log" if log else ""), "")
        if log and step:
            report(path, f"'{key}': log and step exclude each other", "remove step")
        numbers = [value[name] for name in ("low", "high", "step") if value.get(name) is not None]
        whole = all(isinstance(number, int) for number in numbers)
        return SearchRange(key, low=low, high=high, step=step, log=log, is_whole=whole)

    def json_schema(self) -> dict[str, Any]:
        item = {"anyOf": [{"type": "array"}, _RANGE.json_schema()]}
        return {"type": "object", "additionalProperties": item, "description": "key of train.yaml -> what to try"}


class _Train:
    """The schema of `train`: a path, or the keys of a train.yaml, which `settings.read` checks."""

    def read(self, value: Any, path: yaml_reader.Path, report: ReportProblem) -> Any:
        if not isinstance(value, str | Mapping):
            report(path, "'train' must be a train.yaml or its keys", "train: train.yaml")
        return value

    def json_schema(self) -> dict[str, Any]:
        return {"description": "a train.yaml, or its keys"}


FIELDS: dict[str, Schema] = {
    "train": _Train(),
    "search": _Search(),
    "trials": Integer(1, "runs in all (default 20)"),
    "seed": Seed("of the search (default 0)"),
    "prune": Boolean("end a run whose validation loss is above the others' median (default true)"),
    "output": String("the sweep's folder (default: runs/NAME-OF-THIS-FILE)"),
}
SWEEP = Object(FIELDS, required=("train", "search"), description="a mergeforge training sweep")


def read_sweep(path: Path) -> SweepSettings:
    """Read sweep.yaml. Raises RecipeError with every mistake, each with its line and column."""
    raw, positions, problems = train_settings.read_document(path)
    values = SWEEP.read(raw, (), train_settings.reporter(positions, problems, "sweep.yaml"))
    if problems:
        raise RecipeError(f"{path} has mistakes:", problems=sorted(set(problems)))
    train = values["train"]
    if isinstance(train, str):
        train = train_settings.read(path.parent / train if not Path(train).is_file() else train).raw
    output = Path(values.get("output") or Path("runs") / path.stem)
    options = {name: values[name] for name in ("trials", "seed", "prune") if name in values}
    sweep = SweepSettings(plain_value(train), tuple(values["search"].values()), output, **options)
    _check_runs(sweep, path)
    return sweep


def _check_runs(sweep: SweepSettings, path: Path) -> None:
    """Read the settings with the extremes of every range, and with all ranges at once. Raises RecipeError."""
    for values in _corner_values(sweep):
        try:
            settings: TrainSettings = train_settings.read(sweep.run_settings(values, sweep.output))
        except RecipeError as error:
            shown = ", ".join(f"{key}: {value}" for key, value in values.items())
            text = f"{path} would try settings with mistakes ({shown or 'train'}): {error}"
            raise RecipeError(text, hint=error.command_hint) from None
        if settings.data.validation is None:
            raise RecipeError(
                "a sweep compares validation losses, but there is no validation data", hint="add val: 0.1"
            )


def _corner_values(sweep: SweepSettings) -> Iterator[dict[str, Any]]:
    yield {}
    yield {search_range.key: search_range.extremes()[0] for search_range in sweep.ranges}
    for search_range in sweep.ranges:
        for value in search_range.extremes():
            yield {search_range.key: value}


def _with_value(raw: Mapping[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """A copy with the value at a path of keys; what is missing on the way is created."""
    first, *rest = path
    if not rest:
        return {**raw, first: value}
    inner = raw.get(first)
    return {**raw, first: _with_value(inner if isinstance(inner, Mapping) else {}, rest, value)}
