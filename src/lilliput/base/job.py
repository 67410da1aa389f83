"""A job: what one run is asked to do. Core sections here; a technique's section is the room's own class.

    model = "smollm2-135m"
    data.path = "notes/*.jsonl"
    lora.rank = 16

A room is on when its section is present. Top-level keys belong to the section `job` and are written without a prefix.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from lilliput.base import registry
from lilliput.base.config import Section, Settings, load
from lilliput.base.hardware import free_bytes
from lilliput.base.show import parse_size


class Top(Section):
    """Top-level keys of a job."""

    model: str = Field("smollm2-135m", description="a name, a folder, a .gguf or .bin file, or a preset of models/sizes.py")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="how weights are stored; CPUs compute in fp32 either way")
    seed: int = Field(0, ge=0, description="seed of everything random")
    threads: int | Literal["auto"] = Field("auto", description="compute threads; auto = what the cgroup allows")
    hardware: str = Field("auto", description="auto = this machine, or a declared hardware name (plan)")


class Data(Section):
    """What is read, and how it becomes tokens."""

    path: str | tuple[str, ...] = Field("", description="file, glob, list of them, or data:NAME from `lilliput pull`")
    eval_path: str | tuple[str, ...] = Field("", description="held-out files; empty = the last `holdout` of the data")
    holdout: float = Field(0.1, ge=0, lt=1, description="share of the tokens (or conversations) held out when eval_path is empty")
    format: Literal["auto", "text", "messages", "instruction"] = Field("auto", description="auto looks at the first record")
    sequence: int = Field(512, ge=2, description="tokens in one sequence")
    tokenizer: str = Field("auto", description="auto = the model's; bytes, chars, bpe:SIZE (trained on the data), or a folder")


class Train(Section):
    """The training loop. `tokens_per_step` is the one truth about batch size; the rest derives."""

    steps: int = Field(100, ge=1, description="optimizer steps")
    tokens_per_step: int = Field(4096, ge=1, description="tokens of one optimizer step, over all devices")
    micro_batch: int | Literal["auto"] = Field("auto", description="sequences in one forward; auto = the largest that fits")
    init: Literal["weights", "scratch"] = Field("weights", description="start from the model's weights, or from random ones")
    lr: float = Field(3e-4, gt=0, description="peak learning rate")
    lr_end: float = Field(0.1, ge=0, le=1, description="final learning rate as a share of the peak")
    schedule: Literal["cosine", "wsd", "constant"] = Field("cosine", description="after the warm-up")
    warmup: int = Field(10, ge=0, description="steps of linear warm-up")
    decay: float = Field(0.2, ge=0, le=1, description="wsd: the share of the steps that decays at the end")
    weight_decay: float = Field(0.1, ge=0, description="on matrices, not on norms and biases")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW")
    eps: float = Field(1e-8, gt=0, description="AdamW")
    clip: float = Field(1.0, ge=0, description="largest gradient norm; 0 = off")
    dropout: float = Field(0.0, ge=0, lt=1, description="on embeddings, attention output and MLP output")
    eval_every: int = Field(0, ge=0, description="steps between evaluations; 0 = at the start and the end only")
    eval_tokens: int = Field(16384, ge=1, description="tokens of one evaluation, at most")
    save_every: int = Field(50, ge=0, description="steps between checkpoints; 0 = at the end only")
    tensorboard: bool = Field(False, description="also write TensorBoard events (extra `tensorboard`)")


class Memory(Section):
    """What a run may use of each tier. With `device` given, the sections that make the job fit are chosen, and said with their reason."""

    device: str = Field("", description="bytes for weights, gradients, optimizer and activations: 600MB; empty = what is free, nothing is chosen")
    host: str = Field("", description="bytes for what leaves the device; empty = what is free")
    disk: str = Field("", description="folder that may be filled with what leaves both, one run at a time; empty = no disk is used")

    def bytes(self) -> dict[str, int]:
        """Tier -> bytes of memory, where `device` is given: what the meter of a run enforces."""
        return {tier: parse_size(text) for tier, text in (("device", self.device), ("host", self.host)) if text and self.device}

    def limits(self) -> dict[str, int]:
        """Tier -> bytes, where any were given; a folder's are those that are free and those of its own files."""
        return self.bytes() | ({"disk": free_bytes(Path(self.disk))} if self.disk and self.device else {})


