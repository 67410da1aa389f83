"""Counters of a server for Prometheus, under vLLM's names, so that its dashboards and its `bench serve` read them unchanged.

What the engine counts is read when somebody asks (one snapshot, no cost in between); what clients feel (time to the first token,
between tokens, of the whole request) is measured where deltas are handed out. Token counters equal the sum of the clients' `usage`.
A request's time is told apart as vLLM does: queue (until its first step), prefill (until its first token), decode (until its last).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from lilliput.serve.request import Delta, Sampling
from lilliput.serve.stats import STEP_TOKENS, Stats
from lilliput.serve.traces import Tracer

LABELS = ("model_name", "engine")
FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
SECONDS = {
    "time_to_first_token_seconds": ("From the request to its first token.", FIRST),
    "inter_token_latency_seconds": ("Between two tokens of an answer.", BETWEEN),
    "time_per_output_token_seconds": ("Between two tokens of an answer (vLLM's older name).", BETWEEN),
    "request_time_per_output_token_seconds": ("Mean time between the tokens of an answer.", BETWEEN),
    "e2e_request_latency_seconds": ("From the request to its last token.", WHOLE),
    "request_queue_time_seconds": ("From the request to the first step that computed something of it.", WHOLE),
    "request_prefill_time_seconds": ("From that step to the first token.", WHOLE),
    "request_decode_time_seconds": ("From the first token of a request to its last.", WHOLE),
    "request_inference_time_seconds": ("From the first step of a request to its last token.", WHOLE),
}
COUNTS = {
    "request_prompt_tokens": ("Tokens of a prompt.", TOKENS),
    "request_generation_tokens": ("Tokens of the answers of a request.", TOKENS),
    "request_params_n": ("Answers asked for.", (1, 2, 5, 10, 20)),
    "request_params_max_tokens": ("max_tokens of a request.", TOKENS),
    "request_max_num_generation_tokens": ("Tokens of the longest answer of a request.", TOKENS),
}


class Board:
    """Where the models of one server count: the page that Prometheus reads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        histogram = lambda name, text, buckets: Histogram(f"vllm:{name}", text, LABELS, buckets=buckets, registry=self.registry)
        counter = lambda name, text, *more: Counter(name, text, (*LABELS, *more), registry=self.registry)
        self.histograms = {name: histogram(name, text, buckets) for name, (text, buckets) in (SECONDS | COUNTS).items()}
        self.prompt, self.generated = counter("vllm:prompt_tokens", "Tokens of prompts."), counter("vllm:generation_tokens", "Tokens of answers.")
        self.success = counter("vllm:request_success", "Answers by how they ended.", "finished_reason")
        self.refused = counter("lilliput:requests_refused", "Requests answered with an error, by status.", "status")
        self.engines: list[EngineFigures] = []
        self.registry.register(_Engines(self.engines))

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)


class Metrics:
    """The figures of one model of a server."""

    def __init__(self, model: str, stats: Callable[[], Stats] | None, board: Board, block: int = 16, tracer: Tracer | None = None,
                 adapters: int = 0, engine: str = "0") -> None:  # fmt: skip
        """`stats`: the engine's snapshot, None without an engine; `block`: tokens of a cache block; `tracer`: gets each request that is over;
        `adapters`: how many may be loaded; `engine`: which replica this is."""
        self.tracer, self.labels, self._board = tracer, (model, engine), board
        self._histograms = {name: histogram.labels(*self.labels) for name, histogram in board.histograms.items()}
        self._prompt, self._generated = board.prompt.labels(*self.labels), board.generated.labels(*self.labels)
        if stats is not None:
            board.engines.append(EngineFigures(stats, self.labels, block, adapters))

    def observe(self, name: str, value: float) -> None:
        """One value of a histogram."""
        self._histograms[name].observe(value)

    def refused(self, status: int) -> None:
        """A request that got an error."""
        self._board.refused.labels(*self.labels, str(status)).inc()

    def request(self, prompt: int, sampling: Sampling) -> Watch:
        """A stopwatch for a request that begins now."""
        return Watch(self, prompt, sampling)

    def ended(self, reason: str) -> None:
        """An answer has ended so."""
        self._board.success.labels(*self.labels, {"cancelled": "abort"}.get(reason, reason)).inc()


