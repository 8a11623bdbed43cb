"""A merge method, PEFT method, GGUF architecture and quant type are one file each, added to a copy of the package.

Nothing else of the copy changes. CONTRIBUTING.md shows the same.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import PACKAGE

METHOD = '''"""Half the weighted sum of the inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.methods import method

if TYPE_CHECKING:
    from torch import Tensor


@method("half_sum", scratch_blocks=2)
def half_sum(models: list[Tensor], *, weight: list[float]) -> Tensor:
    """Half of sum(weight_i * model_i)."""
    total = models[0] * weight[0]
    for tensor, factor in zip(models[1:], weight[1:], strict=True):
        total.add_(tensor, alpha=factor)
    return total.mul_(0.5)
'''

PEFT_METHOD = '''"""An additive delta, saved whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.kind import AdaptedModule, Config, Delta, Formula, adapter

if TYPE_CHECKING:
    from torch import Tensor


@adapter("WHOLEDELTA", prefixes=("whole_delta",), fields="")
def whole_delta(config: Config, module: AdaptedModule) -> dict[str, Formula]:
    """W + delta."""
    module.require("whole_delta")

    def delta(factors: Mapping[str, Tensor]) -> Delta:
        return lambda start, stop, base: factors["whole_delta"][start:stop]

    return {"weight": Formula("WholeDelta", delta)}
'''

ARCHITECTURE = '''"""A Llama under another name."""

from __future__ import annotations

from mergeforge.gguf.architectures import ARCHITECTURES, GGUFModelSpec, architecture
from mergeforge.gguf.architectures.model import HFModel


@architecture("AlpacaForCausalLM")
def alpaca(model: HFModel) -> GGUFModelSpec:
    return ARCHITECTURES["LlamaForCausalLM"](model)
'''

QUANT_TYPE = '''"""Q8_0 under another name and number."""

from __future__ import annotations

from mergeforge.gguf.quantize import QuantType, q8_0, register

register(QuantType("Q8_X", 99, 32, 34, q8_0.quantize_torch))
'''

MERGES = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
import mergeforge
from mergeforge.operations.synthetic_models import SHAPES, write_adapter, write_model

assert mergeforge.__file__.startswith(sys.argv[1]), mergeforge.__file__
for seed, name in enumerate(("base", "tuned", "other")):
    write_model(Path(name), SHAPES["tiny"], seed=seed, dtype="F32")
base, tuned = load_file("base/model.safetensors"), load_file("tuned/model.safetensors")
name = "model.layers.0.mlp.up_proj.weight"

out = mergeforge.merge(models=["base", "tuned"], weights=[0.5, 1.5], method="half_sum", out="half")
assert torch.allclose(load_file(out / "model.safetensors")[name], (0.5 * base[name] + 1.5 * tuned[name]) / 2)

def merged(method, **parameters):
    models = [{"model": "tuned", "parameters": {"weight": 0.7}}, {"model": "other", "parameters": {"weight": 0.3}}]
    recipe = {"merge_method": method, "base_model": "base", "models": models, "parameters": parameters}
    return (mergeforge.merge(recipe, out=method) / "model.safetensors").read_bytes()

assert merged("elected_mean") == merged("ties", density=1.0)

Path("adapter").mkdir()
change = torch.full_like(base[name], 0.25)
save_file({f"base_model.model.{name[:-7]}.whole_delta": change}, "adapter/adapter_model.safetensors")
Path("adapter/adapter_config.json").write_text(json.dumps({"peft_type": "WHOLEDELTA"}))
out = mergeforge.merge(base_model="base", adapters=["adapter"], out="folded")
assert torch.equal(load_file(out / "model.safetensors")[name], base[name] + 0.25)

config = json.loads(Path("base/config.json").read_text())
Path("base/config.json").write_text(json.dumps(config | {"architectures": ["AlpacaForCausalLM"]}))
(plain,) = mergeforge.convert_to_gguf("base", "q8_0", out="plain.gguf")
(other,) = mergeforge.convert_to_gguf("base", "q8_0", out="other.gguf", tensor_types={"ffn_up": "q8_x"})
types = {tensor["name"]: tensor["dtype"] for tensor in mergeforge.inspect(plain)["tensors"]}
assert types["blk.0.ffn_up.weight"] == "Q8_0"
assert other.stat().st_size == plain.stat().st_size and other.read_bytes() != plain.read_bytes()
"""


def documented_row() -> str:
    """The row of the example in CONTRIBUTING.md."""
    example = (PACKAGE.parent / "CONTRIBUTING.md").read_text().split("### Example: a method as a row of the table")[1]
    return example.split("```python\n")[1].split("\n```")[0]


@pytest.mark.parametrize("native", [True, False])
def test_each_extension_is_one_file(tmp_path: Path, native: bool) -> None:
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns("__pycache__", *([] if native else ["_kernels*"]))
    shutil.copytree(PACKAGE, copy / "mergeforge", ignore=ignored)
    (copy / "mergeforge/methods/half_sum.py").write_text(METHOD)
    table = copy / "mergeforge/methods/task_vectors.py"
    table.write_text(table.read_text().replace("]  # fmt: skip", f"{documented_row()},\n]  # fmt: skip"))
    (copy / "mergeforge/adapters/peft/kinds/whole_delta.py").write_text(PEFT_METHOD)
    (copy / "mergeforge/gguf/architectures/alpaca.py").write_text(ARCHITECTURE)
    (copy / "mergeforge/gguf/quantize/q8_x.py").write_text(QUANT_TYPE)
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", MERGES, str(copy)],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
