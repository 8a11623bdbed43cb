"""mergeforge commands in processes of their own that start in milliseconds and can be killed in every way.

A server process imports everything once and forks a child for each command, so that a thousand runs do not import
torch a thousand times. A child may wait for a tracer, have limits on what it uses, and sync after each tile.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KILLED = -signal.SIGKILL
DEAD = 137  # the exit code of a child that killed itself
GO = signal.SIGUSR1  # what a child that is to be traced waits for
PR_SET_PTRACER = 0x59616D61  # linux/prctl.h


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: by that signal), and what it said."""

    code: int
    out: str
    err: str


class Child:
    """A command that is running."""

    def __init__(self, server: Warm, pid: int) -> None:
        self._server = server
        self.pid = pid

    def kill(self, number: int = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> Ended:
        code = self._server._answer()["code"]
        out, err = (path.read_text(errors="replace") for path in self._server.said)
        return Ended(code, out, err)


class Warm:
    """The server; runs one command at a time."""

    def __init__(self, **env: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        self._folder = tempfile.TemporaryDirectory()
        self.said = (Path(self._folder.name) / "out", Path(self._folder.name) / "err")
        self._imported = Path(self._folder.name) / "imported"
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**kept, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **env},
            text=True,
            start_new_session=True,
        )
        self._answer()

    def start(self, arguments: Sequence[str], folder: Path | None = None, **how: Any) -> Child:
        """Start a command in a folder. `how`: see Order."""
        said = [str(path) for path in self.said]
        order = {"arguments": list(map(str, arguments)), "folder": str(folder or Path.cwd()), "said": said, **how}
        assert self._process.stdin
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Child(self, self._answer()["pid"])

    def run(self, arguments: Sequence[str], folder: Path | None = None, **how: Any) -> Ended:
        return self.start(arguments, folder, **how).wait()

    def learn(self, arguments: Sequence[str], folder: Path | None = None) -> Ended:
        """Run a command; the server imports what it needed, so that later ones have it."""
        return self.run(arguments, folder, imported=str(self._imported))

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "the server has died"
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass(frozen=True)
class Order:
    """What a child does. `traced`: wait for GO first. `eager`: sync after each tile. `hasty`: never wait
    long between tries. `dies_at`: end at that change of the disk (1-based). `limits`: RLIMIT_* -> soft
    limit; `DATA_MORE`: bytes that it may take beyond what it has. `env` is added to the environment. `imported`: a file
    for the names of its modules."""

    arguments: list[str]
    folder: str
    said: list[str]
    traced: bool = False
    eager: bool = False
    hasty: bool = False
    dies_at: int = 0
    limits: dict[str, int] | None = None
    env: dict[str, str] | None = None
    imported: str = ""


def serve() -> None:
    import huggingface_hub  # noqa: F401
    import torch

    import mergeforge.data
    import mergeforge.hub.publish
    import mergeforge.operations.verify  # noqa: F401

    torch.set_num_threads(1)
    torch.zeros(9).bfloat16()  # torch looks at the processor now
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    tell(answers, ready=True)
    for line in sys.stdin:
        order = Order(**json.loads(line))
        ready, waited = os.pipe()
        pid = os.fork()
        if pid == 0:
            os._exit(obey(order, waited))
        os.close(waited)
        os.read(ready, 1)  # ends when the child has closed it
        os.close(ready)
        tell(answers, pid=pid)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        for name in Path(order.imported).read_text().split() if order.imported else ():
            with suppress(ImportError):
                importlib.import_module(name)
        tell(answers, code=code)


def tell(answers: Any, **facts: Any) -> None:
    answers.write(json.dumps(facts) + "\n")
    answers.flush()


def obey(order: Order, ready: int) -> int:
    """Run the command as `python -m mergeforge` would; its exit code."""
    from mergeforge.cli import run_command
    from mergeforge.execute import executor

    for number, path in enumerate(order.said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
    os.chdir(order.folder)
    os.environ.update(order.env or {})
    if order.eager:
        executor.SYNC_SECONDS = 0.0
    if order.hasty:
        be_hasty()
    if order.dies_at:
        die_at(order.dies_at)
    if order.traced:
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(-1))
        signal.pthread_sigmask(signal.SIG_BLOCK, {GO})
    os.close(ready)
    if order.traced:
        signal.sigwait({GO})
    limit(order.limits or {})
    try:
        code = run_command(order.arguments)
    except BaseException:
        traceback.print_exc()
        code = 1
    if order.imported:
        Path(order.imported).write_text("\n".join(sys.modules))
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def be_hasty() -> None:
    from mergeforge.io.remote import retry

    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.01))
    retry.WAITS = tuple(0.01 for _ in retry.WAITS)
    retry.LONGEST = 0.01


def die_at(number: int) -> None:
    from support.faults.breaking import CHANGING, Strikes

    strikes = Strikes(number, die, lasting=False)
    for name in CHANGING:
        setattr(os, name, strikes.around(getattr(os, name)))


def die(original: Any, *arguments: Any, **named: Any) -> None:
    """End the process without a farewell; a write gets half of its bytes out first."""
    if original.__name__ in ("pwrite", "write"):
        fd, data, *rest = arguments
        original(fd, bytes(data)[: len(data) // 2], *rest)
    os._exit(DEAD)


def limit(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        if name == "DATA_MORE":
            held = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line)
            name, value = "RLIMIT_DATA", int(held.split()[1]) * 1024 + value
        number = getattr(resource, name)
        resource.setrlimit(number, (value, resource.getrlimit(number)[1]))


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[up]) for up in (3, 2)]  # the package, and tests/support
    serve()
