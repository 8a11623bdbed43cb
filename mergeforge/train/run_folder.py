"""RunFolder: what a training run leaves, where, and how it gets there whole.

run.json        what was trained on what, with which versions; state: running, interrupted, finished
metrics.jsonl   a line for each step and validation
report.html     curves and samples
adapter/        the PEFT adapter (full training: model/), with tokenizer and chat template
merge.yaml      a recipe that folds the adapter into its base
checkpoints/    step-N: adapter, optimizer, scheduler, random state
data/           tokens
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergeforge.errors import OutputError, SourceError
from mergeforge.io.disk import sync_folder, write_durably

PARTIAL = ".partial"
STEP = "step-"
RUN = "run.json"
RECIPE = "merge.yaml"
RUNNING, INTERRUPTED, FINISHED = "running", "interrupted", "finished"


class RunFolder:
    """The folder of one run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.adapter = root / "adapter"
        self.model = root / "model"
        self.checkpoints = root / "checkpoints"
        self.partial = self.checkpoints / PARTIAL
        self.metrics = root / "metrics.jsonl"
        self.report = root / "report.html"
        self.data = root / "data"
        self.recipe = root / RECIPE
        self.merged = root / "merged"
        self._samples = self.data / "samples-before.json"
        self.base = root / "base"  # of sample:tiny

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one process. Raises OutputError while another one has it."""
        self.root.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise OutputError(f"another run holds {self.root}", hint="wait for it, or name another output") from None
        finally:
            os.close(handle)

    def manifest(self) -> dict[str, Any] | None:
        """run.json; None where nothing has run here. Raises OutputError where it cannot be read."""
        path = self.root / RUN
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise OutputError(f"{path} cannot be read: {error}", hint="--fresh starts over") from None
        return found if isinstance(found, dict) else {}

    def settings(self) -> dict[str, Any]:
        """What the run was asked for, its folder among it."""
        return {**(self.manifest() or {}).get("settings", {}), "output": str(self.root)}

    def record(self, facts: Mapping[str, Any]) -> None:
        """Write run.json, whole or not at all."""
        write_durably(self.root / RUN, json.dumps(facts, indent=2, default=str).encode() + b"\n")

    def record_samples(self, answers: Mapping[str, str]) -> None:
        """Keep what was answered before training."""
        write_durably(self._samples, json.dumps(answers, ensure_ascii=False).encode())

    def samples_before(self) -> dict[str, str]:
        """Prompt -> answer before training; empty where none was kept."""
        try:
            return dict(json.loads(self._samples.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def clear(self) -> None:
        """Take away what an earlier run left, its data excepted."""
        for path in (self.adapter, self.model, self.checkpoints):
            shutil.rmtree(path, ignore_errors=True)
        for path in (self.metrics, self.report, self.recipe, self.root / RUN):
            path.unlink(missing_ok=True)

    def steps(self) -> list[int]:
        """The steps of which there is a whole checkpoint, ascending."""
        names = [path.name for path in self.checkpoints.glob(f"{STEP}*")]
        return sorted(int(name.removeprefix(STEP)) for name in names if name.removeprefix(STEP).isdecimal())

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"{STEP}{step}"

    def commit_checkpoint(self, made: Path, step: int) -> Path:
        """Give a checkpoint that lies under PARTIAL its name, once all of it is on the disk."""
        for path in made.rglob("*"):
            if path.is_file():
                _sync(path)
        sync_folder(made)
        final = self.checkpoint(step)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(made, final)
        sync_folder(self.checkpoints)
        return final

    def drop_old(self, keep: int, best: int | None) -> None:
        """Leave the newest `keep` checkpoints, and the best one."""
        for step in self.steps()[:-keep]:
            if step != best:
                shutil.rmtree(self.checkpoint(step))

    def metric_values(self, key: str) -> list[float]:
        """The values of a key in metrics.jsonl, in order."""
        if not self.metrics.exists():
            return []
        lines = (json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines())
        return [line[key] for line in lines if key in line]

    def cut_metrics(self, step: int) -> None:
        """Forget what was noted after `step`: it is done again."""
        if not self.metrics.exists():
            return
        kept = [line for line in self.metrics.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        write_durably(self.metrics, "".join(line + "\n" for line in kept).encode())


def _step_of(line: str) -> float:
    """The step of a line; a line that a crash cut short counts as the last of all."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def newest_run(where: Path = Path("runs")) -> RunFolder:
    """The run of `where` that was finished last. Raises SourceError where there is none."""
    found = []
    for path in where.glob(f"*/{RUN}"):
        with contextlib.suppress(OutputError):
            if (RunFolder(path.parent).manifest() or {}).get("state") == FINISHED:
                found.append(path)
    if not found:
        raise SourceError(f"there is no finished run in {where}/", hint="name its folder")
    return RunFolder(max(found, key=lambda path: path.stat().st_mtime).parent)
