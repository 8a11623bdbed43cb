#!/usr/bin/env python3
"""Merges that read from a Hub and write to one, against merges from and to files; the Hub is a local server.

    python benchmarks/streaming.py --dir DIR [--shape 1.1b] [--memory 256MiB] [--rounds 3]

Needs disk for two models of the shape, and memory for three (the Hub keeps everything there). The bars: reading from
the Hub takes at most 1.3 times the bare download plus the merge from files; memory stays within --memory; and at most
1.2 shards are on the disk when files are uploaded as they are finished.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from measure import Measured, adapter, in_turn, machine, measure, median, mergeforge, model, table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.fake_hub import FakeHub

INTERPRETER = 350  # MiB on top of --memory: Python, torch and an HTTP client
SHARD = 500_000_000
MB = 1e6
TRANSFER = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from mergeforge.io.remote import RemoteSession
from mergeforge.io.remote.hub_repo import open_repo_files
from huggingface_hub import HfApi
session, step = RemoteSession(0), 8 << 20
for repo in sys.argv[1:]:
    info = HfApi().model_info(repo)
    names = [one.rfilename for one in info.siblings if one.rfilename.endswith(".safetensors")]
    for file in open_repo_files(repo, info.sha, names, session).values():
        buffers = threading.local()
        def fetch(at):
            buffer = buffers.__dict__.setdefault("held", memoryview(bytearray(step)))
            file.ranges.fetch(buffer[: min(step, file.size - at)], at, session.stopped)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(fetch, range(0, file.size, step)))
"""


def serve(folder: Path, names: list[str]) -> None:
    """A Hub that serves each folder as repo org/NAME; prints its environment, then answers until it is stopped."""
    hub = FakeHub()
    for name in names:
        hub.add_repo(f"org/{name}", {path.name: path.read_bytes() for path in (folder / name).iterdir()})
    for key, value in hub.env().items():
        print(f"{key}={value}")
    print(flush=True)
    hub.server.serve_forever()


@contextmanager
def hub_of(folder: Path, names: list[str]) -> Iterator[None]:
    """Run the Hub in its own process, with this process's environment pointing to it."""
    command = [sys.executable, __file__, "--dir", str(folder), "--serve", *names]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        while line := process.stdout.readline().strip():
            key, _, value = line.partition("=")
            os.environ[key] = value
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        yield
    finally:
        process.kill()
        process.wait()


class Disk:
    """The most bytes that a folder's files took up during a block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.most = 0
        self._ended = threading.Event()

    def watching(self, run: Callable[[], Measured]) -> Measured:
        thread = threading.Thread(target=self._watch)
        thread.start()
        try:
            return run()
        finally:
            self._ended.set()
            thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self.most = max(self.most, sum(map(_allocated, self.folder.rglob("*"))))


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def fresh_home(root: Path) -> None:
    shutil.rmtree(root / "home", ignore_errors=True)
    os.environ["HF_HOME"] = str(root / "home")


def recipes(root: Path, shape: str) -> dict[str, tuple[dict[str, object], dict[str, object], list[str]]]:
    """By name: the recipe from files, the recipe from the Hub, the repos that it reads."""
    base, tuned, lora = model(root, shape), model(root, shape, seed=1, near=0), adapter(root, shape)
    output = {"shard_size": SHARD}

    def fold(base: str, lora: str) -> dict[str, object]:
        return {"base_model": base, "adapters": [lora], "output": output}

    def linear(*models: str) -> dict[str, object]:
        parts = [{"model": one, "parameters": {"weight": 0.5}} for one in models]
        return {"merge_method": "linear", "models": parts, "output": output}

    names = [f"org/{path.name}" for path in (base, tuned, lora)]
    return {
        "fold a LoRA": (fold(str(base), str(lora)), fold(names[0], names[2]), [names[0], names[2]]),
        "linear of two": (linear(str(base), str(tuned)), linear(*names[:2]), names[:2]),
    }


def compare(root: Path, about: str, shape: str, memory: str, rounds: int) -> list[str]:
    files, hub, repos = recipes(root, shape)[about]

    def streamed() -> Measured:
        fresh_home(root)
        return mergeforge(hub, root / "streamed", "--memory", memory, "--stream-inputs")

    found = in_turn(
        rounds,
        {
            "files": lambda: mergeforge(files, root / "merged", "--memory", memory),
            "transfer": lambda: measure([sys.executable, "-c", TRANSFER, *repos]),
            "streamed": streamed,
        },
    )
    same = all(_same(path, root / "streamed" / path.name) for path in (root / "merged").glob("*.safetensors"))
    seconds = {name: median(some, lambda one: one.seconds) for name, some in found.items()}
    both = seconds["files"] + seconds["transfer"]
    peak = max(one.peak for one in found["streamed"]) / 2**20
    bar = int(memory.removesuffix("MiB")) + INTERPRETER
    shutil.rmtree(root / "merged")
    shutil.rmtree(root / "streamed")
    return [
        about,
        *(f"{seconds[name]:.1f} s" for name in found),
        f"{seconds['streamed'] / both:.2f} of 1.3",
        f"{peak:.0f} of {bar} MiB",
        "yes" if same else "NO",
    ]


def sent(root: Path, about: str, shape: str, memory: str) -> list[str]:
    """Read from the Hub and write to it: how much is on the disk at any time."""
    fresh_home(root)
    disk, hub = Disk(root / "sent"), recipes(root, shape)[about][1]
    options = ("--memory", memory, "--stream-inputs", "--stream-to-hub", f"fake/{int(time.time())}")
    done = disk.watching(lambda: mergeforge(hub, root / "sent", *options))
    home = sum(map(_allocated, (root / "home").rglob("*")))
    shutil.rmtree(root / "sent")
    return [
        about,
        f"{done.seconds:.1f} s",
        f"{disk.most / SHARD:.2f} of 1.2 shards",
        f"{home / MB:.1f} MB",
        f"{done.peak / 2**20:.0f} MiB",
    ]


def _same(one: Path, other: Path) -> bool:
    return subprocess.run(["cmp", "-s", one, other], check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--shape", default="1.1b")
    parser.add_argument("--memory", default="256MiB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.dir.mkdir(parents=True, exist_ok=True)
    if given.serve:
        serve(given.dir, given.serve)
        return
    cases = recipes(given.dir, given.shape)
    names = sorted({repo.removeprefix("org/") for _, _, repos in cases.values() for repo in repos})
    print(f"{machine()}\n")
    with hub_of(given.dir, names):
        rows = [compare(given.dir, about, given.shape, given.memory, given.rounds) for about in cases]
        print(table(["merge", "from files", "bare transfer", "streamed", "ratio", "peak RSS", "same bytes"], rows))
        rows = [sent(given.dir, about, given.shape, given.memory) for about in cases]
        print("\n" + table(["both ends on the Hub", "time", "disk", "cache", "peak RSS"], rows))


if __name__ == "__main__":
    main()
