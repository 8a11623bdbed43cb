"""Surveying: what rows hold, without a tokenizer. Lengths are of characters here."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mergeforge.data.conversation import Conversation, Passage
from mergeforge.data.counts import Counts, Tally, total_of
from mergeforge.data.formats import Format
from mergeforge.data.settings import DataSettings, DataSource
from mergeforge.data.source_reader import Decision, decisions, open_files, read_file
from mergeforge.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Survey:
    """Counts with lengths in characters, and how each source is read."""

    counts: Counts
    decisions: tuple[Decision, ...]


def survey(settings: DataSettings) -> Survey:
    """Read all rows once. Raises SourceError and RecipeError."""
    parts = [survey_source(source) for source in settings.sources]
    lengths, keys = _joined([one[1] for one in parts], "int64"), _joined([one[2] for one in parts], "uint64")
    counted: dict[str, Counts] = {}
    for source, (tally, length, key, _) in zip(settings.sources, parts, strict=True):
        counted[_free(source.path, counted)] = replace(tally.counts(length, 0, key), tokens=0)
    formats = [one for part in parts for one in part[3]]
    return Survey(replace(total_of(counted, lengths, keys), tokens=0), decisions(formats))


def prompts_of(settings: DataSettings, count: int) -> list[list[Mapping[str, Any]]]:
    """The messages before the last answer of the first `count` conversations: to ask a model before and after."""
    found: list[list[Mapping[str, Any]]] = []
    for source in settings.sources:
        for file in open_files(source):
            for row in read_file(file, Tally(), settings.system):
                messages = row.content.messages if isinstance(row.content, Conversation) else ()
                answers = [at for at, one in enumerate(messages) if one["role"] == "assistant" and at]
                if answers:
                    found.append(list(messages[: answers[-1]]))
                if len(found) == count:
                    return found
    return found


def survey_source(
    source: DataSource, seed: int = 0
) -> tuple[Tally, NDArray[np.int64], NDArray[np.uint64], list[tuple[str, str, Format]]]:
    """(tally, characters and key of each row that can be used, formats)."""
    import numpy as np

    tally, lengths, keys, formats = Tally(), array("q"), array("Q"), []
    for file in open_files(source):
        formats.append((source.path, file.file.name, file.format))
        for row in read_file(file, tally):
            tally.kinds["used"] += 1
            lengths.append(_characters(row.content))
            keys.append(row.content.key(seed))
    return tally, np.asarray(lengths, np.int64), np.asarray(keys, np.uint64), formats


def _characters(content: Conversation | Passage) -> int:
    if isinstance(content, Passage):
        return len(content.text)
    return sum(len(str(message["content"])) for message in content.messages)


def _joined(parts: list[Any], kind: str) -> Any:
    import numpy as np

    if not parts:
        raise RecipeError("no data is named")
    return np.concatenate(parts).astype(kind)


def _free(name: str, taken: Mapping[str, Any]) -> str:
    while name in taken:
        name += " (again)"
    return name
