"""The node's session with the registry: hello, beats, renewals, grants, releases.

One stream, opened again with backoff for as long as the process lives, with the same
nonce, so that a registry which restarts finds the same incarnation. It ends for good when
the registry says that this incarnation is over, or when this process stood still for longer than
its lease: both are sticky, and the process must exit (`fenced`). While the registry is
away nothing else changes: the log alone decides whether a manager may write.
"""

import asyncio
import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_service import convert
from steward.errors import Reason, StewardError
from steward.model.keys import Epoch, NodeId, NodeIncarnation, NodeRev, UserKey
from steward.model.placement import Placement
from steward.rpc.factory import call_metadata, make_channel
from steward.rpc.outbox import Outbox, OutboxClosed, OutboxFull
from steward.rpc.roles import RoleCredentials
from steward.rpc.stream import PeerStream, keep
from steward.runtime.clock import boot_ms
from steward.v1 import registry_service_pb2 as pb
from steward.v1.registry_service_pb2_grpc import RegistryServiceStub

if TYPE_CHECKING:
    from steward.v1.registry_service_pb2_grpc import RegistryServiceAsyncStub

_log = logging.getLogger(__name__)

CONFIRM_S = 2.0
MOST_PER_MESSAGE = 512
MAX_RELEASES = 100_000


