"""Alerts on what is slow, full or stuck."""

from steward.telemetry.alert import Alert
from steward.telemetry.promql import JOB, increase, quantile, series, total


def load_alerts() -> list[Alert]:
    """Something is slow, full, or stuck."""
    sockets = total("steward_edge_connections")
    slow = increase("steward_edge_slow_consumers_total", "10m")
    instance = "service, instance"
    return [
        Alert(
            "StewardAppendsSlow",
            f"{quantile(0.99, 'steward_agent_append_seconds')} > 0.25",
            "5m",
            "warning",
            "p99 of appends is over 250 ms: every event is shown that much later",
            "Text comes in jerks, and messages are accepted late.",
            (
                "Compare with `steward_log_commit_seconds`: the disk of the log, or the way to it.",
                "`steward_log_commit_appends` at its bound means that the log can't keep up: "
                "a faster disk, or the log on PostgreSQL.",
            ),
        ),
        Alert(
            "StewardDeliverySlow",
            f"{quantile(0.99, 'steward_edge_delivery_seconds', 'instance')} > 0.1",
            "5m",
            "warning",
            "Edge {{ $labels.instance }} needs over 100 ms to write what it has",
            "Its users see everything late.",
            (
                "It has too many connections or events for its CPU: add edges.",
                "`steward drain` it when it alone is slow; its clients go elsewhere and resume.",
            ),
        ),
        Alert(
            "StewardLoopLag",
            f"{quantile(0.99, 'steward_loop_lag_seconds', instance)} > 0.25",
            "5m",
            "warning",
            "The event loop of {{ $labels.instance }} runs timers over 250 ms late",
            "Everything that this process does is late by as much.",
            (
                "Something blocks the loop or the CPU is exhausted; past a second, leases are at "
                "risk.",
                "Compare with `steward_gc_pause_seconds` and `process_cpu_seconds_total` of it.",
            ),
        ),
        Alert(
            "StewardAgentCodeBlocks",
            f"{quantile(0.99, 'steward_agent_loop_lag_seconds', 'instance')} > 0.5",
            "5m",
            "warning",
            "Agent code on {{ $labels.instance }} holds its loop for over 500 ms",
            "Runs on this node wait for each other; managers and leases are not touched.",
            (
                "The node's log names the agent whose code blocked.",
                "What blocks belongs into a thread: `asyncio.to_thread` in the agent.",
            ),
        ),
        Alert(
            "StewardGcPauses",
            f"{quantile(0.99, 'steward_gc_pause_seconds', instance)} > 0.1",
            "10m",
            "warning",
            "The garbage collector holds {{ $labels.instance }} up for over 100 ms",
            "Everything of this process stands still for as long.",
            (
                "Look at `process_resident_memory_bytes`: much that lives makes collections long.",
                "Spread the users over more processes, or find what agent code keeps.",
            ),
        ),
        Alert(
            "StewardSlowConsumers",
            f"{slow} / {sockets} > 0.05",
            "5m",
            "warning",
            "More than 5 % of the connections were ended in ten minutes: clients don't read",
            "These clients connect again and resume; they see events in bursts.",
            (
                "One edge alone: look at its network. All of them: look at the clients' release.",
                "Clients on thin lines can ask for merged deltas (`merge=1`).",
            ),
        ),
        Alert(
            "StewardEdgesDoNotRead",
            f"{increase('steward_agent_slow_edges_total', '15m', 'instance')} > 0",
            "0m",
            "warning",
            "{{ $labels.instance }} ended the stream of an edge that did not read",
            "Users of this edge saw a pause; it attached again and caught up from the log.",
            (
                "Find the edge in the node's log, and look at its loop lag and CPU.",
                "If it stays: add edges, or drain this one.",
            ),
        ),
        Alert(
            "StewardQueuesGrow",
            " or ".join(
                f"max by ({instance}) ({series(name)}) > {bound}"
                for name, bound in (
                    ("steward_agent_waiting_appends", 5000),
                    ("steward_agent_outbox_items", 10000),
                    ("steward_log_waiting_operations", 5000),
                    ("steward_registry_waiting_commands", 5000),
                    ("steward_edge_waiting_commands", 5000),
                )
            ),
            "2m",
            "warning",
            "Work piles up in {{ $labels.instance }} ({{ $labels.service }})",
            "Latencies grow; past the bound of the queue, work is refused.",
            (
                "The queue says who is slow: appends and operations the log, outbox items an "
                "edge, commands of an edge a node, commands of the registry its store.",
                "Look at that one's loop lag, CPU and disk.",
            ),
        ),
        Alert(
            "StewardRunsAbandoned",
            f"{increase('steward_agent_abandoned_runs_total', '15m', 'instance')} > 0",
            "0m",
            "warning",
            "Cancelled runs on {{ $labels.instance }} did not end within their grace",
            "None: the run is over for the user. Its code still holds a place on the node.",
            (
                "The node's log names the agent; its code swallows the cancellation or blocks.",
                "Restart the node when it is full of such runs: `steward drain NODE` first.",
            ),
        ),
        Alert(
            "StewardFileDescriptors",
            f'max by ({instance}) (process_open_fds{{job="{JOB}"}} '
            f'/ process_max_fds{{job="{JOB}"}}) > 0.8',
            "5m",
            "warning",
            "{{ $labels.instance }} has 80 % of its file descriptors open",
            "At 100 % it can take no connection any more.",
            (
                "Raise `ulimit -n` of the process; an edge needs one per connection.",
                "`steward doctor` says what a machine should have.",
            ),
        ),
    ]
