"""GGUF through llama.cpp's own converter, for model classes that mergeforge does not write itself.

The converter runs in a process of its own and writes one file in F32, F16 or BF16, as the weights are. That file is
then quantized as `mergeforge gguf FILE.gguf` does, within --memory, and removed. The converter's memory is its own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeforge.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mergeforge.core.messages import OnMessage
from mergeforge.core.sizes import format_size
from mergeforge.core.tensor_info import FLOATS
from mergeforge.errors import OutputError, SourceError
from mergeforge.execute.workspace import read_receipt
from mergeforge.gguf.file_types import file_type_named
from mergeforge.io.disk import on_disk
from mergeforge.operations.convert_gguf import GGUFConversion, convert, output_paths
from mergeforge.operations.requantize_gguf import plan_gguf
from mergeforge.planner import Options, Plan
from mergeforge.planner.requantize import Requantization
from mergeforge.recipe import GGUFEntry

OFFICIAL = "official"  # the installed converter
SCRIPT = "convert_hf_to_gguf.py"
PROGRAM = "convert-hf-to-gguf"
_HALF = ("F16", "BF16")  # dtypes of weights, and types that the converter's file then has; otherwise F32
_LAST_LINES = 12


@dataclass(frozen=True)
class Converter:
    """llama.cpp's converter: the command that starts it."""

    command: tuple[str, ...]

    def __str__(self) -> str:
        return self.command[-1]


@dataclass(frozen=True)
class OfficialConversion:
    """A planned conversion of the folder `model` to the types.

    settings: see convert_gguf.SETTINGS. out: as given. file, nbytes: the converter's file, in a hidden folder of the
    output, and about how large it is.
    """

    converter: Converter
    model: Path
    types: tuple[str, ...]
    out: str | None
    settings: Mapping[str, Any]
    options: Options
    file: Path
    nbytes: int

    @property
    def source_type(self) -> str:
        """The type of the converter's file."""
        return self.file.stem.rpartition("-")[2].lower()

    def __str__(self) -> str:
        about = f"a file of {format_size(self.nbytes)}, which is quantized and then removed"
        return f"llama.cpp's converter ({self.converter}) writes {about}"


def find_converter(name: str) -> Converter:
    """The installed converter (`official`), or that of a llama.cpp tree. Raises SourceError if there is none."""
    if name == OFFICIAL:
        if program := shutil.which(PROGRAM):
            return Converter((program,))
        # an environment of its own: the package has a module gguf, which would replace the one that mergeforge uses
        hint = f"pipx install {PROGRAM}, or name a llama.cpp tree instead of `{OFFICIAL}`"
        raise SourceError("llama.cpp's converter is not installed", hint=hint)
    script = Path(name).expanduser() / SCRIPT
    if not script.is_file():
        hint = f"clone llama.cpp, or name `{OFFICIAL}` after pipx install {PROGRAM}"
        raise SourceError(f"{name} is not a llama.cpp tree: it has no {SCRIPT}", hint=hint)
    return Converter((sys.executable, str(script.resolve())))


def plan_official(
    converter: str,
    model: str,
    types: Sequence[str],
    out: str | None,
    settings: Mapping[str, Any],
    options: Options,
    *,
    name: str = "",
    overwrite: bool = False,
) -> OfficialConversion:
    """Plan a conversion of a local folder; `name`: the model's name (default: the folder's).

    Raises SourceError for another model, and if the converter is not there; RecipeError for an unknown type, and
    OutputError for files that exist, before the converter runs.
    """
    found = find_converter(converter)
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        raise SourceError(f"{model} is not a folder with a config.json", hint="the converter reads local folders only")
    name, types = name or folder.resolve().name, tuple(types) or ("q8_0",)
    target, file, _ = output_paths(name, types, out, splits=bool(settings.get("split_max_size")))
    labels = [file_type_named(type_).label for type_ in types]
    files = [file] if file else [target / f"{name}-{label}.gguf" for label in labels]
    if existing := [path for path in files if path.exists() and not overwrite]:
        raise OutputError(f"{existing[0]} exists", hint="--overwrite replaces it and nothing else")
    checkpoint = open_checkpoint(folder, model)
    dtypes = {tensor.info.dtype for tensor in checkpoint.tensors.values() if tensor.info.dtype in FLOATS}
    kind = next(iter(dtypes)) if len(dtypes) == 1 and dtypes <= set(_HALF) else "F32"
    nbytes = sum(tensor.info.numel for tensor in checkpoint.tensors.values()) * (4 if kind == "F32" else 2)
    work = target / f".{name}.converter-{_digest(checkpoint)}"
    converted, given = work / f"{name}-{kind}.gguf", str(file or target)
    return OfficialConversion(found, folder, types, given, settings, options, converted, nbytes)


