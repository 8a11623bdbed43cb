"""RunFolder: the files of a training run. Each appears under its name only when it is complete.

run.json        what was trained on what, with which versions; state: running, interrupted, finished
metrics.jsonl   one line per step and per validation
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
from collections.abc import Iterator, Mapping, Sequence
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
        self.base = root / "base"  # the model of sample:tiny
        self.eva = self.data / "eva.safetensors"  # where `lora.init: eva` starts
        self._samples = self.data / "samples-before.json"
        self._base_scores = self.data / "base-scores.json"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder for this process. Raises OutputError while another process has it."""
        self.root.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            text = f"another process is training in {self.root}"
            raise OutputError(text, hint="wait until it ends, or choose another output") from None
        finally:
            os.close(handle)

    def manifest(self) -> dict[str, Any] | None:
        """run.json; None where nothing has run. Raises OutputError where it cannot be read."""
        path = self.root / RUN
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise OutputError(f"cannot read {path}: {error}", hint="delete it to start over") from None
        return manifest if isinstance(manifest, dict) else {}

    def settings(self) -> dict[str, Any]:
        """The settings that the run was started with, including its folder."""
        return {**(self.manifest() or {}).get("settings", {}), "output": str(self.root)}

    def record(self, manifest: Mapping[str, Any]) -> None:
        """Write run.json atomically."""
        write_durably(self.root / RUN, json.dumps(manifest, indent=2, default=str).encode() + b"\n")

    def record_samples(self, samples: Mapping[str, str]) -> None:
        """Store the samples (prompt -> answer) from before training."""
        write_durably(self._samples, json.dumps(samples, ensure_ascii=False).encode())

    def samples_before(self) -> dict[str, str]:
        """Prompt -> answer from before training; empty where there are none."""
        try:
            return dict(json.loads(self._samples.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def record_base_scores(self, scores: Sequence[tuple[float, float]]) -> None:
        """Store two numbers of each validation row from before training: nats and tokens, or margin and agreement."""
        write_durably(self._base_scores, json.dumps(scores).encode())

    def base_scores(self) -> list[tuple[float, float]]:
        """What `record_base_scores` stored; empty where there is nothing."""
        try:
            return [(float(first), float(second)) for first, second in json.loads(self._base_scores.read_bytes())]
        except (OSError, ValueError, TypeError):
            return []

    def clear(self) -> None:
        """Delete what an earlier run left, except its tokenized data."""
        for path in (self.adapter, self.model, self.checkpoints):
            shutil.rmtree(path, ignore_errors=True)
        for path in (self.metrics, self.report, self.recipe, self.root / RUN):
            path.unlink(missing_ok=True)

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending."""
        names = [path.name for path in self.checkpoints.glob(f"{STEP}*")]
        return sorted(int(name.removeprefix(STEP)) for name in names if name.removeprefix(STEP).isdecimal())

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"{STEP}{step}"

    def commit_checkpoint(self, written: Path, step: int) -> Path:
        """Give a checkpoint written under PARTIAL its final name, once all of it is on the disk."""
        for path in written.rglob("*"):
            if path.is_file():
                _sync(path)
        sync_folder(written)
        final = self.checkpoint(step)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(written, final)
        sync_folder(self.checkpoints)
        return final

    def drop_old(self, keep: int, best: int | None) -> None:
        """Delete all checkpoints but the newest `keep` and the best one."""
        for step in self.steps()[:-keep]:
            if step != best:
                shutil.rmtree(self.checkpoint(step))

    def metric_values(self, key: str) -> list[float]:
        """The values of a key in metrics.jsonl, in order."""
        return [line[key] for line in self.metric_lines() if key in line]

    def metric_lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, in order; one that a crash cut short is left out."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if _step_of(line) < float("inf")]

    def cut_metrics(self, step: int) -> None:
        """Remove the metrics after `step`, which will be trained again."""
        if not self.metrics.exists():
            return
        lines = [line for line in self.metrics.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        write_durably(self.metrics, "".join(line + "\n" for line in lines).encode())


def _step_of(line: str) -> float:
    """The step of a line of metrics; infinity for a line that a crash cut short."""
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
    """The run in `where` that finished last. Raises SourceError where there is none."""
    finished = []
    for path in where.glob(f"*/{RUN}"):
        with contextlib.suppress(OutputError):
            if (RunFolder(path.parent).manifest() or {}).get("state") == FINISHED:
                finished.append(path)
    if not finished:
        raise SourceError(f"there is no finished run in {where}/", hint="name the run's train.yaml")
    return RunFolder(max(finished, key=lambda path: path.stat().st_mtime).parent)
