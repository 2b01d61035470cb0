"""A node process in the simulation: its session with the registry, its log stream, its life.

It keeps the rules of `agent_service.uplink.registry`: joins with a nonce of its own, beats and
renews, sends releases until they are answered, and ends itself when it is told that it
is fenced, when it gets another incarnation, or when it stood still for longer than its
lease, which is asked before each step (the real `Standstill`). A lease that could not be renewed
ends the managers of strict tenants. What it hosts is in `simulated_host`.
"""

from collections.abc import Callable
from typing import Any

from agent_service.core.grants import GrantBook
from agent_service.host.standstill import Standstill
from registry_service.core import commands as to_registry
from registry_service.core import effects as from_registry
from registry_service.core.transactions import NodeClaim
from steward.errors import Reason
from steward.model.keys import Epoch, NodeId, NodeIncarnation, UserKey
from steward.model.placement import Placement
from steward.testing.faults import Faults
from steward.testing.invariants import Invariants
from steward.testing.simulated_host import SimulatedHost
from steward.testing.simulated_log import LogUplink, SimulatedLog
from steward.testing.simulated_network import End, Network, Process, Uplink
from steward.testing.simulated_registry import Say, SimulatedRegistry
from steward.testing.world import World

CONFIRM_MS = 2_000
SIGN_MS = 100
ORPHANS_MS = 30_000


