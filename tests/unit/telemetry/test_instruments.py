"""Series exist from the start, exemplars are of sampled traces, and figures of the process hold."""

import os
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest

from steward.telemetry.instruments import FAST, Instruments, exemplar_of
from steward.telemetry.process_figures import ProcessFigures, open_files

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"


def test_a_counter_stands_at_zero_for_every_label_set_before_it_counts() -> None:
    registry = CollectorRegistry()
    Instruments(registry).counter("x_total", "X.", kind=("a", "b"), result=("ok",))
    for kind in ("a", "b"):
        assert registry.get_sample_value("x_total", {"kind": kind, "result": "ok"}) == 0
    assert registry.get_sample_value("x_total", {"kind": "c", "result": "ok"}) is None


def test_only_a_sampled_trace_is_an_exemplar() -> None:
    assert exemplar_of(f"{TRACE}-01") == {"trace_id": "0af7651916cd43dd8448eb211c80319c"}
    assert exemplar_of(f"{TRACE}-00") is None
    assert exemplar_of("") is None


def test_the_exemplar_is_in_the_exposition_that_prometheus_asks_for() -> None:
    registry = CollectorRegistry()
    histogram = Instruments(registry).histogram("x_seconds", "X.", FAST)
    histogram.observe(0.003, exemplar_of(f"{TRACE}-00"))
    assert b"trace_id" not in generate_latest(registry)  # type: ignore[no-untyped-call]
    histogram.observe(0.003, exemplar_of(f"{TRACE}-01"))
    page = generate_latest(registry).decode()  # type: ignore[no-untyped-call]
    [line] = [line for line in page.splitlines() if "trace_id" in line]
    assert line.startswith('x_seconds_bucket{le="0.005"} 2.0 # {trace_id="0af765')


def test_open_files_are_counted_without_a_list_of_them() -> None:
    before = open_files()
    files = [os.open(Path(__file__), os.O_RDONLY) for _ in range(50)]
    try:
        assert open_files() == before + 50
    finally:
        for file in files:
            os.close(file)
    assert open_files() == before


def test_figures_of_the_process_are_those_of_the_kernel() -> None:
    registry = CollectorRegistry()
    registry.register(ProcessFigures())
    resident = registry.get_sample_value("process_resident_memory_bytes")
    status = Path("/proc/self/status").read_text()
    [kib] = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")]
    assert resident is not None and abs(resident - kib * 1024) < 16 * 1024 * 1024
    used = registry.get_sample_value("process_cpu_seconds_total")
    times = os.times()
    assert used is not None and abs(used - times.user - times.system) < 0.5
