"""`lilliput papers`: the 27 systems, which of them work here, and their claims measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lilliput.base.errors import OK, OUR_FAULT, UserError
from lilliput.cli import common

if TYPE_CHECKING:
    from lilliput.base.show import Show
    from lilliput.papers.paper import Paper


@common.verb
def papers(
    words: Annotated[list[str] | None, typer.Argument(metavar="run | NAME", hidden=True)] = None,
    json: common.Json = False,
    dry_run: common.DryRun = False,
    show_config: common.ShowConfig = False,
) -> int:
    """List the 27 systems, and which work here.

    With a name: the reference and the claim of one. With run and a name: its claim, measured on this machine. A
    system works when its rooms are registered and its claim is measured by a run of ours, and works in part when the
    claim rests on something that is not here yet, which is named. Published numbers are the
    authors', on their machines. Exit code 1: a measured claim did not hold here.

    \b
    Examples:
      lilliput papers
      lilliput papers gptq
      lilliput papers run checkpointing
    """
    from lilliput.base.show import Show
    from lilliput.papers import index

    show = Show(json=json)
    own, overrides = common.split(words)
    if overrides:
        raise UserError(f"papers takes no settings, got `{overrides[0]}`", fix="lilliput papers run NAME")
    if show_config:
        common.show_places(show)
        return OK
    if own[:1] == ["run"]:
        common.at_most(own, 2, "lilliput papers run NAME")
        if len(own) < 2:
            raise UserError("papers run needs a name", "works: " + ", ".join(_working()), f"lilliput papers run {_working()[0]}")
        return measure(show, index.find(own[1]), dry_run)
    common.at_most(own, 1, "lilliput papers NAME")
    if own:
        detail(show, index.find(own[0]))
    else:
        listing(show)
    return OK


def listing(show: Show) -> None:
    """The table of all systems by group, with a count of those that work."""
    from lilliput.papers import index

    groups = index.papers()
    rows = [{"group": group, **_row(paper)} for group, members in groups.items() for paper in members]
    working, partly = (sum(row["status"] == status for row in rows) for status in ("works", "in part"))
    show.data({"works": working, "in part": partly, "systems": rows})
    for group in groups:
        here = [row | {"claim": _both(row)} for row in rows if row["group"] == group]
        show.table(here, ("name", "status", "switched on by", "claim"), group)
    show.line(f"{working} of {len(rows)} systems work here, {partly} in part. `lilliput papers NAME` shows one, `lilliput papers run NAME` measures its claim.")


def detail(show: Show, paper: Paper) -> None:
    """One system: reference, published claim, status and switch."""
    row = {"title": paper.title, "authors": paper.authors, "year": paper.year, "where": paper.where} | _row(paper)
    show.data(row)
    show.table([{"field": key, "value": str(value)} for key, value in row.items() if value], ("field", "value"))


def measure(show: Show, paper: Paper, dry_run: bool) -> int:
    """Run a paper's measurement and show it beside the published claim; code 1 when the claim does not hold here."""
    if paper.run is None or not paper.runs:
        raise UserError(f"{paper.system} is not built here yet", f"works: {', '.join(_working())}", f"lilliput papers run {_working()[0]}")
    if dry_run:
        show.data({"name": paper.name, "would_measure": paper.claim})
        show.line(f"would measure: {paper.claim}")
        return OK
    finding = paper.run()
    show.data({**_row(paper), "measured here": finding.summary, "holds": finding.holds, "rows": [dict(row) for row in finding.rows]})
    show.table([dict(row) for row in finding.rows], tuple(finding.rows[0]), f"{paper.system}, measured here")
    show.line(f"published: {paper.claim}")
    show.line(f"measured:  {finding.summary}")
    if paper.lacks:
        show.line(f"not here:  {paper.lacks}")
    show.line(("what is here holds" if paper.lacks else "the claim holds here") if finding.holds else "the claim does NOT hold here")
    return OK if finding.holds else OUR_FAULT


def _row(paper: Paper) -> dict[str, Any]:
    return {
        "name": paper.name,
        "system": paper.system,
        "status": paper.status,
        "switched on by": " ".join(paper.switches) if paper.runs else "",
        "published claim": paper.claim,
        "measured here": paper.measured if paper.runs else "",
        "not here yet": paper.lacks,
    }


def _both(row: dict[str, Any]) -> str:
    """The published claim, what was measured here where it was, and what is missing."""
    return row["published claim"] + "".join(f" {word}: {row[key]}." for word, key in (("Here", "measured here"), ("Not here", "not here yet")) if row[key])


def _working() -> list[str]:
    from lilliput.papers import index

    return [paper.name for group in index.papers().values() for paper in group if paper.runs]
