"""OpenTelemetry spans, one per scoring request, with status and version but no content.

OpenTelemetry's environment variables set the collector.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from mlflow_pt_deploy.errors import MissingExtraError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from mlflow_pt_deploy.serving.http.response import Response

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class RequestTracer:
    """Exports a span for each response, in batches on its own thread.

    Args:
        exporter: Sends spans to the collector.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        name = os.environ.get("OTEL_SERVICE_NAME", "pt-deploy")
        # a private provider: MLflow's tracing uses the global one
        self._provider = TracerProvider(resource=Resource.create({"service.name": name}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("mlflow_pt_deploy")
        self._parent = TraceContextTextMapPropagator()
        self._kind = SpanKind.SERVER

    def response_sent(
        self, model: str, label: str, route: str, result: Response, seconds: float, parent: str
    ) -> None:
        """Record the response to a scoring request.

        Args:
            model: Name of the model.
            label: Label of the version; empty if none computed it.
            route: Path of the request.
            result: The response.
            seconds: Duration of the request, until now.
            parent: The request's ``traceparent`` header; empty if there is none.
        """
        from opentelemetry.trace import Status, StatusCode

        end = time.time_ns()
        attributes: dict[str, str | int] = {
            "http.route": route,
            "http.response.status_code": result.status,
            "pt_deploy.model": model,
            "pt_deploy.version": label,
        }
        if result.error_code:
            attributes["error.type"] = result.error_code
        span = self._tracer.start_span(
            f"score {model}",
            self._parent.extract({"traceparent": parent}),
            kind=self._kind,
            attributes=attributes,
            start_time=end - int(seconds * 1e9),
        )
        if result.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(end)

    def close(self) -> None:
        """Send the remaining spans."""
        self._provider.shutdown()


def tracer_from_environment() -> RequestTracer | None:
    """Create a tracer if one of `ENDPOINTS` is set.

    Raises:
        MissingExtraError: One is set, and the exporter is not installed.
    """
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ModuleNotFoundError as error:
        raise MissingExtraError("opentelemetry-exporter-otlp-proto-http", "otel") from error
    return RequestTracer(OTLPSpanExporter())
