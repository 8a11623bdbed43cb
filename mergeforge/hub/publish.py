"""Publish: a finished folder to a Hub repo, so that the repo shows the old state or the new one, and nothing between.

Only what is missing is sent: weights by their sha256, small files by their git hash. All large files are
uploaded first (the Hub keeps them, so a publish that broke off goes on), then one commit on the state
that was looked at names them, and takes away what an earlier publish left. Nothing of it is seen before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeforge.core.checksums import file_sha256, git_sha1
from mergeforge.errors import MergeforgeError, OutputError, RecipeError, SourceError, listing
from mergeforge.hub.download import download_whole

RECEIPT = "mergeforge.json"
AGAIN = "the same command again: what was sent is kept"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class Upload:
    """A file to send: its name in the repo, where it lies, its bytes."""

    name: str
    path: Path
    nbytes: int


@dataclass(frozen=True)
class Publication:
    """What publishing would do. `parent`: the commit that it builds on (None: the repo is new)."""

    folder: Path
    repo: str
    revision: str
    private: bool
    parent: str | None
    send: tuple[Upload, ...]
    kept: tuple[str, ...]
    remove: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.send)


def plan_publication(
    folder: str | Path, repo: str, *, revision: str = "main", private: bool = True, links_into: str | Path | None = None
) -> Publication:
    """Compare a folder with a repo; sends nothing. `links_into`: where its links may lead, but for the folder itself.

    Raises SourceError for a folder that is unfinished, RecipeError for a name that is none, and
    MergeforgeError where the Hub does not let us in.
    """
    folder = Path(folder)
    files = _files_of(folder)
    _check_links(files.values(), [folder, *([Path(links_into)] if links_into else [])])
    check_access(repo)
    parent, held = held_files(repo, revision)
    same = {name for name, path in files.items() if name in held and is_same(path, held[name])}
    send = [Upload(name, path, path.stat().st_size) for name, path in files.items() if name not in same]
    remove = stale_files(repo, parent, held, files)
    return Publication(folder, repo, revision, private, parent, tuple(send), tuple(sorted(same)), tuple(remove))


def publish(publication: Publication) -> Iterator[str]:
    """Send what is missing, yielding each file's name when it is there; the commit comes last, and yields its address.

    Raises OutputError when somebody else changed the repo meanwhile: run it again.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, one = HfApi(), publication
    if not (one.send or one.remove):
        return
    with hub_errors(one.repo):
        if one.parent is None:
            api.create_repo(one.repo, private=one.private, exist_ok=True)
        if one.revision != "main":
            api.create_branch(one.repo, branch=one.revision, exist_ok=True)
    operations: list[Any] = []
    for upload in one.send:
        operation = CommitOperationAdd(path_in_repo=upload.name, path_or_fileobj=str(upload.path))
        with hub_errors(one.repo):
            api.preupload_lfs_files(one.repo, additions=[operation], revision=one.revision, free_memory=False)
        operations.append(operation)
        yield upload.name
    operations += [CommitOperationDelete(path_in_repo=name) for name in one.remove]
    with hub_errors(one.repo):
        parent = one.parent or api.repo_info(one.repo, revision=one.revision).sha
        done = api.create_commit(
            one.repo, operations, commit_message=_title(one), revision=one.revision, parent_commit=parent
        )
    yield str(done.commit_url)


def check_access(repo: str) -> str:
    """The account that the token in use belongs to. Raises RecipeError or MergeforgeError."""
    if not _REPO.fullmatch(repo):
        raise RecipeError(f"{repo!r} is not a repo id", hint="OWNER/NAME")
    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise MergeforgeError("there is no Hub token", hint="`hf auth login`, or set HF_TOKEN")
    with hub_errors(repo):
        return str(HfApi().whoami()["name"])


