"""Add converted GGUF files to a folder that holds other files, and list them in its receipt and Modelfile.

In a folder of earlier conversions of the same model, the receipt, recipe and card become those of one conversion to all
types. In the folder of a merge, the receipt gets the hash of each added file. A folder without a receipt gets none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergeforge.core.checksums import file_sha256
from mergeforge.core.file_names import MODEL_CARD, RECEIPT, RECIPE
from mergeforge.errors import MALFORMED_ERRORS, MergeforgeError
from mergeforge.execute.model_card import model_card
from mergeforge.execute.workspace import read_receipt
from mergeforge.gguf.file_types import file_type_named
from mergeforge.gguf.modelfile import MODELFILE, modelfile
from mergeforge.io.disk import on_disk, sync_folder, write_durably
from mergeforge.planner import Options, Plan, make_plan

Receipt = Mapping[str, Any]


@dataclass(frozen=True)
class Addition:
    """Files to add to the folder `out`: those of a finished conversion (`plan`), or its only file under a new path."""

    plan: Plan
    out: Path
    file: Path | None
    options: Options

    @property
    def moves(self) -> dict[Path, Path]:
        """Every written file and its path in the folder."""
        return {self.plan.out / name: self.file or self.out / name for name in self.plan.files}

    @property
    def types(self) -> dict[Path, str]:
        """The type of every file, by its path in the folder."""
        labels = {name: gguf.file_type.label for gguf in self.plan.ggufs for name in gguf.layout.files}
        return {path: labels[written.name] for written, path in self.moves.items()}

    @property
    def superseded(self) -> list[Path]:
        """Files of the same name and type that are split otherwise."""
        if self.file or not self.out.is_dir():
            return []
        stems, names = set(map(_unsplit, self.plan.files)), set(self.plan.files)
        return [
            path for path in sorted(self.out.glob("*.gguf")) if _unsplit(path.name) in stems and path.name not in names
        ]


def add_files(addition: Addition) -> None:
    """Give every file its name, then update the folder's receipt; repeating it after a crash completes it."""
    old = read_receipt(addition.out)
    new = read_receipt(addition.plan.out)
    joined = _joined_plan(addition, old, new) if old and new else None
    for written, path in addition.moves.items():
        if written.exists():
            with on_disk(path):
                os.replace(written, path)
    sync_folder(addition.out)
    if joined and old and new:
        _write_joined(addition, joined, old, new)
    elif old:
        _write_listed(addition, old)
    elif addition.file is None and addition.plan.gguf_models and not (addition.out / MODELFILE).exists():
        write_durably(addition.out / MODELFILE, _modelfile(addition.plan, addition.plan.gguf_names))
    for path in addition.superseded:
        path.unlink(missing_ok=True)


def _unsplit(name: str) -> str:
    """A file's name without the number of its split."""
    return re.sub(r"-\d{5}-of-\d{5}\.gguf$", ".gguf", name)


# a folder of conversions


def _joined_plan(addition: Addition, old: Receipt, new: Receipt) -> Plan | None:
    """One conversion to the folder's types and the new ones; None if the folder holds something else."""
    try:
        if addition.file or _conversion_of(old) != _conversion_of(new):
            return None
        labels = {gguf.file_type.label for gguf in addition.plan.gguf_models}
        kept = [entry for entry in _entries(old) if _label(entry) not in labels]
        mmproj = {key: receipt["recipe"]["output"][key] for receipt in (old, new) for key in _towers(receipt)}
        recipe = {**new["recipe"], "output": {**new["recipe"]["output"], **mmproj, "gguf": [*kept, *_entries(new)]}}
        plan = make_plan(recipe, replace(addition.options, out=addition.out))
    except (MergeforgeError, *MALFORMED_ERRORS):  # its imatrix is gone, or the receipt is from another version
        return None
    return plan if plan.files.keys() - new["files"].keys() <= old["files"].keys() else None


def _conversion_of(receipt: Receipt) -> dict[str, Any]:
    """What must be equal in conversions of one model: everything but the types, and the path to the model."""
    recipe = receipt["recipe"]
    output = {key: value for key, value in recipe["output"].items() if key not in ("gguf", "mmproj")}
    inputs = [{**source, "name": ""} for source in receipt["inputs"]]
    return {**recipe, "models": len(recipe["models"]), "output": output, "inputs": inputs}


def _entries(receipt: Receipt) -> list[Any]:
    entries = receipt["recipe"]["output"].get("gguf") or []
    return list(entries) if isinstance(entries, list) else [entries]


