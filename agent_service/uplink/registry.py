"""The node's session with the registry: hello, beats, renewals, grants, moves, releases.

One stream, opened again with backoff for as long as the process lives, with the same nonce, so
that a registry which restarts finds the same incarnation. It ends for good when the registry
says that this incarnation is over; that is sticky, and the process must exit (`fenced`).

Guarantees: releases, and what is to be known of the log's fences and of the drain, are said
again on each new stream until they were heard. A stream on which the registry says nothing for two
seconds, though it beats, is opened again on a new connection. When renewals stay without an
answer the lease becomes uncertain (`agent_service.core.lease`), also while no stream is up.
Nothing else changes while the registry is away: the log alone decides whether a manager may write.
"""

import asyncio
import itertools
import logging
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from agent_service import convert
from agent_service.core.lease import LeaseChange, NodeLease
from agent_service.uplink.releases import MOST_PER_MESSAGE, OwnedUser, Release, Releases
from steward.errors import Reason, StewardError
from steward.model.keys import Epoch, NodeId, NodeIncarnation, NodeRev, UserKey
from steward.model.placement import Placement
from steward.rpc.factory import call_metadata, make_channel
from steward.rpc.outbox import Outbox, OutboxClosed, OutboxFull
from steward.rpc.roles import RoleCredentials
from steward.rpc.stream import PeerStream, keep
from steward.runtime.clock import boot_ms
from steward.telemetry.logs import fields
from steward.v1 import registry_service_pb2 as pb
from steward.v1.registry_service_pb2_grpc import RegistryServiceStub

_log = logging.getLogger(__name__)

CONFIRM_S = 2.0
BEAT_MS = 250
MOST_QUIET_BEATS = 8

Request = pb.HoldNodeSessionRequest


