"""Publish a finished folder to a Hub repo atomically: the repo shows either the old state or the new plan.

Only files that changed are uploaded; weights are compared by sha256, small files by their git hash. Large files are
uploaded first (the Hub keeps them, so an interrupted publish resumes), then a single commit on the state that was
compared adds them and deletes the leftovers of an earlier publish. Nothing is visible before that commit.
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
from mergeforge.core.file_names import RECEIPT
from mergeforge.errors import MergeforgeError, OutputError, RecipeError, SourceError, format_list
from mergeforge.hub.download import download_verified

RETRY_HINT = "run the same command again; files that were uploaded are kept"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class Upload:
    """A file to upload: its name in the repo, its path, its size."""

    name: str
    path: Path
    nbytes: int


@dataclass(frozen=True)
class Publication:
    """What a publish would do. `parent`: the commit that it builds on (None: the repo is new)."""

    folder: Path
    repo: str
    revision: str
    private: bool
    parent: str | None
    uploads: tuple[Upload, ...]
    unchanged: tuple[str, ...]
    deletions: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(upload.nbytes for upload in self.uploads)


def plan_publication(
    folder: str | Path,
    repo: str,
    *,
    revision: str = "main",
    private: bool = True,
    links_into: str | Path | None = None,
    dry_run: bool = False,
) -> Publication:
    """Compare a folder with a repo without uploading anything.

    `links_into`: another folder that its symbolic links may point into. `dry_run`: it is not going to be published, so
    no token is needed; a repo that cannot be read without one then counts as new.

    Raises SourceError for an unfinished folder, RecipeError for an invalid repo name, and MergeforgeError if the Hub
    denies access.
    """
    folder = Path(folder)
    files = _files_of(folder)
    _check_links(files.values(), [folder, *([Path(links_into)] if links_into else [])])
    _check_repo_id(repo)
    if not dry_run or _has_token():
        check_access(repo)
    parent, remote = repo_files(repo, revision)
    unchanged = {name for name, path in files.items() if name in remote and is_unchanged(path, remote[name])}
    uploads = [Upload(name, path, path.stat().st_size) for name, path in files.items() if name not in unchanged]
    deletions = stale_files(repo, parent, remote, files)
    return Publication(
        folder, repo, revision, private, parent, tuple(uploads), tuple(sorted(unchanged)), tuple(deletions)
    )


def publish(publication: Publication) -> Iterator[str]:
    """Upload the changed files, yielding the name of each; finally commit, and yield the URL of the commit.

    Raises OutputError if somebody else changed the repo in the meantime; the publish can be run again.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, plan = HfApi(), publication
    if not (plan.uploads or plan.deletions):
        return
    with hub_errors(plan.repo):
        if plan.parent is None:
            api.create_repo(plan.repo, private=plan.private, exist_ok=True)
        if plan.revision != "main":
            api.create_branch(plan.repo, branch=plan.revision, exist_ok=True)
    operations: list[Any] = []
    for upload in plan.uploads:
        operation = CommitOperationAdd(path_in_repo=upload.name, path_or_fileobj=str(upload.path))
        with hub_errors(plan.repo):
            api.preupload_lfs_files(plan.repo, additions=[operation], revision=plan.revision, free_memory=False)
        operations.append(operation)
        yield upload.name
    operations += [CommitOperationDelete(path_in_repo=name) for name in plan.deletions]
    with hub_errors(plan.repo):
        parent = plan.parent or api.repo_info(plan.repo, revision=plan.revision).sha
        commit = api.create_commit(
            plan.repo, operations, commit_message=_title(plan), revision=plan.revision, parent_commit=parent
        )
    yield str(commit.commit_url)


def check_access(repo: str) -> str:
    """Return the account of the token in use. Raises RecipeError (invalid repo id) or MergeforgeError (no access)."""
    _check_repo_id(repo)
    from huggingface_hub import HfApi

    if not _has_token():
        raise MergeforgeError("there is no Hub token", hint="log in with `hf auth login`, or set HF_TOKEN")
    with hub_errors(repo):
        return str(HfApi().whoami()["name"])


def _check_repo_id(repo: str) -> None:
    if not _REPO.fullmatch(repo):
        raise RecipeError(f"{repo!r} is not a repo id", hint="use OWNER/NAME")


def _has_token() -> bool:
    from huggingface_hub import get_token

    return bool(get_token())


