"""A machine with its own cache that uses the fake Hub. Several commands run in one process, which is faster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergeforge.operations.synthetic_models import ModelShape
from support.fake_hub import FakeHub

SHAPE = ModelShape(320, 1024, 6, 5, 5, 2048)  # 19 MB
SHARD = 5_000_000
COMMANDS = """
import json, sys
from mergeforge.cli import run_command
from mergeforge.io.remote import http, retry
retry.WAITS = (0.01,) * 4
http.TIMEOUT = 3.0
{setup}
codes = []
for command in json.loads(sys.argv[1]):
    print("$", *command, flush=True)
    codes.append(run_command(command))
print(json.dumps(codes))
"""


@dataclass(frozen=True)
class Ran:
    """The output of the commands, and their exit codes."""

    codes: list[int]
    out: str
    err: str


class Machine:
    def __init__(self, hub: FakeHub, root: Path) -> None:
        self.hub = hub
        self.root = root
        self.home = root / "home"
        keep = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
        self.env = {**keep, **hub.env(), "HF_HOME": str(self.home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    def start(self, *commands: list[str], setup: str = "", **env: str) -> subprocess.Popen[str]:
        code = COMMANDS.format(setup=setup)
        arguments = [sys.executable, "-c", code, json.dumps(commands)]
        pipe = subprocess.PIPE
        return subprocess.Popen(arguments, env={**self.env, **env}, stdout=pipe, stderr=pipe, text=True)

    def run(self, *commands: list[str], setup: str = "", **env: str) -> Ran:
        """Run the commands one after the other; each must return an exit code and must not show the token."""
        self.hub.log.clear()
        process = self.start(*commands, setup=setup, **env)
        out, err = process.communicate(timeout=120)
        assert "Traceback" not in err, err
        assert process.returncode == 0, err
        assert not self.hub.token or self.hub.token not in out + err
        return Ran(json.loads(out.splitlines()[-1]), out, err)

    def recipe(self, name: str, **recipe: Any) -> str:
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return str(path)

    @property
    def fetched(self) -> int:
        """Bytes of weights that were requested, by their ranges."""
        ranges = [one["range"].removeprefix("bytes=").split("-") for one in self.hub.log if one["range"]]
        return sum(int(last) - int(first) + 1 for first, last in ranges)

    @property
    def downloaded(self) -> list[Path]:
        """Weights in the cache."""
        return list(self.home.rglob("*.safetensors"))


def merge_of(base: str, tuned: str, loan: str) -> dict[str, Any]:
    """A linear merge of a model with an adapter and another model."""
    models = [
        {"model": f"{base}+{loan}", "parameters": {"weight": 0.3}},
        {"model": tuned, "parameters": {"weight": 0.7}},
    ]
    return {"merge_method": "linear", "models": models, "output": {"shard_size": SHARD}}


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
