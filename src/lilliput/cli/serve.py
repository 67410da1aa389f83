"""`lilliput serve`: a model behind OpenAI's API, with a web page, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lilliput.base import env
from lilliput.base.errors import DOES_NOT_FIT, OK, UserError
from lilliput.cli import chat, common

if TYPE_CHECKING:
    from lilliput.base.job import Job
    from lilliput.base.show import Show
    from lilliput.serve.openai.served import Served


@common.verb
def serve(
    words: Annotated[list[str] | None, typer.Argument(metavar="MODEL | KEY=VALUE", hidden=True)] = None,
    no_page: Annotated[bool, typer.Option("--no-page", help="Only the API, no web page.")] = False,
    json: common.Json = False,
    dry_run: common.DryRun = False,
    show_config: common.ShowConfig = False,
) -> int:
    """Serve a model to OpenAI's clients and to a web page.

    POST /v1/chat/completions, /v1/completions, /v1/responses, /v1/embeddings, /tokenize; GET /v1/models, /health, /metrics
    (Prometheus), / (chat and a live view). Listens on loopback unless http.host says otherwise; keys come from LILLIPUT_API_KEY.
    http.* holds port, limits and origins, serve.* how the model is run, generate.* what a request that says nothing gets.
    --dry-run prints where the memory goes. SIGTERM lets open answers end. A folder with a BERT encoder serves embeddings alone.

    \b
    Examples:
      lilliput serve smollm2-135m
      lilliput serve runs/job/model http.port=8080 serve.weights=q4 serve.kv=int8
      LILLIPUT_API_KEY=secret lilliput serve smollm2-135m http.host=0.0.0.0 http.embeddings=mean
    """
    from lilliput.base.job import Job
    from lilliput.base.show import Show

    show = Show(json=json)
    own, overrides = common.split(words)
    common.at_most(own, 1, "lilliput serve smollm2-135m")
    job = Job.load(None, [*(f"model={model}" for model in own), *overrides])
    if show_config:
        common.show_settings(show, job.settings if encoder(job) is not None else chat.settled(job))
        return OK
    if dry_run:
        return present(job, show)
    run(job, show, page=not no_page)
    return OK


def encoder(job: Job) -> Path | None:
    """The folder of the job's model when it is a BERT-class encoder; None for decoders."""
    from lilliput.base import records

    config = Path(job.top.model).expanduser() / "config.json"
    content = records.read_json(config) if config.is_file() else None
    return config.parent if isinstance(content, dict) and content.get("model_type") == "bert" else None


def present(job: Job, show: Show) -> int:
    """Where the memory goes: weights, cache in blocks, one step's work; the exit code says whether it fits."""
    from lilliput import api
    from lilliput.base.show import size
    from lilliput.models.load import choose_runner, resolve_spec
    from lilliput.plan.serving import memory_plan

    spec, path = resolve_spec(job.top.model, fetch=False)
    _, hardware = api.model_and_machine(job)
    device = hardware.select(job.top.device).device
    runner, reason = choose_runner(spec, job.serve, device.kind)
    plan = memory_plan(spec, path, job.serve, runner, device.free)
    show.data({"model": job.top.model, "runner": runner, "reason": reason, **plan.document()})
    rows = [{"part": name, "bytes": size(count), "of it": text} for name, count, text in plan.rows()]
    show.table(rows, ("part", "bytes", "of it"))
    show.line(f"{runner}: {reason}")
    show.line(f"{size(plan.total)} of {size(plan.free)} free on {device.name}: {'fits' if plan.fits else f'does not fit; {plan.fix}'}")
    return OK if plan.fits else DOES_NOT_FIT


def run(job: Job, show: Show, page: bool) -> None:
    """Load and serve until a signal comes."""
    http = job.http
    try:
        from lilliput.serve import http as server
    except ModuleNotFoundError as error:
        raise UserError("the server needs more packages", f"{error.name} is not installed", "pip install 'lilliput[serve,structured]'") from error
    keys = tuple(dict.fromkeys(key for key in (*([http.api_key] if isinstance(http.api_key, str) else http.api_key), *env.api_keys()) if key))
    folder = Path(__file__).parent.parent / "web" if page else None

    def ready(port: int) -> None:
        host = f"[{http.host}]" if ":" in http.host else http.host
        show.data({"url": f"http://{host}:{port}", "model": made.name})
        show.line(f"{made.name} on http://{host}:{port}" + ("  (web page there, API under /v1)" if page else "/v1") + "; Ctrl-C ends it")

    server.check_address(http, keys)
    made, backend = served(job)
    show.line(backend)
    server.serve(made, keys, folder, ready)


def served(job: Job) -> tuple[Served, str]:
    """The job's model behind the API, and what runs it."""
    from lilliput import api
    from lilliput.serve import embeddings
    from lilliput.serve.async_engine import AsyncEngine
    from lilliput.serve.metrics import Metrics
    from lilliput.serve.openai.served import Served
    from lilliput.serve.traces import Tracer

    http, name = job.http, job.http.name or job.top.model
    folder = encoder(job)
    if folder is not None:
        embedder, tokenizer = embeddings.of_encoder(folder, "last" if http.embeddings == "last" else "mean")
        return Served(name, http, tokenizer, Metrics(name, None), embedder=embedder), "an encoder: embeddings alone"
    tracer = Tracer(http.traces, name) if http.traces else None
    model = api.load_job(job.top, job.serve)
    engine = AsyncEngine(model.engine)
    pooling = http.embeddings
    vectors = None if pooling == "off" else embeddings.of_decoder(job.top.model, job.top.device, job.top.dtype, model.spec, pooling)
    given = {key.partition(".")[2] for key, source in job.settings.sources.items() if key.startswith("generate.") and source != "default"}
    defaults: dict[str, Any] = {key: getattr(job.generate, key) for key in given - {"system", "max_tokens"}}
    return Served(name, http, model.tokenizer, Metrics(name, engine.stats, tracer=tracer), engine, vectors, defaults), model.backend
