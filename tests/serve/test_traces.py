"""Spans arrive at a collector: one a request, with the client's trace as parent and the request's own figures."""

from __future__ import annotations

import json
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from http_server import KEY, running

pytest.importorskip("fastapi", reason="needs the extra `serve`")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra `traces`")


def test_a_span_for_each_request(tmp_path: Path) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *words: object) -> None: ...

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with running(tmp_path, f"http.traces=http://127.0.0.1:{collector.server_port}/v1/traces") as server:
        for head, tokens, stream in (({"traceparent": parent}, 5, False), ({}, 7, True)):
            body = {"prompt": "To be", "max_tokens": tokens, "temperature": 0.5, "ignore_eos": True, "stream": stream}
            head = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}", **head}
            urllib.request.urlopen(urllib.request.Request(server.url + "/v1/completions", json.dumps(body).encode(), head), timeout=30).read()
        prompt = len(server.served.tokenizer.encode("To be", special=True))
    collector.shutdown()
    assert len(spans) == 2, "those that were not sent yet are sent at the end"
    for span, tokens in zip(spans, (5, 7)):
        told = {one.key: one.value for one in span.attributes}
        assert span.name == "llm_request" and told["gen_ai.response.model"].string_value == "tiny"
        assert told["gen_ai.usage.prompt_tokens"].int_value == prompt and told["gen_ai.usage.completion_tokens"].int_value == tokens
        assert told["gen_ai.request.temperature"].double_value == 0.5
        first, whole = told["gen_ai.latency.time_to_first_token"].double_value, told["gen_ai.latency.e2e"].double_value
        assert 0 < first <= whole and abs((span.end_time_unix_nano - span.start_time_unix_nano) / 1e9 - whole) < 1e-3
    assert spans[0].trace_id.hex() == parent.split("-")[1] and spans[0].parent_span_id.hex() == parent.split("-")[2]
    assert spans[1].trace_id.hex() != parent.split("-")[1] and not spans[1].parent_span_id