class Eval(Section):
    """What `lilliput eval` measures."""

    tasks: str | tuple[str, ...] = Field("perplexity", description="perplexity, arc_easy, piqa, boolq, winogrande, openbookqa, lambada")
    path: str = Field("", description="text for perplexity; for other tasks the file or the folder that holds them")
    window: int = Field(1024, ge=2, description="tokens of one perplexity window")
    stride: int | Literal["auto"] = Field("auto", description="tokens between windows; auto = window (no overlap)")
    limit: int = Field(0, ge=0, description="windows or questions at most; 0 = all")
    batch: int = Field(4, ge=1, description="windows or choices in one forward")


class Generate(Section):
    """Sampling of chat and generate."""

    max_tokens: int = Field(256, ge=1, description="new tokens at most")
    temperature: float = Field(0.0, ge=0, description="0 = greedy")
    top_k: int = Field(0, ge=0, description="0 = off")
    top_p: float = Field(1.0, gt=0, le=1, description="1 = off")
    min_p: float = Field(0.0, ge=0, le=1, description="0 = off")
    repetition_penalty: float = Field(1.0, gt=0, description="1 = off")
    system: str = Field("", description="system message of a chat; empty = the template's own")


class Serve(Section):
    """How a model is run for answers: chat, generate, and eval where this section is given."""

    runner: Literal["auto", "native", "eager"] = Field("auto", description="native: compiled kernels; eager: PyTorch; auto = native where it can")
    weights: Literal["file", "fp32", "fp16", "w8", "q4", "nf4", "fp8", "fp8_rows"] = Field(
        "file", description="how the native runner keeps matrices; file = as the file does (GGUF, GPTQ, AWQ, fp16), else fp32; fp8_rows: activations in fp8 too"
    )
    kv: Literal["fp32", "fp16", "int8", "int4"] = Field("fp32", description="how the native runner stores keys and values")
    context: int = Field(0, ge=0, description="tokens of one request, prompt and answer together; 0 = the model's context")
    kv_tokens: int = Field(0, ge=0, description="tokens of cache over all requests; 0 = four contexts, at most a quarter of the free memory")
    max_batch_tokens: int = Field(512, ge=1, description="tokens of one step over all requests, and answers that run at once")
    step_ms: float = Field(0.0, ge=0, description="a step in which answers are written should take at most so long: prompts are cut smaller; 0 = any time")
    sharing: bool = Field(True, description="prompts with the same beginning compute it once")
    scheduling: Literal["fcfs", "priority"] = Field("fcfs", description="which request runs first: in order of arrival, or by its priority")
    preemption: Literal["auto", "swap", "recompute"] = Field("auto", description="what a request that loses its cache does; auto = what is measured cheaper")
    swap_tokens: int = Field(0, ge=0, description="tokens of swap space beside the cache; 0 = none, so preempted requests are computed again")
    swap_file_tokens: int = Field(0, ge=0, description="tokens of swap space in a file, used when that in memory is full")
    swap_folder: str = Field("", description="folder of that file, best on a fast disk; empty = the system's for temporary files")
    policy: str = Field("full", description="which tokens stay in the cache: full, sliding:W, sinks:S+W or heavy_hitter:H+R")
    draft: str = Field("", description="who guesses tokens ahead: ngram, layers:N, or a model of the same vocabulary; empty = nobody")
    guesses: int = Field(8, ge=1, le=32, description="tokens guessed a step and answer at most; how many is chosen by what was accepted")
    adapters: str = Field("", description="folder that LoRA adapters are loaded from; those in it are loaded at the start; empty = none")
    max_adapters: int = Field(16, ge=1, description="adapters that may be loaded at once")


