"""`lilliput serve`: a model behind OpenAI's API, with a web page, in one process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lilliput.base import env, registry
from lilliput.base.errors import DOES_NOT_FIT, OK, UserError
from lilliput.cli import chat, common

if TYPE_CHECKING:
    from lilliput.base.job import Job
    from lilliput.base.show import Show
    from lilliput.serve.metrics import Board
    from lilliput.serve.openai.house import House
    from lilliput.serve.openai.served import Served

NOT_SHARED = "\nprefixes are not shared: serve.policy={} evicts"
FEWER = "serve.kv_tokens=N is of each model"


@common.verb
def serve(
    words: Annotated[list[str] | None, typer.Argument(metavar="MODEL ... | KEY=VALUE", hidden=True)] = None,
    adapters: Annotated[str, typer.Option(metavar="FOLDER", help="LoRA adapters to serve; the same as serve.adapters=...", show_default=False)] = "",
    replicas: Annotated[int, typer.Option("--replicas", help="So many servers through Ray Serve; the same as replicas.count=N.", show_default=False)] = 0,
    no_page: Annotated[bool, typer.Option("--no-page", help="Only the API, no web page.")] = False,
    json: common.Json = False,
    dry_run: common.DryRun = False,
    show_config: common.ShowConfig = False,
) -> int:
    """Serve a model, or several, to OpenAI's clients and to a web page.

    POST /v1/chat/completions, /v1/completions, /v1/responses, /v1/embeddings, /tokenize; GET /v1/models, /health, /metrics
    (Prometheus), / (chat and a live view). Listens on loopback unless http.host says otherwise; keys come from LILLIPUT_API_KEY.
    http.* holds port, limits and origins, serve.* how the model is run, generate.* what a request that says nothing gets.
    --dry-run prints where the memory goes. SIGTERM lets open answers end. A folder with a BERT encoder serves embeddings alone.

    \b
    Examples:
      lilliput serve smollm2-135m
      lilliput serve runs/job/model http.port=8080 serve.weights=q4 serve.kv=int8
      lilliput serve smollm2-135m --adapters runs/adapters
      lilliput serve smollm2-135m runs/job/model
      LILLIPUT_API_KEY=secret lilliput serve smollm2-135m http.host=0.0.0.0 http.embeddings=mean
    """
    from lilliput.base.job import Job
    from lilliput.base.show import Show

    show = Show(json=json)
    own, overrides = common.split(words)
    flags = ([f"serve.adapters={adapters}"] if adapters else []) + ([f"replicas.count={replicas}"] if replicas else [])
    jobs = [Job.load(None, [*(f"model={model}" for model in models), *flags, *overrides]) for models in [[model] for model in own] or [[]]]
    check(jobs)
    if show_config:
        common.show_settings(show, jobs[0].settings if encoder(jobs[0]) is not None else chat.settled(jobs[0]))
        return OK
    if dry_run:
        return present(jobs, show)
    run(jobs, show, page=not no_page)
    return OK


def check(jobs: list[Job]) -> None:
    """UserError for what several models cannot share, and for prefix sharing that was asked for by name where the cache evicts."""
    for job in jobs:
        if job.serve.sharing and job.settings.sources["serve.sharing"] != "default" and evicts(job):
            why = f"serve.policy={job.serve.policy} moves and drops a sequence's keys, and another prompt would read them"
            raise UserError("serve.sharing=true cannot stand with this cache policy", why, "serve.sharing=false or serve.policy=full")
    if len(jobs) == 1:
        return
    http, serve = jobs[0].http, jobs[0].serve
    names = [job.top.model for job in jobs]
    if len(set(names)) < len(names):
        raise UserError("one model is named twice", ", ".join(names), "name each once")
    if http.name:
        raise UserError("http.name names one model", f"{len(jobs)} are served, each under its own name", "http.name=")
    if serve.adapters:
        raise UserError("serve.adapters belongs to one model", f"{len(jobs)} are served", "serve the model that has adapters alone")


def evicts(job: Job) -> bool:
    """Whether the job's cache policy drops keys, so that prompts share no prefix."""
    return bool(registry.made("kv_policy", job.serve.policy).evicts)