class SimulatedNode(Process):
    """A node process. A supervisor starts it again when it has ended."""

    def __init__(
        self,
        name: str,
        world: World,
        network: Network,
        registry: SimulatedRegistry,
        log: SimulatedLog,
        host: Callable[["SimulatedNode"], SimulatedHost],
        invariants: Invariants,
        faults: Faults,
        rate: int,
    ) -> None:
        super().__init__(world, network, name, rate)
        self.node_id = NodeId(name)
        self.address = f"{name}:1"
        self.invariants = invariants
        self.ended: Callable[[SimulatedNode, str], None] = lambda *_: None
        self._registry = registry
        self.log_process = log
        self._make_host = host
        self._faults = faults

    # ---- life

    def begin(self) -> None:
        self.process = f"{self.name}/{self.life}"
        self.pid = self.life * 100 + int(self.name[-1])
        self.incarnation: NodeIncarnation | None = None
        self.book: GrantBook | None = None
        self.host = self._make_host(self)
        self._in_session = False
        self._sessions = 0
        self._confirming: dict[int, Callable[[Placement | None], None]] = {}
        self._confirmed_user: dict[int, UserKey] = {}
        self._releases: dict[tuple[UserKey, Epoch], to_registry.Release] = {}
        self._released: dict[int, list[tuple[UserKey, Epoch]]] = {}
        self._requests = 0
        self._asked_ms = 0
        self.strict: frozenset[str] = frozenset()
        self._standstill = Standstill(self.clock.now())
        self._sign()
        # Renewals that were sent, and until when the last one that was answered is good.
        self._renewals: dict[int, int] = {}
        self._good_until_ms = 0
        self.log = LogUplink(self, self.log_process)
        self._uplink = Uplink(
            self,
            lambda: (self._registry, "node"),
            up=self._hello,
            message=self._receive,
            down=self._down,
        )
        self.after(ORPHANS_MS, self._look_again)

    def crash(self, *, silent: bool = False) -> None:
        if self.alive:
            super().crash(silent=silent)
            self.ended(self, "machine" if silent else "process")

    def fence(self, cause: str) -> None:
        """This process knows that it is over: it ends, and with it every manager (P11)."""
        self.invariants.knows_fenced(self.process, cause)
        self.crash()

    # ---- the session with the registry

    def tell(self, say: Say) -> bool:
        return self._in_session and self._uplink.send(say)

    def _hello(self) -> None:
        claim = NodeClaim(
            self.node_id, "boot", self.process, self.address, capacity=10_000, pid=self.pid
        )
        self._asked_ms = self.clock.now()
        self._uplink.send(lambda peer: to_registry.OpenNodeSession(peer, claim))

    def _down(self) -> None:
        self._in_session = False
        for answer in list(self._confirming.values()):
            answer(None)
        self._confirming.clear()

    def _receive(self, message: from_registry.Message) -> None:
        match message:
            case from_registry.NodeWelcome():
                self._welcome(message)
            case from_registry.LeaseRenewed(renewal, ttl_ms):
                sent_ms = self._renewals.pop(renewal, None)
                if sent_ms is not None:
                    self._good_until_ms = sent_ms + ttl_ms * 9 // 10
            case from_registry.PlacementsGranted(placements, activate):
                self.host.granted(placements, activate)
            case from_registry.HandOffUsers(users, cause):
                self.host.hand_off(users, cause)
            case from_registry.EvictManagers(users):
                self.host.evict(users)
            case from_registry.ClusterMembers():
                self._look_for_orphans()
            case from_registry.AskLogHead():
                self._tell_log_head()
            case from_registry.PlacementsConfirmed(request_id, placements):
                answer = self._confirming.pop(request_id, None)
                user = self._confirmed_user.pop(request_id, None)
                if answer is not None:
                    answer(next((p for p in placements if p.user == user), None))
            case from_registry.PlacementsReleased(request_id):
                for key in self._released.pop(request_id, ()):
                    self._releases.pop(key, None)
            case from_registry.NodeFenced(_, cause):
                self.fence(cause)
            case from_registry.Refused(reason) if reason is not Reason.NODE_ID_IN_USE:
                self.fence("the registry refuses this process")
            case _:
                pass

    def _welcome(self, welcome: from_registry.NodeWelcome) -> None:
        incarnation = NodeIncarnation(self.node_id, welcome.node_rev)
        if self.incarnation is None:
            self.incarnation = incarnation
            self.book = GrantBook(incarnation)
            self.strict = frozenset(welcome.strict_tenants)
            self._allow(welcome.ttl_ms)
        elif incarnation != self.incarnation:
            self.fence("the registry gave this process another incarnation")
            return
        self._uplink.settled()
        self._in_session = True
        self._sessions += 1
        self._renewals.clear()
        self._good_until_ms = self._asked_ms + welcome.ttl_ms * 9 // 10
        self._released.clear()
        self._send_releases(list(self._releases))
        self._tick(self._sessions, welcome.ttl_ms, welcome.beat_ms, 0)

    def _allow(self, ttl_ms: int) -> None:
        self._standstill.allow(self.clock.now(), ttl_ms)

    def is_silent(self) -> bool:
        """Whether nothing may go out any more; asked before each step (P11)."""
        if self.alive and self._standstill.too_long(self.clock.now()):
            self.fence(f"stood still for {self._standstill.stood_ms} ms")
        return not self.alive

    def lease_over(self) -> bool:
        """Whether the lease could not be renewed: strict tenants have to wait (P3)."""
        return self.clock.now() > self._good_until_ms

    def _sign(self) -> None:
        if self._standstill.sign(self.clock.now()):
            self.after(SIGN_MS, self._sign)
        else:
            self.is_silent()

    def _tick(self, session: int, ttl_ms: int, beat_ms: int, ticks: int) -> None:
        if session != self._sessions or not self._in_session or self.is_silent():
            return
        self.tell(self.beat())
        if ticks % (ttl_ms // 5 // beat_ms) == 0:
            self._renewals[ticks] = self.clock.now()
            self.tell(lambda peer: to_registry.RenewLease(peer, ticks))
        self.after(beat_ms, lambda: self._tick(session, ttl_ms, beat_ms, ticks + 1))

    def _tell_log_head(self) -> None:
        """The largest fence in the log, if the log can be asked."""
        if not self.log.connected:
            return
        largest = Epoch(self.log_process.largest_fence())

        def answer() -> None:
            self.tell(lambda peer: to_registry.ReportLogHead(peer, largest))

        self.after(self.network.delay() * 2, answer)

    def _look_for_orphans(self) -> None:
        """Users with an open run and no manager here; the registry knows who has one elsewhere."""
        if self._in_session and self.log.connected:
            users = tuple(u for u in self.log_process.open_users() if u not in self.host.live)
            if users:
                self.tell(lambda peer: to_registry.AdoptUsers(peer, users))

    def _look_again(self) -> None:
        self._look_for_orphans()
        self.after(ORPHANS_MS, self._look_again)

    def beat(self) -> Say:
        managers, runs = len(self.host.live), self.host.open_runs
        reached = self.log.connected
        return lambda peer: to_registry.ReceiveBeat(peer, 0, managers, runs, reached)

    def confirm(self, user: UserKey, answer: Callable[[Placement | None], None]) -> None:
        """Ask whether the registry placed `user` here; None when it can't be asked."""
        self._requests += 1
        number = self._requests
        if not self.tell(lambda peer: to_registry.ConfirmPlacements(peer, number, (user,))):
            answer(None)
            return
        self._confirming[number] = answer
        self._confirmed_user[number] = user

        def late() -> None:
            if self._confirming.pop(number, None) is not None:
                answer(None)

        self.after(CONFIRM_MS, late)

    def release(self, release: to_registry.Release) -> None:
        """Give a placement back; kept until the registry has answered."""
        key = (release.user, release.epoch)
        self._releases[key] = release
        self._send_releases([key])

    def _send_releases(self, keys: list[tuple[UserKey, Epoch]]) -> None:
        if not keys:
            return
        self._requests += 1
        number = self._requests
        releases = tuple(self._releases[key] for key in keys)
        if self.tell(lambda peer: to_registry.ReleasePlacements(peer, number, releases)):
            self._released[number] = keys

    # ---- edges

    def accepted(self, end: End, hello: Any) -> None:
        kind, wanted, edge = hello
        if kind == "read":
            self._read(end, *edge)
        elif self.incarnation != wanted:
            end.send(("stale",))
            end.close()
        else:
            end.send(("welcome",))
            self.host.edge_opened(end)

    def _read(self, end: End, user: UserKey, after: int, until: int) -> None:
        """A page for a client that catches up: from the log, if this node reaches it."""
        if not self.log.connected:
            end.close()
            return

        def answer() -> None:
            if self.log_process.alive and self.log.connected:
                end.send(self.log_process.read(user, after, until))
            end.close()

        self.after(self.network.delay() * 2, answer)
