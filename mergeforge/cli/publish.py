"""mergeforge publish."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("folder", metavar="DIR")
@click.argument("repo", metavar="REPO_ID")
@click.option("--private/--public", default=True, show_default=True, help="Who sees a repo that is made now.")
@click.option("--revision", default="main", metavar="BRANCH", show_default=True, help="The branch to publish on.")
@click.option(
    "--gguf",
    type=click.Choice(["beside", "apart"]),
    default="beside",
    show_default=True,
    help="GGUF files in the same repo, or in REPO_ID-GGUF.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be sent and removed.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def publish(folder: str, repo: str, *, gguf: str, as_json: bool, **options: Any) -> None:
    """Publish DIR (a merged model, a GGUF, an adapter) as the Hub repo REPO_ID.

    Only what is missing is sent, and one commit makes it visible; interrupted, the same command goes on.
    The token is that of `hf auth login`, or HF_TOKEN.

    \b
    mergeforge publish merged owner/name --dry-run
    mergeforge publish merged owner/name --public --gguf apart
    """
    options["quiet"] = options["quiet"] or as_json
    if gguf == "beside":
        found = _publish(Path(folder), repo, **options)
        if as_json:
            click.echo(json.dumps(found))
        return
    from mergeforge.hub.split_gguf_repo import part

    with tempfile.TemporaryDirectory() as work:
        parts = part(Path(folder), Path(work), repo)
        options["links_into"] = folder
        both = [_publish(parts.model, repo, **options), _publish(parts.ggufs, parts.gguf_repo, **options)]
    if as_json:
        click.echo(json.dumps(both))


def _publish(folder: Path, repo: str, *, dry_run: bool, quiet: bool, **options: Any) -> dict[str, Any]:
    """Publish one folder; what was done, for --json."""
    from mergeforge.core.sizes import show_size
    from mergeforge.hub import publish as publishing

    planned = publishing.plan_publication(folder, repo, **options)

    def say(text: str) -> None:
        if not quiet:
            click.echo(text, err=not dry_run)

    for one in planned.send:
        say(f"{'would send' if dry_run else 'to send'} {one.name} ({show_size(one.nbytes)})")
    for name in planned.remove:
        say(f"{'would remove' if dry_run else 'to remove'} {name}, which an earlier publish left")
    say(f"{len(planned.kept)} files are in {repo} already, {show_size(planned.nbytes)} to send")
    address = None
    for done in () if dry_run else publishing.publish(planned):
        address = done
        say(f"sent {done}" if done.count("://") == 0 else done)
    facts = {"repo": repo, "sent": [one.name for one in planned.send], "removed": list(planned.remove)}
    return facts | {"kept": list(planned.kept), "bytes": planned.nbytes, "commit": address}
