"""The process of a command: its exit code, and what must happen at exit although torch is not torn down."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LEAVING = """
import atexit, sys, tempfile, threading, time
from concurrent.futures import ThreadPoolExecutor
import mergeforge.__main__ as command, mergeforge.cli

def run_command():
    import torch
    atexit.register(lambda: print("exit function"))
    print(FOLDER.name)
    ThreadPoolExecutor(1).submit(lambda: (time.sleep(0.1), print("executor")))
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    return 3

FOLDER = tempfile.TemporaryDirectory()
mergeforge.cli.run_command = run_command
command.main()
"""


def test_exit_waits_for_threads_and_runs_exit_functions_and_finalizers() -> None:
    done = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, timeout=100)
    folder, *said = done.stdout.splitlines()
    assert done.returncode == 3, done.stderr
    assert said == ["executor", "thread", "exit function"]
    assert not Path(folder).exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_an_error(models: Path) -> None:
    command = [sys.executable, "-m", "mergeforge", "diff", "base", "tuned-a", "--json"]  # it imports torch
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100)
    assert done.returncode == 1 and "Traceback" not in done.stderr


def test_a_closed_pipe_is_no_traceback(models: Path) -> None:
    command = [sys.executable, "-m", "mergeforge", "diff", "base", "tuned-a"]
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=100)
    assert done.returncode == 1 and "Traceback" not in done.stderr
