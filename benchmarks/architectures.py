#!/usr/bin/env python3
"""Families of transformers through the same merge, as a Markdown table.

    python benchmarks/architectures.py [--only llama,t5]

Two tiny random models of each family (the tests' own) are averaged half and half in float32. `lost` counts the
input's tensors that the output lacks, for linear and for ties. `max |d weight|` is against the mean of the state dicts,
`max |d output|` (logits where there are any) between the merged folder as transformers loads it and a
model with that mean. `loads`: transformers misses nothing and has nothing left over.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import table

sys.path.extend([str(Path(__file__).parents[1] / "tests" / name) for name in ("", "planner")])

from support.tiny_architectures import ARCHITECTURES, Architecture, cnn, unet
from test_any_architecture import STEM, half, mean, saved, stored

import mergeforge
from mergeforge.errors import MergeforgeError

HEAD = ["model type", "class", "tensors", "lost: linear", "lost: ties", "loads", "max abs d weight", "max abs d output"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    chosen = [one for one in ARCHITECTURES if not given.only or one.kind in given.only.split(",")]
    rows = [_tried(lambda root, case=case: _row(case, root), case.kind) for case in chosen]
    if not given.only:
        for name, make in (("Stable Diffusion UNet", unet), ("convolutional net", cnn)):
            for suffix in STEM:
                rows.append(_tried(lambda root, case=(make, suffix): _bare(*case, root), f"{name}, .{suffix}"))
    print(table(HEAD, rows))
    print(f"\n{sum(row[5] == 'yes' for row in rows)} of {len(rows)} merge and load.")


def _tried(row: Any, name: str) -> list[str]:
    """The row of a case, or why there is none."""
    with tempfile.TemporaryDirectory() as root:
        try:
            return [name, *row(Path(root))]
        except (MergeforgeError, RuntimeError, ValueError) as error:
            return [name, f"{type(error).__name__}: {error}".splitlines()[0], *[""] * (len(HEAD) - 2)]


def _row(case: Architecture, root: Path) -> list[str]:
    first, second = saved(case, root)
    inputs = [stored(root / name) for name in "ab"]
    out = mergeforge.merge(half(root, "a", "b"), out=root / "out", device="cpu")
    found, expected = stored(out), mean(*inputs)
    loaded, report = case.load(out)
    whole = not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    first.load_state_dict(mean(first.state_dict(), second.state_dict()))
    apart = float((case.outputs(loaded) - case.outputs(first)).abs().max())
    lost = len(inputs[0].keys() - _ties(root, "a", "b").keys())
    cells = [str(len(expected)), str(len(expected.keys() - found.keys())), str(lost), "yes" if whole else "no"]
    return [type(first).__name__, *cells, f"{_apart(found, expected):.1e}", f"{apart:.1e}"]


def _bare(make: Any, suffix: str, root: Path) -> list[str]:
    """Files of tensors without any config; a state dict has no outputs to compare."""
    import torch
    from safetensors.torch import save_file

    models = [make(seed) for seed in (0, 1)]
    names = [f"{name}.{suffix}" for name in "ab"]
    for tensors, name in zip(models, names, strict=True):
        (save_file if suffix == "safetensors" else torch.save)(tensors, root / name)
    pickled = suffix == "bin"
    out = mergeforge.merge(half(root, *names), out=root / "out", device="cpu", allow_pickle=pickled)
    found, expected = stored(out), mean(*models)
    lost = len(models[0].keys() - _ties(root, *names, allow_pickle=pickled).keys())
    cells = [str(len(expected)), str(len(expected.keys() - found.keys())), str(lost), "yes"]
    return ["a bare file", *cells, f"{_apart(found, expected):.1e}", ""]


def _ties(root: Path, base: str, other: str, **options: Any) -> dict[str, Any]:
    models = [{"model": str(root / other), "parameters": {"weight": 1, "density": 0.5}}]
    recipe = {"merge_method": "ties", "base_model": str(root / base), "models": models}
    return stored(mergeforge.merge(recipe, out=root / "ties", device="cpu", **options))


def _apart(found: dict[str, Any], expected: dict[str, Any]) -> float:
    return max(float((found[name].double() - value.double()).abs().max()) for name, value in expected.items())


if __name__ == "__main__":
    main()
