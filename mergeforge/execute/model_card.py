"""The model card: README.md of a merged model."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from mergeforge.checkpoints.checkpoint import Checkpoint, read_json
from mergeforge.checkpoints.model import ModelSource
from mergeforge.core.file_names import MODEL_CARD
from mergeforge.core.messages import warnings_in, without_warnings
from mergeforge.core.sizes import format_size
from mergeforge.gguf.modelfile import MODELFILE
from mergeforge.hub.model_card import LICENSE_KEYS, is_repo_id, read_front_matter, write_card
from mergeforge.methods.papers import PAPERS
from mergeforge.planner import Plan
from mergeforge.recipe import to_yaml


def model_card(plan: Plan) -> str:
    """The front matter for the Hub, and a body that says how the model was made."""
    recipe = _recipe(plan)
    counts = Counter(plan.summaries.values())
    rows = "\n".join(f"| {count} | {summary} |" for summary, count in counts.most_common())
    sources = "\n".join(f"- {_describe(checkpoint)}" for checkpoint in plan.inputs.checkpoints)
    body = f"""Merged with mergeforge by the method `{plan.recipe.method_name}`{_papers(plan)}.

## Inputs

{sources}

{_files(plan)}## What was done

| tensors | operation |
|---|---|
{rows}

The arithmetic is float32, rounded once when a tensor is written. `mergeforge.json` holds the operation and the
checksum of every tensor; `mergeforge verify {shlex.quote(str(_folder(plan)))}` checks them.

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
    bases = _bases_of_adapters(plan) if all(Path(name).exists() for name in named) else []
    front: dict[str, Any] = {
        "base_model": list(dict.fromkeys([*bases, *(name for name in repos if "://" not in name)]))
    }
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
    """How to load and serve a language model: from its repo, if it is published, or from its folder."""
    architectures = (
        plan.inputs.stored_models[0].checkpoint.config.get("architectures") if plan.inputs.stored_models else None
    )
    if not any(str(name).endswith("ForCausalLM") for name in architectures or ()):
        return ""
    publish = plan.recipe.output.publish
    model = publish.repo if publish else str(_folder(plan))
    commands = []
    if plan.checkpoint.files:
        name = json.dumps(model, ensure_ascii=False)
        code = "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        code += f"tokenizer = AutoTokenizer.from_pretrained({name})\n"
        code += f'model = AutoModelForCausalLM.from_pretrained({name}, dtype="auto", device_map="auto")'
        commands += [f"```python\n{code}\n```", f"```sh\nvllm serve {shlex.quote(model)}\n```"]
    if plan.gguf_models:
        serve, run = _of_repo(plan, publish.repo) if publish else _of_folder(plan)
        commands.append(f"```sh\n{serve}\n{run}\n```")
    return "## Use\n\n" + "\n\n".join(commands) + "\n\n"


def _of_repo(plan: Plan, repo: str) -> tuple[str, str]:
    """Commands that run the first GGUF file of a Hub repo in llama.cpp and Ollama."""
    name = f"{repo}:{plan.gguf_models[0].file_type.label}"
    return f"llama-server -hf {shlex.quote(name)}", f"ollama run {shlex.quote(f'hf.co/{name}')}"


def _of_folder(plan: Plan) -> tuple[str, str]:
    """The same for the folder that the merge wrote."""
    file, modelfile = (shlex.quote(str(_folder(plan) / name)) for name in (plan.gguf_names[0], MODELFILE))
    name = re.sub(r"[^a-z0-9_.-]+", "-", plan.out.absolute().name.lower()).strip("-.") or "merged"
    return f"llama-server -m {file}", f"ollama create {name} -f {modelfile} && ollama run {name}"


def _folder(plan: Plan) -> Path:
    """The output folder as the user named it; of an absolute path, only the name, since cards are published."""
    return Path(plan.out.name) if plan.out.is_absolute() else plan.out


def _recipe(plan: Plan) -> str:
    """The recipe as YAML, with the folder that was really written to."""
    *stages, last = plan.recipe.documents
    output = {**(last.get("output") or {}), "path": str(_folder(plan))}
    return "---\n".join(map(to_yaml, [*stages, {**last, "output": output}])).strip()


def _papers(plan: Plan) -> str:
    """Links to the papers of the methods; the Hub finds arXiv ids in cards."""
    methods = [name for document in (*plan.recipe.stages, plan.recipe) for name in document.method_name.split("+")]
    papers = dict.fromkeys(paper for name in methods for paper in PAPERS.get(name, ()))
    links = " and ".join(f"[{paper.title}]({paper.url})" for paper in papers)
    return f" ({links})" if links else ""


def _bases_of_adapters(plan: Plan) -> list[str]:
    """The Hub repos that the adapters name as their base, for a base model that is a local folder."""
    paths = [opened.adapter.folder / "adapter_config.json" for opened in plan.inputs.opened_adapters]
    names = [str(read_json(path).get("base_model_name_or_path") or "") for path in paths if path.is_file()]
    return list(dict.fromkeys(name for name in names if is_repo_id(name)))


def _describe(checkpoint: Checkpoint) -> str:
    label = checkpoint.label
    name = label if not Path(label).is_absolute() else Path(label).name
    return f"{name} at {checkpoint.revision}" if checkpoint.revision else name


def _license(model: ModelSource) -> dict[str, Any]:
    """The license fields of the input's own model card: copied, never invented."""
    front = read_front_matter(model.folder / MODEL_CARD)
    return {key: front[key] for key in LICENSE_KEYS if key in front}
