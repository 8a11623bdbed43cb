#!/usr/bin/env python3
"""What each GGUF type costs in quality: KL divergence from float32, over a text, in llama.cpp.

    python benchmarks/gguf_quality.py --base FOLDER --adapter ADAPTER --dir DIR [--types q8_0,q4_k_m,...] [--chunks 6]

The adapter is folded into the base, and every type is written twice: from the float32 values of the merge, and from
values that were rounded to bfloat16 first, as when a merged model is saved and converted later. Both are compared with
the F32 file of the merge. The text is the prose of Python's own documentation (pydoc), so that everyone has it.

`mergeforge demo --real DIR` makes such a base and adapter: SmolLM2-135M-Instruct, whose weights come from a Q4_1 file.
So they lie on the grid of that type, but for what the adapter changes: types with 4 bits look better here than on a
model that was never quantized.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from measure import machine, table

sys.path.insert(0, str(Path(__file__).parents[1]))
TYPES = "q8_0,q6_k,q5_k_m,q5_k_s,q4_k_m,q4_k_s,iq4_nl,iq4_xs,q4_1,q4_0,q3_k_l,q3_k_m,q3_k_s,q2_k"
TOPICS = ("class", "compound", "exceptions", "execmodel", "import", "numbers", "string-methods", "types")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--chunks", type=int, default=6, help="of 512 tokens, the second half of which is scored")
    given = parser.parse_args()
    types = given.types.split(",")
    merged, rounded = write(given, types, "float32"), write(given, types, "stored")
    print(f"{machine()}; {given.chunks} chunks of 512 tokens\n")
    head = ["type", "bits per weight", "KL divergence", "KL, rounded first", "same top token", "perplexity"]
    print(table(head, rows(given, types, merged, rounded)))


def write(given: argparse.Namespace, types: list[str], source: str) -> dict[str, tuple[Path, float]]:
    """Fold, and write all types from these values. Returns type -> file and bits per weight."""
    import mergeforge

    output = {"gguf": ["f32", *types], "gguf_from": source, "name": "model"}
    adapters = [{"adapter": given.adapter, "weight": 1.0}]
    recipe = {"base_model": given.base, "adapters": adapters, "dtype": "bfloat16", "output": output}
    plan = mergeforge.plan(recipe, out=given.dir / source, device="cpu")
    mergeforge.run(plan, overwrite=True)
    names = {gguf.file_type.label: (plan.out / gguf.first_file, gguf.bits_per_weight) for gguf in plan.ggufs}
    from mergeforge.gguf.file_types import file_type_named

    return {type_: names[file_type_named(type_).label] for type_ in ("f32", *types)}


def rows(
    given: argparse.Namespace, types: list[str], merged: dict[str, Any], rounded: dict[str, Any]
) -> list[list[str]]:
    """A row for each type."""
    from mergeforge.eval import open_model
    from mergeforge.eval.divergence import compare_distributions

    text, reference = prose(), open_model(merged["f32"][0])
    found = []
    for type_ in ("f32", *types):
        one, other = (
            compare_distributions(open_model(files[type_][0]), reference, text, limit=given.chunks)
            for files in (merged, rounded)
        )
        values = [f"{one.kl_divergence:.5f} ± {one.kl_error:.5f}", f"{other.kl_divergence:.5f} ± {other.kl_error:.5f}"]
        found.append([type_, f"{merged[type_][1]:.2f}", *values, f"{one.agreement:.1%}", f"{one.ratio:.3f}x"])
        print(*found[-1], sep="  ", file=sys.stderr, flush=True)
    return found


def prose() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in TOPICS)


if __name__ == "__main__":
    main()
