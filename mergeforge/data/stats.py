"""What the rows hold, without a tokenizer: lengths are in characters here."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mergeforge.data.conversation import Conversation, TextSample
from mergeforge.data.counts import DataStats, RecordCounter, total_stats
from mergeforge.data.formats import Format
from mergeforge.data.preference import PreferenceSample
from mergeforge.data.settings import DataSettings, DataSource
from mergeforge.data.source_reader import Decision, merge_decisions, open_files, parse_file
from mergeforge.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class CharacterStats:
    """Statistics with lengths in characters, and how each source is read."""

    counts: DataStats
    decisions: tuple[Decision, ...]


def character_stats(settings: DataSettings) -> CharacterStats:
    """Read all rows once. Raises SourceError and RecipeError."""
    if not settings.sources:
        raise RecipeError("no data is given")
    import numpy as np

    parts = [source_stats(source) for source in settings.sources]
    by_name: dict[str, DataStats] = {}
    for source, (counter, lengths, keys, _) in zip(settings.sources, parts, strict=True):
        by_name[_unused_name(source.path, by_name)] = replace(counter.stats(lengths, 0, keys), tokens=0)
    all_lengths = np.concatenate([lengths for _, lengths, _, _ in parts])
    all_keys = np.concatenate([keys for _, _, keys, _ in parts])
    formats = [format for part in parts for format in part[3]]
    return CharacterStats(replace(total_stats(by_name, all_lengths, all_keys), tokens=0), merge_decisions(formats))


def first_prompts(settings: DataSettings, count: int) -> list[list[Mapping[str, Any]]]:
    """The messages before the last answer of the first `count` conversations, to ask a model before and after."""
    prompts: list[list[Mapping[str, Any]]] = []
    for source in settings.sources:
        for file in open_files(source):
            for row in parse_file(file, RecordCounter(), settings.system):
                messages = row.content.messages if isinstance(row.content, Conversation) else ()
                answers = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index]
                if answers:
                    prompts.append(list(messages[: answers[-1]]))
                if len(prompts) == count:
                    return prompts
    return prompts


def source_stats(
    source: DataSource, seed: int = 0
) -> tuple[RecordCounter, NDArray[np.int64], NDArray[np.uint64], list[tuple[str, str, Format]]]:
    """(counter, characters of each usable row, its key, formats)."""
    import numpy as np

    counter, lengths, keys, formats = RecordCounter(), array("q"), array("Q"), []
    for file in open_files(source):
        formats.append((source.path, file.file.name, file.format))
        for row in parse_file(file, counter):
            counter.kinds["used"] += 1
            lengths.append(_characters(row.content))
            keys.append(row.content.key(seed))
    return counter, np.asarray(lengths, np.int64), np.asarray(keys, np.uint64), formats


def _characters(content: Conversation | TextSample | PreferenceSample) -> int:
    if isinstance(content, TextSample):
        return len(content.text)
    if isinstance(content, PreferenceSample):
        return sum(_characters(answer.conversation) for answer in content.answers)
    return sum(len(str(message["content"])) for message in content.messages)


def _unused_name(name: str, taken: Mapping[str, Any]) -> str:
    while name in taken:
        name += " (again)"
    return name
