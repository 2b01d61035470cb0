"""A client in the simulation: what an SDK does, and what its user would notice.

It keeps its position, resumes behind it at whichever edge takes it, sends each message again
under the same id until it is accepted, and sometimes leaves for a while. Everything that it
is shown goes to the invariants.
"""

from collections.abc import Sequence
from typing import Any

import orjson

from edge.core.batch import EventBatch
from edge.core.resume import ResumePoint
from steward.model.keys import StreamId, UserKey
from steward.testing.invariants import Invariants
from steward.testing.simulated_edge import SimulatedEdge
from steward.testing.simulated_network import End, Network, Process
from steward.testing.world import World

SILENCE_MS = 60_000


class SimulatedClient(Process):
    """One connection at a time. It never dies: clients that die are no concern of the cluster."""

    def __init__(
        self,
        name: str,
        user: UserKey,
        world: World,
        network: Network,
        edges: Sequence[SimulatedEdge],
        invariants: Invariants,
    ) -> None:
        super().__init__(world, network, name)
        self.user = user
        self.position = 0
        self.stream: StreamId | None = None
        self.pending: dict[str, bytes] = {}
        self.accepted_ids: dict[str, str] = {}
        self.sent = 0
        self.ready = False
        self.wants = True
        self._edges = edges
        self._invariants = invariants
        self._end: End | None = None
        self._connecting = False

    def begin(self) -> None:
        self.connect()

    def accepted(self, end: End, hello: Any) -> None:
        raise NotImplementedError

    def connect(self) -> None:
        if not self._connecting and self._end is None and self.wants:
            self._connecting = True
            edge = self.world.random.choice(self._edges)
            point = ResumePoint(self.position, self.stream)
            hello = (self.user, self.name, point)
            self.network.connect(self, edge, hello, self._opened, self._failed)

    def leave(self) -> None:
        """Close the window, until `come_back`."""
        self.wants = False
        if self._end is not None:
            self._end.close()
            self._over()

    def come_back(self) -> None:
        self.wants = True
        self.connect()

    def message(self) -> None:
        """Write something. It is sent again until some manager has accepted it."""
        self.sent += 1
        id = f"{self.name}.{self.sent}"
        thread = self.world.random.choice(("main", "main", "side"))
        fields = {"type": "user_message", "id": id, "content": "hello", "thread_id": thread}
        self.pending[id] = orjson.dumps(fields)
        if self.ready and self._end is not None:
            self._end.send(self.pending[id])

    def cancel(self) -> None:
        """Change one's mind about what runs."""
        if self.ready and self._end is not None:
            self._end.send(b'{"type":"cancel","thread_id":"main"}')

    def _opened(self, end: End) -> None:
        self._connecting = False
        if not self.wants:
            end.close()
            return
        self._end = end
        end.on_message = self._message
        end.on_end = self._over

    def _failed(self) -> None:
        self._connecting = False
        self.after(self.world.between(100, 600), self.connect)

    def _over(self) -> None:
        self._end = None
        self.ready = False
        self.after(self.world.between(50, 400), self.connect)

    def _message(self, message: tuple[str, Any]) -> None:
        kind, body = message
        match kind:
            case "events":
                self._events(body)
            case "ready":
                self._ready(orjson.loads(body))
            case "accepted":
                fields = orjson.loads(body)
                self.pending.pop(fields["id"], None)
                run = self.accepted_ids.setdefault(fields["id"], fields["run_id"])
                text = "{} was accepted as {} and as {}"
                same = run == fields["run_id"]
                self._invariants.require("L1", same, text, fields["id"], run, fields["run_id"])
            case "error":
                ref = orjson.loads(body).get("ref", "")
                if ref in self.pending:
                    self.after(self.world.between(200, 800), lambda: self._again(ref))
            case "ping":
                if self._end is not None:
                    self._end.send(b"")
            case _:
                pass

    def _again(self, id: str) -> None:
        if self.ready and id in self.pending and self._end is not None:
            self._end.send(self.pending[id])

    def _ready(self, fields: dict[str, Any]) -> None:
        self.ready = True
        self.stream = StreamId(fields["stream_id"])
        if fields["resume"] == "reset":
            self.position = 0
        self._invariants.began(self.name, self.user, self.position, fields["sequence"])
        assert self._end is not None
        for payload in self.pending.values():
            self._end.send(payload)

    def _events(self, batch: EventBatch) -> None:
        self._invariants.shown(self.name, self.user, batch.first, batch.events)
        self.position = batch.last
