"""What to do: `docs/violations.md` from the table of kinds, `docs/runbooks.md` from the alerts.

Every kind of `steward.model.violations` has its line here; a kind without one makes the
generation fail, and so the test that holds the file against it.
"""

from collections.abc import Mapping
from types import MappingProxyType

from steward.model.violations import KINDS, Severity, ViolationKind
from steward.telemetry.alerts import alerts

_V = ViolationKind

LOOK: Mapping[ViolationKind, str] = MappingProxyType(
    {
        _V.STALE_APPEND: "Expected once per user after a take-over from a node that still ran.",
        _V.STALE_SEAL: "Expected when a node was taken over while it began a manager.",
        _V.APPEND_CONFLICT: "Expected beside `stale_append`; alone, two writers share an epoch: "
        "look for `two_effective_managers`.",
        _V.STALE_EPOCH_COMMAND: "Expected while an edge learns of a move; the edge asks again.",
        _V.UNKNOWN_PLACEMENT: "Expected while a node learns of a placement. Steady: compare "
        "`steward where USER` with the node in the evidence.",
        _V.FORGED_EPOCH: "Never by an honest edge: find the process that the evidence names.",
        _V.STALE_EPOCH: "Expected after a take-over; the edge asks again.",
        _V.SECOND_MANAGER: "Agent or host code made a manager twice: find the caller.",
        _V.DIRECT_CONSTRUCTION: "Agent code made a manager itself: the evidence has its place.",
        _V.NODE_STOOD_STILL: "The machine was suspended or starved of CPU: look at its load.",
        _V.NODE_ID_IN_USE: "Two processes were given one `--id`: rename one.",
        _V.FENCED_NODE_RETURNED: "Expected after a pause or a cut network; the process ends.",
        _V.FOREIGN_RELEASE: "Expected when a release was late; it removed nothing.",
        _V.WRONG_CLUSTER: "A process has another `--cluster`, or the address of this one.",
        _V.STALE_DELIVERY: "Expected after a take-over from a node that still ran.",
        _V.DELIVERY_GAP: "Now and then: a lost batch. Steady: look at that node's log for errors.",
        _V.FOREIGN_DELIVERY: "Expected while a user detaches; otherwise find the node.",
        _V.FOREIGN_USER: "A client tried to act as somebody else: look at who signed its token.",
        _V.FOREIGN_ORIGIN: "A page elsewhere tried to connect; if it is yours, add its origin.",
        _V.REPLAYED_TICKET: "A ticket was taken from somewhere: a shared URL, or a proxy's log.",
        _V.FENCE_ABOVE_REGISTRY: "The registry's store is older than the log: it was restored from "
        "a backup, or another cluster's log is used. It raises its generation by itself. Find out "
        "which store was put back, and check that no second registry uses the other one.",
        _V.TWO_EFFECTIVE_MANAGERS: "Stop the node of the lower epoch (`steward drain`, or kill "
        "it). Read the user's stream: epochs in it must not go down. If both could append, the "
        "log's fence failed: stop the log, keep its files, and report it.",
        _V.EPOCH_WENT_DOWN: "The registry granted, or the log took, a lower epoch than before. "
        "Stop the registry and keep its store; compare `generation` and `rev` with the ledger.",
        _V.STREAM_WENT_BACK: "The log lost acknowledged events: a restored volume, or a disk that "
        "lies about flushes. Stop the log, keep its files, and look at its disk.",
        _V.FOREIGN_EVENT: "Data of one user came to another. Stop the edge that the evidence "
        "names, keep its log, and find out from the trace which stream carried it.",
        _V.DUPLICATE_MANAGER: "End the one that the registry does not name: fence its node "
        "(`steward drain NODE --now`), after its log was kept. The one that the log's fence names "
        "is the only one that can have written since.",
        _V.STALE_MANAGER: "It can't write any more, but its node does not know it: look at that "
        "node's session in its log, then fence it (`steward drain NODE --now`).",
        _V.ORPHAN_MANAGER: "The node has a grant that the registry never gave, or the registry "
        "lost one: compare the ledger of the user with the evidence; then fence the node.",
        _V.UNSEALED_MANAGER: "The log was put back to a time before, or the node has another "
        "log: compare its `--log` with the other nodes'. Its next append will be refused.",
        _V.UNREACHABLE_USER: "The user waits for a manager that can't be made: `steward move "
        "USER` gives her a new placement. Then find out from the node's log why it let go.",
        _V.MISATTACHED_EDGE: "The edge missed a move, and drops what the right node sends: "
        "restart it; its clients come back elsewhere. Look in its log for the registry's session.",
    }
)

_HEAD = """# Violations

<!-- {generated} -->

A **refusal** is a guard that worked: somebody, often a process that was paused and does not know
that it was taken over, tried what it must not, and nothing happened. A **breach** is an invariant
that was seen broken. There must be none, ever; one pages (`StewardSsotViolation`).

Whoever sees one reports it to the registry, which keeps it with number, time, user, epoch, node,
who reported it, evidence and trace. Equal ones within a second are one row with a count. At most
`registry.kept_violations` rows are kept; the oldest refusals go first. Evidence is one line of at
most 4 KiB, and what looks like a token or a ticket is left out of it.

    steward violations                # the newest, and how many there ever were; exit 1 on a breach
    steward violations --breaches
    steward violations --follow --json
"""

_BREACH_HEAD = """## Breaches

For each: keep the stores (`registry.db`, the log's directory) and the logs of all processes as they
are before anything is restarted; then the row's second half. `steward violations --breaches --json`
has the user, the epochs and the trace id; `steward where USER` says who owns the user now.

| kind | what was seen | what to do |
|---|---|---|
"""

_REFUSAL_HEAD = """
## Refusals

None needs anybody at once. Many of one kind, or of one process, say that something is set up wrong
or that somebody tries.

| kind | what was refused | when to look |
|---|---|---|
"""


def render_runbook(generated: str) -> str:
    """The page; `generated` says how it was made. Raises KeyError for a kind without a line."""
    breaches = _rows(Severity.BREACH)
    return (
        _HEAD.format(generated=generated)
        + "\n"
        + _BREACH_HEAD
        + breaches
        + _REFUSAL_HEAD
        + _rows(Severity.REFUSAL)
    )


def _rows(severity: Severity) -> str:
    return "".join(
        f"| `{kind.value}` | {row.meaning} | {LOOK[kind]} |\n"
        for kind, row in KINDS.items()
        if row.severity is severity
    )


def render_alert_runbooks(generated: str) -> str:
    """One section for each alert, in the order of the rules."""
    lines = [
        "# Runbooks",
        "",
        f"<!-- {generated} -->",
        "",
        "One section for each alert of `deploy/observability/alerts.yml`; its `runbook` annotation",
        "leads here. `page` wants somebody now, `warning` in the next working hours.",
        "",
    ]
    for alert in alerts():
        summary = alert.summary.replace("{{ $labels.", "`").replace(" }}", "`")
        lines += [
            f"## {alert.name}",
            "",
            f"*{alert.severity}, after {alert.hold}.* {summary}.",
            "",
            f"**What users see.** {alert.effect}",
            "",
            *(f"{number}. {step}" for number, step in enumerate(alert.steps, 1)),
            "",
            "```promql",
            alert.expression,
            "```",
            "",
        ]
    return "\n".join(lines).rstrip("\n") + "\n"
