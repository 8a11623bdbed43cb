"""Resolve a path or Hub repo id to local files.

Repos are downloaded to huggingface_hub's cache. A branch is resolved to a commit once; only the files that a merge
reads are downloaded (safetensors if there are any), and nothing that is cached already. Downloaded weights are compared
with the Hub's sha256. On request, weights stay remote and only the files next to them are downloaded (io/remote/).
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mergeforge.core.checksums import file_sha256, git_sha1
from mergeforge.errors import MergeforgeError, SourceError, format_list
from mergeforge.io.disk import InputFile, write_durably
from mergeforge.io.model_files import is_complete_set, sort_model_files

if TYPE_CHECKING:
    from mergeforge.io.remote import RemoteSession

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB = "hf://"
_SHA1 = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_READ_ONLY = ("README.md", "adapter_config.json")  # read, but not copied into a merge


@dataclass(frozen=True)
class LocalInput:
    """The local folder or file of an input, and its Hub commit if it comes from there.

    `files`: remote weight files of the folder, by name.
    """

    path: Path
    revision: str | None
    files: Mapping[str, InputFile] = field(default_factory=dict)


def fetch(
    path: str,
    revision: str | None,
    stems: tuple[str, ...],
    *,
    allow_pickle: bool = False,
    session: RemoteSession | None = None,
    stream: bool = False,
) -> LocalInput:
    """Return the local folder (or file) of a model or adapter; download what is missing of a Hub repo.

    `stems`: the weights' file names without suffix; if empty, only the files next to weights are downloaded. With a
    `session`, weights behind URLs (hf://owner/name too) stay remote; with `stream`, those of all repos do. Raises
    SourceError if there is neither a local path nor a reachable repo.
    """
    local = _local(path)
    if local is not None:
        if revision:
            raise SourceError(f"{path} is a local path, so it has no revision '{revision}'")
        return LocalInput(local, None)
    if path.startswith(_HUB):
        path, stream = path.removeprefix(_HUB).rstrip("/"), True
    elif "://" in path:
        return _open_url(path, revision, stems, session)
    if not _REPO_ID.fullmatch(path) or path.startswith(("./", "../", "/")):
        raise SourceError(f"there is no {path}", hint="it is neither a local path nor a Hub repo id (owner/name)")
    return _download(path, revision, stems, allow_pickle, session if stream else None)


def _local(path: str) -> Path | None:
    try:
        local = Path(path).expanduser()
        return local if local.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, an unknown home directory, a NUL
        return None


def _open_url(url: str, revision: str | None, stems: tuple[str, ...], session: RemoteSession | None) -> LocalInput:
    """Open a folder or a single safetensors file behind a URL; the files next to the weights are copied."""
    from mergeforge.io.remote.folder import open_remote_folder

    if session is None:
        raise SourceError(f"{url} can only be read by run and plan", hint="copy it to a local folder first")
    if revision:
        raise SourceError(f"{url} is not a Hub repo, so it has no revision '{revision}'")
    single = url.rpartition("/")[2] if url.endswith(".safetensors") else ""
    remote = open_remote_folder(url.removesuffix(single), session)
    names = remote.names(() if single else stems)
    needed = [single, *needed_files(names, (), False)] if single else needed_files(names, stems, False)
    folder = session.temporary_folder()
    others = non_weight_files(needed)
    for name in others:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(remote.read(name))
    return LocalInput(folder, None, {name: remote.open(name) for name in needed if name not in others})


def _download(
    repo: str, revision: str | None, stems: tuple[str, ...], allow_pickle: bool, session: RemoteSession | None = None
) -> LocalInput:
    """Download a repo to the cache; with a session, weights that are not cached already stay on the Hub."""
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision)
        names = [sibling.rfilename for sibling in info.siblings or []]
        needed = needed_files(names, stems, allow_pickle and session is None, repo)
        folder = download_verified(repo, str(info.sha), non_weight_files(needed) if session else needed)
        _remember(folder, revision or "main", str(info.sha))
        return LocalInput(
            folder, info.sha, _remote_weights(repo, str(info.sha), needed, folder, session) if session else {}
        )
    except SourceError:
        raise
    except Exception as error:  # of huggingface_hub or its HTTP library, or an invalid name
        cached = _cached(repo, revision, stems)
        if cached is not None:
            return cached
        requested = f"{repo}@{revision}" if revision else repo
        raise _not_found(requested, error) from None


def _not_found(requested: str, error: Exception) -> SourceError:
    """The error for a name that is not a local path, and that the Hub lacks or could not be asked about."""
    from huggingface_hub.errors import HfHubHTTPError

    local = "give the path of a local folder"
    response = getattr(error, "response", None)
    if isinstance(error, HfHubHTTPError) and response is not None:
        message = (error.server_message or str(error)).strip().splitlines()[0]
        hint = f"check the name and revision, log in with `hf auth login` for a private or gated repo, or {local}"
        return SourceError(f"there is no local {requested}, and the Hub says: {message}", hint=hint)
    if isinstance(error, ValueError):  # HFValidationError: no name of a repo
        hint = f"check the name and revision, or {local}"
        return SourceError(f"there is no local {requested}: {str(error).splitlines()[0]}", hint=hint)
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    text = f"there is no local {requested}, and the Hub could not be reached: {reason}"
    return SourceError(text, hint=f"check the network, or {local}")


def _remote_weights(
    repo: str, sha: str, needed: list[str], folder: Path, session: RemoteSession
) -> dict[str, InputFile]:
    from mergeforge.io.remote.hub_repo import open_repo_files

    absent = [name for name in needed if name not in non_weight_files(needed) and not (folder / name).exists()]
    return {**open_repo_files(repo, sha, absent, session)}


def non_weight_files(names: list[str]) -> list[str]:
    """The names of files that are not weights to merge."""
    weights = sort_model_files(names).left_out.get("weights", [])
    return [name for name in names if name not in weights or name.endswith(".json")]


def download_verified(repo: str, revision: str | None, needed: list[str], kind: str = "model") -> Path:
    """Download missing files of a repo; a damaged file is downloaded once more.

    Files are cached under their sha256 or git sha1, so a new file is compared with its own name. Raises SourceError for
    a file that arrives damaged twice.
    """
    import huggingface_hub

    for is_last in (False, True):
        started = time.time()
        folder = Path(huggingface_hub.snapshot_download(repo, repo_type=kind, revision=revision, allow_patterns=needed))
        damaged = [path for path in map(folder.joinpath, needed) if _is_damaged(path, started)]
        if not damaged:
            return folder
        for path in damaged:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
        if is_last:
            text = f"{format_list(path.name for path in damaged)} of {repo} came damaged twice"
            raise SourceError(text, hint="something between this machine and the Hub may be modifying the data")
    raise AssertionError("unreachable")


def _is_damaged(path: Path, started: float) -> bool:
    """Whether a file differs from its name in the cache. Large files are checked only if downloaded since `started`."""
    blob = path.resolve()
    if _SHA1.fullmatch(blob.name):
        return git_sha1(blob.read_bytes()) != blob.name
    if not _SHA256.fullmatch(blob.name) or blob.stat().st_mtime < started - 2:  # file systems may store whole seconds
        return False
    return file_sha256(blob) != blob.name


def _remember(folder: Path, revision: str, sha: str) -> None:
    """Record the commit of a branch in the cache, as huggingface_hub does, for offline use by name."""
    ref = folder.parents[1] / "refs" / revision
    with contextlib.suppress(OSError, MergeforgeError):
        if revision != sha and not (ref.is_file() and ref.read_text() == sha):
            ref.parent.mkdir(parents=True, exist_ok=True)
            write_durably(ref, sha.encode())


def _cached(repo: str, revision: str | None, stems: tuple[str, ...]) -> LocalInput | None:
    """The repo from an earlier download, for a machine that is offline."""
    import huggingface_hub

    names = [f"{stem}{suffix}" for stem in stems for suffix in (".safetensors", ".safetensors.index.json")]
    for name in ("config.json", "adapter_config.json", *names, "pytorch_model.bin"):
        try:
            cached = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision)
        except Exception:  # an invalid name: the caller reports why the Hub could not be reached
            return None
        if isinstance(cached, str):
            return LocalInput(Path(cached).parent, Path(cached).parent.name)
    return None


def needed_files(names: list[str], stems: tuple[str, ...], allow_pickle: bool, label: str = "the repo") -> list[str]:
    """The files of a repo that a merge reads: weights in one format, configuration, tokenizer. `label`: for errors.

    Raises SourceError if there are no weights that may be read.
    """
    weights = [name for stem in stems for name in _weights(names, stem, ".safetensors")]
    if stems and not weights and allow_pickle:
        weights = [name for stem in stems for name in _weights(names, stem, ".bin")]
    if "model" in stems and all(name.endswith(".json") for name in weights):
        weights = [*weights, *_other_names(names)]
    if stems and not weights and "model" not in stems and _is_model(names):
        hint = "list it under 'models'; `mergeforge extract-lora` makes an adapter from a model and its base"
        raise SourceError(f"{label} is a whole model, not an adapter", hint=hint)
    if stems and not weights:
        weights_there = format_list(name for name in names if name.endswith((".safetensors", ".bin", ".gguf", ".pth")))
        raise SourceError(f"{label} holds no safetensors weights (it holds: {weights_there or 'no weights'})")
    read = [name for name in names if name in _READ_ONLY]
    return weights + [name for name in (*sort_model_files(names).copied, *read) if name not in weights]


def _is_model(names: list[str]) -> bool:
    """Whether a repo holds a whole model: a config.json, no adapter_config.json, and weights under a model's names."""
    weights = [name for suffix in (".safetensors", ".bin") for name in _weights(names, "model", suffix)]
    return bool(weights) and "config.json" in names and "adapter_config.json" not in names


def _other_names(names: list[str]) -> list[str]:
    """Weights that are not named after model.safetensors: those of an index, of one model, or a single file."""
    others = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    indices = [name for name in names if name.endswith(".safetensors.index.json") and "/" not in name]
    known = len(indices) == 1 or len(others) == 1 or is_complete_set(others)
    return [*others, *(name for name in indices if not name.startswith("model."))] if known else []


def _weights(names: list[str], stem: str, suffix: str) -> list[str]:
    stem = "pytorch_model" if stem == "model" and suffix == ".bin" else stem
    pattern = re.compile(rf"{re.escape(stem)}(-\d+-of-\d+)?{re.escape(suffix)}(\.index\.json)?")
    return [name for name in names if pattern.fullmatch(name)]
