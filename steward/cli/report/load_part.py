"""The part under load: streams that are checked event by event, and cheats that must be refused.

Both play against the cluster of this machine with users of tenants of their own, and last some
seconds. What can't be played here (the load agent is not served, or the cluster is elsewhere) makes
a line that says so.
"""

from typing import TYPE_CHECKING

from steward.cli.report.lines import Line, Part, Verdict, some
from steward.errors import StewardError

if TYPE_CHECKING:
    from steward.cli.target import Target

STREAMS = ("streams-whole", "under load every stream comes whole, in order, to its user alone")
CHEATS = ("cheats-refused", "every cheat is refused and recorded, and none works")

USERS, RATE, SECONDS = 20, 400.0, 3.0
NOT_ASKED = "not asked for: run `steward compliance --load`"


def lines_not_asked_for() -> list[Line]:
    """What is said without `--load`."""
    how = "nothing was played"
    return [
        Line(*_head(head), Verdict.NOT_CHECKED, how, (NOT_ASKED,)) for head in (STREAMS, CHEATS)
    ]


def streams_line(target: "Target") -> Line:
    """Put the cluster under load, checking each event of each stream. Blocks for some seconds."""
    from steward.cli.load import AGENT, plan_here
    from steward.cli.target import WrongTarget
    from steward.load.generator import LoadBroken, Watcher, generate
    from steward.load.plan import WrongPlan
    from steward.rpc.keys import KeyUnusable

    how = f"`steward load`: {USERS} users, {RATE:g} events/s in all, for {SECONDS:g} s"
    if target.local is None:
        why = "not checked from here: run `steward load --url` with tokens of the cluster"
        return Line(*_head(STREAMS), Verdict.NOT_CHECKED, how, (why,))
    try:
        plan = plan_here(target.local, target.data, users=USERS, rate=RATE, seconds=SECONDS)
        found = generate(plan, Watcher())
    except (WrongPlan, WrongTarget, KeyUnusable) as error:
        return Line(*_head(STREAMS), Verdict.NOT_CHECKED, how, (str(error),))
    except LoadBroken as error:
        if "NOT_FOUND" in str(error):
            why = f"the cluster has no agent {AGENT!r}: `--agent steward.load.agent:load`"
            return Line(*_head(STREAMS), Verdict.NOT_CHECKED, how, (why,))
        return Line(*_head(STREAMS), Verdict.BROKEN, how, (str(error),))
    if not found.events:
        return Line(*_head(STREAMS), Verdict.NOT_CHECKED, how, ("no event came",))
    p99 = found.latency.percentile(0.99)
    told = f"{found.events} events of {USERS} users, each checked; p99 of delivery {p99:.1f} ms"
    return Line(*_head(STREAMS), Verdict.KEPT, how, (told,))


async def cheats_line(target: "Target") -> Line:
    """Play every cheat of `steward attack`."""
    from steward.cli.attack import doors_here, play_each
    from steward.cli.cheats import CHEATS as ALL
    from steward.cli.cluster_file import NoCluster
    from steward.rpc.keys import KeyUnusable

    how = f"`steward attack`: {len(ALL)} cheats were played"
    if target.local is None:
        why = "not checked from here: run `steward attack --all --registry …`"
        return Line(*_head(CHEATS), Verdict.NOT_CHECKED, how, (why,))
    try:
        played = [each async for each in play_each(target, doors_here(target), ALL)]
    except (NoCluster, KeyUnusable, StewardError) as error:
        return Line(*_head(CHEATS), Verdict.NOT_CHECKED, how, (str(error),))
    trouble = [f"{each.cheat}: {each.trouble}" for each in played if each.trouble]
    refused = [f"{each.cheat}: {each.said}" for each in played if not each.trouble]
    counted = f"{len(refused)} of {len(played)} cheats were refused and recorded"
    verdict = Verdict.BROKEN if trouble else Verdict.KEPT
    return Line(*_head(CHEATS), verdict, how, (counted, *some([*trouble, *refused])))


def _head(line: tuple[str, str]) -> tuple[str, Part, str]:
    return line[0], Part.LOAD, line[1]
