"""Scenarios of the `Registry` machine: text files of commands, and the effects they must have.

A line at the margin is a command; the indented lines under it are its effects, printed,
in order. The store is a real `MemoryDisk`, whose outcomes are given to the machine at once
unless `store hold` was said. `STEWARD_REWRITE=1` writes what happens now into the files:
read the diff before you believe it.

    node PEER ID NONCE [pid=N] [capacity=N] [zone=Z]      edge PEER
    beat PEER... [nolog]   renew PEER N          close PEER reset|eof    hangup PEER
    resolve PEER USER[>=EPOCH]...                confirm PEER USER...    find PEER USER
    release PEER USER@EPOCH...                   unreachable PEER NODE/REV
    handoff PEER USER@EPOCH[+]... (a release by plan; + has open runs)
    announce PEER (the node drains)              adopt PEER USER...      loghead PEER EPOCH
    drain|fence PEER NODE   move PEER USER [NODE]   evict PEER USER (by an operator)
    death PEER NODE PID                          dial N refused|accepted|timed_out
    after MS (time passes)                       tick MS (and the timer comes)
    live MS PEER... (tick, while these nodes beat and renew)
    store hold|apply|deliver|unknown|lost        store reversed (the last outcome first)
    store away (nothing gets there, and nothing will until it says deliver)
    restart [FIELD=N]... (with this configuration from now on)           ledger [N]
        (generation=N: the operator wants at least this one, at this start)
    restore [all] (the disk becomes what it was when `backup` was said)  backup
        (its witness stays, and shows it at the next restart; with `all` it is put back too)
    elsewhere USER@EPOCH NODE/REV NODE/REV (another replica moves the user)
    report NODE KIND USER@EPOCH                  describe PEER           term
    violations (all that are recorded)

Users are of tenant t, or written tenant:name. Beats, and what everybody is told at each change of
the cluster, are printed after `show cluster` only; so is the question for the log's head,
which every node answers with 0 until `quiet logs` was said.
"""

import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest

from registry_service.core import commands, effects
from registry_service.core.commands import Command, PeerId, StreamEnd
from registry_service.core.config import RegistryConfig
from registry_service.core.registry import Registry
from registry_service.core.transactions import (
    NodeClaim,
    Outcome,
    PlaceUser,
    RecordViolation,
    ReleasePlacement,
    Unknown,
)
from registry_service.store.memory import MemoryDisk
from steward.model.keys import (
    GENERATION_SHIFT,
    EdgeId,
    Epoch,
    NodeId,
    NodeIncarnation,
    NodeRev,
    UserKey,
)
from steward.model.placement import Placement
from steward.model.violations import Violation, ViolationKind

FILES = sorted(Path(__file__).parent.glob("*.txt"))


def user(text: str) -> UserKey:
    tenant, _, name = text.rpartition(":")
    return UserKey(tenant or "t", name)


def show_user(who: UserKey) -> str:
    return who.user if who.tenant == "t" else f"{who.tenant}:{who.user}"


def number(text: str) -> int:
    """An epoch or an incarnation: REVISION, or GENERATION:REVISION."""
    generation, _, revision = text.rpartition(":")
    return int(generation or 0) << GENERATION_SHIFT | int(revision)


def at_epoch(text: str) -> tuple[UserKey, Epoch]:
    name, _, epoch = text.partition("@")
    return user(name), Epoch(number(epoch))


def incarnation(text: str) -> NodeIncarnation:
    node_id, _, rev = text.partition("/")
    return NodeIncarnation(NodeId(node_id), NodeRev(number(rev)))


