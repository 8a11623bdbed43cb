"""Check a finished merge against its receipt."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from mergeforge.core.checksums import chunk_checksums, file_sha256, tensor_checksum
from mergeforge.core.file_names import MODEL_CARD, RECEIPT, RECIPE
from mergeforge.core.tensor_info import Tile, blocks
from mergeforge.errors import MergeforgeError, SourceError, malformed_as_source_error
from mergeforge.execute.compute import compute_tiles
from mergeforge.execute.unfinished import read_unfinished
from mergeforge.execute.workspace import read_receipt
from mergeforge.hub.publish import lfs_identity, repo_files
from mergeforge.io.disk import DiskFile, InputFile
from mergeforge.io.safetensors_header import Header, read_header
from mergeforge.planner import Plan, TensorPlan, make_plan
from mergeforge.tensors.budget import cpu_count
from mergeforge.tensors.worker import Worker, single_torch_thread
from mergeforge.writers.encoder import chunk_ranges
from mergeforge.writers.fp8 import SCALE_SUFFIX
from mergeforge.writers.safetensors import KEY

SAMPLE = 24  # tensors that a deep check recomputes


@dataclass(frozen=True)
class Verdict:
    """The number of files and tensors checked, of tensors recomputed, all problems, and the merge's own warnings."""

    files: int
    tensors: int
    recomputed: int
    problems: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(out: str | Path, *, deep: bool = False, everything: bool = False) -> Verdict:
    """Check sizes, headers and every tensor's checksum. `deep`: recompute a sample from the inputs; `everything`: all.

    Raises SourceError when there is no receipt; all other problems are in the verdict.
    """
    out = Path(out)
    receipt = read_receipt(out)
    if receipt is None:
        raise _no_receipt(out)
    with malformed_as_source_error(out / RECEIPT):
        problems = _check_all(out, receipt)
    recomputed = _recompute(out, receipt, problems, everything) if deep and not problems else 0
    warnings = tuple(receipt.get("warnings", ()))
    return Verdict(len(receipt["files"]), len(receipt["tensors"]), recomputed, tuple(problems), warnings)


def _no_receipt(out: Path) -> SourceError:
    run = read_unfinished(out)
    if not out.exists():
        return SourceError(f"there is no folder {out}")
    if run is None:
        return SourceError(f"{out} has no receipt ({RECEIPT})", hint="only finished merges of mergeforge have one")
    text = f"{out} holds an interrupted merge ({run.method}): {len(run.rows)} tensors are written, none is final yet"
    return SourceError(text, hint="run the command that started it again to resume, or with --fresh to start over")


def _check_all(out: Path, receipt: Mapping[str, Any]) -> list[str]:
    """Everything that differs from the receipt."""
    files = receipt["files"]
    uploaded = {name: facts for name, facts in files.items() if _sent_to(facts)[0] and not (out / name).exists()}
    problems = _check_files(out, {name: facts for name, facts in files.items() if name not in uploaded})
    problems += _check_uploaded(uploaded)
    headers = {name: _header(out / name, problems) for name in _weight_files(receipt)}
    problems += _check_tensors(receipt["tensors"], headers)
    return problems + _check_encoded(out, receipt)


def _weight_files(receipt: Mapping[str, Any]) -> list[str]:
    """The checkpoint's files. A combined adapter's file is not one: like the other files, it is hashed whole."""
    return [name for name, facts in receipt["files"].items() if name.endswith(".safetensors") and "sha256" not in facts]


