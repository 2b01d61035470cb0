"""The tracing of one service, made from its settings.

Without an endpoint nothing of OpenTelemetry's SDK is imported, no trace is ever sampled,
and recording a span costs one comparison.
"""

from steward.config.settings import ServiceSettings
from steward.telemetry.tracing import Tracing


def make_tracing(
    service: str, instance: str, settings: ServiceSettings, *, content: bool = False
) -> Tracing:
    """Tracing for a composition root; its owner calls `close()` at the end.

    `service` is the role (`edge`), `instance` the process' id. With `otlp_endpoint` set,
    new traces are sampled with `trace_ratio`; traces begun elsewhere keep their own bit.
    `content`: record what users and agents wrote.
    """
    if not settings.otlp_endpoint:
        return Tracing()
    from steward.telemetry.otlp_exporter import OtlpExporter

    exporter = OtlpExporter(service, instance, settings.cluster, settings.otlp_endpoint)
    return Tracing(exporter, settings.trace_ratio, content=content)