def _files_of(folder: Path) -> dict[str, Path]:
    """What is published of a folder: what its receipt lists, or all that is not hidden."""
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder")
    if (folder / ".mergeforge").exists():
        raise SourceError(f"{folder} is not finished", hint="run its recipe again, then publish")
    receipt = folder / RECEIPT
    if receipt.is_file():
        names = [*_listed(_receipt(receipt)), RECEIPT]
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise SourceError(f"{folder} lacks {listing(missing)}, which its receipt lists", hint="mergeforge verify")
        return {name: folder / name for name in sorted(names)}
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    relative = {path.relative_to(folder).as_posix(): path for path in found}
    shown = {name: path for name, path in relative.items() if not name.startswith(".") and "/." not in name}
    if not shown:
        raise SourceError(f"{folder} is empty")
    return shown


def _check_links(files: Iterable[Path], places: Sequence[Path]) -> None:
    """Raises SourceError for a link that leads out of the places: it would publish what lies there."""
    roots = [place.resolve() for place in places]
    for path in files:
        if not any(path.resolve().is_relative_to(root) for root in roots):
            raise SourceError(f"{path} is a link that leads out of its folder", hint="put the file itself there")


def _receipt(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise SourceError(f"{path} is no receipt", hint="mergeforge verify") from None


def _listed(receipt: Any) -> list[str]:
    files = receipt.get("files") if isinstance(receipt, Mapping) else None
    names = [str(name) for name in files] if isinstance(files, Mapping) else []
    return [name for name in names if not Path(name).is_absolute() and ".." not in Path(name).parts]


def held_files(repo: str, revision: str) -> tuple[str | None, dict[str, Any]]:
    """The repo's newest commit and its files by name; None where there is no such repo or branch."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.hf_api import RepoFile

    try:
        with hub_errors(repo):
            sha = str(HfApi().repo_info(repo, revision=revision).sha)
            files = HfApi().list_repo_tree(repo, recursive=True, revision=sha)
            return sha, {one.path: one for one in files if isinstance(one, RepoFile)}
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None, {}


def is_same(path: Path, held: Any) -> bool:
    """Whether the repo holds the file's content already."""
    if held.size != path.stat().st_size:
        return False
    if held.lfs is not None:
        return bool(file_sha256(path) == held.lfs.sha256)
    return bool(git_sha1(path.read_bytes()) == held.blob_id)


def lfs_of(held: Any) -> tuple[str, int]:
    """The sha256 and size of a large file in a repo; ("", 0) for one that is none."""
    return (str(held.lfs.sha256), int(held.size)) if held.lfs is not None else ("", 0)


def stale_files(repo: str, parent: str | None, held: Mapping[str, Any], files: Collection[str]) -> list[str]:
    """What an earlier publish left that this one does not have: by its receipt, and shards that would be read first."""
    if parent is None:
        return []
    earlier: list[str] = []
    if RECEIPT in held:
        with hub_errors(repo), suppress(ValueError):  # what somebody else wrote there may be no receipt
            earlier = _listed(json.loads((download_whole(repo, parent, [RECEIPT]) / RECEIPT).read_text("utf-8")))
    if any(_WEIGHTS.fullmatch(name) for name in files):
        earlier += [name for name in held if _WEIGHTS.fullmatch(name)]
    return sorted({name for name in earlier if name in held and name not in files})


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """The Hub's refusals as our errors; what was not found stays what it is."""
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError, MergeforgeError):
        raise
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status == 412:
            text = f"{repo} was changed by somebody else meanwhile"
            raise OutputError(text, hint=AGAIN) from None
        said = error.server_message or str(error).splitlines()[0]
        hint = "`hf auth login` with a token that may write there" if status in (401, 403) else AGAIN
        raise MergeforgeError(f"the Hub refused {repo}: {said}", hint=hint) from None
    except Exception as error:  # of its HTTP library, or a RuntimeError around any of these
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = AGAIN
        raise MergeforgeError(f"publishing to {repo} broke off: {first}", hint=hint) from None


def _title(publication: Publication) -> str:
    return "Upload with mergeforge" if publication.parent is None else "Update with mergeforge"
