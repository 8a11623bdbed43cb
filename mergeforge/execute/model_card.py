"""The model card: README.md of a merged model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from mergeforge.checkpoints.checkpoint import Checkpoint
from mergeforge.checkpoints.model import ModelSource
from mergeforge.core.file_names import MODEL_CARD
from mergeforge.core.messages import warnings_in, without_warnings
from mergeforge.core.sizes import format_size
from mergeforge.hub.model_card import LICENSE_KEYS, read_front_matter, write_card
from mergeforge.planner import Plan


def model_card(plan: Plan) -> str:
    """The front matter for the Hub, and a body that says how the model was made."""
    recipe = plan.recipe.to_yaml().strip()
    counts = Counter(plan.summaries.values())
    rows = "\n".join(f"| {count} | {summary} |" for summary, count in counts.most_common())
    sources = "\n".join(f"- {_describe(checkpoint)}" for checkpoint in plan.inputs.checkpoints)
    body = f"""Merged with mergeforge by the method `{plan.recipe.method_name}`.

## Inputs

{sources}

{_files(plan)}## What was done

| tensors | operation |
|---|---|
{rows}

The arithmetic is float32, rounded once when a tensor is written. `mergeforge.json` holds the operation and the
checksum of every tensor; `mergeforge verify` checks them.

{_notes(plan)}{_use(plan)}## Recipe

```yaml
{recipe}
```
"""
    return write_card(_front_matter(plan), plan.out.absolute().name, body)


def _front_matter(plan: Plan) -> dict[str, Any]:
    inputs = plan.inputs
    models = inputs.stored_models
    named = list(dict.fromkeys(str(model.entry.model.path) for model in models))
    adapters = [str(adapter.entry.adapter.path) for adapter in inputs.opened_adapters]
    merged = len(named) > 1 or len(adapters) > 1
    repos = [name.removeprefix("hf://") for name in [*named, *adapters] if not Path(name).exists()]
    front: dict[str, Any] = {"base_model": [name for name in repos if "://" not in name]}
    if not front["base_model"]:
        del front["base_model"]
    else:
        front["base_model_relation"] = "merge" if merged else "finetune"
    exported = not plan.checkpoint.files
    if exported and not merged and "base_model" in front:
        front["base_model_relation"] = "quantized"
    tags = ["mergeforge", *(["gguf"] if plan.ggufs else [])]
    if merged or not exported:
        tags.insert(0, "merge")
    front |= {"library_name": "gguf" if exported else "transformers", "tags": tags}
    licenses = [_license(model.checkpoint) for model in models]
    if licenses and licenses[0] and all(license == licenses[0] for license in licenses):
        front |= licenses[0]
    return front


def _notes(plan: Plan) -> str:
    """The plan's warnings and notes; inputs with absolute paths are shown by name only."""
    lists = {"Warnings": warnings_in(plan.notes), "Notes": without_warnings(plan.notes)}
    sections = [(title, "\n".join(f"- {note}" for note in notes)) for title, notes in lists.items() if notes]
    text = "\n\n".join(f"## {title}\n\n{listed}" for title, listed in sections)
    for checkpoint in sorted(plan.inputs.checkpoints, key=lambda checkpoint: -len(checkpoint.label)):
        if Path(checkpoint.label).is_absolute():
            text = text.replace(checkpoint.label, Path(checkpoint.label).name)
    return f"{text}\n\n" if text else ""


def _files(plan: Plan) -> str:
    """The GGUF files: type, size, bits per weight, and what they were quantized from."""
    if not plan.ggufs:
        return ""
    rows = "\n".join(
        f"| {', '.join(gguf.layout.files)} | {gguf.file_type.label} | {format_size(gguf.layout.nbytes)} "
        f"| {gguf.bits_per_weight:.2f} |"
        for gguf in plan.ggufs
    )
    stored = plan.recipe.output.gguf_from == "stored"
    origin = "the 16-bit values of the safetensors" if stored else "the merged float32 values, not from a 16-bit copy"
    return f"""## GGUF files

| file | type | size | bits per weight |
|---|---|---|---|
{rows}

Encoded from {origin}.

"""


def _use(plan: Plan) -> str:
    """How to load and serve a language model, by the name of its repo if known."""
    architectures = (
        plan.inputs.stored_models[0].checkpoint.config.get("architectures") if plan.inputs.stored_models else None
    )
    if not any(str(name).endswith("ForCausalLM") for name in architectures or ()):
        return ""
    publish = plan.recipe.output.publish
    repo = publish.repo if publish else f"OWNER/{plan.out.absolute().name}"
    commands = []
    if plan.checkpoint.files:
        code = "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        code += f'tokenizer = AutoTokenizer.from_pretrained("{repo}")\n'
        code += f'model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto", device_map="auto")'
        commands += [f"```python\n{code}\n```", f"```sh\nvllm serve {repo}\n```"]
    if plan.ggufs:
        label = plan.ggufs[0].file_type.label
        commands.append(f"```sh\nllama-server -hf {repo}:{label}\nollama run hf.co/{repo}:{label}\n```")
    return "## Use\n\n" + "\n\n".join(commands) + "\n\n"


def _describe(checkpoint: Checkpoint) -> str:
    label = checkpoint.label
    name = label if not Path(label).is_absolute() else Path(label).name
    return f"{name} at {checkpoint.revision}" if checkpoint.revision else name


def _license(model: ModelSource) -> dict[str, Any]:
    """The license fields of the input's own model card: copied, never invented."""
    front = read_front_matter(model.folder / MODEL_CARD)
    return {key: front[key] for key in LICENSE_KEYS if key in front}
