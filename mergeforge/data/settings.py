"""Settings of training data: sources, validation split, template, what is trained on, and what to do if too long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergeforge.data.system_messages import MERGE, SYSTEM_POLICIES
from mergeforge.recipe.schema import Enum, ListOf, MapOf, Object, ReportProblem, Schema, String
from mergeforge.recipe.yaml_reader import Path

PAIRS, LABELED = "preference", "unpaired_preference"  # formats of preference data, under TRL's names
PREFERENCE_FORMATS = (PAIRS, LABELED)
FORMATS = ("auto", "messages", "sharegpt", "alpaca", "prompt_response", "text", *PREFERENCE_FORMATS)
LOSS_ON = ("assistant", "last", "all")
TOO_LONG = ("drop", "cut_prompt", "cut_end")


@dataclass(frozen=True)
class DataSource:
    """One entry of `data:`.

    `path`: a file, folder, glob, `hf://owner/name[@revision][:split or file]` or `sample:chat`. `columns`: role -> the
    file's column; overrides detection. `rows`: a Python list instead of a file; `path` is then its name.
    """

    path: str
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    rows: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True)
class DataSettings:
    """How rows become tokens.

    `validation`: a fraction of the rows, a number of rows, or the path of other data. The split depends on the content
    of a row only: equal rows are on the same side, and the order of the file does not matter.
    `template`: auto (the tokenizer's own, or plain), tokenizer, a name, or the path of a Jinja file.
    `system`: the system message for conversations without one. `system_policy`: what to do with system messages if the
    template does not render them: merge (into the first user turn), drop, or refuse the row. `seq_len` None: no limit.
    `too_long`: what to do with conversations longer than seq_len: drop; cut_prompt (cut on the left, keep the last
    answer whole); cut_end. Texts are cut into chunks of `seq_len` (cut_end keeps only the first).
    """

    sources: tuple[DataSource, ...]
    validation: float | int | str | None = None
    template: str = "auto"
    system: str | None = None
    loss_on: str = "assistant"
    seq_len: int | None = None
    too_long: str = "drop"
    seed: int = 0
    system_policy: str = MERGE


@dataclass(frozen=True)
class ValidationSplit:
    """Schema of `val`: a fraction of the rows (0 to 1), a number of rows, or a path."""

    description: str = ""

    def read(self, value: Any, path: Path, report: ReportProblem) -> Any:
        if isinstance(value, str) and value:
            try:
                value = float(value) if "e" in value.lower() else value  # YAML 1.1 reads 1e-2 as text
            except ValueError:
                return value
        if isinstance(value, bool) or not isinstance(value, int | float | str) or value == "":
            hint = "a fraction such as 0.1, a number of rows such as 200, or a path"
            report(path, f"'val' cannot be {value!r}", hint)
            return None
        if isinstance(value, str) or value == 0:
            return value or None
        if value < 0 or (isinstance(value, float) and not 0 < value < 1):
            report(path, f"'val' cannot be {value}", "a fraction between 0 and 1, or a whole number of rows")
            return None
        return value

    def json_schema(self) -> dict[str, Any]:
        kinds = [
            {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
            {"type": "integer", "minimum": 0},
            {"type": "string", "minLength": 1},
        ]
        return {"anyOf": kinds} | ({"description": self.description} if self.description else {})


@dataclass(frozen=True)
class SystemMessages:
    """Schema of `system`: a text, or what to do with system messages that the template refuses, or both."""

    description: str = ""

    def read(self, value: Any, path: Path, report: ReportProblem) -> Any:
        if isinstance(value, str) and value in SYSTEM_POLICIES:
            return {"unsupported": value}
        return _SYSTEM.read(value, path, report)

    def json_schema(self) -> dict[str, Any]:
        return _SYSTEM.json_schema() | {"description": self.description}


_SYSTEM = Object(
    {
        "text": String("system message for conversations without one"),
        "unsupported": Enum(SYSTEM_POLICIES, "system messages that the template refuses: merge, drop or refuse"),
    },
    shorthand="text",
)
_SOURCE = Object(
    {
        "path": String("a file, folder, glob, hf://owner/name[@revision][:split or file], or sample:chat"),
        "format": Enum(FORMATS, "auto: detected from the columns"),
        "columns": MapOf(
            String(), "role (prompt, input, response, system, messages, text, weight, ...) -> the file's column"
        ),
    },
    required=("path",),
    shorthand="path",
)
# The keys of train.yaml that describe data.
FIELDS: dict[str, Schema] = {
    "data": ListOf(_SOURCE, "training data: files, folders, globs, Hub data sets, samples", allow_scalar=True),
    "val": ValidationSplit("validation data: a fraction of the rows, a number of rows, or the path of other data"),
    "template": String("chat template: auto, tokenizer, plain, raw, chatml, llama3, mistral, ..., or a .jinja file"),
    "system": SystemMessages(
        "system message for conversations without one; or merge (default), drop or refuse: what to do with system "
        "messages if the template refuses them"
    ),
    "loss_on": Enum(LOSS_ON, "which tokens are trained on: every answer, the last answer, everything"),
    "too_long": Enum(TOO_LONG, "conversations longer than seq_len: drop, cut_prompt (on the left) or cut_end"),
}


def _data_source(value: str | Mapping[str, Any]) -> DataSource:
    if isinstance(value, str):
        return DataSource(value)
    return DataSource(value["path"], value.get("format") or "auto", dict(value.get("columns") or {}))


def row_source(data: Any, name: str = "rows") -> DataSource | None:
    """A list of rows as a source; None for anything else, such as a list of sources, which have a `path`."""
    is_list = isinstance(data, list | tuple) and bool(data)
    if not is_list or not all(isinstance(row, Mapping) and "path" not in row for row in data):
        return None
    return DataSource(name, rows=tuple(dict(row) for row in data))


def data_settings(value: Mapping[str, Any], *, seq_len: int | None = None, seed: int = 0) -> DataSettings:
    """Settings from a mapping that was validated against FIELDS; `data` may also be a list of rows."""
    rows = row_source(value.get("data"))
    system = value.get("system") or {}
    system = {"text": system} if isinstance(system, str) else system
    return DataSettings(
        sources=(rows,) if rows else tuple(_data_source(source) for source in value.get("data") or ()),
        validation=value.get("val"),
        template=value.get("template") or "auto",
        system=system.get("text"),
        system_policy=system.get("unsupported") or MERGE,
        loss_on=value.get("loss_on") or "assistant",
        seq_len=seq_len,
        too_long=value.get("too_long") or "drop",
        seed=seed,
    )