def _check_files(out: Path, files: Mapping[str, Any]) -> list[str]:
    """Files that are missing or changed. The model card may change: its owner edits it, and so does `eval --card`."""
    problems = []
    for name, facts in files.items():
        path = out / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif name == MODEL_CARD:
            continue
        elif path.stat().st_size != facts["size"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, not {facts['size']}")
        elif "sha256" in facts and file_sha256(path) != facts["sha256"]:
            problems.append(f"{name} has changed")
    return problems


def _check_uploaded(files: Mapping[str, Any]) -> list[str]:
    """Compare files that were uploaded to the Hub and removed here with the newest commit of the repo."""
    problems = []
    for repo, revision in dict.fromkeys(map(_sent_to, files.values())):
        expected = {name: facts for name, facts in files.items() if _sent_to(facts) == (repo, revision)}
        try:
            _, held = repo_files(repo, revision)
        except MergeforgeError as error:
            problems.append(f"{repo} cannot be checked: {error}")
            continue
        for name, facts in expected.items():
            if name not in held:
                problems.append(f"{name} is neither in the folder nor in {repo}")
            elif lfs_identity(held[name]) != (facts.get("lfs_sha256"), facts["size"]):
                problems.append(f"{name} of {repo} is not the file that was uploaded")
    return problems


def _sent_to(facts: Mapping[str, Any]) -> tuple[str, str]:
    """The repo and branch that a file was uploaded to; "" for none."""
    target = facts.get("sent_to")
    return (str(target.get("repo", "")), str(target.get("revision", ""))) if isinstance(target, Mapping) else ("", "")


def _header(path: Path, problems: list[str]) -> Header | None:
    try:
        return read_header(path)
    except SourceError as error:
        if path.is_file():
            problems.append(str(error))
        return None


def _check_tensors(tensors: Mapping[str, Any], headers: Mapping[str, Header | None]) -> list[str]:
    """Compare every tensor's file, dtype, shape and checksum; one thread per core reads."""
    held = {name: header for file, header in headers.items() if header for name in header.tensors}
    packed = {packed for name, facts in tensors.items() if "fp8" in facts for packed in (name, f"{name}{SCALE_SUFFIX}")}
    held = {name: header for name, header in held.items() if name not in packed}
    tensors = {name: facts for name, facts in tensors.items() if "file" in facts}
    problems = [f"{name} is in a file but not in the receipt" for name in sorted(set(held) - set(tensors))]

    def check(name: str) -> str:
        facts, header = tensors[name], headers.get(tensors[name]["file"])
        if header is None:
            return ""  # its file is already reported
        if name not in header.tensors:
            return f"{name} is not in {facts['file']}"
        info, offset = header.tensors[name]
        if (info.dtype, list(info.shape)) != (facts["dtype"], facts["shape"]):
            return f"{name} is {info.dtype} {list(info.shape)}, not {facts['dtype']} {facts['shape']}"
        sums = []
        for start, stop in blocks(Tile(name, 0, info.rows), info):
            buffer = bytearray((stop - start) * info.row_nbytes)
            header.file.read_into(memoryview(buffer), offset + start * info.row_nbytes)
            sums.append(xxhash.xxh3_128_hexdigest(buffer))
        return "" if tensor_checksum(sums) == facts["xxh3"] else f"{name} is damaged: its checksum differs"

    with ThreadPoolExecutor(cpu_count()) as pool:
        return problems + [problem for problem in pool.map(check, tensors) if problem]


def _check_encoded(out: Path, receipt: Mapping[str, Any]) -> list[str]:
    """Compare headers of encoded files (GGUF, FP8) and every tensor's bytes with the receipt, one thread per core."""
    used = {one["file"] for tensor in receipt["tensors"].values() for one in _encoded(tensor).values()}
    hashed = {name for name, facts in receipt["files"].items() if "sha256" in facts}  # added by `mergeforge gguf`
    files = {name: facts for name, facts in receipt["files"].items() if name.endswith(".gguf") or name in used}
    files = {name: facts for name, facts in files.items() if name not in hashed}
    opened = {name: DiskFile(out / name) for name, facts in files.items() if _has_size(out / name, facts["size"])}
    problems = []
    for name, file in opened.items():
        facts = files[name]
        for at, size, digest in [[0, facts["header_size"], facts["header_sha256"]], *facts["known"]]:
            data = bytearray(size)
            file.read_into(memoryview(data), at)
            if hashlib.sha256(data).hexdigest() != digest:
                problems.append(f"the {'constants' if at else 'header'} of {name} changed")

    def check(task: tuple[str, str, Mapping[str, Any]]) -> str:
        name, key, facts = task
        sums = _chunk_digests(opened[facts["file"]], facts["strips"])
        return "" if tensor_checksum(sums) == facts["xxh3"] else f"{name} is damaged in {facts['file']} ({key})"

    tasks = [
        (name, key, facts)
        for name, tensor in receipt["tensors"].items()
        for key, facts in _encoded(tensor).items()
        if facts["file"] in opened
    ]
    with ThreadPoolExecutor(cpu_count()) as pool:
        return problems + [problem for problem in pool.map(check, tasks) if problem]


def _encoded(tensor: Mapping[str, Any]) -> dict[str, Any]:
    """The receipt's entries for a tensor's encoded forms."""
    return {**tensor.get("gguf", {}), **tensor.get("fp8", {})}


def _chunk_digests(file: InputFile, chunks: list[Any]) -> Iterator[str]:
    """Digests of chunks as the receipt lists them (receipt.py, _chunks)."""
    if chunks and isinstance(chunks[0], int):
        first, total, step = chunks
        ranges_of_chunks: Iterable[Any] = (
            [[first + start, min(step, total - start), 1, 0]] for start in range(0, total, step)
        )
    else:
        ranges_of_chunks = chunks
    left = file.size
    for ranges in ranges_of_chunks:
        digest = xxhash.xxh3_128()
        for offset, nbytes, times, distance in ranges:
            left -= nbytes * times
            if left < 0 or nbytes < 0 or times < 0:
                raise ValueError(f"chunks of more than the {file.size} bytes of {file.path}")
            for repetition in range(times):
                buffer = bytearray(nbytes)
                file.read_into(memoryview(buffer), offset + repetition * distance)
                digest.update(buffer)
        yield digest.hexdigest()


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _recompute(out: Path, receipt: Mapping[str, Any], problems: list[str], everything: bool) -> int:
    """Recompute tensors from the inputs and compare their checksums; returns how many."""
    import torch

    plan = make_plan(out / RECIPE, out=out.parent / f"{out.name}.verify", threads=1, device="cpu", allow_nonfinite=True)
    chosen = list(plan.tensor_plans)
    if not everything and len(chosen) > SAMPLE:
        chosen = random.Random(receipt["fingerprint"]).sample(chosen, SAMPLE)
    worker = Worker("cpu", max(tensor_plan.staging_nbytes for tensor_plan in plan.tensor_plans))
    with torch.inference_mode(), single_torch_thread():
        for tensor_plan in chosen:
            recorded = _recorded_checksums(receipt["tensors"][tensor_plan.info.name])
            computed = _compute_checksums(tensor_plan, worker)
            if {key: computed.get(key) for key in recorded} != recorded:
                problems.append(f"{tensor_plan.info.name} comes out differently when recomputed from the inputs")
    _note_changed_inputs(plan, receipt, problems)
    return len(chosen)


def _compute_checksums(tensor_plan: TensorPlan, worker: Worker) -> dict[str, str]:
    """The checksum of a tensor for each of its encoders, computed from the inputs."""
    sums: dict[str, list[str]] = {}
    for tile, encoded, _ in compute_tiles(tensor_plan, tensor_plan.tiles, worker, allow_nonfinite=True):
        for encoder, raw in encoded:
            sizes = [encoder.chunk_nbytes(*rows) for rows in chunk_ranges(tile.start, tile.stop, encoder)]
            sums.setdefault(encoder.key, []).extend(chunk_checksums(raw, sizes))
    return {key: tensor_checksum(digests) for key, digests in sums.items()}


def _recorded_checksums(facts: Mapping[str, Any]) -> dict[str, str]:
    """The checksums in the receipt for a tensor."""
    checksums = {key: encoded["xxh3"] for key, encoded in _encoded(facts).items()}
    return checksums | ({KEY: facts["xxh3"]} if "xxh3" in facts else {})


def _note_changed_inputs(plan: Plan, receipt: Mapping[str, Any], problems: list[str]) -> None:
    now = {
        (table.label, name): digest for table in plan.inputs.checkpoints for name, digest in table.file_hashes.items()
    }
    for source in receipt["inputs"]:
        for name, facts in source["files"].items():
            if now.get((source["name"], name)) not in (None, facts["header_sha256"]):
                problems.append(f"{name} of {source['name']} is no longer the file that was merged")
