"""OpenTelemetry spans, one a scoring request, sent where OpenTelemetry's environment variables say.

Knows the answer's status and who gave it, nothing of its content.
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
    """Tells a collector of each answer, some of them at a time, from a thread of its own.

    Args:
        exporter: Sends spans to it.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        name = os.environ.get("OTEL_SERVICE_NAME", "pt-deploy")
        # its own, not the process's: MLflow's tracing has that
        self._provider = TracerProvider(resource=Resource.create({"service.name": name}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("mlflow_pt_deploy")
        self._parent = TraceContextTextMapPropagator()
        self._kind = SpanKind.SERVER

    def response_sent(
        self, model: str, label: str, route: str, result: Response, seconds: float, parent: str
    ) -> None:
        """A request to score was answered.

        Args:
            model: The slot's name.
            label: The version's, empty where none answered.
            route: The path.
            result: The answer.
            seconds: How long it took, until now.
            parent: The request's header ``traceparent``, empty without.
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
        """Send what is left."""
        self._provider.shutdown()


def tracer_from_environment() -> RequestTracer | None:
    """RequestTracer, where one of `ENDPOINTS` is set.

    Raises:
        MissingExtraError: It is, and the exporter is not installed.
    """
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ModuleNotFoundError as error:
        raise MissingExtraError("opentelemetry-exporter-otlp-proto-http", "otel") from error
    return RequestTracer(OTLPSpanExporter())