class World:
    """A machine, its disk and its peers by name."""

    def __init__(self) -> None:
        self.now = 0
        self.disk = MemoryDisk(lambda: self.now)
        self.names: dict[str, PeerId] = {}
        # Transactions whose outcome was not given yet, and the outcome if they were applied.
        self.held: list[tuple[effects.Commit, Outcome | None]] = []
        self.holding = False
        self.lines: list[str] = []
        self.request = 0
        self.config = RegistryConfig()
        self.show_cluster = False
        self.quiet_logs = False
        self.saved: MemoryDisk | None = None
        self.do_restart()

    def peer(self, name: str) -> PeerId:
        return self.names.setdefault(name, PeerId(len(self.names) + 1))

    def name(self, peer: PeerId) -> str:
        return next(name for name, number in self.names.items() if number == peer)

    def give(self, command: Command) -> None:
        """One command, and every outcome that the store has for it."""
        waiting = [command]
        while waiting:
            for effect in self.machine.handle(self.now, waiting.pop(0)):
                if isinstance(effect, effects.Commit) and not self.holding:
                    outcome = self.disk.apply(self.term, effect.operations)
                    waiting.append(commands.FinishTransaction(effect.transaction, outcome))
                elif isinstance(effect, effects.Commit):
                    self.held.append((effect, None))
                    kinds = " ".join(type(each).__name__ for each in effect.operations)
                    self.lines.append(f"commit {effect.transaction}: {kinds}")
                else:
                    self.lines += self.show_unless_hidden(effect)
                    waiting += self.answers(effect)

    def show_unless_hidden(self, effect: effects.Effect) -> list[str]:
        if isinstance(effect, effects.Send):
            match effect.message:
                case effects.RegistryBeat():
                    return []
                case effects.ClusterNodes() | effects.ClusterMembers() if not self.show_cluster:
                    return []
                case effects.AskLogHead() if not self.quiet_logs:
                    return []
        return [self.show(effect)]

    def answers(self, effect: effects.Effect) -> list[Command]:
        """What a node says at once: an empty log, unless logs are quiet."""
        match effect:
            case effects.Send(peer, effects.AskLogHead()) if not self.quiet_logs:
                return [commands.ReportLogHead(peer, Epoch(0))]
        return []

    def run(self, line: str) -> list[str]:
        self.lines = []
        verb, *words = line.split()
        action: Callable[..., None] = getattr(self, f"do_{verb}")
        action(*words)
        return self.lines

    # Commands

    def do_restart(self, *options: str) -> None:
        least_generation = 0
        for option in options:
            field, _, value = option.partition("=")
            if field == "generation":
                least_generation = int(value)
            elif field == "strict":
                self.config = replace(self.config, strict_tenants=frozenset(value.split(",")))
            else:
                self.config = replace(self.config, **{field: int(value)})
        self.machine = Registry(self.config)
        self.held = []
        self.term, view = self.disk.open(least_generation)
        self.give(commands.Recover(view))

    def do_term(self) -> None:
        """Another process takes the store."""
        self.disk.open()

    def do_node(self, peer: str, node_id: str, nonce: str, *options: str) -> None:
        extra = {key: value for key, _, value in (word.partition("=") for word in options)}
        claim = NodeClaim(
            NodeId(node_id),
            "boot",
            nonce,
            f"{nonce}.host:1",
            zone=extra.get("zone", ""),
            capacity=int(extra.get("capacity", 0)),
            version="1",
            pid=int(extra.get("pid", 1)),
        )
        self.give(commands.OpenNodeSession(self.peer(peer), claim))

    def do_show(self, what: str) -> None:
        assert what == "cluster"
        self.show_cluster = True

    def do_quiet(self, what: str) -> None:
        assert what == "logs"
        self.quiet_logs = True

    def do_backup(self) -> None:
        self.saved = deepcopy(self.disk)

    def do_restore(self, what: str = "") -> None:
        assert self.saved is not None and what in ("", "all")
        witness = self.disk.witness
        self.disk = deepcopy(self.saved)
        if not what:
            self.disk.witness = witness

    def do_edge(self, peer: str) -> None:
        self.give(commands.OpenEdgeSession(self.peer(peer), EdgeId(peer)))

    def do_hangup(self, peer: str) -> None:
        self.give(commands.CloseEdgeSession(self.peer(peer)))

    def do_beat(self, *peers: str) -> None:
        reachable = "nolog" not in peers
        for peer in peers:
            if peer != "nolog":
                self.give(commands.ReceiveBeat(self.peer(peer), log_reachable=reachable))

    def do_renew(self, peer: str, renewal: str) -> None:
        self.give(commands.RenewLease(self.peer(peer), int(renewal)))

    def do_announce(self, peer: str) -> None:
        self.give(commands.AnnounceDrain(self.peer(peer)))

    def do_drain(self, peer: str, node_id: str) -> None:
        self.give(commands.DrainNode(self.peer(peer), NodeId(node_id)))

    def do_fence(self, peer: str, node_id: str) -> None:
        self.give(commands.FenceNodeByOperator(self.peer(peer), NodeId(node_id), "it is sick"))

    def do_move(self, peer: str, name: str, node_id: str = "") -> None:
        self.give(commands.MoveUser(self.peer(peer), user(name), NodeId(node_id)))

    def do_evict(self, peer: str, name: str) -> None:
        self.give(commands.EvictUser(self.peer(peer), user(name), "abuse"))

    def do_adopt(self, peer: str, *names: str) -> None:
        self.give(commands.AdoptUsers(self.peer(peer), tuple(map(user, names))))

    def do_loghead(self, peer: str, fence: str) -> None:
        self.give(commands.ReportLogHead(self.peer(peer), Epoch(number(fence))))

    def do_close(self, peer: str, end: str) -> None:
        self.give(commands.CloseNodeSession(self.peer(peer), StreamEnd(end)))

    def do_resolve(self, peer: str, *words: str) -> None:
        queries = []
        for word in words:
            name, _, epoch = word.partition(">=")
            queries.append(commands.UserQuery(user(name), Epoch(int(epoch or 0))))
        self.request += 1
        self.give(commands.ResolveManagers(self.peer(peer), self.request, tuple(queries)))

    def do_confirm(self, peer: str, *names: str) -> None:
        users = tuple(user(name) for name in names)
        self.give(commands.ConfirmPlacements(self.peer(peer), 0, users))

    def do_find(self, peer: str, name: str) -> None:
        self.give(commands.FindPlacement(self.peer(peer), user(name)))

    def do_describe(self, peer: str) -> None:
        self.give(commands.DescribeCluster(self.peer(peer)))

    def do_release(self, peer: str, *words: str) -> None:
        releases = tuple(commands.Release(*at_epoch(word), "idle") for word in words)
        self.give(commands.ReleasePlacements(self.peer(peer), 0, releases))

    def do_handoff(self, peer: str, *words: str) -> None:
        releases = tuple(
            commands.Release(
                *at_epoch(word.rstrip("+")), "handoff", handoff=True, activate=word.endswith("+")
            )
            for word in words
        )
        self.give(commands.ReleasePlacements(self.peer(peer), 0, releases))

    def do_report(self, node_id: str, kind: str, word: str) -> None:
        """A violation that a node saw: it comes to the store by a call, past the machine."""
        seen = Violation(ViolationKind(kind), "seen", *at_epoch(word))
        self.disk.apply(self.term, (RecordViolation(seen, f"agent:{node_id}"),))

    def do_unreachable(self, peer: str, node: str) -> None:
        self.give(commands.ReportUnreachable(self.peer(peer), incarnation(node), "no answer"))

    def do_death(self, peer: str, node_id: str, pid: str) -> None:
        self.give(commands.ReportDeath(self.peer(peer), NodeId(node_id), int(pid), "exit 137"))

    def do_dial(self, number: str, outcome: str) -> None:
        self.give(commands.FinishDial(commands.DialId(int(number)), commands.DialOutcome(outcome)))

    def do_after(self, ms: str) -> None:
        self.now += int(ms)

    def do_tick(self, ms: str) -> None:
        """Let time pass as a real timer would: a tick at every deadline on the way."""
        end = self.now + int(ms)
        while (deadline := self.machine.next_deadline()) is not None and deadline <= end:
            self.now = max(deadline, self.now)
            self.give(commands.Tick())
        self.now = end

    def do_live(self, ms: str, *peers: str) -> None:
        end = self.now + int(ms)
        while self.now < end:
            self.do_tick(str(min(250, end - self.now)))
            for peer in peers:
                self.give(commands.ReceiveBeat(self.peer(peer)))
                self.give(commands.RenewLease(self.peer(peer), 0))
        self.lines = [line for line in self.lines if not line.endswith("< renewed 0")]

    def do_store(self, what: str) -> None:
        self.holding = what in ("hold", "apply", "away")
        if what == "hold":
            return
        held, self.held = self.held, []
        if what == "reversed":
            held.reverse()
        for commit, outcome in held:
            if what not in ("unknown", "away") and outcome is None:
                outcome = self.disk.apply(self.term, commit.operations)
            if what == "apply":
                self.held.append((commit, outcome))
                continue
            if outcome is None or what == "lost":
                outcome = Unknown()
            self.give(commands.FinishTransaction(commit.transaction, outcome))

    def do_elsewhere(self, word: str, holder: str, target: str) -> None:
        who, epoch = at_epoch(word)
        release = ReleasePlacement(who, epoch, incarnation(holder), "handoff")
        place = PlaceUser(who, incarnation(target), "handoff")
        self.disk.apply(self.term, (release, place))

    def do_ledger(self, count: str = "100") -> None:
        for row in self.disk.rows[-int(count) :]:
            who = f" {row.user}@{show_epoch(row.epoch)}" if row.user else ""
            node = f" on {row.node_id}/{show_epoch(row.node_rev)}" if row.node_id else ""
            why = f" [{row.evidence}]" if row.evidence else ""
            self.lines.append(f"{row.revision} {row.kind}{who}{node}: {row.cause}{why}")

    def do_violations(self) -> None:
        for row in self.disk.violations.read(0, 100, None, False):
            who = f" {row.user}@{show_epoch(row.epoch)}" if row.user else ""
            node = f" on {row.node_id}/{show_epoch(row.node_rev)}" if row.node_id else ""
            what = f"{row.severity} {row.kind}{who}{node}: {row.evidence}"
            self.lines.append(f"{row.number} {what} ({row.reporter})")

    # Printing

    def show(self, effect: effects.Effect) -> str:
        match effect:
            case effects.Send(peer, message):
                return f"{self.name(peer)} < {self.show_message(message)}"
            case effects.Close(peer):
                return f"{self.name(peer)} closed"
            case effects.Dial(dial, address):
                return f"dial {dial} {address}"
            case effects.NodeUp(incarnation, _, resumed):
                return f"up {show_node(incarnation)}{' (resumed)' if resumed else ''}"
            case effects.NodeDraining(incarnation):
                return f"draining {show_node(incarnation)}"
            case effects.NodeLost(incarnation, cause, evidence, detail):
                return f"lost {show_node(incarnation)}: {cause} [{evidence.value}: {detail}]"
            case effects.ViolationSeen(_, violation, reporter):
                return f"{violation.severity} {violation.kind}: {violation.evidence} ({reporter})"
            case effects.PlacementEnded(who, cause, took):
                return f"{cause} of {show_user(who)} took {took} ms"
            case effects.GenerationRaised(generation, cause):
                return f"generation {generation}: {cause}"
            case effects.GraceBegun(cause, until):
                return f"grace until {until}: {cause}"
            case effects.Halt(cause):
                return f"halt: {cause}"
        raise AssertionError(effect)

    def show_message(self, message: effects.Message) -> str:
        match message:
            case effects.ManagersResolved(_, results, cached):
                return f"resolved {', '.join(map(show_result, results))} ({cached} cached)"
            case effects.PlacementsGranted(placements, activate):
                how = "granted and to be activated" if activate else "granted"
                return f"{how} {', '.join(map(show_result, placements))}"
            case effects.HandOffUsers(users, cause):
                return f"hand off ({cause}) {', '.join(map(show_owned, users))}"
            case effects.EvictManagers(users):
                return f"evict {', '.join(map(show_owned, users))}"
            case effects.EvictSessions(who, cause):
                return f"end the sessions of {show_user(who)}: {cause}"
            case effects.PlacementMoved(placement):
                return f"moved {show_result(placement)}"
            case effects.ClusterMembers(node_ids):
                return f"members {' '.join(node_ids) or 'nobody'}"
            case effects.ClusterNodes(nodes):
                return f"nodes {' '.join(map(show_status, nodes)) or 'none'}"
            case effects.AskLogHead():
                return "what is the head of the log?"
            case effects.PlacementsConfirmed(_, placements):
                return f"confirmed {', '.join(map(show_result, placements)) or 'nobody'}"
            case effects.PlacementsReleased(_, deleted):
                return f"released {deleted}"
            case effects.NodeFenced(incarnation, cause):
                return f"fenced {show_node(incarnation)}: {cause}"
            case effects.NodeWelcome(node_rev, strict_tenants=strict):
                tenants = f", strict: {' '.join(strict)}" if strict else ""
                return f"welcome {show_epoch(node_rev)}{tenants}"
            case effects.LeaseRenewed(renewal):
                return f"renewed {renewal}"
            case effects.EdgeWelcome():
                return "welcome"
            case effects.PlacementFound(placement, alive, edges):
                where = show_result(placement) if placement else "nobody"
                asked = f" for {' '.join(edges)}" if edges else ""
                return f"found {where} alive={alive}{asked}"
            case effects.ClusterDescribed(nodes, revision, placements, edges):
                names = " ".join(map(show_status, nodes))
                return f"cluster [{names}] rev={revision} placements={placements} edges={edges}"
            case effects.DeathRecorded(fenced):
                return f"death recorded fenced={fenced}"
            case effects.NodeDrained(node_rev, placements):
                return f"draining {show_epoch(node_rev)}, {placements} to move"
            case effects.NodeFencedByOperator(node_rev):
                return f"fenced {show_epoch(node_rev)}"
            case effects.UserMoved(placement, from_node):
                return f"moved {show_result(placement)} from {from_node}"
            case effects.UserEvicted(epoch):
                return f"evicted, epoch {epoch} is over"
            case effects.Refused(reason, why):
                return f"refused {reason}: {why}"
        raise AssertionError(message)