def encoder(job: Job) -> Path | None:
    """The folder of the job's model when it is a BERT-class encoder; None for decoders."""
    from lilliput.base import records

    config = Path(job.top.model).expanduser() / "config.json"
    content = records.read_json(config) if config.is_file() else None
    return config.parent if isinstance(content, dict) and content.get("model_type") == "bert" else None


def present(jobs: list[Job], show: Show) -> int:
    """Where the memory goes: weights, cache in blocks, one step's work; the exit code says whether it fits, all models and replicas together."""
    from lilliput.base import hardware
    from lilliput.base.show import size
    from lilliput.plan.serving import encoder_bytes, memory_plan

    times = replicas_here(jobs)
    documents, tables, total, fix = [], [], 0, ""
    device = hardware.find(jobs[0].top.hardware).select(jobs[0].top.device).device
    for job in jobs:
        folder = encoder(job)
        if folder is not None:
            total += (weights := encoder_bytes(folder))
            documents.append({"model": job.top.model, "runner": "encoder", "weights": weights, "total": weights, "free": device.free})
            tables.append((job, [("weights", weights, "an encoder in fp32, the matrices of its blocks twice")], "an encoder: embeddings alone"))
            continue
        plan, runner, reason = memory_plan(job, device.free, device.kind, times)
        documents.append({"model": job.top.model, "runner": runner, "reason": reason, **plan.document()})
        tables.append((job, list(plan.rows()), f"{runner}: {reason}"))
        total += plan.total
        fix = fix or ("" if plan.fits else plan.fix)
    fits, each = total * times <= device.free, f"{times} times {size(total)}, " if times > 1 else ""
    told = {"total": total * times, "free": device.free, "fits": fits, "replicas": times}
    show.data(documents[0] | told if len(jobs) == 1 else {"models": documents, **told})
    for job, rows, why in tables:
        table = [{"part": name, "bytes": size(count), "of it": text} for name, count, text in rows]
        show.table(table, ("part", "bytes", "of it"), job.top.model if len(jobs) > 1 else "")
        show.line(why)
    show.line(f"{each}{size(total * times)} of {size(device.free)} free on {device.name}: {'fits' if fits else f'does not fit; {fix or FEWER}'}")
    return OK if fits else DOES_NOT_FIT


def replicas_here(jobs: list[Job]) -> int:
    """Replicas on this machine at most; of a cluster's machines one replica each is told."""
    replicas = jobs[0].replicas
    return 1 if replicas.address else max(replicas.count, replicas.most)


def run(jobs: list[Job], show: Show, page: bool) -> None:
    """Load and serve until a signal comes."""
    http = jobs[0].http
    try:
        from lilliput.serve import http as server
    except ModuleNotFoundError as error:
        raise UserError("the server needs more packages", f"{error.name} is not installed", "pip install 'lilliput[serve,structured]'") from error
    keys = tuple(dict.fromkeys(key for key in (*([http.api_key] if isinstance(http.api_key, str) else http.api_key), *env.api_keys()) if key))
    folder = Path(__file__).parent.parent / "web" if page else None
    names = [job.http.name or job.top.model for job in jobs]

    def ready(port: int) -> None:
        host = f"[{http.host}]" if ":" in http.host else http.host
        show.data({"url": f"http://{host}:{port}", "model": names[0], "models": names})
        show.line(f"{', '.join(names)} on http://{host}:{port}" + ("  (web page there, API under /v1)" if page else "/v1") + "; Ctrl-C ends it")

    server.check_address(http, keys)
    replicas = jobs[0].replicas
    if max(replicas.count, replicas.most) > 1:
        several(jobs, show, keys, folder, ready)
        return
    house, backends = open_house(jobs)
    for backend in backends:
        show.line(backend)
    server.serve(server.application(house, keys, folder), http, house.stop, ready)


