"""Shipping: finished files to a Hub repo one by one, while the merge goes on, and away from here.

They are gathered on a branch of their own, where the Hub keeps them however long the merge takes and lists them by
sha256. At the end one commit on the branch that is published takes them over together with what lies beside the
weights, and the gathering branch goes away. A run that was killed asks that branch what has arrived.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mergeforge.errors import MergeforgeError, OutputError
from mergeforge.execute.journal import UploadedFile
from mergeforge.execute.workspace import Workspace
from mergeforge.hub.publish import AGAIN, check_access, held_files, hub_errors, is_same, lfs_of, stale_files
from mergeforge.io.disk import sync_folder
from mergeforge.planner import Plan
from mergeforge.recipe import Publish

T = TypeVar("T")
Tell = Callable[[str], None]
WAITS = (1.0, 5.0, 20.0)  # seconds between tries, beyond those that huggingface_hub makes itself


class StreamingUpload:
    """The files of one merge on their way: `sent` have arrived, `lost` had and are gone from the Hub."""

    def __init__(self, plan: Plan, workspace: Workspace, parent: str, tell: Tell) -> None:
        assert plan.recipe.output.publish is not None
        self.to: Publish = plan.recipe.output.publish
        self.branch = f"mergeforge-{plan.fingerprint[:12]}"
        self.workspace = workspace
        self.parent = parent
        self.tell = tell
        self.sent: dict[str, UploadedFile] = {}
        self.lost: tuple[str, ...] = ()

    def reconcile(self) -> None:
        """Compare the journal with what the gathering branch holds, and remove here what has arrived there."""
        _, held = held_files(self.to.repo, self.branch)
        ours = {name: one for name, one in self.workspace.journal.sent.items() if one.repo == self.to.repo}
        self.sent = {name: one for name, one in ours.items() if name in held and _is_there(one, held[name])}
        self.lost = tuple(name for name in self.workspace.journal.sent if name not in self.sent)
        for name in self.sent:
            self._remove(name)

    def upload(self, name: str) -> None:
        """Send a finished file, see that it is there, note it, remove it here. Raises MergeforgeError, OutputError."""
        if name in self.sent:
            return
        sent = self._send(name)
        self.workspace.journal.record_sent(name, sent)
        self.sent[name] = sent
        self._remove(name)
        self.tell(f"sent {name}")

    def publish(self) -> None:
        """One commit: the files that were sent, what was staged beside them, and away with an earlier publish's.

        Raises OutputError when somebody else changed the repo meanwhile.
        """
        from huggingface_hub import HfApi

        parent, held = held_files(self.to.repo, self.to.revision)
        operations = self._operations(parent, held)
        if operations:
            if parent != self.parent:
                raise OutputError(f"{self.to.repo} was changed by somebody else meanwhile", hint=AGAIN)
            with hub_errors(self.to.repo):
                done = HfApi().create_commit(
                    self.to.repo,
                    operations,
                    commit_message="Upload with mergeforge",
                    revision=self.to.revision,
                    parent_commit=self.parent,
                )
            self.tell(f"sent {done.commit_url}")
        try:
            _persist(lambda: HfApi().delete_branch(self.to.repo, branch=self.branch))
        except Exception as error:  # of huggingface_hub or its HTTP library; it does no harm where it is
            if _status(error) != 404:
                self.tell(f"{self.to.repo} still has the branch {self.branch}: it can be deleted")

    def _send(self, name: str) -> UploadedFile:
        from huggingface_hub import CommitOperationAdd, HfApi

        path, repo = self.workspace.folder / name, self.to.repo

        def send() -> Any:
            added = CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path))
            HfApi().create_commit(repo, [added], commit_message=f"Add {name}", revision=self.branch)
            return HfApi().get_paths_info(repo, [name], revision=self.branch)

        with hub_errors(repo):
            found = _persist(send)
        if len(found) != 1 or not is_same(path, found[0]):
            raise MergeforgeError(f"{repo} does not hold {name} as it was sent", hint=AGAIN)
        sha256, nbytes = lfs_of(found[0])
        if not sha256:
            raise MergeforgeError(f"{repo} does not keep {name} as a large file", hint="see its .gitattributes")
        return UploadedFile(repo, sha256, nbytes)

    def _operations(self, parent: str | None, held: dict[str, Any]) -> list[Any]:
        """What the branch that is published lacks or has too much."""
        from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

        commit = self.workspace.journal.commit
        assert commit is not None
        beside = {name: self._staged(name) for name in commit.moves}
        changed = {name: path for name, path in beside.items() if name not in held or not is_same(path, held[name])}
        moved = [name for name, one in self.sent.items() if name not in held or not _is_there(one, held[name])]
        stale = stale_files(self.to.repo, parent, held, {*beside, *self.sent})
        return [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in changed.items()),
            *(CommitOperationCopy(name, name, src_revision=self.branch) for name in moved),
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
        ]

    def _staged(self, name: str) -> Path:
        """Where a small file is: a run that was killed in its last step has moved some."""
        staged = self.workspace.folder / name
        return staged if staged.exists() else self.workspace.out / name

    def _remove(self, name: str) -> None:
        (self.workspace.folder / name).unlink(missing_ok=True)
        sync_folder(self.workspace.folder)


def open_streaming_upload(plan: Plan, workspace: Workspace, tell: Tell) -> StreamingUpload:
    """Ask for the token, make the repo and the gathering branch, and see what has arrived already.

    Raises RecipeError for a name that is none, MergeforgeError where the Hub does not let us in.
    """
    from huggingface_hub import HfApi

    to = plan.recipe.output.publish
    assert to is not None
    check_access(to.repo)
    parent, _ = held_files(to.repo, to.revision)
    api = HfApi()
    with hub_errors(to.repo):
        if parent is None:
            api.create_repo(to.repo, private=to.private, exist_ok=True)
            if to.revision != "main":
                api.create_branch(to.repo, branch=to.revision, exist_ok=True)
            parent = str(api.repo_info(to.repo, revision=to.revision).sha)
        shipment = StreamingUpload(plan, workspace, parent, tell)
        api.create_branch(to.repo, branch=shipment.branch, revision=to.revision, exist_ok=True)
    shipment.reconcile()
    return shipment


def _is_there(sent: UploadedFile, held: Any) -> bool:
    return lfs_of(held) == (sent.sha256, sent.nbytes)


def _persist(action: Callable[[], T]) -> T:
    """Do what another try may mend again: not what the Hub refuses."""
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
