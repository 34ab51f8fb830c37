"""Traces of requests for OpenTelemetry: when they are sent, and what they hold."""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest
from serving.stub_ranks import front_settings, rank_settings

from halovae.serving.app import make_app
from halovae.serving.signatures import Signatures


def test_requests_are_traced_if_a_collector_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    calls: list[tuple[str, object]] = []
    provider = SimpleNamespace(add_span_processor=lambda processor: calls.append(("processor", processor)))
    instrumentor = SimpleNamespace(instrument_app=lambda app, **_: calls.append(("app", app)))
    modules: dict[str, dict[str, Any]] = {
        "opentelemetry": {},
        "opentelemetry.trace": {"set_tracer_provider": lambda given: calls.append(("provider", given))},
        "opentelemetry.sdk": {},
        "opentelemetry.sdk.trace": {"TracerProvider": lambda: provider},
        "opentelemetry.sdk.trace.export": {"BatchSpanProcessor": lambda exporter: ("batches to", exporter)},
        "opentelemetry.exporter.otlp.proto.http.trace_exporter": {"OTLPSpanExporter": lambda: "collector"},
        "opentelemetry.instrumentation.fastapi": {"FastAPIInstrumentor": instrumentor},
    }
    for name, contents in modules.items():
        fake = ModuleType(name)
        fake.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, fake)
    app = make_app(rank_settings(model, tmp_path), front_settings(model))
    assert calls == [("processor", ("batches to", "collector")), ("provider", provider), ("app", app)]
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    make_app(rank_settings(model, tmp_path), front_settings(model))
    assert len(calls) == 3
    assert "halovae[otel]" in caplog.text
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT")
    caplog.clear()
    make_app(rank_settings(model, tmp_path), front_settings(model))
    assert (len(calls), caplog.text) == (3, "")


@pytest.fixture
def instrumented(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Take the place of OpenTelemetry's packages. Return what the instrumentation of the last app got."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    given: dict[str, Any] = {}
    provider = SimpleNamespace(add_span_processor=lambda processor: None)
    modules: dict[str, dict[str, Any]] = {
        "opentelemetry": {},
        "opentelemetry.trace": {"set_tracer_provider": lambda given: None},
        "opentelemetry.sdk": {},
        "opentelemetry.sdk.trace": {"TracerProvider": lambda: provider},
        "opentelemetry.sdk.trace.export": {"BatchSpanProcessor": lambda exporter: None},
        "opentelemetry.exporter.otlp.proto.http.trace_exporter": {"OTLPSpanExporter": lambda: None},
        "opentelemetry.instrumentation.fastapi": {
            "FastAPIInstrumentor": SimpleNamespace(instrument_app=lambda app, **options: given.update(options))
        },
    }
    for name, contents in modules.items():
        fake = ModuleType(name)
        fake.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, fake)
    return given


class Span:
    """A span as OpenTelemetry's are."""

    def __init__(self, **attributes: str) -> None:
        self.attributes = attributes

    def set_attribute(self, name: str, value: str) -> None:
        self.attributes[name] = value


def test_spans_hold_no_query(model: Path, tmp_path: Path, instrumented: dict[str, Any]) -> None:
    make_app(rank_settings(model, tmp_path), front_settings(model))
    url = Signatures(tmp_path).signed("/v1/videos/a/content", "alice", 60)
    query = url.partition("?")[2]
    span = Span(**{
        "http.url": f"http://a{url}", "http.target": url, "url.full": f"http://a{url}",
        "url.path": "/v1/videos/a/content", "url.query": query, "http.method": "GET",
    })  # fmt: skip
    instrumented["server_request_hook"](span, {})
    assert span.attributes == {
        "http.url": "http://a/v1/videos/a/content", "http.target": "/v1/videos/a/content",
        "url.full": "http://a/v1/videos/a/content", "url.path": "/v1/videos/a/content", "url.query": "",
        "http.method": "GET",
    }  # fmt: skip
    instrumented["server_request_hook"](SimpleNamespace(), {})  # a span that is not recorded


@pytest.mark.parametrize("root", ["", "/made", "/a.b"])
def test_only_probes_are_not_traced(model: Path, tmp_path: Path, instrumented: dict[str, Any], root: str) -> None:
    make_app(rank_settings(model, tmp_path), front_settings(model, root_path=root))
    patterns = instrumented["excluded_urls"].split(",")

    def is_excluded(path: str) -> bool:
        return any(re.search(pattern, f"http://example.com:8080{root}{path}") for pattern in patterns)

    assert all(map(is_excluded, ("/livez", "/readyz", "/health", "/metrics")))
    for path in ("/v1/videos/health", "/v1/videos/metrics/content", "/healthy", "/metrics/a", "/", "/a/livez"):
        assert not is_excluded(path), path


@pytest.mark.anyio
async def test_a_traced_request_hides_its_signature(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With OpenTelemetry's own packages."""
    sdk = pytest.importorskip("opentelemetry.sdk.trace.export")
    pytest.importorskip("opentelemetry.instrumentation.fastapi")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    fake = ModuleType("collector")
    fake.__dict__["OTLPSpanExporter"] = lambda: memory
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", fake)
    monkeypatch.setattr(sdk, "BatchSpanProcessor", sdk.SimpleSpanProcessor)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    app = make_app(rank_settings(model, tmp_path), front_settings(model, api_key="secret"))
    url = Signatures(tmp_path).signed("/v1/videos/health/content", None, 60)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")
    async with client, app.router.lifespan_context(app):
        assert (await client.get(url)).status_code == 404
        await client.get("/livez")
    (span,) = (span for span in memory.get_finished_spans() if span.kind.name == "SERVER")
    assert "signature" not in span.to_json()
    assert "/v1/videos/health/content" in span.to_json()
