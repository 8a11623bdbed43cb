"""StreamingUpload: upload finished files to a Hub repo one by one during the merge, and remove them locally.

The files are committed to a staging branch, where the Hub keeps them however long the merge takes, and lists them by
sha256. At the end, one commit on the target branch takes them over together with the files next to the weights, and
the staging branch is deleted. After a crash, the next run asks the staging branch which files have arrived.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mergeforge.core.messages import OnMessage
from mergeforge.errors import MergeforgeError, OutputError
from mergeforge.execute.journal import UploadedFile
from mergeforge.execute.workspace import Workspace
from mergeforge.hub.publish import (
    RETRY_HINT,
    check_access,
    hub_errors,
    is_unchanged,
    lfs_identity,
    repo_files,
    stale_files,
)
from mergeforge.io.disk import sync_folder
from mergeforge.planner import Plan
from mergeforge.recipe import Publish

T = TypeVar("T")
WAITS = (1.0, 5.0, 20.0)  # seconds between attempts, in addition to huggingface_hub's own retries


class StreamingUpload:
    """The files of one merge on the Hub: `uploaded` have arrived, `missing_remotely` had but are gone."""

    def __init__(self, plan: Plan, workspace: Workspace, parent: str, on_message: OnMessage) -> None:
        assert plan.recipe.output.publish is not None
        self.target: Publish = plan.recipe.output.publish
        self.branch = f"mergeforge-{plan.fingerprint[:12]}"
        self.workspace = workspace
        self.parent = parent
        self.on_message = on_message
        self.uploaded: dict[str, UploadedFile] = {}
        self.missing_remotely: tuple[str, ...] = ()

    def reconcile(self) -> None:
        """Compare the journal with the staging branch, and remove locally what has arrived there."""
        _, remote = repo_files(self.target.repo, self.branch)
        recorded = self.workspace.journal.uploaded
        same_repo = {name: file for name, file in recorded.items() if file.repo == self.target.repo}
        self.uploaded = {
            name: file for name, file in same_repo.items() if name in remote and _is_uploaded(file, remote[name])
        }
        self.missing_remotely = tuple(name for name in recorded if name not in self.uploaded)
        for name in self.uploaded:
            self._remove(name)

    def upload(self, name: str) -> None:
        """Upload a finished file, check that it arrived, record it, and remove it locally.

        Raises MergeforgeError or OutputError.
        """
        if name in self.uploaded:
            return
        file = self._upload(name)
        self.workspace.journal.record_upload(name, file)
        self.uploaded[name] = file
        self._remove(name)
        self.on_message(f"uploaded {name}")

    def publish(self) -> None:
        """Make one commit on the target branch: uploaded files, files next to them, deletion of earlier files.

        Raises OutputError if somebody else changed the repo in the meantime.
        """
        from huggingface_hub import HfApi

        parent, remote = repo_files(self.target.repo, self.target.revision)
        operations = self._operations(parent, remote)
        if operations:
            if parent != self.parent:
                text = f"{self.target.repo} was changed by somebody else in the meantime"
                raise OutputError(text, hint=RETRY_HINT)
            with hub_errors(self.target.repo):
                commit = HfApi().create_commit(
                    self.target.repo,
                    operations,
                    commit_message="Upload with mergeforge",
                    revision=self.target.revision,
                    parent_commit=self.parent,
                )
            self.on_message(f"uploaded {commit.commit_url}")
        try:
            _retry(lambda: HfApi().delete_branch(self.target.repo, branch=self.branch))
        except Exception as error:  # of huggingface_hub or its HTTP library; the branch does no harm
            if _status(error) != 404:
                self.on_message(f"could not delete the branch {self.branch} of {self.target.repo}; it is not needed")

    def _upload(self, name: str) -> UploadedFile:
        from huggingface_hub import CommitOperationAdd, HfApi

        path, repo = self.workspace.folder / name, self.target.repo

        def commit() -> Any:
            addition = CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path))
            HfApi().create_commit(repo, [addition], commit_message=f"Add {name}", revision=self.branch)
            return HfApi().get_paths_info(repo, [name], revision=self.branch)

        with hub_errors(repo):
            files = _retry(commit)
        if len(files) != 1 or not is_unchanged(path, files[0]):
            raise MergeforgeError(f"{repo} does not hold {name} as it was uploaded", hint=RETRY_HINT)
        sha256, nbytes = lfs_identity(files[0])
        if not sha256:
            text = f"{repo} does not store {name} as a large file"
            raise MergeforgeError(text, hint="check the .gitattributes file of the repo")
        return UploadedFile(repo, sha256, nbytes)

    def _operations(self, parent: str | None, remote: dict[str, Any]) -> list[Any]:
        """The operations that turn the target branch into the merge."""
        from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

        commit = self.workspace.journal.commit
        assert commit is not None
        local = {name: self._local_path(name) for name in commit.moves}
        changed = {
            name: path for name, path in local.items() if name not in remote or not is_unchanged(path, remote[name])
        }
        staged = [
            name for name, file in self.uploaded.items() if name not in remote or not _is_uploaded(file, remote[name])
        ]
        stale = stale_files(self.target.repo, parent, remote, {*local, *self.uploaded})
        return [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in changed.items()),
            *(CommitOperationCopy(name, name, src_revision=self.branch) for name in staged),
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
        ]

    def _local_path(self, name: str) -> Path:
        """Where a small file is: a run that was killed in its last step has moved some of them."""
        staged = self.workspace.folder / name
        return staged if staged.exists() else self.workspace.out / name

    def _remove(self, name: str) -> None:
        (self.workspace.folder / name).unlink(missing_ok=True)
        sync_folder(self.workspace.folder)


def open_streaming_upload(plan: Plan, workspace: Workspace, on_message: OnMessage) -> StreamingUpload:
    """Check the token, create the repo and the staging branch, and see what has arrived already.

    Raises RecipeError for an invalid repo name, MergeforgeError if the Hub denies access.
    """
    from huggingface_hub import HfApi

    target = plan.recipe.output.publish
    assert target is not None
    check_access(target.repo)
    parent, _ = repo_files(target.repo, target.revision)
    api = HfApi()
    with hub_errors(target.repo):
        if parent is None:
            api.create_repo(target.repo, private=target.private, exist_ok=True)
            if target.revision != "main":
                api.create_branch(target.repo, branch=target.revision, exist_ok=True)
            parent = str(api.repo_info(target.repo, revision=target.revision).sha)
        upload = StreamingUpload(plan, workspace, parent, on_message)
        api.create_branch(target.repo, branch=upload.branch, revision=target.revision, exist_ok=True)
    upload.reconcile()
    return upload


def _is_uploaded(file: UploadedFile, remote_file: Any) -> bool:
    return lfs_identity(remote_file) == (file.sha256, file.nbytes)


def _retry(action: Callable[[], T]) -> T:
    """Repeat an action after failures that may be temporary, but not after a refusal by the Hub."""
    for seconds in WAITS:
        try:
            return action()
        except Exception as error:  # of huggingface_hub or its HTTP library
            if 400 <= _status(error) < 500 and _status(error) not in (408, 429):
                raise
            time.sleep(seconds)
    return action()


def _status(error: Exception) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 500))