def several(jobs: list[Job], show: Show, keys: tuple[str, ...], folder: Path | None, ready: Callable[[int], None]) -> None:
    """The same by replicas of Ray Serve, behind one front."""
    from lilliput.serve import http as server
    from lilliput.serve import replicas
    from lilliput.serve.front import Front

    options, http = jobs[0].replicas, jobs[0].http
    told = [(job.to_toml(), cache_override(job, replicas_here(jobs))) for job in jobs]
    handle, lost = replicas.start(functools.partial(replica_house, told), options, http)
    show.line(f"{options.count} replicas of Ray Serve" + (f", up to {options.most}" if options.most > options.count else ""))
    try:
        front = Front(handle, lost, http, keys, folder)
        server.serve(front.app, http, front.stop, ready)
    finally:
        replicas.stop()


def cache_override(job: Job, times: int) -> list[str]:
    """The cache of one of so many replicas on this machine, which each would take by what is free when it starts: the dry run's share, as an override."""
    from lilliput.base import hardware
    from lilliput.plan.serving import memory_plan

    if job.serve.kv_tokens or times == 1 or encoder(job) is not None:
        return []
    device = hardware.find(job.top.hardware).select(job.top.device).device
    return [f"serve.kv_tokens={memory_plan(job, device.free, device.kind, times)[0].tokens}"]


def replica_house(jobs: list[tuple[str, list[str]]], name: str) -> House:
    """The models of these jobs (TOML, overrides) in a replica of this name."""
    import tempfile

    from lilliput.base.job import Job

    with tempfile.TemporaryDirectory() as folder:
        made = []
        for at, (text, overrides) in enumerate(jobs):
            path = Path(folder) / f"{at}.toml"
            path.write_text(text)
            made.append(Job.load(path, overrides))
    return open_house(made, name)[0]


def open_house(jobs: list[Job], engine: str = "0") -> tuple[House, list[str]]:
    """The jobs' models behind the API, and what runs each. `engine`: the replica's name in metrics."""
    from lilliput.serve.metrics import Board
    from lilliput.serve.openai.house import House

    board = Board()
    made = [served(job, board, engine) for job in jobs]
    return House([model for model, _ in made], board), [backend for _, backend in made]


def served(job: Job, board: Board, engine: str = "0") -> tuple[Served, str]:
    """The job's model behind the API, counting on `board`, and what runs it."""
    from lilliput import api
    from lilliput.serve import embeddings
    from lilliput.serve.adapters import Library
    from lilliput.serve.async_engine import AsyncEngine
    from lilliput.serve.metrics import Metrics
    from lilliput.serve.openai.served import Served
    from lilliput.serve.traces import Tracer

    http, name = job.http, job.http.name or job.top.model
    folder = encoder(job)
    if folder is not None:
        embedder, tokenizer = embeddings.of_encoder(folder, "last" if http.embeddings == "last" else "mean")
        return Served(name, http, tokenizer, Metrics(name, None, board, engine=engine), embedder=embedder), "an encoder: embeddings alone"
    tracer = Tracer(http.traces, name) if http.traces else None
    model = api.load_job(job.top, job.serve)
    running = AsyncEngine(model.engine)
    pooling = http.embeddings
    vectors = None if pooling == "off" else embeddings.of_decoder(job.top.model, job.top.device, job.top.dtype, model.spec, pooling)
    given = {key.partition(".")[2] for key, source in job.settings.sources.items() if key.startswith("generate.") and source != "default"}
    defaults: dict[str, Any] = {key: getattr(job.generate, key) for key in given - {"system", "max_tokens"}}
    library = Library(job.serve.adapters) if job.serve.adapters else None
    metrics = Metrics(name, running.stats, board, tracer=tracer, adapters=job.serve.max_adapters, engine=engine)
    note = NOT_SHARED.format(job.serve.policy) if evicts(job) else ""
    return Served(name, http, model.tokenizer, metrics, running, vectors, defaults, library), model.backend + note
