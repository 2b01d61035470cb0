"""Scenarios of the `Registry` machine: text files of commands, and the effects they must have.

A line at the margin is a command; the indented lines under it are its effects, printed,
in order. The store is a real `MemoryDisk`, whose outcomes are given to the machine at once
unless `store hold` was said. `STEWARD_REWRITE=1` writes what happens now into the files:
read the diff before you believe it.

    node PEER ID NONCE [pid=N] [capacity=N]      edge PEER
    beat|drain PEER   renew PEER N               close PEER reset|eof    hangup PEER
    resolve PEER USER[>=EPOCH]...                confirm PEER USER...    find PEER USER
    release PEER USER@EPOCH...                   unreachable PEER NODE/REV
    death PEER NODE PID                          dial N refused|accepted|timed_out
    after MS (time passes)                       tick MS (and the timer comes)
    live MS PEER... (tick, while these nodes beat and renew)
    store hold|apply|deliver|unknown|lost        store reversed (the last outcome first)
    restart                                      ledger [N]
    elsewhere USER@EPOCH NODE/REV NODE/REV (another replica moves the user)
    refusal PEER KIND USER@EPOCH                 describe PEER           term
"""

import os
from collections.abc import Callable
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
    ReleasePlacement,
    Unknown,
)
from registry_service.store.memory import MemoryDisk
from steward.model.keys import EdgeId, Epoch, NodeId, NodeIncarnation, NodeRev, UserKey
from steward.model.placement import Placement

FILES = sorted(Path(__file__).parent.glob("*.txt"))


def user(text: str) -> UserKey:
    return UserKey("t", text)


def at_epoch(text: str) -> tuple[UserKey, Epoch]:
    name, _, epoch = text.partition("@")
    return user(name), Epoch(int(epoch))


def incarnation(text: str) -> NodeIncarnation:
    node_id, _, rev = text.partition("/")
    return NodeIncarnation(NodeId(node_id), NodeRev(int(rev)))


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
                elif not (
                    isinstance(effect, effects.Send)
                    and isinstance(effect.message, effects.RegistryBeat)
                ):
                    self.lines.append(self.show(effect))

    def run(self, line: str) -> list[str]:
        self.lines = []
        verb, *words = line.split()
        action: Callable[..., None] = getattr(self, f"do_{verb}")
        action(*words)
        return self.lines

    # Commands

    def do_restart(self) -> None:
        self.machine = Registry(RegistryConfig())
        self.held = []
        self.term, view = self.disk.open()
        self.give(commands.Recover(view))

    def do_term(self) -> None:
        """Another process takes the store."""
        self.disk.open()

    def do_node(self, peer: str, node_id: str, nonce: str, *options: str) -> None:
        extra = {key: int(value) for key, _, value in (word.partition("=") for word in options)}
        claim = NodeClaim(
            NodeId(node_id), "boot", nonce, f"{nonce}.host:1", capacity=0, version="1", pid=1
        )
        if extra:
            claim = NodeClaim(
                claim.node_id,
                claim.boot_id,
                nonce,
                claim.address,
                capacity=extra.get("capacity", 0),
                pid=extra.get("pid", 1),
            )
        self.give(commands.OpenNodeSession(self.peer(peer), claim))

    def do_edge(self, peer: str) -> None:
        self.give(commands.OpenEdgeSession(self.peer(peer), EdgeId(peer)))

    def do_hangup(self, peer: str) -> None:
        self.give(commands.CloseEdgeSession(self.peer(peer)))

    def do_beat(self, *peers: str) -> None:
        for peer in peers:
            self.give(commands.ReceiveBeat(self.peer(peer)))

    def do_renew(self, peer: str, renewal: str) -> None:
        self.give(commands.RenewLease(self.peer(peer), int(renewal)))

    def do_drain(self, peer: str) -> None:
        self.give(commands.AnnounceDrain(self.peer(peer)))

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

    def do_refusal(self, peer: str, kind: str, word: str) -> None:
        self.give(commands.ReportRefusal(self.peer(peer), kind, *at_epoch(word), "seen", ""))

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
        self.holding = what in ("hold", "apply")
        if what == "hold":
            return
        held, self.held = self.held, []
        if what == "reversed":
            held.reverse()
        for commit, outcome in held:
            if what != "unknown" and outcome is None:
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
            who = f" {row.user}@{row.epoch}" if row.user else ""
            node = f" on {row.node_id}/{row.node_rev}" if row.node_id else ""
            why = f" [{row.evidence}]" if row.evidence else ""
            self.lines.append(f"{row.revision} {row.kind}{who}{node}: {row.cause}{why}")

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
            case effects.RefusalRecorded(kind, detail):
                return f"refusal {kind}: {detail}"
            case effects.GraceBegun(cause, until):
                return f"grace until {until}: {cause}"
            case effects.Halt(cause):
                return f"halt: {cause}"
        raise AssertionError(effect)

    def show_message(self, message: effects.Message) -> str:
        match message:
            case effects.ManagersResolved(_, results, cached):
                return f"resolved {', '.join(map(show_result, results))} ({cached} cached)"
            case effects.PlacementsGranted(placements):
                return f"granted {', '.join(map(show_result, placements))}"
            case effects.PlacementsConfirmed(_, placements):
                return f"confirmed {', '.join(map(show_result, placements)) or 'nobody'}"
            case effects.PlacementsReleased(_, deleted):
                return f"released {deleted}"
            case effects.NodeFenced(incarnation, cause):
                return f"fenced {show_node(incarnation)}: {cause}"
            case effects.NodeWelcome(node_rev):
                return f"welcome {node_rev}"
            case effects.LeaseRenewed(renewal):
                return f"renewed {renewal}"
            case effects.EdgeWelcome():
                return "welcome"
            case effects.PlacementFound(placement, alive):
                return f"found {show_result(placement) if placement else 'nobody'} alive={alive}"
            case effects.ClusterDescribed(nodes, revision, placements, edges):
                names = " ".join(
                    show_node(node.record.incarnation) + ("(draining)" if node.draining else "")
                    for node in nodes
                )
                return f"cluster [{names}] rev={revision} placements={placements} edges={edges}"
            case effects.DeathRecorded(fenced):
                return f"death recorded fenced={fenced}"
            case effects.Refused(reason, why):
                return f"refused {reason}: {why}"
        raise AssertionError(message)


def show_node(incarnation: NodeIncarnation) -> str:
    return f"{incarnation.node_id}/{incarnation.node_rev}"


def show_result(result: Placement | effects.UserRefused) -> str:
    if isinstance(result, Placement):
        return f"{result.user.user}@{result.epoch} on {show_node(result.incarnation)}"
    return f"{result.user.user} {result.reason} after {result.retry_after_ms} ms"


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
