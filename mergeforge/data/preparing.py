"""Preparing: the rows of all sources -> token stores on disk, once for the same rows, settings and tokenizer."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.data.conversations import BadRow, EmptyRow
from mergeforge.data.counting import KINDS, Counts, Tally, counts_of, total_of
from mergeforge.data.fingerprints import fingerprint_of
from mergeforge.data.formats import Format
from mergeforge.data.masks import APART
from mergeforge.data.reading import Decision, OpenFile, decisions, open_files
from mergeforge.data.rendering import Renderer, make_renderer
from mergeforge.data.rows import Bad
from mergeforge.data.settings import DataSettings, DataSource
from mergeforge.data.splitting import held_out
from mergeforge.data.stores import StoreWriter, TokenStore
from mergeforge.disk import disk_error, sync_folder, write_durably
from mergeforge.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FACTS = "facts.json"
_FEWEST = 0.01  # of the rows; with less left something is wrong with all of them
_STALE = 86400.0  # seconds after which an unfinished folder belongs to nobody

Watch = Callable[[int], None]  # called with the rows so far


@dataclass(frozen=True)
class Prepared:
    """Data ready to train on. `template`: the Jinja that was used; `folder`: where the stores lie.

    `fingerprint`: of rows, settings, tokenizer and template; the same one means the same tokens. `notes`: what a
    person should know of it.
    """

    train: TokenStore
    validation: TokenStore | None
    counts: Counts
    decisions: tuple[Decision, ...]
    template: str
    template_name: str
    fingerprint: str
    folder: Path
    notes: tuple[str, ...] = ()


def prepare(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    also: str = "",
    watch: Watch | None = None,
) -> Prepared:
    """Read, split, render and mask all rows into stores inside `folder`, or take those that are there already.

    `also`: text that makes the fingerprint another one. Raises SourceError where next to nothing could be trained on.
    """
    renderer = make_renderer(settings, tokenizer)
    fingerprint = fingerprint_of(settings, validation_source(settings), renderer, also)
    home = folder / fingerprint[:16]
    if not (home / FACTS).is_file():
        _make(settings, renderer, fingerprint, home, watch or (lambda rows: None))
    return open_prepared(home)


def open_prepared(folder: Path) -> Prepared:
    """What `prepare` left in a folder. Raises SourceError."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{folder} holds no prepared data: {error}") from None
    validation = TokenStore.open(folder, "validation") if (folder / "validation.index").is_file() else None
    return Prepared(
        train=TokenStore.open(folder, "train"),
        validation=validation,
        counts=counts_of(facts["counts"]),
        decisions=tuple(
            Decision(**{**one, "files": tuple(one["files"]), "unused": tuple(one["unused"])})
            for one in facts["decisions"]
        ),
        template=facts["template"],
        template_name=facts["template_name"],
        fingerprint=facts["fingerprint"],
        folder=folder,
        notes=tuple(facts["notes"]),
    )


def validation_source(settings: DataSettings) -> tuple[DataSource, ...]:
    """The source that is held out, where it is data of its own."""
    return (DataSource(settings.validation),) if isinstance(settings.validation, str) else ()


def _make(settings: DataSettings, renderer: Renderer, fingerprint: str, home: Path, watch: Watch) -> None:
    """Write the stores beside their place, then move them there: they are whole or absent."""
    part = _part(home)
    try:
        facts = _write(settings, renderer, part, watch)
        facts |= {"fingerprint": fingerprint}
        write_durably(part / FACTS, json.dumps(facts, indent=1).encode())
        sync_folder(part)
        if home.exists() and not (home / FACTS).exists():
            shutil.rmtree(home)
        try:
            os.rename(part, home)
        except OSError:  # another process was faster
            if not (home / FACTS).is_file():
                raise
        sync_folder(home.parent)
    except OSError as error:
        raise disk_error(error, str(home)) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _part(home: Path) -> Path:
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        for left in home.parent.glob("*.part"):
            if time.time() - left.stat().st_mtime > _STALE:
                shutil.rmtree(left, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix=f"{home.name}.", suffix=".part", dir=home.parent))
    except OSError as error:
        raise disk_error(error, str(home.parent)) from error