class NodeSession:
    """Implements the host's `RegistryPort`. Run `run()` as one task for the life of the process."""

    def __init__(
        self,
        address: str,
        credentials: RoleCredentials,
        hello: pb.NodeHello,
        *,
        joined: Callable[[NodeIncarnation], None],
        granted: Callable[[Iterable[Placement]], None],
        beat: Callable[[], pb.NodeBeat],
    ) -> None:
        self._address = address
        self._credentials = credentials
        self._hello = hello
        self._joined = joined
        self._granted = granted
        self._beat = beat
        # Where requests go while the session is open, and the box of the stream that is opening.
        self._outbox: Outbox[pb.HoldNodeSessionRequest] | None = None
        self._opening: Outbox[pb.HoldNodeSessionRequest] = Outbox()
        self._ticking: asyncio.Task[None] | None = None
        self._incarnation: NodeIncarnation | None = None
        self._beats = 0
        self._renewals = 0
        self._requests = 0
        self._confirming: dict[int, asyncio.Future[list[Placement]]] = {}
        self._releases: OrderedDict[tuple[UserKey, Epoch], str] = OrderedDict()
        self._released: dict[int, list[tuple[UserKey, Epoch]]] = {}
        self._last_tick_ms = boot_ms()
        self._flushed = asyncio.Event()
        self.fenced: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def connected(self) -> bool:
        return self._outbox is not None

    async def run(self) -> None:
        """Hold the session until cancelled or fenced."""
        async with make_channel(self._address) as channel:
            stub: RegistryServiceAsyncStub = RegistryServiceStub(channel)
            self._stream = PeerStream(
                open_call=lambda: stub.HoldNodeSession(metadata=call_metadata(self._credentials)),
                hello=pb.HoldNodeSessionRequest(hello=self._hello),
                pack=lambda requests: requests[0],
                most=1,
                on_welcome=self._on_welcome,
                on_message=self._on_message,
            )
            keeping = asyncio.ensure_future(
                keep(self._attempt, lambda: self.connected, self._on_down)
            )
            try:
                ends: set[asyncio.Future[Any]] = {self.fenced, keeping}
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            finally:
                keeping.cancel()
                await asyncio.gather(keeping, return_exceptions=True)

    async def confirm(self, user: UserKey) -> Placement | None:
        """Ask whether the registry placed `user` here. Raises StewardError if it can't be asked."""
        self._requests += 1
        number = self._requests
        future: asyncio.Future[list[Placement]] = asyncio.get_running_loop().create_future()
        self._confirming[number] = future
        request = pb.ConfirmPlacements(request_id=number, users=[convert.user_to_proto(user)])
        try:
            if not self._send(pb.HoldNodeSessionRequest(confirm=request)):
                raise StewardError(Reason.MANAGER_UNAVAILABLE, "the registry is out of reach")
            placements = await asyncio.wait_for(future, CONFIRM_S)
        except TimeoutError:
            raise StewardError(Reason.MANAGER_UNAVAILABLE, "the registry is silent") from None
        finally:
            self._confirming.pop(number, None)
        return next((p for p in placements if p.user == user), None)

    def release(self, user: UserKey, epoch: Epoch, cause: str) -> None:
        """Give a placement back; kept until the registry has answered. The oldest go when full."""
        self._releases[user, epoch] = cause
        if len(self._releases) > MAX_RELEASES:
            self._releases.popitem(last=False)
        self._send_releases([(user, epoch)])

    def report_refusal(self, kind: str, user: UserKey | None, epoch: Epoch, evidence: str) -> None:
        refusal = pb.ReportRefusal(kind=kind, epoch=epoch, evidence=evidence)
        if user is not None:
            refusal.user.CopyFrom(convert.user_to_proto(user))
        self._send(pb.HoldNodeSessionRequest(refusal=refusal))

    def announce_drain(self) -> None:
        self._send(pb.HoldNodeSessionRequest(drain=pb.AnnounceDrain()))

    async def flush(self, timeout_s: float) -> None:
        """Wait until every release was answered, or the time is over."""
        if self._releases and self.connected:
            self._flushed.clear()
            try:
                await asyncio.wait_for(self._flushed.wait(), timeout_s)
            except TimeoutError:
                _log.warning("placements not given back", extra={"count": len(self._releases)})

    async def _attempt(self) -> None:
        outbox = self._opening = Outbox()
        self._outbox = None
        try:
            await self._stream.hold(outbox)
        finally:
            if self._ticking is not None:
                self._ticking.cancel()
                await asyncio.gather(self._ticking, return_exceptions=True)
            for future in self._confirming.values():
                if not future.done():
                    error = StewardError(Reason.MANAGER_UNAVAILABLE, "the registry went away")
                    future.set_exception(error)

    def _on_down(self, error: StewardError) -> None:
        self._outbox = None
        _log.debug("registry session ended", extra={"why": str(error)})

    def _on_welcome(self, first: pb.HoldNodeSessionResponse) -> None:
        if first.WhichOneof("body") == "fenced":
            self._fence(first.fenced.cause)
            return
        welcome = first.welcome
        incarnation = NodeIncarnation(NodeId(self._hello.node_id), NodeRev(welcome.node_rev))
        if self._incarnation is None:
            self._incarnation = incarnation
            self._joined(incarnation)
        elif incarnation != self._incarnation:
            self._fence("the registry gave this process another incarnation")
            return
        self._last_tick_ms = boot_ms()
        self._outbox = self._opening
        # What the stream before did not answer is asked again, under new numbers.
        self._released.clear()
        self._send_releases(list(self._releases))
        self._ticking = asyncio.ensure_future(self._tick(welcome))

    def _on_message(self, response: pb.HoldNodeSessionResponse) -> None:
        match response.WhichOneof("body"):
            case "granted":
                granted = response.granted.placements
                self._granted([convert.placement_from_proto(p) for p in granted])
            case "confirmed":
                future = self._confirming.get(response.confirmed.request_id)
                if future is not None and not future.done():
                    confirmed = response.confirmed.placements
                    future.set_result([convert.placement_from_proto(p) for p in confirmed])
            case "released":
                for key in self._released.pop(response.released.request_id, ()):
                    self._releases.pop(key, None)
                if not self._releases:
                    self._flushed.set()
            case "fenced":
                self._fence(response.fenced.cause)
            case _:
                pass  # Beats and renewals: their arrival is the message.

    async def _tick(self, welcome: pb.NodeWelcome) -> None:
        """Beats and renewals. Notices that this process stood still for longer than its lease."""
        period_s = max(welcome.beat_ms, 20) / 1000
        renew_every = max(welcome.ttl_ms // 5 // max(welcome.beat_ms, 20), 1)
        ticks = 0
        while not self.fenced.done():
            now_ms = boot_ms()
            stood_ms, self._last_tick_ms = now_ms - self._last_tick_ms, now_ms
            if stood_ms > welcome.ttl_ms:
                self._fence(f"this process stood still for {stood_ms} ms, longer than its lease")
                return
            self._beats += 1
            beat = self._beat()
            beat.beat = self._beats
            self._send(pb.HoldNodeSessionRequest(beat=beat))
            if ticks % renew_every == 0:
                self._renewals += 1
                self._send(pb.HoldNodeSessionRequest(renew=pb.RenewLease(renewal=self._renewals)))
            ticks += 1
            await asyncio.sleep(period_s)

    def _send_releases(self, keys: list[tuple[UserKey, Epoch]]) -> None:
        for start in range(0, len(keys), MOST_PER_MESSAGE):
            part = keys[start : start + MOST_PER_MESSAGE]
            self._requests += 1
            request = pb.ReleasePlacements(
                request_id=self._requests,
                placements=[
                    pb.ReleasedPlacement(
                        user=convert.user_to_proto(user),
                        epoch=epoch,
                        cause=self._releases[user, epoch],
                    )
                    for user, epoch in part
                ],
            )
            if self._send(pb.HoldNodeSessionRequest(release=request)):
                self._released[self._requests] = part

    def _send(self, request: pb.HoldNodeSessionRequest) -> bool:
        if self._outbox is None:
            return False
        try:
            self._outbox.put(request)
        except (OutboxFull, OutboxClosed):
            return False
        return True

    def _fence(self, cause: str) -> None:
        if not self.fenced.done():
            self.fenced.set_result(cause)


def new_nonce() -> str:
    """Random, once per process: tells two processes under one node id apart."""
    return secrets.token_hex(16)


def boot_id() -> str:
    """Identifies the boot of this machine; empty where the kernel does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
