"""Data of the Hub: hf://owner/name[@revision][:what] -> local files, by huggingface_hub alone.

`what` is a split (train where nothing is said), a folder and a split (`main/train`), or a file or glob
(`data/*.jsonl`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from mergeforge.data.readers.open import ending_of
from mergeforge.errors import MergeforgeError, RecipeError, SourceError, listing
from mergeforge.hub.download import download_whole

_NAME = re.compile(r"hf://(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^:]+))?(?::(?P<what>.+))?")
_SHARD = re.compile(r"(.*-)(\d+)-of-(\d+)(.*)")
# Of a repo that holds its rows in more than one of these, the first is taken.
_KINDS = ((".parquet",), (".jsonl", ".ndjson"), (".json",), (".csv", ".tsv"), (".txt",))
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def hub_files(path: str) -> list[tuple[str, Path]]:
    """(name for messages, local file) of a data set; what is missing is downloaded.

    Raises RecipeError for a path that is none, SourceError where the Hub or the repo does not have it.
    """
    parts = _NAME.fullmatch(path)
    if parts is None:
        raise RecipeError(f"{path} is no data set of the Hub", hint="hf://owner/name[@revision][:split or file]")
    repo, revision, what = parts["repo"], parts["revision"], parts["what"] or ""
    here = f"{repo}@{revision}" if revision else repo
    try:
        wanted = chosen(_listed(repo, revision), what, path)
        folder = download_whole(repo, revision, wanted, "dataset")
    except MergeforgeError:
        raise
    except Exception as error:  # its own, its HTTP library's, a name that it finds not valid
        cached = _cached(repo, revision)
        if cached is None:
            said = getattr(error, "server_message", None) or str(error).strip() or type(error).__name__
            hint = "check the name and revision, or `hf auth login` for a private or gated data set"
            raise SourceError(f"data set {here}: the Hub says: {said.splitlines()[0]}", hint=hint) from None
        folder = cached
        there = [one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_file()]
        wanted = chosen(there, what, path)
        _check_shards(path, wanted)
    return [(f"{path} {name}" if len(wanted) > 1 else path, folder / name) for name in wanted]


def chosen(names: Sequence[str], what: str, path: str) -> list[str]:
    """The files of a split, in order. Raises SourceError where there is none, or more than one set of them."""
    data = [name for name in sorted(names) if _kind(name) is not None]
    if what in data:
        return [what]
    found = [name for name in data if fnmatch(name, what)] if "*" in what else _of_split(data, what)
    kinds = sorted({kind for name in found if (kind := _kind(name)) is not None})
    found = [name for name in found if _kind(name) == kinds[0]]
    if not found:
        hint = f"it holds: {listing(data, 10)}" if data else f"it holds: {listing(names, 10) or 'nothing'}"
        raise SourceError(f"{path}: the repo holds no data file {what and f'for {what!r}'}".rstrip(), hint=hint)
    folders = sorted({name.rpartition("/")[0] for name in found})
    if len(folders) > 1 and "*" not in what:
        hint = f"say which: {path.removesuffix(':' + what)}:{folders[0] or found[0]}/{what or 'train'}"
        raise SourceError(f"{path} has several sets of data: {listing(folders, 10)}", hint=hint)
    return found


def _of_split(data: list[str], what: str) -> list[str]:
    """Files by a split's name, in a folder if one is given. Without a name: train, or all but the other splits."""
    folder, _, split = what.rpartition("/")
    inside = [name for name in data if not folder or name.startswith(folder + "/")]
    words = _SPLITS.get(split or "train", (split,))
    found = [name for name in inside if _says(name, words)]
    if found or split:
        return found
    others = (*_SPLITS["validation"], *_SPLITS["test"])
    return [name for name in inside if not _says(name, others)]


def _says(name: str, words: Sequence[str]) -> bool:
    return any(re.search(rf"(^|[^a-z0-9]){re.escape(word)}([^a-z0-9]|$)", name.lower()) for word in words)


def _kind(name: str) -> int | None:
    if name.rpartition("/")[2].startswith(".") or "readme" in name.lower():
        return None
    return next((at for at, endings in enumerate(_KINDS) if ending_of(Path(name)) in endings), None)


def _listed(repo: str, revision: str | None) -> list[str]:
    import huggingface_hub

    info = huggingface_hub.HfApi().dataset_info(repo, revision=revision)
    return [one.rfilename for one in info.siblings or []]


def _cached(repo: str, revision: str | None) -> Path | None:
    """What an earlier download left, for a machine that is offline."""
    import huggingface_hub

    try:
        repos = huggingface_hub.scan_cache_dir().repos
    except Exception:  # there is no cache; the caller says why the Hub could not be asked
        return None
    held = [one for repo_ in repos if (repo_.repo_type, repo_.repo_id) == ("dataset", repo) for one in repo_.revisions]
    asked = revision or "main"
    return next((one.snapshot_path for one in held if asked in one.refs or one.commit_hash.startswith(asked)), None)


def _check_shards(path: str, wanted: Sequence[str]) -> None:
    """Raises SourceError where some of the files of a split have not come: they say how many there are."""
    for name in wanted:
        match = _SHARD.fullmatch(name)
        if match and sum(_SHARD.sub(r"\1-of-\3\4", one) == _SHARD.sub(r"\1-of-\3\4", name) for one in wanted) < int(
            match[3]
        ):
            raise SourceError(f"{path} was downloaded in part only, and the Hub cannot be asked", hint="go online")
