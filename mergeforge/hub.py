"""A path or Hub repo id -> local files.

Repos come through huggingface_hub's cache. A branch is resolved to a commit once; only the files
that a merge reads are downloaded (safetensors where there are any), and nothing when they are
already there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mergeforge.errors import SourceError, listing

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SIDE_FILES = re.compile(r"[^/]*\.(json|jinja|model|txt|md)|LICENSE[^/]*|NOTICE[^/]*|[^/]*tokenizer[^/]*|[^/]*\.tiktoken")


@dataclass(frozen=True)
class Local:
    """Where an input lies on this machine, and its Hub commit if it came from there."""

    path: Path
    revision: str | None


def fetch(path: str, revision: str | None, stems: tuple[str, ...], *, allow_pickle: bool = False) -> Local:
    """The local folder (or file) of a model or adapter; downloads what is missing of a Hub repo.

    `stems` are the weights' file names without ending. Raises SourceError when there is neither a
    local path nor a repo that can be reached.
    """
    local = Path(path).expanduser()
    if local.exists():
        if revision:
            raise SourceError(f"{path} is a local path, which has no revision '{revision}'")
        return Local(local, None)
    if not _REPO_ID.fullmatch(path) or path.startswith(("./", "../", "/")):
        raise SourceError(f"there is no {path}", hint="neither a local path nor a Hub repo id (owner/name)")
    return _download(path, revision, stems, allow_pickle)


def _download(repo: str, revision: str | None, stems: tuple[str, ...], allow_pickle: bool) -> Local:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision)
        names = [sibling.rfilename for sibling in info.siblings or []]
        wanted = wanted_files(names, stems, allow_pickle)
        folder = huggingface_hub.snapshot_download(repo, revision=info.sha, allow_patterns=wanted)
        return Local(Path(folder), info.sha)
    except (OfflineModeIsEnabled, OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        cached = _cached(repo, revision)
        if cached is not None:
            return cached
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "check the name and revision, `hf auth login` for a private or gated repo, or give a local path"
        raise SourceError(f"there is no local {repo}, and the Hub says: {first}", hint=hint) from None


def _cached(repo: str, revision: str | None) -> Local | None:
    """The repo as an earlier download left it, for a machine that is offline."""
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True)
    except Exception:  # nothing cached: the caller reports why the Hub could not be asked
        return None
    return Local(Path(folder), Path(folder).name)


def wanted_files(names: list[str], stems: tuple[str, ...], allow_pickle: bool) -> list[str]:
    """The files of a repo that a merge reads: weights of one format, configuration, tokenizer.

    Raises SourceError when there are no weights that may be read.
    """
    weights = [name for stem in stems for name in _weights(names, stem, ".safetensors")]
    if not weights and allow_pickle:
        weights = [name for stem in stems for name in _weights(names, stem, ".bin")]
    if not weights:
        held = listing(name for name in names if name.endswith((".safetensors", ".bin", ".gguf", ".pth")))
        raise SourceError(f"the repo holds no safetensors weights (it holds: {held or 'no weights'})")
    return weights + [name for name in names if _SIDE_FILES.fullmatch(name) and name not in weights]


def _weights(names: list[str], stem: str, ending: str) -> list[str]:
    stem = "pytorch_model" if stem == "model" and ending == ".bin" else stem
    pattern = re.compile(rf"{re.escape(stem)}(-\d+-of-\d+)?{re.escape(ending)}(\.index\.json)?")
    return [name for name in names if pattern.fullmatch(name)]
