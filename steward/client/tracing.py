"""What a message belongs to: the trace that the application is in when it sends it.

Taken from OpenTelemetry's API when the application uses it; this package neither needs nor
imports it. Without a trace the edge begins one.
"""

import sys


def current_trace() -> str:
    """The `traceparent` of the span that is current here and now; empty when there is none."""
    api = sys.modules.get("opentelemetry.trace")
    if api is None:
        return ""
    context = api.get_current_span().get_span_context()
    if not context.is_valid:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
