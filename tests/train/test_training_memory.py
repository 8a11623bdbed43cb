"""Host memory while a base is loaded in 4 bit: near the quantized size, not the stored one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mergeforge.operations.synthetic_models import SHAPES, write_model

CODE = """
import json, re, sys, threading, time
from pathlib import Path
from mergeforge.train.environment import silence_libraries
from mergeforge.train.loop.load_base import LoadOptions, load_base

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

peak = [0]
def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()
with silence_libraries():
    model = load_base(LoadOptions(sys.argv[1], "bf16", "cpu", quantize=True))
print(json.dumps([peak[0], sum(weight.numel() * weight.element_size() for weight in model.parameters())]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_loading_takes_the_quantized_size_and_less_than_a_gigabyte(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "1.1b", SHAPES["1.1b"])
    done = subprocess.run([sys.executable, "-c", CODE, str(folder)], capture_output=True, text=True, check=True)
    peak, quantized = json.loads(done.stdout)
    assert quantized < peak < quantized + 1e9