def _write(settings: DataSettings, renderer: Renderer, part: Path, watch: Watch) -> dict[str, Any]:
    import numpy as np

    writer, pass_ = StoreWriter(part), _Pass(settings, renderer, watch)
    try:
        for source in settings.sources:
            pass_.source(source, source.path, writer)
        trained_on = writer.count
        for source in validation_source(settings):
            pass_.source(source, f"validation: {source.path}", writer)
    finally:
        writer.close()
    counted = pass_.counted(writer)
    keys = writer.keys()
    held = np.arange(writer.count) >= trained_on
    notes = list(pass_.notes())
    train = ~held
    if isinstance(settings.validation, int | float):
        held = held_out(keys, settings.validation)
        train = ~held
    elif held.any():
        train &= ~np.isin(keys, keys[held])
        if again := int((~held).sum() - train.sum()):
            notes.append(f"{again} examples are in the validation data too; they are not trained on")
    if not train.any():
        raise SourceError("every row is in the validation data too: none is left to train on")
    writer.name("train", np.flatnonzero(train))
    if held.any():
        writer.name("validation", np.flatnonzero(held))
    return {
        "counts": counted.json(),
        "decisions": [asdict(one) for one in decisions(pass_.formats)],
        "template": renderer.template.jinja if pass_.conversations else "",
        "template_name": renderer.template.name if pass_.conversations else "",
        "notes": notes,
    }


class _Pass:
    """One way through all rows: what was decided, and what was counted."""

    def __init__(self, settings: DataSettings, renderer: Renderer, watch: Watch) -> None:
        self.settings, self.renderer, self.watch = settings, renderer, watch
        self.formats: list[tuple[str, str, Format]] = []
        self.conversations = 0
        self.several = 0
        self._rows = 0
        self._parts: list[tuple[str, Tally, int, int, int]] = []

    def source(self, source: DataSource, name: str, writer: StoreWriter) -> None:
        start, before, tally = writer.count, writer.trained, Tally()
        for file in open_files(source):
            self.formats.append((name, file.file.name, file.format))
            self._file(file, tally, writer)
        _check_enough(name, tally, self.settings)
        self._parts.append((name, tally, start, writer.count, writer.trained - before))

    def _file(self, file: OpenFile, tally: Tally, writer: StoreWriter) -> None:
        for row in file.rows:
            self._rows += 1
            self.watch(self._rows)
            if isinstance(row, Bad):
                tally.skip(row.place, "bad", row.why)
                continue
            try:
                read = file.format.read(row.value, self.settings.system)
                found = self.renderer.render(read)
            except BadRow as error:
                tally.skip(row.place, "bad", str(error))
                continue
            except EmptyRow as error:
                tally.skip(row.place, "empty", str(error))
                continue
            if not found.examples:
                tally.skip(row.place, "too_long", f"more than {self.settings.seq_len} tokens")
                continue
            self.conversations += file.format.name != "text"
            self.several += APART in found.way
            tally.kinds["used"] += 1
            tally.kinds["cut"] += found.cut
            key = read.key(self.settings.seed)
            for one in found.examples:
                writer.add(one, key)

    def counted(self, writer: StoreWriter) -> Counts:
        """All counts, once the writer is closed."""
        lengths, keys = writer.lengths(), writer.keys()
        parts: dict[str, Counts] = {}
        for name, tally, start, stop, trained in self._parts:
            while name in parts:
                name += " (again)"
            parts[name] = tally.counts(lengths[start:stop], trained, keys[start:stop])
        own = {name: one for name, one in parts.items() if not name.startswith("validation: ")}
        stop = sum(one.examples for one in own.values())
        return replace(total_of(own, lengths[:stop], keys[:stop]), sources=parts)

    def notes(self) -> Iterator[str]:
        if self.several:
            rows = f"{self.several} row{'s' if self.several > 1 else ''}"
            yield f"the template renders earlier answers otherwise: in {rows} each answer became an example of its own"
        if self.conversations:
            yield from self.renderer.notes()


def _check_enough(name: str, tally: Tally, settings: DataSettings) -> None:
    """Raises SourceError where next to nothing of a source is left."""
    rows = tally.kinds["used"] + sum(tally.kinds[kind] for kind in KINDS)
    if tally.kinds["used"] > _FEWEST * rows or not rows:
        return
    why = ", ".join(f"{tally.kinds[kind]} {kind.replace('_', ' ')}" for kind in KINDS if tally.kinds[kind])
    lines = "\n".join(f"  {one.place}: {one.why}" for one in tally.skipped[:8])
    hint = "mergeforge data preview shows one of them"
    if tally.kinds["too_long"] > rows / 2:
        hint = "a larger seq_len, or too_long: cut_prompt"
    raise SourceError(f"of {rows} rows of {name}, {tally.kinds['used']} can be trained on ({why}):\n{lines}", hint=hint)