def _files_of(folder: Path) -> dict[str, Path]:
    """The files of a folder to publish: those that its receipt lists, or all that are not hidden."""
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder")
    if (folder / ".mergeforge").exists():
        raise SourceError(f"{folder} is not finished", hint="run its recipe again, then publish")
    receipt = folder / RECEIPT
    if receipt.is_file():
        names = [*_listed(_receipt(receipt)), RECEIPT]
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise SourceError(
                f"{folder} lacks {format_list(missing)}, which its receipt lists",
                hint="check the folder with `mergeforge verify`",
            )
        return {name: folder / name for name in sorted(names)}
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    relative = {path.relative_to(folder).as_posix(): path for path in paths}
    visible = {name: path for name, path in relative.items() if not name.startswith(".") and "/." not in name}
    if not visible:
        raise SourceError(f"{folder} is empty")
    return visible


def _check_links(files: Iterable[Path], folders: Sequence[Path]) -> None:
    """Raise SourceError for a link that leads out of the folders, which would publish the file that it points to."""
    roots = [folder.resolve() for folder in folders]
    for path in files:
        if not any(path.resolve().is_relative_to(root) for root in roots):
            raise SourceError(f"{path} is a link that leads out of its folder", hint="replace it by the file itself")


def _receipt(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise SourceError(f"{path} is not a valid receipt", hint="check the folder with `mergeforge verify`") from None


def _listed(receipt: Any) -> list[str]:
    files = receipt.get("files") if isinstance(receipt, Mapping) else None
    names = [str(name) for name in files] if isinstance(files, Mapping) else []
    return [name for name in names if not Path(name).is_absolute() and ".." not in Path(name).parts]


def repo_files(repo: str, revision: str) -> tuple[str | None, dict[str, Any]]:
    """The newest commit of a branch and its files by name; (None, {}) if there is no such repo or branch."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.hf_api import RepoFile

    try:
        with hub_errors(repo):
            sha = str(HfApi().repo_info(repo, revision=revision).sha)
            files = HfApi().list_repo_tree(repo, recursive=True, revision=sha)
            return sha, {file.path: file for file in files if isinstance(file, RepoFile)}
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None, {}


def is_unchanged(path: Path, remote_file: Any) -> bool:
    """Whether the repo has the content of a local file already."""
    if remote_file.size != path.stat().st_size:
        return False
    if remote_file.lfs is not None:
        return bool(file_sha256(path) == remote_file.lfs.sha256)
    return bool(git_sha1(path.read_bytes()) == remote_file.blob_id)


def lfs_identity(remote_file: Any) -> tuple[str, int]:
    """The sha256 and size of a large file in a repo; ("", 0) for a small plan."""
    return (str(remote_file.lfs.sha256), int(remote_file.size)) if remote_file.lfs is not None else ("", 0)


def stale_files(repo: str, parent: str | None, remote: Mapping[str, Any], files: Collection[str]) -> list[str]:
    """Files of an earlier publish that this one does not have: those in its receipt, and shards of another layout."""
    if parent is None:
        return []
    earlier: list[str] = []
    if RECEIPT in remote:
        with hub_errors(repo), suppress(ValueError):  # somebody else may have written something else there
            earlier = _listed(json.loads((download_verified(repo, parent, [RECEIPT]) / RECEIPT).read_text("utf-8")))
    if any(_WEIGHTS.fullmatch(name) for name in files):
        earlier += [name for name in remote if _WEIGHTS.fullmatch(name)]
    return sorted({name for name in earlier if name in remote and name not in files})


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn the Hub's errors into ours; errors about a missing repo or revision are passed on."""
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError, MergeforgeError):
        raise
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status == 412:
            text = f"{repo} was changed by somebody else in the meantime"
            raise OutputError(text, hint=RETRY_HINT) from None
        message = error.server_message or str(error).splitlines()[0]
        hint = "use `hf auth login` with a token that has write access" if status in (401, 403) else RETRY_HINT
        raise MergeforgeError(f"the Hub refused {repo}: {message}", hint=hint) from None
    except Exception as error:  # of its HTTP library, or a RuntimeError around any of these
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MergeforgeError(f"publishing to {repo} failed: {reason}", hint=RETRY_HINT) from None


def _title(publication: Publication) -> str:
    return "Upload with mergeforge" if publication.parent is None else "Update with mergeforge"
