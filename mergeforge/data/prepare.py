"""Preparing: the rows of all sources -> token stores on disk, once for the same rows, settings and tokenizer."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.data.counts import Counts, counts_of
from mergeforge.data.fingerprint import fingerprint_of
from mergeforge.data.pipeline import HELD_OUT, Filling, Watch
from mergeforge.data.render import Renderer, make_renderer
from mergeforge.data.settings import DataSettings, DataSource
from mergeforge.data.source_reader import Decision, decisions
from mergeforge.data.split import held_out
from mergeforge.data.token_store import StoreWriter, TokenStore
from mergeforge.errors import SourceError
from mergeforge.io.disk import disk_error, sync_folder, write_durably

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FACTS = "facts.json"
_STALE = 86400.0  # seconds after which an unfinished folder belongs to nobody


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
    """Write the stores into a folder; what else is known of them."""
    writer = StoreWriter(part)
    filling = Filling(settings, renderer, writer, watch)
    try:
        for source in settings.sources:
            filling.add(source, source.path)
        own = writer.count
        for source in validation_source(settings):
            filling.add(source, f"{HELD_OUT}{source.path}")
    finally:
        writer.close()
    notes = [*filling.notes(), *_name_sides(settings, writer, own)]
    return {
        "counts": filling.counts().json(),
        "decisions": [asdict(one) for one in decisions(filling.formats)],
        "template": renderer.template.jinja if filling.conversations else "",
        "template_name": renderer.template.name if filling.conversations else "",
        "notes": notes,
    }


def _name_sides(settings: DataSettings, writer: StoreWriter, own: int) -> list[str]:
    """Make the stores `train` and `validation` of all examples, of which the first `own` are not held out as data.

    Returns notes.
    """
    import numpy as np

    keys, notes = writer.keys(), []
    held = np.arange(writer.count) >= own
    if isinstance(settings.validation, int | float):
        held = held_out(keys, settings.validation)
    train = ~held
    if isinstance(settings.validation, str):
        train &= ~np.isin(keys, keys[held])
        if again := int((~held).sum() - train.sum()):
            notes.append(f"{again} examples are in the validation data too; they are not trained on")
    if not train.any():
        raise SourceError("every row is in the validation data too: none is left to train on")
    writer.name("train", np.flatnonzero(train))
    if held.any():
        writer.name("validation", np.flatnonzero(held))
    return notes
