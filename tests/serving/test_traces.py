"""Traces of requests, by OpenTelemetry's own packages: when they are sent, and what they hold."""

import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, Queue
from threading import Thread

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from serving.stub_ranks import front_settings, rank_settings

from halovae.serving.app import make_app
from halovae.serving.signatures import Signatures


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue[Span]]:
    """The requests that a collector on this host receives. It is the one that the environment names."""
    spans: Queue[Span] = Queue()

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        if span.kind == Span.SpanKind.SPAN_KIND_SERVER:
                            spans.put(span)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")  # milliseconds
        yield spans
        server.shutdown()


async def asked(app: FastAPI, *paths: str) -> list[int]:
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")
    async with client, app.router.lifespan_context(app):
        return [(await client.get(path)).status_code for path in paths]


@pytest.mark.anyio
async def test_a_request_is_traced_without_its_signature(model: Path, tmp_path: Path, received: "Queue[Span]") -> None:
    app = make_app(rank_settings(model, tmp_path), front_settings(model, api_key="secret"))
    url = Signatures(tmp_path).signed("/v1/videos/health/content", None, 60)
    assert await asked(app, url) == [404]
    span = received.get(timeout=30)
    path, _, query = url.partition("?")
    assert (path in str(span), query in str(span), "signature" in str(span)) == (True, False, False)


@pytest.mark.anyio
@pytest.mark.parametrize("root", ["", "/made", "/a.b"])
async def test_only_probes_are_not_traced(model: Path, tmp_path: Path, received: "Queue[Span]", root: str) -> None:
    app = make_app(rank_settings(model, tmp_path), front_settings(model, root_path=root))
    probes = [f"{root}{path}" for path in ("/livez", "/readyz", "/health", "/metrics")]
    others = [f"{root}{path}" for path in ("/v1/videos/health", "/v1/videos/metrics/content", "/healthy", "/a/livez")]
    await asked(app, *probes, *others)
    spans = [received.get(timeout=30) for _ in others]
    with pytest.raises(Empty):
        received.get(timeout=0.5)
    urls = [
        one.value.string_value for span in spans for one in span.attributes if one.key in ("url.path", "http.target")
    ]
    assert sorted(urls) == sorted(others)


def test_without_its_packages_nothing_is_traced(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    make_app(rank_settings(model, tmp_path), front_settings(model))
    assert caplog.text == ""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    make_app(rank_settings(model, tmp_path), front_settings(model))
    assert "halovae[otel]" in caplog.text
