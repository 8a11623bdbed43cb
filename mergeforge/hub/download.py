"""A path or Hub repo id -> local files.

Repos come through huggingface_hub's cache. A branch is resolved to a commit once; only the files
that a merge reads are downloaded (safetensors where there are any), and nothing when they are
already there. Weights that have just come are compared with the sha256 that the Hub tells. On request
weights stay where they are, and only what lies beside them is downloaded (remote/).
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
from mergeforge.errors import MergeforgeError, SourceError, listing
from mergeforge.io.disk import InputFile, write_durably

if TYPE_CHECKING:
    from mergeforge.io.remote import RemoteSession

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB = "hf://"
_SHA1 = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SIDE_FILES = re.compile(
    r"[^/]*\.(json|jinja|model|txt|md)|LICENSE[^/]*|NOTICE[^/]*|[^/]*tokenizer[^/]*|[^/]*\.tiktoken"
)


@dataclass(frozen=True)
class Local:
    """Where an input lies on this machine, and its Hub commit if it came from there.

    `files`: weights that belong there and lie elsewhere, by name.
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
    link: RemoteSession | None = None,
    stream: bool = False,
) -> Local:
    """The local folder (or file) of a model or adapter; downloads what is missing of a Hub repo.

    `stems` are the weights' file names without ending; with none, only what lies beside weights is downloaded.
    Through a `link`, weights behind URLs (hf://owner/name too) are opened where they lie; those of every repo if
    `stream` says so. Raises SourceError when there is neither a local path nor a repo that can be reached.
    """
    local = _local(path)
    if local is not None:
        if revision:
            raise SourceError(f"{path} is a local path, which has no revision '{revision}'")
        return Local(local, None)
    if path.startswith(_HUB):
        path, stream = path.removeprefix(_HUB).rstrip("/"), True
    elif "://" in path:
        return _behind(path, revision, stems, link)
    if not _REPO_ID.fullmatch(path) or path.startswith(("./", "../", "/")):
        raise SourceError(f"there is no {path}", hint="neither a local path nor a Hub repo id (owner/name)")
    return _download(path, revision, stems, allow_pickle, link if stream else None)


def _local(path: str) -> Path | None:
    try:
        local = Path(path).expanduser()
        return local if local.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, the home of nobody, a NUL
        return None


def _behind(url: str, revision: str | None, stems: tuple[str, ...], link: RemoteSession | None) -> Local:
    """A folder, or one safetensors file, behind a URL: what lies beside the weights is copied here."""
    from mergeforge.io.remote.folder import place_of

    if link is None:
        raise SourceError(f"{url} can be read by run and plan alone", hint="copy it to a folder here first")
    if revision:
        raise SourceError(f"{url} is not a Hub repo, so it has no revision '{revision}'")
    single = url.rpartition("/")[2] if url.endswith(".safetensors") else ""
    place = place_of(url.removesuffix(single), link)
    names = place.names(() if single else stems)
    wanted = [single, *wanted_files(names, (), False)] if single else wanted_files(names, stems, False)
    folder = link.folder()
    for name in beside_weights(wanted):
        (folder / name).write_bytes(place.read(name))
    return Local(folder, None, {name: place.open(name) for name in wanted if name.endswith(".safetensors")})


def _download(
    repo: str, revision: str | None, stems: tuple[str, ...], allow_pickle: bool, link: RemoteSession | None = None
) -> Local:
    """A repo's files in the cache; through a link its weights stay on the Hub, but for those that are here already."""
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision)
        names = [sibling.rfilename for sibling in info.siblings or []]
        wanted = wanted_files(names, stems, allow_pickle and link is None)
        folder = download_whole(repo, str(info.sha), beside_weights(wanted) if link else wanted)
        _remember(folder, revision or "main", str(info.sha))
        return Local(folder, info.sha, _elsewhere(repo, str(info.sha), wanted, folder, link) if link else {})
    except SourceError:
        raise
    except Exception as error:  # its own, its HTTP library's, a name that it finds not valid
        cached = _cached(repo, revision, stems)
        if cached is not None:
            return cached
        said = getattr(error, "server_message", None) or str(error).strip() or type(error).__name__
        hint = "check the name and revision, `hf auth login` for a private or gated repo, or give a local path"
        asked = f"{repo}@{revision}" if revision else repo
        raise SourceError(f"there is no local {asked}, and the Hub says: {said.splitlines()[0]}", hint=hint) from None


