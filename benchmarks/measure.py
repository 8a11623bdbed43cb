"""What the benchmarks share: running a command and measuring it, making inputs once, printing a table."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergeforge.operations.synthetic_models import model_shape, write_adapter, write_model

PYTHON = sys.executable
# A small process in between: the system counts a parent's memory as its child's (exec_mmap, vfork).
LAUNCHER = """
import json, os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
seconds = time.perf_counter() - started
facts = [os.waitstatus_to_exitcode(status), seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024]
open(sys.argv[1], "w").write(json.dumps(facts))
"""


@dataclass(frozen=True)
class Measured:
    """A finished process: wall-clock and CPU seconds, peak resident memory in bytes."""

    seconds: float
    cpu: float
    peak: int


def measure(command: Sequence[str]) -> Measured:
    """Run a command to its end. Raises CalledProcessError with its output when it fails.

    Python may write bytecode caches, as it does for packages that pip has installed.
    """
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.NamedTemporaryFile("r") as facts:
        launcher = [PYTHON, "-S", "-c", LAUNCHER, facts.name, *command]
        done = subprocess.run(
            launcher, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True, env=env
        )
        code, seconds, cpu, peak = json.load(facts)
    if code:
        raise subprocess.CalledProcessError(code, list(command), done.stdout)
    return Measured(seconds, cpu, peak)


def synced(command: Sequence[str], out: Path) -> list[str]:
    """The command, and then sync: it ends when its output is on the disk, as mergeforge's own runs do."""
    return ["sh", "-c", f"{shlex.join(command)} && sync -f {shlex.quote(str(out))}"]


def prepare_cache(folders: Iterable[Path], *, cached: bool) -> None:
    """Read weights into the page cache or drop them from it, so that every run starts alike."""
    for path in (path for folder in folders for path in folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            if cached:
                piece = bytearray(8 << 20)
                while file.readinto(piece):
                    pass
            else:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def import_seconds() -> float:
    """Seconds that importing torch alone takes: the median of three processes."""
    return statistics.median(measure([PYTHON, "-c", "import torch"]).seconds for _ in range(3))


def in_turn(
    rounds: int, cases: dict[str, Callable[[], Measured]], before: Callable[[], None] = lambda: None
) -> dict[str, list[Measured]]:
    """Run every case once per round, so that slow spells of the machine hit all alike; call `before` ahead of each."""
    found: dict[str, list[Measured]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            before()
            found[name].append(case())
    return found


def median(found: Iterable[Measured], of: Callable[[Measured], float]) -> float:
    return statistics.median(of(one) for one in found)


def model(root: Path, shape: str, *, seed: int = 0, near: int | None = None) -> Path:
    """A random model of a shape, made once."""
    folder = root / (f"{shape}-{seed}" if near is None else f"{shape}-{near}-tuned-{seed}")
    if not (folder / "config.json").exists():
        write_model(folder, model_shape(shape), seed=seed, near=near)
    return folder


def adapter(root: Path, shape: str, *, rank: int = 16) -> Path:
    """A random all-linear adapter of a shape, made once."""
    folder = root / f"{shape}-adapter-{rank}"
    if not (folder / "adapter_config.json").exists():
        write_adapter(folder, model_shape(shape), str(root / f"{shape}-0"), rank=rank)
    return folder


def mergeforge(recipe: dict[str, object], out: Path, *options: str) -> Measured:
    """One `mergeforge run` of a recipe into a new folder."""
    import yaml

    shutil.rmtree(out, ignore_errors=True)
    path = out.parent / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return measure([PYTHON, "-m", "mergeforge", "run", str(path), "--out", str(out), "--device", "cpu", *options])


def machine() -> str:
    """The machine in one line."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        memory = int(Path("/proc/meminfo").read_text(encoding="utf-8").split()[1]) / 2**20
    except (OSError, StopIteration):
        return name
    return f"{len(os.sched_getaffinity(0))} cores of {name}, {memory:.0f} GiB, {platform.system()} {platform.release()}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