def show_node(incarnation: NodeIncarnation) -> str:
    return f"{incarnation.node_id}/{show_epoch(incarnation.node_rev)}"


def show_status(node: effects.NodeStatus) -> str:
    return show_node(node.record.incarnation) + ("(draining)" if node.draining else "")


def show_epoch(epoch: int) -> str:
    """Revision alone in generation 0, else generation:revision."""
    generation, revision = divmod(epoch, 1 << GENERATION_SHIFT)
    return f"{generation}:{revision}" if generation else str(revision)


def show_owned(owned: effects.OwnedUser) -> str:
    return f"{show_user(owned.user)}@{show_epoch(owned.epoch)}"


def show_result(result: Placement | effects.UserRefused) -> str:
    if isinstance(result, Placement):
        epoch = show_epoch(result.epoch)
        return f"{show_user(result.user)}@{epoch} on {show_node(result.incarnation)}"
    return f"{show_user(result.user)} {result.reason} after {result.retry_after_ms} ms"


def play(text: str) -> str:
    """The scenario with the effects that its commands have now."""
    world = World()
    written = []
    for line in text.splitlines():
        if line.startswith(" "):
            continue
        written.append(line)
        if line and not line.startswith("#"):
            written += [f"    {effect}" for effect in world.run(line)]
    return "\n".join(written) + "\n"


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_commands_have_exactly_the_effects_that_the_scenario_says(path: Path) -> None:
    expected = path.read_text()
    happened = play(expected)
    if os.environ.get("STEWARD_REWRITE"):
        path.write_text(happened)
    assert happened == expected


def test_there_are_scenarios_and_each_expects_something() -> None:
    assert len(FILES) >= 9
    for path in FILES:
        assert "\n    " in path.read_text(), f"{path.name} expects no effect at all"