def _digest(checkpoint: Checkpoint) -> str:
    """What the converter's file is made from: the headers, sizes and times of the weights, and the config."""
    stats = [(name, (checkpoint.folder / name).stat()) for name in checkpoint.file_hashes]
    facts = [dict(checkpoint.file_hashes), [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]]
    config = (checkpoint.folder / "config.json").read_bytes()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode() + config).hexdigest()[:16]


def run_converter(conversion: OfficialConversion, *, fresh: bool = False, overwrite: bool = False) -> GGUFConversion:
    """Run the converter, unless its finished file is there, and plan what makes the GGUF files from that file.

    Raises SourceError with the converter's last lines if it fails.
    """
    if fresh or not conversion.file.is_file():
        _write_file(conversion)
    file, types, out, settings = conversion.file, conversion.types, conversion.out, conversion.settings
    return plan_gguf(str(file), types, out, settings, Requantization(), conversion.options, overwrite=overwrite)


def convert_officially(conversion: OfficialConversion, *, fresh: bool = False, overwrite: bool = False) -> list[Path]:
    """Do both steps; returns the GGUF files. The converter's file stays, for further types.

    Raises the errors of run_converter() and convert().
    """
    written = run_converter(conversion, fresh=fresh, overwrite=overwrite)
    deque(convert(written, fresh=fresh, overwrite=overwrite), maxlen=0)
    return written.files


def remove_file(conversion: OfficialConversion) -> None:
    """Remove the converter's file."""
    shutil.rmtree(conversion.file.parent, ignore_errors=True)


def _write_file(conversion: OfficialConversion) -> None:
    """Write the converter's file; it has its name only when it is complete."""
    part = conversion.file.with_suffix(".part")
    with on_disk(part):
        part.parent.mkdir(parents=True, exist_ok=True)
    arguments = [str(conversion.model), "--outfile", str(part), "--outtype", conversion.source_type]
    done = subprocess.run([*conversion.converter.command, *arguments], capture_output=True, text=True, errors="replace")
    if done.returncode or not part.is_file():
        part.unlink(missing_ok=True)
        lines = "\n".join((done.stderr or done.stdout).strip().splitlines()[-_LAST_LINES:])
        raise SourceError(f"llama.cpp's converter cannot write {conversion.model}:\n{lines}")
    with on_disk(conversion.file):
        part.replace(conversion.file)


def lacks_conversion(plan: Plan) -> bool:
    """Whether the merge is finished, but not all GGUF files that the converter is to make of it."""
    receipt = read_receipt(plan.out) if plan.recipe.output.converter else None
    return receipt is not None and receipt.get("fingerprint") == plan.fingerprint and bool(_missing(plan))


def convert_merged(plan: Plan, *, on_message: OnMessage = lambda _: None) -> None:
    """Write the GGUF files that the recipe of a finished merge names; those that its receipt lists are left alone."""
    budget = plan.budget
    options = Options(memory=budget.memory, device=budget.device, threads=budget.threads)
    converter, out, files = str(plan.recipe.output.converter), str(plan.out), set[Path]()
    for entry in _missing(plan):
        settings = _settings(entry)
        conversion = plan_official(converter, out, (entry.type,), out, settings, options, name=_model_name(plan))
        if not conversion.file.is_file():
            on_message(str(conversion))
        convert_officially(conversion)
        files.add(conversion.file.parent)
    for folder in files:  # one, because all entries have the same model
        shutil.rmtree(folder, ignore_errors=True)


def _missing(plan: Plan) -> list[GGUFEntry]:
    """The GGUF entries of the recipe that have no file in the receipt of the finished merge."""
    listed = (read_receipt(plan.out) or {}).get("files", {})
    written = {facts.get("type") for facts in listed.values()}
    return [entry for entry in plan.recipe.output.gguf if file_type_named(entry.type).label not in written]


def _model_name(plan: Plan) -> str:
    return plan.recipe.output.name or plan.out.name


def _settings(entry: GGUFEntry) -> dict[str, Any]:
    """The entry as the settings of a conversion."""
    settings = {
        "imatrix": entry.imatrix,
        "tensor_types": dict(entry.tensor_types),
        "output_tensor_type": entry.output_type,
        "token_embedding_type": entry.embedding_type,
        "pure": entry.pure,
        "split_max_size": entry.split_max_size,
    }
    return {key: value for key, value in settings.items() if value}
