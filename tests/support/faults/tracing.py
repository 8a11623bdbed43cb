"""Commands under strace, which kills them or makes a system call fail at a chosen place."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE

import pytest

from support.faults.warm import GO, Child, Ended, Warm


def traced(
    warm: Warm, arguments: Sequence[str], folder: Path, call: str, inject: str, *, everywhere: bool = False
) -> Ended:
    """Run it with `inject` (strace's words) at a system call of its main thread, or of every thread."""
    child = warm.start(arguments, folder, traced=True, eager=True)
    words = ["-e", f"trace={call}", "-e", f"inject={call}:{inject}", *(["-f"] if everywhere else [])]
    assert follow(child, *words), "strace could not attach"
    return child.wait()


def follow(child: Child, *words: str) -> bool:
    """Let a child that waits for it run under strace; False where strace may not look at it."""
    with following(child, *words) as attached:
        return attached


@contextmanager
def following(child: Child, *words: str) -> Iterator[bool]:
    """The same, while something else is done."""
    with subprocess.Popen(["strace", "-qq", "-o", "/dev/null", "-p", str(child.pid), *words], stderr=PIPE) as strace:
        while strace.poll() is None and not _has_tracer(child.pid):
            time.sleep(0.0005)
        attached = strace.poll() is None
        child.kill(GO if attached else signal.SIGKILL)
        yield attached
        strace.communicate()


def _has_tracer(pid: int) -> bool:
    return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()


def need_strace(warm: Warm) -> None:
    """Skip where strace is not here, or may not look at other processes."""
    if shutil.which("strace") is None:
        pytest.skip("no strace")
    child = warm.start(["list", "methods"], traced=True)
    attached = follow(child, "-e", "trace=none")
    child.wait()
    if not attached:
        pytest.skip("strace may not attach here")