class Http(Section):
    """The server of `lilliput serve`. A key that others must not read goes into LILLIPUT_API_KEY."""

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 = every network, with a key only")
    port: int = Field(8000, ge=0, le=65535, description="0 = any free one")
    name: str = Field("", description="the model's name in the API; empty = as it was asked for")
    api_key: str | tuple[str, ...] = Field("", description="keys that clients must show; empty = none on loopback")
    cors: str | tuple[str, ...] = Field("", description="origins whose pages may call, or *; empty = none")
    embeddings: Literal["off", "mean", "last"] = Field("off", description="/v1/embeddings of a decoder; takes a second copy of the weights")
    max_requests: int = Field(256, ge=1, description="requests in flight; more are answered 503")
    max_body: int = Field(4 << 20, ge=1024, description="bytes of one request")
    max_tokens: int = Field(0, ge=0, description="tokens of one answer; 0 = what the context allows")
    timeout: float = Field(600.0, ge=0, description="seconds of one request; 0 = no limit")
    drain: float = Field(30.0, ge=0, description="seconds that answers have to end after SIGTERM")
    traces: str = Field("", description="where OpenTelemetry spans go (OTLP over HTTP, http://127.0.0.1:4318/v1/traces); empty = nowhere")


class Replicas(Section):
    """`lilliput serve --replicas N`: the server several times through Ray Serve (extra `ray`), behind one address."""

    count: int = Field(1, ge=1, description="servers; 1 = this process alone, without Ray")
    most: int = Field(0, ge=0, description="servers at most, as many as the load asks for; 0 = always `count`")
    target: float = Field(8.0, gt=0, description="requests in flight for each server that autoscaling aims at")
    idle: float = Field(120.0, ge=0, description="seconds of less load before a server is taken away")
    slack: int = Field(4, ge=0, description="requests in flight that a server may have above the idlest and still get those whose beginning it has read")
    cpus: float = Field(1.0, ge=0, description="cores that Ray sets aside for a server; 0 = none")
    address: str = Field("", description="a running Ray cluster, `auto` or HOST:PORT; empty = Ray is started on this machine, for it alone")


CORE: dict[str, type[Section]] = {"job": Top, "data": Data, "train": Train, "memory": Memory, "eval": Eval, "generate": Generate, "serve": Serve, "http": Http,
                                  "replicas": Replicas}  # fmt: skip


def sections() -> dict[str, type[Section]]:
    """Every section a job may have: the core ones and the train rooms."""
    return CORE | {name: registry.find("train", name) for name in registry.names("train")}


class Job:
    """One job, checked. `job.train.lr`, `job.rooms["lora"]`; `job.settings.sources` knows where each value came from."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.top: Top = settings.section("job")
        self.data: Data = settings.section("data")
        self.train: Train = settings.section("train")
        self.memory: Memory = settings.section("memory")
        self.eval: Eval = settings.section("eval")
        self.generate: Generate = settings.section("generate")
        self.serve: Serve = settings.section("serve")
        self.http: Http = settings.section("http")
        self.replicas: Replicas = settings.section("replicas")
        self.rooms: dict[str, Any] = {name: settings.section(name) for name in registry.names("train") if settings.present(name)}

    @staticmethod
    def load(path: str | Path | None = None, overrides: Iterable[str] = (), **sections_given: Any) -> Job:
        """From a TOML file, `section.key=value` strings and keyword sections, later ones winning. UserError on any fault.

        Example: Job.load("job.toml", ["train.steps=50"], lora={"rank": 8})
        """
        return Job(load(sections(), path, overrides, sections_given, always=CORE))

    def folders(self) -> list[str]:
        """Those whose disk the job may fill, the sections' own first. A room names its one in `files`."""
        named = [getattr(room, "files", "") for room in self.rooms.values()]
        return [folder for folder in (*named, self.memory.disk if self.memory.device else "") if folder]

    def to_toml(self) -> str:
        """The whole job as TOML that loads back to an equal job."""
        return self.settings.to_toml()
