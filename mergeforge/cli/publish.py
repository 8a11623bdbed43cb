"""mergeforge publish."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from mergeforge.cli import _options

if TYPE_CHECKING:
    from mergeforge.hub.publish import Publication


@click.command()
@click.argument("folder", metavar="DIR")
@click.argument("repo", metavar="REPO_ID")
@click.option("--private/--public", default=True, show_default=True, help="Visibility of a repo that is created.")
@click.option("--revision", default="main", metavar="BRANCH", show_default=True, help="Branch to publish to.")
@click.option(
    "--gguf",
    type=click.Choice(["beside", "apart"]),
    default="beside",
    show_default=True,
    help="Put GGUF files in the same repo, or in REPO_ID-GGUF.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be uploaded and removed.")
@_options.as_json
@_options.quiet
def publish(
    folder: str, repo: str, *, private: bool, revision: str, gguf: str, dry_run: bool, as_json: bool, quiet: bool
) -> None:
    """Publish DIR (a merged model, GGUF files or an adapter) as the Hub repo REPO_ID.

    Uploads only the files that changed and makes them visible with one commit. If it is interrupted, run the same
    command again to resume. Uses the token of `hf auth login` or HF_TOKEN.

    \b
    Examples:
      mergeforge publish merged owner/name --dry-run
      mergeforge publish merged owner/name --public --gguf apart
    """
    from mergeforge.hub.split_gguf_repo import publications

    with publications(folder, repo, revision=revision, private=private, gguf=gguf, dry_run=dry_run) as planned:
        results = [_publish(publication, dry_run=dry_run, quiet=quiet or as_json) for publication in planned]
    if as_json:
        click.echo(json.dumps(results[0] if gguf == "beside" else results))


def _publish(publication: Publication, *, dry_run: bool, quiet: bool) -> dict[str, Any]:
    """Publish one repo; returns what was done, for --json."""
    from mergeforge.core.sizes import format_size
    from mergeforge.hub import publish as hub_publish

    def say(text: str) -> None:
        if not quiet:
            click.echo(text, err=not dry_run)

    for upload in publication.uploads:
        say(f"{'would upload' if dry_run else 'uploading'} {upload.name} ({format_size(upload.nbytes)})")
    for name in publication.deletions:
        say(f"{'would remove' if dry_run else 'removing'} {name}, left from an earlier publish")
    unchanged = len(publication.unchanged)
    say(f"{unchanged} files unchanged in {publication.repo}, {format_size(publication.nbytes)} to upload")
    address = None
    for uploaded in () if dry_run else hub_publish.publish(publication):
        address = uploaded
        say(uploaded if "://" in uploaded else f"uploaded {uploaded}")
    return {
        "repo": publication.repo,
        "sent": [upload.name for upload in publication.uploads],
        "removed": list(publication.deletions),
        "kept": list(publication.unchanged),
        "bytes": publication.nbytes,
        "commit": address,
    }