class NodeSession:
    """Implements the host's `RegistryPort`. Run `run()` as one task for the life of the process."""

    def __init__(
        self,
        address: str,
        credentials: RoleCredentials,
        hello: pb.NodeHello,
        *,
        joined: Callable[[NodeIncarnation], None],
        granted: Callable[[Sequence[Placement], bool], None],
        hand_off: Callable[[Sequence[OwnedUser], str], None],
        evict: Callable[[Sequence[OwnedUser]], None],
        members: Callable[[Sequence[NodeId]], None],
        asked_log_head: Callable[[], None],
        lease_uncertain: Callable[[frozenset[str]], None],
        lease_certain: Callable[[], None],
        beat: Callable[[], pb.NodeBeat],
        census: Callable[[pb.HoldNodeSessionResponse], None] | None = None,
    ) -> None:
        """The callbacks do not block.

        `granted` gets whether to make the managers at once; `hand_off` the cause;
        `lease_uncertain` the tenants whose managers must end; both of the lease come in turns;
        `census` the questions of one.
        """
        self._address = address
        self._credentials = credentials
        self._hello = hello
        self._joined = joined
        self._granted = granted
        self._hand_off = hand_off
        self._evict = evict
        self._members = members
        self._asked_log_head = asked_log_head
        self._lease_uncertain = lease_uncertain
        self._lease_certain = lease_certain
        self._beat = beat
        self._census = census
        # Where requests go while the session is open, and the box of the stream that is opening.
        self._outbox: Outbox[Request] | None = None
        self._opening: Outbox[Request] = Outbox()
        self._stream: PeerStream[Request, Request, pb.HoldNodeSessionResponse] | None = None
        self._hello_ms = 0
        self._away = "it has not answered yet"
        self._incarnation: NodeIncarnation | None = None
        self._strict_tenants: frozenset[str] = frozenset()
        self._lease = NodeLease()
        self._beat_ms = BEAT_MS
        self._renew_at_ms = 0
        self._quiet_beats = 0
        self._beats = itertools.count(1)
        self._renewals = itertools.count(1)
        self._requests = itertools.count(1)
        self._confirming: dict[int, asyncio.Future[list[Placement]]] = {}
        self._releases = Releases()
        self._flushed = asyncio.Event()
        self._largest_fence = Epoch(0)
        self._draining = False
        self.lease_ms = 0
        """The TTL that the registry gave; 0 before the first welcome."""
        self.fenced: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def connected(self) -> bool:
        return self._outbox is not None

    @property
    def node_rev(self) -> int:
        """That of this incarnation; 0 before the first welcome."""
        return self._incarnation.node_rev if self._incarnation is not None else 0

    @property
    def lease_is_certain(self) -> bool:
        return self._lease.certain

    def unready(self) -> str | None:
        """Why this node has never joined; None once it has."""
        if self._incarnation is not None:
            return None
        return f"not joined to the registry at {self._address}: {self._away}"

    async def run(self) -> None:
        """Hold the session until cancelled or fenced."""
        keeping = asyncio.ensure_future(keep(self._attempt, lambda: self.connected, self._on_down))
        ticking = asyncio.ensure_future(self._tick())
        ends: set[asyncio.Future[Any]] = {self.fenced, keeping, ticking}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not self.fenced.done():
                (ticking if ticking.done() else keeping).result()
        finally:
            keeping.cancel()
            ticking.cancel()
            await asyncio.gather(keeping, ticking, return_exceptions=True)

    # What the node says

    async def confirm(self, user: UserKey) -> Placement | None:
        """Ask whether the registry placed `user` here. Raises StewardError if it can't be asked."""
        number = next(self._requests)
        future: asyncio.Future[list[Placement]] = asyncio.get_running_loop().create_future()
        self._confirming[number] = future
        request = pb.ConfirmPlacements(request_id=number, users=[convert.user_to_proto(user)])
        try:
            if not self._send(Request(confirm=request)):
                raise StewardError(Reason.MANAGER_UNAVAILABLE, "the registry is out of reach")
            placements = await asyncio.wait_for(future, CONFIRM_S)
        except TimeoutError:
            raise StewardError(Reason.MANAGER_UNAVAILABLE, "the registry is silent") from None
        finally:
            self._confirming.pop(number, None)
        return next((p for p in placements if p.user == user), None)

    def release(
        self,
        user: UserKey,
        epoch: Epoch,
        cause: str,
        handoff: bool = False,
        activate: bool = False,
    ) -> None:
        """Give a placement back; kept until answered. Only the first word about one counts."""
        release = Release(user, epoch, cause, handoff, activate)
        if self._releases.add(release):
            self._send_releases([release])

    def adopt(self, users: Sequence[UserKey]) -> bool:
        """Name users who have an open run and, as far as is known here, no manager.

        Whether it was sent; nobody answers, and what got lost is named again at the next scan.
        """
        for start in range(0, len(users), MOST_PER_MESSAGE):
            part = [convert.user_to_proto(user) for user in users[start : start + MOST_PER_MESSAGE]]
            if not self._send(Request(adopt=pb.AdoptUsers(users=part))):
                return False
        return True

    def report_log_head(self, fence: Epoch) -> None:
        """The log has this fence: asked for, or met above a grant of this node.

        The largest is said again on each new stream.
        """
        self._largest_fence = max(self._largest_fence, fence)
        self._send_log_head(fence)

    def answer_census(self, answer: Request) -> None:
        """Send an answer of the census; without a session it is lost, and asked for again."""
        self._send(answer)

    def announce_drain(self) -> None:
        """This node is going to stop: place nobody here any more. Said again on each new stream."""
        self._draining = True
        self._send(Request(drain=pb.AnnounceDrain()))

    async def flush(self, timeout_s: float) -> None:
        """Wait until every release was answered, or the time is over."""
        if self._releases and self.connected:
            self._flushed.clear()
            try:
                await asyncio.wait_for(self._flushed.wait(), timeout_s)
            except TimeoutError:
                _log.warning("placements not given back", extra=fields(count=len(self._releases)))

    # The stream

    async def _attempt(self) -> None:
        """One stream to its end, on a connection of its own: a dead one must not be met again."""
        outbox = self._opening = Outbox()
        async with make_channel(self._address) as channel:
            # The stub's types know generators only.
            stub: Any = RegistryServiceStub(channel)
            self._stream = PeerStream(
                open_call=lambda: stub.HoldNodeSession(metadata=call_metadata(self._credentials)),
                hello=Request(hello=self._hello),
                pack=lambda requests: requests[0],
                most=1,
                on_welcome=self._on_welcome,
                on_message=self._on_message,
            )
            self._hello_ms = boot_ms()
            try:
                await self._stream.hold(outbox)
            finally:
                self._stream = None
                for future in self._confirming.values():
                    if not future.done():
                        error = StewardError(Reason.MANAGER_UNAVAILABLE, "the registry went away")
                        future.set_exception(error)

    def _on_down(self, error: StewardError) -> None:
        was_up, self._outbox = self._outbox is not None, None
        if was_up or error.message != self._away:
            _log.warning("no session with the registry", extra=fields(why=error.message))
        self._away = error.message

    def _on_welcome(self, first: pb.HoldNodeSessionResponse) -> None:
        if first.WhichOneof("body") == "fenced":
            self._fence(first.fenced.cause)
            return
        welcome = first.welcome
        incarnation = NodeIncarnation(NodeId(self._hello.node_id), NodeRev(welcome.node_rev))
        if self._incarnation is not None and incarnation != self._incarnation:
            self._fence("the registry gave this process another incarnation")
            return
        self.lease_ms = welcome.ttl_ms
        self._beat_ms = max(welcome.beat_ms, 20)
        self._strict_tenants = frozenset(welcome.strict_tenants)
        self._lease.welcomed(self._hello_ms, welcome.ttl_ms)
        if self._incarnation is None:
            self._incarnation = incarnation
            self._joined(incarnation)
        self._outbox = self._opening
        self._quiet_beats = 0
        self._renew_at_ms = boot_ms() + welcome.ttl_ms // 5
        self._look_at_lease()
        if self._draining:
            self._send(Request(drain=pb.AnnounceDrain()))
        if self._largest_fence:
            self._send_log_head(self._largest_fence)
        for part in self._releases.again():
            self._send_releases(part)
        self._send_beat()

    def _on_message(self, response: pb.HoldNodeSessionResponse) -> None:
        self._quiet_beats = 0
        match response.WhichOneof("body"):
            case "granted":
                granted = response.granted
                placements = [convert.placement_from_proto(p) for p in granted.placements]
                self._granted(placements, granted.activate)
            case "renewed":
                self._lease.renewed(response.renewed.renewal)
                self._look_at_lease()
            case "confirmed":
                future = self._confirming.get(response.confirmed.request_id)
                if future is not None and not future.done():
                    confirmed = response.confirmed.placements
                    future.set_result([convert.placement_from_proto(p) for p in confirmed])
            case "released":
                self._releases.answered(response.released.request_id)
                if not self._releases:
                    self._flushed.set()
            case "hand_off":
                self._hand_off(_owned_from(response.hand_off.users), response.hand_off.cause)
            case "evict":
                self._evict(_owned_from(response.evict.users))
            case "members":
                self._members([NodeId(node_id) for node_id in response.members.node_ids])
            case "ask_log_head":
                self._asked_log_head()
            case "ask_holdings" | "ask_fences" if self._census is not None:
                self._census(response)
            case "fenced":
                self._fence(response.fenced.cause)
            case _:
                pass  # A beat: its arrival is the message.

    # Time

    async def _tick(self) -> None:
        """Beats and renewals while a stream is up; the lease always."""
        while True:
            now_ms = boot_ms()
            self._look_at_lease()
            if self.connected:
                self._send_beat()
                if now_ms >= self._renew_at_ms:
                    self._renew_at_ms = now_ms + self.lease_ms // 5
                    renewal = next(self._renewals)
                    self._lease.renewing(renewal, now_ms)
                    self._send(Request(renew=pb.RenewLease(renewal=renewal)))
                # Turns are counted, not time: own lateness is not the registry's silence.
                self._quiet_beats += 1
                if self._quiet_beats > MOST_QUIET_BEATS and self._stream is not None:
                    self._stream.give_up("the registry is silent")
            wait_ms = self._beat_ms
            if self._lease.certain:
                wait_ms = min(wait_ms, max(self._lease.until_ms - now_ms, 1))
            await asyncio.sleep(wait_ms / 1000)

    def _look_at_lease(self) -> None:
        match self._lease.look(boot_ms()):
            case LeaseChange.UNCERTAIN:
                _log.warning("the lease is uncertain", extra=fields(why=self._away))
                self._lease_uncertain(self._strict_tenants)
            case LeaseChange.CERTAIN:
                self._lease_certain()

    def _send_beat(self) -> None:
        beat = self._beat()
        beat.beat = next(self._beats)
        self._send(Request(beat=beat))

    def _send_log_head(self, fence: Epoch) -> None:
        self._send(Request(log_head=pb.ReportLogHead(largest_fence=fence)))

    def _send_releases(self, part: Sequence[Release]) -> None:
        number = next(self._requests)
        request = pb.ReleasePlacements(
            request_id=number,
            placements=[
                pb.ReleasedPlacement(
                    user=convert.user_to_proto(release.user),
                    epoch=release.epoch,
                    cause=release.cause,
                    handoff=release.handoff,
                    activate=release.activate,
                )
                for release in part
            ],
        )
        if self._send(Request(release=request)):
            self._releases.asked(number, part)

    def _send(self, request: Request) -> bool:
        if self._outbox is None or self.fenced.done():
            return False
        try:
            self._outbox.put(request)
        except OutboxClosed:
            return False
        except OutboxFull:
            if self._stream is not None:
                self._stream.give_up("the registry does not read")
            return False
        return True

    def _fence(self, cause: str) -> None:
        if not self.fenced.done():
            self.fenced.set_result(cause)


def _owned_from(users: Iterable[pb.OwnedUser]) -> list[OwnedUser]:
    return [(convert.user_from_proto(owned.user), Epoch(owned.epoch)) for owned in users]


def new_nonce() -> str:
    """Random, once per process: tells two processes under one node id apart."""
    return secrets.token_hex(16)


def boot_id() -> str:
    """Identifies the boot of this machine; empty where the kernel does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
