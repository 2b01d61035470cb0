"""A span exporter that keeps what it is given, for tests that ask what was traced."""

from steward.telemetry.tracing import FinishedSpan


class KeptSpans:
    """Every span, in the order in which they ended."""

    def __init__(self) -> None:
        self.spans: list[FinishedSpan] = []

    def export(self, span: FinishedSpan) -> None:
        self.spans.append(span)

    def close(self) -> None:
        """Nothing waits."""

    def names(self) -> list[str]:
        return [span.name for span in self.spans]

    def one(self, name: str) -> FinishedSpan:
        """The only span of this name."""
        (span,) = (span for span in self.spans if span.name == name)
        return span
