"""`lilliput bench`: the kernels and the decoder measured on this machine, beside the best peers that are installed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lilliput.base.errors import OK, UserError, did_you_mean
from lilliput.cli import common

if TYPE_CHECKING:
    from lilliput.base.job import Job
    from lilliput.base.show import Show

WHAT = ("decode", "ops")
BATCHES, PREFILLS = (1, 4, 16, 64), (128, 512, 2048)


@common.verb
def bench(
    words: Annotated[list[str] | None, typer.Argument(metavar="decode | ops KEY=VALUE", hidden=True)] = None,
    rounds: Annotated[int, typer.Option(help="Rounds in which the sides take turns; figures are medians.")] = 5,
    llama_cpp: Annotated[str, typer.Option("--llama-cpp", help="Python of an environment with llama-cpp-python.", show_default=False)] = "",
    vllm: Annotated[str, typer.Option("--vllm", help="Python of an environment with vLLM for CPUs.", show_default=False)] = "",
    only: Annotated[str, typer.Option("--only", help="Of `ops`, these sections alone: names with commas.", show_default=False)] = "",
    page: Annotated[str, typer.Option("--page", help="Also write the tables as Markdown to this file.", show_default=False)] = "",
    json: common.Json = False,
    dry_run: common.DryRun = False,
    show_config: common.ShowConfig = False,
) -> int:
    """Measure this machine: `ops` the kernels, `decode` whole answers.

    ops: each kernel beside torch and the best stock op, and its share of what the machine can do, measured in the same
    run. decode: tokens a second for 1, 4, 16 and 64 sequences at once and for prompts of 128 to 2,048 tokens, each
    storage of ours beside transformers, llama.cpp and vLLM where they are installed.

    \b
    Examples:
      lilliput bench ops
      lilliput bench ops --only linear,cache
      lilliput bench decode model=smollm2-135m threads=2
      lilliput bench decode --llama-cpp ~/venvs/llama/bin/python --page decode.md
    """
    from lilliput.base.job import Job
    from lilliput.base.show import Show

    show = Show(json=json)
    own, overrides = common.split(words)
    common.at_most(own, 1, "lilliput bench decode")
    what = own[0] if own else "decode"
    if what not in WHAT:
        raise UserError(f"unknown benchmark `{what}`", fix=did_you_mean(what, WHAT))
    if rounds < 1:
        raise UserError(f"--rounds {rounds} measures nothing", fix="--rounds 5")
    job = Job.load(None, overrides)
    if show_config:
        common.show_settings(show, job.settings)
        return OK
    if dry_run:
        show.data({"would_measure": what, "model": job.top.model})
        show.line(f"would measure {what}" + (f" of {job.top.model}" if what == "decode" else ""))
        return OK
    tables, document = ops(job, rounds, show, only.replace(",", " ").split()) if what == "ops" else decode(job, rounds, show, llama_cpp, vllm)
    show.data(document)
    for title, rows, columns in tables:
        show.table(rows, columns, title)
    if page:
        Path(page).write_text(markdown(tables, document["machine"]), encoding="utf-8")
        show.line(f"wrote {page}")
    return OK


Table = tuple[str, list[dict[str, Any]], list[str]]


def decode(job: Job, rounds: int, show: Show, llama: str = "", vllm: str = "") -> tuple[list[Table], dict[str, Any]]:
    """Tokens a second of every side, and how ours compare."""
    from lilliput.base import hardware
    from lilliput.base.job import Job
    from lilliput.loops import bench as loop
    from lilliput.models.load import load_to_serve
    from lilliput.models.native import NativeDecoder
    from lilliput.ops import native

    threads = hardware.cpus() if job.top.threads == "auto" else job.top.threads
    native.threads(threads)
    about = loop.machine()
    if native.module() is None:
        raise UserError("there is nothing of ours to measure", native.missing() or "", "install a compiler and lilliput again")
    cache = "fp16" if job.settings.sources["serve.kv"] == "default" else job.serve.kv  # what llama.cpp keeps keys and values in
    with tempfile.TemporaryDirectory() as folder:
        workers, files = loop.peers(job.top.model, threads, llama, vllm, Path(folder), show.line)
        names = {f"ours {kind}": (str(file), "file") for kind, file in files.items()}
        names |= {"ours file": (job.top.model, "file"), "ours w8": (job.top.model, "w8"), "ours fp32": (job.top.model, "fp32")}
        sides: dict[str, Any] = {}
        for name, (model, weights) in names.items():
            kv = "fp32" if weights == "fp32" else cache
            module, tokenizer, _ = load_to_serve(model, Job.load(serve={"runner": "native", "weights": weights, "kv": kv}).serve, "cpu")
            assert isinstance(module, NativeDecoder), "the native runner was asked for"
            sides[name] = loop.Ours(module, tokenizer, kv)
        sides |= workers
        try:
            rows = loop.decode(sides, BATCHES, PREFILLS, rounds, show.line)
        finally:
            for side in sides.values():
                side.end()
    pairs = [(f"ours {kind}", f"llama.cpp {kind}") for kind in files] + [("ours fp32", peer) for peer in workers if "llama" not in peer]
    compared = [{"pair": f"{a} / {b}", **loop.against(rows, a, b)} for a, b in pairs]
    loads = [key for key in rows[0] if key != "side" and not key.endswith(" rounds")]
    plain = [{key: row[key] for key in ("side", *loads)} for row in rows]
    tables = [("tokens a second", plain, ["side", *loads]), ("times faster", compared, ["pair", *loads])]
    return tables, {"machine": about, "rates": plain, "ratios": compared}


def ops(job: Job, rounds: int, show: Show, only: list[str]) -> tuple[list[Table], dict[str, Any]]:
    """Every kernel family beside its peers."""
    from lilliput.base import hardware
    from lilliput.loops import bench as loop
    from lilliput.loops import bench_ops
    from lilliput.ops import native

    native.threads(hardware.cpus() if job.top.threads == "auto" else job.top.threads)
    for name in only:
        if name not in bench_ops.SECTIONS:
            raise UserError(f"`bench ops` has no section `{name}`", fix=did_you_mean(name, list(bench_ops.SECTIONS)))
    limits, rows = bench_ops.measure(rounds, show.line, only)
    about = loop.machine() | limits
    return [("kernels", rows, bench_ops.COLUMNS)], {"machine": about, "ops": rows}


def markdown(tables: list[Table], machine: dict[str, Any]) -> str:
    """The tables as a page."""
    parts = [", ".join(f"{key} {value}" for key, value in machine.items()) + "\n"]
    for title, rows, columns in tables:
        parts.append(f"## {title}\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
        parts += ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows]
        parts.append("")
    return "\n".join(parts)
