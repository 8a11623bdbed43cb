"""Data sets on the Hub: hf://owner/name[@revision][:what] becomes local files, downloaded by huggingface_hub.

`what` is a split (default: train), a folder and a split (`main/train`), or a file or glob (`data/*.jsonl`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from mergeforge.data.readers.base import data_suffix
from mergeforge.errors import MergeforgeError, RecipeError, SourceError, format_list
from mergeforge.hub.download import download_verified

_NAME = re.compile(r"hf://(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^:]+))?(?::(?P<what>.+))?")
_SHARD = re.compile(r"(.*-)(\d+)-of-(\d+)(.*)")
# If a repo holds the same rows in several of these, the first one is used.
_KINDS = ((".parquet",), (".jsonl", ".ndjson"), (".json",), (".csv", ".tsv"), (".txt",))
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def hub_files(path: str) -> list[tuple[str, Path]]:
    """(name for messages, local file) of a data set; missing files are downloaded.

    Raises RecipeError for a malformed path, SourceError if the Hub or the repo does not have it.
    """
    parts = _NAME.fullmatch(path)
    if parts is None:
        raise RecipeError(f"{path} is not a Hub data set", hint="hf://owner/name[@revision][:split or file]")
    repo, revision, what = parts["repo"], parts["revision"], parts["what"] or ""
    try:
        names = select_files(_list_files(repo, revision), what, path)
        folder = download_verified(repo, revision, names, "dataset")
    except MergeforgeError:
        raise
    except Exception as error:  # from huggingface_hub, its HTTP library, or an invalid name
        cached = _cached_snapshot(repo, revision)
        if cached is None:
            full_name = f"{repo}@{revision}" if revision else repo
            reason = getattr(error, "server_message", None) or str(error).strip() or type(error).__name__
            hint = "check the name and revision, or run `hf auth login` for a private or gated data set"
            raise SourceError(f"data set {full_name}: the Hub says: {reason.splitlines()[0]}", hint=hint) from None
        folder = cached
        files = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
        names = select_files(files, what, path)
        _check_shards(path, names)
    return [(f"{path} {name}" if len(names) > 1 else path, folder / name) for name in names]


def select_files(names: Sequence[str], what: str, path: str) -> list[str]:
    """The files of a split, in order. Raises SourceError if there are none, or several sets of them."""
    data = [name for name in sorted(names) if _kind(name) is not None]
    if what in data:
        return [what]
    matches = [name for name in data if fnmatch(name, what)] if "*" in what else _files_of_split(data, what)
    kinds = sorted({kind for name in matches if (kind := _kind(name)) is not None})
    matches = [name for name in matches if _kind(name) == kinds[0]]
    if not matches:
        hint = f"it holds: {format_list(data, 10)}" if data else f"it holds: {format_list(names, 10) or 'nothing'}"
        raise SourceError(f"{path}: the repo holds no data file {what and f'for {what!r}'}".rstrip(), hint=hint)
    folders = sorted({name.rpartition("/")[0] for name in matches})
    if len(folders) > 1 and "*" not in what:
        hint = f"name one: {path.removesuffix(':' + what)}:{folders[0] or matches[0]}/{what or 'train'}"
        raise SourceError(f"{path} holds several data sets: {format_list(folders, 10)}", hint=hint)
    return matches


def _files_of_split(data: list[str], what: str) -> list[str]:
    """Files by the name of a split, inside a folder if one is named. Default: train, or all but the other splits."""
    folder, _, split = what.rpartition("/")
    inside = [name for name in data if not folder or name.startswith(folder + "/")]
    words = _SPLITS.get(split or "train", (split,))
    matches = [name for name in inside if _contains_word(name, words)]
    if matches or split:
        return matches
    other_splits = (*_SPLITS["validation"], *_SPLITS["test"])
    return [name for name in inside if not _contains_word(name, other_splits)]


def _contains_word(name: str, words: Sequence[str]) -> bool:
    return any(re.search(rf"(^|[^a-z0-9]){re.escape(word)}([^a-z0-9]|$)", name.lower()) for word in words)


def _kind(name: str) -> int | None:
    if name.rpartition("/")[2].startswith(".") or "readme" in name.lower():
        return None
    return next((index for index, suffixes in enumerate(_KINDS) if data_suffix(Path(name)) in suffixes), None)


def _list_files(repo: str, revision: str | None) -> list[str]:
    import huggingface_hub

    info = huggingface_hub.HfApi().dataset_info(repo, revision=revision)
    return [sibling.rfilename for sibling in info.siblings or []]


def _cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """The folder of an earlier download, for a machine that is offline."""
    import huggingface_hub

    try:
        repos = huggingface_hub.scan_cache_dir().repos
    except Exception:  # there is no cache; the caller reports why the Hub could not be reached
        return None
    cached = [entry for entry in repos if (entry.repo_type, entry.repo_id) == ("dataset", repo)]
    wanted = revision or "main"
    return next(
        (
            snapshot.snapshot_path
            for entry in cached
            for snapshot in entry.revisions
            if wanted in snapshot.refs or snapshot.commit_hash.startswith(wanted)
        ),
        None,
    )


def _check_shards(path: str, names: Sequence[str]) -> None:
    """Raise SourceError if shards of a split are missing: their names say how many there are."""
    for name in names:
        match = _SHARD.fullmatch(name)
        if match is None:
            continue
        same_set = _SHARD.sub(r"\1-of-\3\4", name)
        if sum(_SHARD.sub(r"\1-of-\3\4", shard) == same_set for shard in names) < int(match[3]):
            raise SourceError(
                f"{path} is only partly downloaded and the Hub cannot be reached", hint="connect to the network"
            )