def _elsewhere(repo: str, sha: str, wanted: list[str], folder: Path, link: RemoteSession) -> dict[str, InputFile]:
    from mergeforge.io.remote.hub_repo import open_repo_files

    absent = [name for name in wanted if name not in beside_weights(wanted) and not (folder / name).exists()]
    return {**open_repo_files(repo, sha, absent, link)}


def beside_weights(names: list[str]) -> list[str]:
    """Of the files that a merge reads, the small ones."""
    return [name for name in names if not name.endswith((".safetensors", ".bin"))]


def download_whole(repo: str, revision: str | None, wanted: list[str], kind: str = "model") -> Path:
    """Download what is missing; what was damaged on its way is fetched once more.

    Files lie in the cache under their sha256 or git's sha1, so what has just come is compared with its own name.
    Raises SourceError for one that comes damaged twice.
    """
    import huggingface_hub

    for last in (False, True):
        started = time.time()
        folder = Path(huggingface_hub.snapshot_download(repo, repo_type=kind, revision=revision, allow_patterns=wanted))
        damaged = [path for path in map(folder.joinpath, wanted) if _is_damaged(path, started)]
        if not damaged:
            return folder
        for path in damaged:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
        if last:
            text = f"{listing(path.name for path in damaged)} of {repo} came damaged twice"
            raise SourceError(text, hint="is something between here and the Hub changing what it sends?")
    raise AssertionError("unreachable")


def _is_damaged(path: Path, started: float) -> bool:
    """Whether a file is not what its name in the cache says: a small one, or a large one that came since `started`."""
    blob = path.resolve()
    if _SHA1.fullmatch(blob.name):
        return git_sha1(blob.read_bytes()) != blob.name
    if not _SHA256.fullmatch(blob.name) or blob.stat().st_mtime < started - 2:  # file systems keep whole seconds
        return False
    return file_sha256(blob) != blob.name


def _remember(folder: Path, revision: str, sha: str) -> None:
    """Note in the cache which commit a branch is, as huggingface_hub does: offline it is asked for by its name."""
    ref = folder.parents[1] / "refs" / revision
    with contextlib.suppress(OSError, MergeforgeError):
        if revision != sha and not (ref.is_file() and ref.read_text() == sha):
            ref.parent.mkdir(parents=True, exist_ok=True)
            write_durably(ref, sha.encode())


def _cached(repo: str, revision: str | None, stems: tuple[str, ...]) -> Local | None:
    """The repo as an earlier download left it, for a machine that is offline."""
    import huggingface_hub

    names = [f"{stem}{ending}" for stem in stems for ending in (".safetensors", ".safetensors.index.json")]
    for name in ("config.json", "adapter_config.json", *names, "pytorch_model.bin"):
        try:
            found = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision)
        except Exception:  # a name that it finds not valid: the caller reports why the Hub could not be asked
            return None
        if isinstance(found, str):
            return Local(Path(found).parent, Path(found).parent.name)
    return None


def wanted_files(names: list[str], stems: tuple[str, ...], allow_pickle: bool) -> list[str]:
    """The files of a repo that a merge reads: weights of one format, configuration, tokenizer.

    Raises SourceError when there are no weights that may be read.
    """
    weights = [name for stem in stems for name in _weights(names, stem, ".safetensors")]
    if stems and not weights and allow_pickle:
        weights = [name for stem in stems for name in _weights(names, stem, ".bin")]
    if stems and not weights:
        held = listing(name for name in names if name.endswith((".safetensors", ".bin", ".gguf", ".pth")))
        raise SourceError(f"the repo holds no safetensors weights (it holds: {held or 'no weights'})")
    return weights + [name for name in names if _SIDE_FILES.fullmatch(name) and name not in weights]


def _weights(names: list[str], stem: str, ending: str) -> list[str]:
    stem = "pytorch_model" if stem == "model" and ending == ".bin" else stem
    pattern = re.compile(rf"{re.escape(stem)}(-\d+-of-\d+)?{re.escape(ending)}(\.index\.json)?")
    return [name for name in names if pattern.fullmatch(name)]