class Watch:
    """One request on its way: when its tokens came."""

    def __init__(self, metrics: Metrics, prompt: int, sampling: Sampling) -> None:
        """Starts now. `prompt`: its tokens."""
        self.metrics, self.prompt, self.sampling = metrics, prompt, sampling
        self.start = time.perf_counter()
        self.first: float | None = None
        self.tokens = self.cached = 0
        self.queued = 0.0
        self._last: dict[int, float] = {}
        self._counts: dict[int, int] = {}
        self._begun: dict[int, float] = {}

    def see(self, delta: Delta) -> None:
        """A delta has come."""
        now, metrics, index = time.perf_counter(), self.metrics, delta.index
        if self.first is None:
            self.first, self.queued = now, min(delta.queued or 0.0, now - self.start)
            metrics.observe("time_to_first_token_seconds", now - self.start)
            metrics._prompt.inc(self.prompt)
        if delta.cached is not None:
            self.cached = max(self.cached, delta.cached)
        if delta.token is not None:
            self.tokens += 1
            metrics._generated.inc()
            if index in self._last:
                metrics.observe("inter_token_latency_seconds", now - self._last[index])
                metrics.observe("time_per_output_token_seconds", now - self._last[index])
            self._last[index] = now
            self._counts[index] = self._counts.get(index, 0) + 1
            self._begun.setdefault(index, now)
        if delta.finish_reason is not None:
            metrics.ended(delta.finish_reason)
            if self._counts.get(index, 0) > 1:
                metrics.observe("request_time_per_output_token_seconds", (now - self._begun[index]) / (self._counts[index] - 1))

    def end(self) -> None:
        """The request is over, however it ended."""
        now, observe = time.perf_counter(), self.metrics.observe
        if self.metrics.tracer is not None:
            self.metrics.tracer.record(self, now - self.start)
        if self.first is None:
            return
        observe("e2e_request_latency_seconds", now - self.start)
        last = max(self._last.values(), default=self.first)
        observe("request_queue_time_seconds", self.queued)
        observe("request_prefill_time_seconds", self.first - self.start - self.queued)
        observe("request_decode_time_seconds", last - self.first)
        observe("request_inference_time_seconds", last - self.start - self.queued)
        observe("request_prompt_tokens", self.prompt)
        observe("request_generation_tokens", self.tokens)
        observe("request_max_num_generation_tokens", max(self._counts.values(), default=0))
        observe("request_params_n", self.sampling.n)
        observe("request_params_max_tokens", self.sampling.max_tokens)


class EngineFigures:
    """The engine's snapshot as metrics, made when they are read."""

    def __init__(self, stats: Callable[[], Stats], labels: tuple[str, str], block: int, adapters: int) -> None:
        self._stats, self._labels, self._block, self._adapters = stats, labels, block, adapters

    def collect(self) -> Iterator[Metric]:
        """One sample a figure."""
        stats = self._stats()
        used = stats.blocks_used / max(1, stats.blocks_total)
        gauges = {
            "vllm:num_requests_running": ("Sequences that have blocks.", stats.running),
            "vllm:num_requests_waiting": ("Sequences that wait for blocks.", stats.waiting),
            "vllm:kv_cache_usage_perc": ("Share of the cache's blocks in use; 1 is all.", used),
            "vllm:gpu_cache_usage_perc": ("The same under vLLM's older name.", used),
            "lilliput:kv_blocks_used": ("Blocks of the cache in use.", stats.blocks_used),
            "lilliput:last_step_seconds": ("Seconds of the engine's last step.", stats.last_step_seconds),
        }
        counters = {
            "vllm:num_preemptions": ("Sequences that lost their blocks.", stats.preempted_swap + stats.preempted_recompute),
            "vllm:prefix_cache_queries": ("Tokens of prompts looked for in the cache.", stats.prefix_queries),
            "vllm:prefix_cache_hits": ("Tokens of prompts found in the cache.", stats.prefix_hits),
            "vllm:spec_decode_num_drafts": ("Steps of a sequence with proposed tokens.", stats.drafts),
            "vllm:spec_decode_num_draft_tokens": ("Tokens that speculation proposed.", stats.drafted),
            "vllm:spec_decode_num_accepted_tokens": ("Tokens that speculation proposed and the model took.", stats.accepted),
            "lilliput:engine_steps": ("Steps of the engine.", stats.steps),
            "lilliput:engine_step_seconds": ("Seconds of all steps together.", stats.step_seconds),
            "lilliput:computed_prompt_tokens": ("Tokens of prompts that were computed.", stats.prompt),
            "lilliput:sampled_tokens": ("Tokens that the engine sampled, also for clients that had left.", stats.generated),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(name, text, labels=LABELS)
            counter.add_metric(self._labels, value)
            yield counter
        places = CounterMetricFamily("vllm:spec_decode_num_accepted_tokens_per_pos", "Proposed tokens that the model took, by their place.",
                                     labels=(*LABELS, "position"))  # fmt: skip
        for at, count in enumerate(stats.accepted_at):
            places.add_metric((*self._labels, str(at)), count)
        yield places
        yield self._steps(stats)
        adapters = GaugeMetricFamily("vllm:lora_requests_info", "Adapters of running and of waiting sequences; always 1.",
                                     labels=("model_name", "max_lora", "running_lora_adapters", "waiting_lora_adapters"))  # fmt: skip
        adapters.add_metric((self._labels[0], str(self._adapters), ",".join(stats.running_adapters), ",".join(stats.waiting_adapters)), 1)
        yield adapters
        info = GaugeMetricFamily("vllm:cache_config_info", "The cache; always 1.", labels=("block_size", "num_gpu_blocks", *LABELS))
        info.add_metric((str(self._block), str(stats.blocks_total), *self._labels), 1)
        yield info

    def _steps(self, stats: Stats) -> HistogramMetricFamily:
        """Tokens of each step."""
        below = list(accumulate(stats.step_tokens))
        buckets = [(str(float(edge)), count) for edge, count in zip(STEP_TOKENS, below)] + [("+Inf", below[-1] if below else 0)]
        family = HistogramMetricFamily("vllm:iteration_tokens_total", "Tokens of each step of the engine.", labels=LABELS)
        family.add_metric(self._labels, buckets, stats.computed)
        return family


class _Engines(Collector):
    """The figures of all engines, one family a name, as Prometheus wants it."""

    def __init__(self, engines: list[EngineFigures]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        """Families in the order of the first engine's."""
        families: dict[str, Metric] = {}
        for engine in self._engines:
            for family in engine.collect():
                families.setdefault(family.name, family)
                if families[family.name] is not family:
                    families[family.name].samples += family.samples
        yield from families.values()