def _towers(receipt: Receipt) -> list[str]:
    """The keys of the recipe's output that ask for a file of the towers."""
    return [key for key in ("mmproj",) if receipt["recipe"]["output"].get(key)]


def _label(entry: Any) -> str:
    return file_type_named(entry["type"] if isinstance(entry, Mapping) else str(entry)).label


def _write_joined(addition: Addition, plan: Plan, old: Receipt, new: Receipt) -> None:
    """The side files and the receipt that one conversion to all types would have written."""
    out = addition.out
    aux = {MODEL_CARD: model_card(plan).encode()}
    aux |= {MODELFILE: _modelfile(plan, plan.gguf_names)} if plan.gguf_models else {}
    aux = {name: content for name, content in aux.items() if _may_write(out, name, content, old)}
    aux[RECIPE] = plan.recipe.to_yaml().encode()
    for name, content in aux.items():
        write_durably(out / name, content)
    removed = {path.name for path in addition.superseded}
    files = {name: (new if name in new["files"] else old)["files"][name] for name in plan.files}
    files |= {name: facts for name, facts in old["files"].items() if name not in files and name not in removed}
    files |= {name: _hashed(content) for name, content in aux.items()}
    earlier = old["tensors"]
    tensors = {name: _joined_tensor(plan, earlier.get(name, {}), facts) for name, facts in new["tensors"].items()}
    changed = {"fingerprint": plan.fingerprint, "recipe": plan.recipe.raw, "tensors": tensors, "files": files}
    _write_receipt(out, {**new, **changed})


def _joined_tensor(plan: Plan, old: Receipt, new: Receipt) -> dict[str, Any]:
    """A tensor's entry, with its encoded forms in the files of the plan."""
    forms = {key: facts for key, facts in old.get("gguf", {}).items() if facts["file"] in plan.files}
    order = list(plan.files)
    joined = sorted((forms | new.get("gguf", {})).items(), key=lambda form: order.index(form[1]["file"]))
    return {**new, "gguf": dict(joined)}


# the folder of a merge, or of a model


def _write_listed(addition: Addition, old: Receipt) -> None:
    """List the files in the receipt of a merge, in place of those of the same names."""
    removed = {path.name for path in addition.superseded}
    files = {name: facts for name, facts in old["files"].items() if name not in removed}
    for path, label in addition.types.items():
        files[path.name] = {"size": path.stat().st_size, "sha256": file_sha256(path), "type": label}
    content = _extended_modelfile(addition)
    if content and _may_write(addition.out, MODELFILE, content, old):
        write_durably(addition.out / MODELFILE, content)
        files[MODELFILE] = _hashed(content)
    names = {path.name for path in addition.types} | removed
    tensors = {name: _without_files(facts, names) for name, facts in old["tensors"].items()}
    _write_receipt(addition.out, {**old, "tensors": tensors, "files": files})


def _without_files(tensor: Receipt, names: Set[str]) -> Receipt:
    """A tensor's entry without its encoded forms in files that are replaced."""
    if "gguf" not in tensor:
        return tensor
    return {**tensor, "gguf": {key: facts for key, facts in tensor["gguf"].items() if facts["file"] not in names}}


def _extended_modelfile(addition: Addition) -> bytes:
    """The folder's Modelfile, with the new files as comments; a new one if there is none; b"" if there is no model."""
    path, names = addition.out / MODELFILE, [path.name for path in addition.types]
    if not path.is_file() and not addition.plan.gguf_models:
        return b""
    if not path.is_file():
        return _modelfile(addition.plan, [name for name in names if name not in addition.plan.mmproj_names])
    with on_disk(path):
        text = path.read_text("utf-8")
    return (text + "".join(f"# FROM ./{name}\n" for name in names if f"FROM ./{name}\n" not in text)).encode()


def _modelfile(plan: Plan, names: Sequence[str]) -> bytes:
    return modelfile(names[0], plan.gguf_models[0].keys, names[1:], plan.mmproj_names).encode()


def _may_write(out: Path, name: str, content: bytes, receipt: Receipt) -> bool:
    """Whether the user has not edited a file: it is as the receipt says, or an interrupted run has written it."""
    path, facts = out / name, receipt["files"].get(name, {})
    return not path.is_file() or file_sha256(path) == facts.get("sha256") or path.read_bytes() == content


def _hashed(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _write_receipt(out: Path, receipt: Receipt) -> None:
    write_durably(out / RECEIPT, (json.dumps(receipt, indent=1, default=str) + "\n").encode())
