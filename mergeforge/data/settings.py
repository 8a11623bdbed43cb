"""What training data is asked for: sources, split, template, what is trained on, what is too long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergeforge.recipe.schema import Choice, ListOf, MapOf, Record, Report, Shape, Text
from mergeforge.recipe.yaml_reader import Path

FORMATS = ("auto", "messages", "sharegpt", "alpaca", "prompt_response", "text")
LOSS_ON = ("assistant", "last", "all")
TOO_LONG = ("drop", "cut_prompt", "cut_end")


@dataclass(frozen=True)
class DataSource:
    """One entry of `data:`.

    `path`: a file, folder, glob, `hf://owner/name[@revision][:split or file]` or `sample:chat`. `columns`: our role
    -> the file's column, over what is detected. `rows`: a Python list instead of a file; `path` is then its name.
    """

    path: str
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    rows: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True)
class DataSettings:
    """How rows become tokens.

    `validation`: a share of the rows, a number of rows, or the path of other data. The split goes by the content of
    a row, so equal rows are on one side and a row's side does not depend on its place in the file.
    `template`: auto (the tokenizer's own, else plain), tokenizer, a name, or the path of a Jinja file.
    `system`: the system message of conversations that have none. `seq_len` None: as long as the longest row.
    `too_long`: of conversations longer than that: drop; cut_prompt (cut at the left, keep the last answer whole);
    cut_end. Texts are cut into pieces of `seq_len` (but cut_end keeps the first one alone).
    """

    sources: tuple[DataSource, ...]
    validation: float | int | str | None = None
    template: str = "auto"
    system: str | None = None
    loss_on: str = "assistant"
    seq_len: int | None = None
    too_long: str = "drop"
    seed: int = 0


@dataclass(frozen=True)
class Held:
    """A share of the rows (0 to 1), a number of rows, or a path."""

    about: str = ""

    def read(self, value: Any, path: Path, report: Report) -> Any:
        if isinstance(value, str) and value:
            try:
                value = float(value) if "e" in value.lower() else value  # YAML 1.1 reads 1e-2 as text
            except ValueError:
                return value
        if isinstance(value, bool) or not isinstance(value, int | float | str) or value == "":
            report(path, f"'val' cannot be {value!r}", "a share such as 0.1, a number of rows such as 200, or a path")
            return None
        if isinstance(value, str) or value == 0:
            return value or None
        if value < 0 or (isinstance(value, float) and not 0 < value < 1):
            report(path, f"'val' cannot be {value}", "a share between 0 and 1, or a whole number of rows")
            return None
        return value

    def json(self) -> dict[str, Any]:
        kinds = [
            {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
            {"type": "integer", "minimum": 0},
            {"type": "string", "minLength": 1},
        ]
        return {"anyOf": kinds} | ({"description": self.about} if self.about else {})


_SOURCE = Record(
    {
        "path": Text("a file, folder, glob, hf://owner/name[@revision][:split or file], or sample:chat"),
        "format": Choice(FORMATS, "auto: detected from the columns"),
        "columns": MapOf(
            Text(), "our role (prompt, input, response, system, messages, text, ...) -> the file's column"
        ),
    },
    required=("path",),
    short="path",
)
# The keys of train.yaml that are about data.
FIELDS: dict[str, Shape] = {
    "data": ListOf(_SOURCE, "what is trained on: files, folders, globs, Hub data sets, samples", lone=True),
    "val": Held("held out for validation: a share, a number of rows, or the path of other data"),
    "template": Text("chat template: auto, tokenizer, plain, raw, chatml, llama3, mistral, ..., or a .jinja file"),
    "system": Text("system message of conversations that have none"),
    "loss_on": Choice(LOSS_ON, "which tokens are trained on: every answer, the last answer, everything"),
    "too_long": Choice(TOO_LONG, "conversations longer than seq_len: drop, cut_prompt (from its left) or cut_end"),
}


def _source_of(value: str | Mapping[str, Any]) -> DataSource:
    if isinstance(value, str):
        return DataSource(value)
    return DataSource(value["path"], value.get("format") or "auto", dict(value.get("columns") or {}))


def settings_of(value: Mapping[str, Any], *, seq_len: int | None = None, seed: int = 0) -> DataSettings:
    """The settings that a checked record of FIELDS gives."""
    return DataSettings(
        sources=tuple(_source_of(one) for one in value.get("data") or ()),
        validation=value.get("val"),
        template=value.get("template") or "auto",
        system=value.get("system"),
        loss_on=value.get("loss_on") or "assistant",
        seq_len=seq_len,
        too_long=value.get("too_long") or "drop",
        seed=seed,
    )
