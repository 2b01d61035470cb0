"""The rules of recorded violations, the same for the table and for its equal in memory."""

import logging
import sqlite3
from collections.abc import Callable, Iterator

import pytest

from registry_service.store.violation_table import (
    MemoryViolations,
    Violations,
    ViolationTable,
    ViolationTotals,
)
from steward.model.keys import Epoch, NodeId, NodeIncarnation, NodeRev, UserKey
from steward.model.violations import Severity, Violation, ViolationKind

REFUSAL, BREACH = ViolationKind.STALE_APPEND, ViolationKind.FOREIGN_EVENT
Make = Callable[[int], Violations]


@pytest.fixture(params=["memory", "sqlite"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes rows that keep so many; made again, the same ones."""
    database = sqlite3.connect(":memory:", isolation_level=None)
    memory: list[MemoryViolations] = []

    def open_table(keep: int) -> Violations:
        if request.param == "memory":
            if not memory:
                memory.append(MemoryViolations(keep))
            return memory[0]
        table = ViolationTable(database, keep)
        table.create()
        table.start()
        return table

    yield open_table
    database.close()


def record(rows: Violations, *kinds: ViolationKind, count: int = 1) -> list[int]:
    numbers = [
        rows.record(Violation(kind, f"seen {index}", count=count), "agent:n1", 1000 + index)
        for index, kind in enumerate(kinds)
    ]
    rows.finish()
    return numbers


def numbers_of(rows: Violations, after: int = 0, limit: int = 100) -> list[int]:
    return [row.number for row in rows.read(after, limit, None, False)]


def test_a_row_says_all_that_was_reported(make: Make) -> None:
    rows = make(10)
    violation = Violation(
        REFUSAL,
        "fence 5",
        UserKey("acme", "ann"),
        Epoch(4),
        NodeIncarnation(NodeId("n1"), NodeRev(2)),
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        3,
    )
    rows.record(violation, "agent:n1", 1234)
    rows.finish()
    (row,) = rows.read(0, 10, None, False)
    assert (row.number, row.at_ms, row.severity, row.kind) == (
        1,
        1234,
        Severity.REFUSAL,
        "stale_append",
    )
    assert (row.tenant, row.user, row.epoch, row.node_id, row.node_rev) == (
        "acme",
        "ann",
        4,
        "n1",
        2,
    )
    assert (row.reporter, row.evidence, row.count) == ("agent:n1", "fence 5", 3)
    assert row.traceparent == violation.traceparent


def test_numbers_ascend_and_are_never_given_again(make: Make) -> None:
    rows = make(2)
    assert record(rows, REFUSAL, REFUSAL, REFUSAL) == [1, 2, 3]
    again = make(2)
    assert again.last == 3
    assert record(again, BREACH) == [4]
    assert numbers_of(again) == [3, 4]


def test_pages_ascend_whether_from_a_number_or_the_newest(make: Make) -> None:
    rows = make(100)
    record(rows, REFUSAL, BREACH, REFUSAL, BREACH, REFUSAL)
    assert numbers_of(rows, after=1, limit=2) == [2, 3]
    assert numbers_of(rows, after=5) == []
    newest = rows.read(0, 2, None, True)
    assert [row.number for row in newest] == [4, 5]
    breaches = rows.read(0, 10, Severity.BREACH, False)
    assert [row.number for row in breaches] == [2, 4]
    assert [row.number for row in rows.read(0, 1, Severity.BREACH, True)] == [4]


def test_the_oldest_refusals_go_first_and_totals_never_go_down(make: Make) -> None:
    rows = make(3)
    record(rows, BREACH, REFUSAL, REFUSAL, count=2)
    record(rows, REFUSAL, BREACH)
    assert numbers_of(rows) == [1, 4, 5]
    assert rows.totals() == ViolationTotals(refusals=5, breaches=3)
    assert make(3).totals() == ViolationTotals(refusals=5, breaches=3)


def test_breaches_that_are_too_many_are_dropped_aloud(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    rows = make(2)
    with caplog.at_level(logging.ERROR):
        record(rows, REFUSAL, BREACH, BREACH)
        assert not caplog.records
        record(rows, BREACH)
    assert numbers_of(rows) == [3, 4]
    assert any("breaches were dropped" in record.getMessage() for record in caplog.records)
    assert rows.totals() == ViolationTotals(refusals=1, breaches=3)


def test_a_store_of_before_gets_the_table() -> None:
    database = sqlite3.connect(":memory:", isolation_level=None)
    database.execute("CREATE TABLE other (number INTEGER PRIMARY KEY AUTOINCREMENT)")
    table = ViolationTable(database)
    table.create()
    table.create()
    table.start()
    assert (table.last, table.totals()) == (0, ViolationTotals(0, 0))
    database.close()
