"""The numbers that `steward up` shows."""

from steward.cli.probe import parse_metrics
from steward.cli.screen import EventRate, totals_of
from steward.cli.supervisor import restart_delay_s

PAGE = """\
# HELP steward_edge_connections Open sockets, by kind.
# TYPE steward_edge_connections gauge
steward_edge_connections{kind="websocket"} 3.0
steward_edge_connections{kind="sse"} 1.0
steward_edge_users 2.0
steward_strange{text="a } b { c"} 5.0 1700000000
garbage
"""


def test_label_sets_of_a_metric_are_added_up() -> None:
    sums = parse_metrics(PAGE)
    assert sums["steward_edge_connections"] == 4.0
    assert sums["steward_edge_users"] == 2.0


def test_what_is_no_metric_is_passed_over() -> None:
    assert "garbage" not in parse_metrics(PAGE)


def test_braces_in_labels_and_a_time_stamp_do_not_confuse() -> None:
    assert parse_metrics(PAGE)["steward_strange"] == 5.0


def test_totals_are_sums_over_the_processes() -> None:
    pages = {
        "edge-0": {"steward_edge_users": 2.0, "steward_edge_connections": 4.0},
        "edge-1": {"steward_edge_users": 1.0, "steward_edge_connections": 1.0},
        "node-0": {"steward_agent_managers": 3.0},
        "log": {"steward_log_events_total": 120.0},
    }
    totals = totals_of(pages, 12.4)
    assert (totals.users, totals.connections, totals.managers) == (3, 5, 3)
    assert str(totals) == "3 users, 3 managers, 5 connections, 120 events, 12 events/s"


def test_rate_is_growth_over_time() -> None:
    rate = EventRate()
    assert rate.update(10.0, {"log": 100.0}) == 0.0
    assert rate.update(12.0, {"log": 300.0}) == 100.0


def test_a_counter_that_began_anew_gives_no_negative_rate() -> None:
    rate = EventRate()
    rate.update(10.0, {"log": 1000.0})
    assert rate.update(11.0, {"log": 5.0}) == 0.0
    assert rate.update(12.0, {"log": 25.0}) == 20.0


def test_a_process_that_did_not_answer_changes_no_rate() -> None:
    rate = EventRate()
    rate.update(10.0, {"log": 100.0})
    assert rate.update(11.0, {}) == 0.0
    assert rate.update(12.0, {"log": 150.0}) == 50.0


def test_restart_delays_double_up_to_thirty_seconds() -> None:
    assert [restart_delay_s("agent", n) for n in range(1, 8)] == [1, 2, 4, 8, 16, 30, 30]
    assert [restart_delay_s("log", n) for n in (1, 2, 3)] == [0.1, 0.2, 0.4]
    assert restart_delay_s("log", 10_000) == 30
