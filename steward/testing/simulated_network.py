"""Processes, streams between them, and what can happen to both: crashes, pauses, partitions.

A stream keeps its order, like TCP; two streams do not wait for each other. What is sent
into a blocked direction waits until it is open again, or is lost when the stream breaks
(keepalive, crash). Each end learns of the other's end in its own time, and a process that
is paused learns nothing until it goes on; then its timers may come before or after
what has arrived meanwhile.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

from steward.testing.world import Action, Clock, World

USUAL_DELAY_MS = 8
SLOW_DELAYS_MS = (60, 300, 1_500)
KEEPALIVE_MS = (10_000, 15_000)
CONNECT_TIMEOUT_MS = 2_000
FIRST_BACKOFF_MS = 50
MOST_BACKOFF_MS = 1_000


class Process:
    """Something that can crash, be paused and start again; nothing of one life reaches the next."""

    def __init__(self, world: World, network: "Network", name: str, rate: int = 1000) -> None:
        self.world = world
        self.network = network
        self.name = name
        self.clock = Clock(world, rate)
        self.alive = False
        self.life = 0
        # The machine is gone, not the process alone: nobody is told, and nobody is refused.
        self.silent = False
        self.paused_until = 0
        self._arrived: deque[Action] = deque()
        self._due: deque[Action] = deque()
        self.ends: dict[End, None] = {}

    @property
    def running(self) -> bool:
        return self.alive and self.world.now_ms >= self.paused_until and not self._arrived

    def accepted(self, end: "End", hello: Any) -> None:
        """Somebody has opened a stream; `end` is this side of it."""
        raise NotImplementedError

    def begin(self) -> None:
        """What a new life starts with."""
        raise NotImplementedError

    def start(self) -> None:
        """Begin a life; nothing if there is one."""
        if self.alive:
            return
        self.life += 1
        self.alive = True
        self.silent = False
        self.paused_until = 0
        self.world.note("{}: starts, life {}", self.name, self.life)
        self.begin()

    def crash(self, *, silent: bool = False) -> None:
        """SIGKILL, or (silent) the power of its machine: what is not on a disk is lost."""
        if not self.alive:
            return
        self.world.note("{}: {}", self.name, "machine is gone" if silent else "dies")
        self.alive = False
        self.silent = silent
        self._arrived.clear()
        self._due.clear()
        ends, self.ends = self.ends, {}
        for end in ends:
            end.cut(silent=silent)

    def pause(self, for_ms: int) -> None:
        """SIGSTOP, then SIGCONT: what reaches it waits, its own timers too."""
        if self.alive:
            self.world.note("{}: is stopped for {} ms", self.name, for_ms)
            self.paused_until = max(self.paused_until, self.world.now_ms + for_ms)
            life = self.life
            self.world.at(self.paused_until, lambda: self._resume(life))

    def wake(self) -> None:
        """SIGCONT before its time."""
        self.paused_until = self.world.now_ms
        self._resume(self.life)

    def arrive(self, action: Action) -> None:
        """Something from outside is here: now, or when this process goes on."""
        if self.world.now_ms < self.paused_until or self._arrived:
            self._arrived.append(action)
        else:
            action()

    def after(self, delay_ms: int, action: Action) -> None:
        """A timer on this process's clock; it ends with this life."""
        life = self.life

        def due() -> None:
            if life == self.life and self.alive:
                if self.world.now_ms < self.paused_until:
                    self._due.append(action)
                else:
                    action()

        self.world.after(self.clock.world_ms(delay_ms), due)

    def _resume(self, life: int) -> None:
        if life != self.life or not self.alive or self.world.now_ms < self.paused_until:
            return
        self.world.note("{}: goes on", self.name)
        queues = [self._arrived, self._due]
        if self.world.chance(0.5):
            queues.reverse()
        for queue in queues:
            while queue and life == self.life and self.alive:
                self.world.steps += 1
                queue.popleft()()


class Network:
    """Who reaches whom. Names are those of processes; a direction is a pair of them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._blocked: dict[tuple[str, str], int] = {}
        self._healed: dict[tuple[str, str], list[Action]] = {}
        self.streams: dict[Stream, None] = {}
        # How likely one direction of a new stream is a slow one.
        self.slow = 0.0

    def is_open(self, source: str, target: str) -> bool:
        return self._blocked.get((source, target), 0) <= self._world.now_ms

    def block(self, source: str, target: str, for_ms: int) -> None:
        """Nothing of `source` reaches `target` for a while: one way only."""
        way = (source, target)
        until = max(self._blocked.get(way, 0), self._world.now_ms + for_ms)
        self._world.note("network: {} no longer reaches {} for {} ms", source, target, for_ms)
        self._blocked[way] = until
        self._world.at(until, lambda: self._heal(way))
        for stream in list(self.streams):
            if stream.joins(source, target):
                stream.break_if_blocked(way)

    def when_open(self, source: str, target: str, action: Action) -> None:
        """Do `action` when the direction is open again."""
        self._healed.setdefault((source, target), []).append(action)

    def _heal(self, way: tuple[str, str]) -> None:
        if self.is_open(*way):
            for action in self._healed.pop(way, ()):
                action()

    def heal(self) -> None:
        """All partitions are over, and nothing is slow any more."""
        self.slow = 0.0
        for stream in self.streams:
            stream.near.most_ms = stream.far.most_ms = USUAL_DELAY_MS
        for way, until in self._blocked.items():
            if until > self._world.now_ms:
                self._blocked[way] = self._world.now_ms
                self._heal(way)

    def delay(self) -> int:
        return self._world.between(0, USUAL_DELAY_MS)

    def slowness(self) -> int:
        """How late the messages of one direction are at most."""
        if self._world.chance(self.slow):
            return self._world.random.choice(SLOW_DELAYS_MS)
        return USUAL_DELAY_MS

    def connect(
        self,
        source: Process,
        target: Process,
        hello: Any,
        opened: "Callable[[End], None]",
        failed: Action,
    ) -> None:
        """Open a stream: `opened` with this side's end, or `failed`, after a while."""
        life, world = source.life, self._world

        def fail() -> None:
            if life == source.life and source.alive:
                source.arrive(failed)

        def arrive() -> None:
            if life != source.life or not source.alive:
                return
            reachable = self.is_open(source.name, target.name)
            if not reachable or not self.is_open(target.name, source.name) or target.silent:
                world.after(CONNECT_TIMEOUT_MS, fail)
            elif not target.alive:
                world.after(self.delay(), fail)
            else:
                stream = Stream(self, source, target)
                target.arrive(lambda: stream.far.accept(hello))
                source.arrive(lambda: opened(stream.near) if stream.near.open else failed())

        world.after(self.delay(), arrive)


class End:
    """One side of a stream. `on_message` and `on_end` are set by whoever holds it."""

    __slots__ = (
        "_free_ms",
        "_held",
        "life",
        "most_ms",
        "on_end",
        "on_message",
        "open",
        "process",
        "stream",
    )

    def __init__(self, stream: "Stream", process: Process) -> None:
        self.stream = stream
        self.process = process
        self.life = process.life
        self.open = True
        self.on_message: Callable[[Any], None] = lambda _: None
        self.on_end: Action = lambda: None
        self._free_ms = 0
        self._held: deque[Action] = deque()
        self.most_ms = stream.network.slowness()
        process.ends[self] = None

    @property
    def peer(self) -> "End":
        stream = self.stream
        return stream.far if self is stream.near else stream.near

    def accept(self, hello: Any) -> None:
        if self.open:
            self.process.accepted(self, hello)

    def send(self, message: Any) -> None:
        """Give a message to the stream; it arrives after those before it, or never."""
        if self.open:
            peer = self.peer
            self._way(lambda: peer.receive(message))

    def close(self) -> None:
        """End it from this side; the other learns of it behind what was sent."""
        if self.open:
            self._forget()
            peer = self.peer
            self._way(peer.ended)

    def cut(self, *, silent: bool) -> None:
        """This side's process is dead. Its kernel says so, unless the machine is gone."""
        self.open = False
        self.stream.network.streams.pop(self.stream, None)
        peer = self.peer
        if silent:
            self.stream.world.after(self.stream.world.between(*KEEPALIVE_MS), peer.ended)
        else:
            self._way(peer.ended)

    def receive(self, message: Any) -> None:
        if self.open:
            self.process.arrive(lambda: self.on_message(message) if self.open else None)

    def ended(self) -> None:
        if self.open:
            self.process.arrive(self._end)

    def _end(self) -> None:
        if self.open:
            self._forget()
            self.on_end()

    def _forget(self) -> None:
        self.open = False
        self.process.ends.pop(self, None)
        self.stream.network.streams.pop(self.stream, None)

    def _way(self, arrive: Action) -> None:
        """The direction to the peer: late by its luck, in order, held while it is blocked."""
        stream = self.stream
        network, world = stream.network, stream.world
        if self._held or not network.is_open(self.process.name, self.peer.process.name):
            if not self._held:
                network.when_open(self.process.name, self.peer.process.name, self._release)
            self._held.append(arrive)
            return
        self._free_ms = max(self._free_ms, world.now_ms + world.between(0, self.most_ms))
        world.at(self._free_ms, arrive)

    def _release(self) -> None:
        held, self._held = self._held, deque()
        for arrive in held:
            self._way(arrive)


class Stream:
    """Two ends, and a direction from each to the other."""

    __slots__ = ("far", "near", "network", "world")

    def __init__(self, network: Network, source: Process, target: Process) -> None:
        self.network = network
        self.world = source.world
        self.near = End(self, source)
        self.far = End(self, target)
        network.streams[self] = None

    def joins(self, one: str, other: str) -> bool:
        names = {self.near.process.name, self.far.process.name}
        return one in names and other in names

    def break_if_blocked(self, way: tuple[str, str]) -> None:
        """A direction was just blocked: keepalive ends the stream if that lasts."""

        def look() -> None:
            if not self.network.is_open(*way):
                # Who notices first tells nobody; the other's keepalive does, or a reset.
                first, second = self.world.random.sample((self.near, self.far), 2)
                first.ended()
                self.world.after(self.world.between(0, 5_000), second.ended)

        self.world.after(self.world.between(*KEEPALIVE_MS), look)

    def reset(self) -> None:
        """The connection breaks; each end learns of it in its own time."""
        for end in (self.near, self.far):
            self.world.after(self.world.between(0, 300), end.ended)


class Uplink:
    """A stream to a peer that is opened again whenever it ends, with backoff, in one life."""

    def __init__(
        self,
        owner: Process,
        choose: Callable[[], tuple[Process, Any]],
        *,
        up: Action,
        message: Callable[[Any], None],
        down: Action = lambda: None,
    ) -> None:
        """`choose` names the peer and what to say to it first, at every attempt."""
        self._owner = owner
        self._choose = choose
        self._up = up
        self._message = message
        self._down = down
        self._backoff_ms = FIRST_BACKOFF_MS
        self._end: End | None = None
        self._closed = False
        self._open()

    @property
    def connected(self) -> bool:
        return self._end is not None

    def send(self, message: Any) -> bool:
        """Whether there was a stream to give it to."""
        if self._end is None:
            return False
        self._end.send(message)
        return True

    def settled(self) -> None:
        """The peer has welcomed us: the next attempt after an end is a quick one."""
        self._backoff_ms = FIRST_BACKOFF_MS

    def drop(self) -> None:
        """Give this stream up and open another."""
        if self._end is not None:
            self._end.close()
            self._ended()

    def close(self) -> None:
        """For good."""
        self._closed = True
        if self._end is not None:
            self._end.close()
            self._end = None

    def _open(self) -> None:
        if not self._closed:
            peer, hello = self._choose()
            self._owner.network.connect(self._owner, peer, hello, self._opened, self._failed)

    def _opened(self, end: End) -> None:
        if self._closed:
            end.close()
            return
        self._end = end
        end.on_message = self._message
        end.on_end = self._ended
        self._up()

    def _ended(self) -> None:
        self._end = None
        self._failed()
        self._down()

    def _failed(self) -> None:
        world = self._owner.world
        wait_ms = world.between(self._backoff_ms // 2, self._backoff_ms)
        self._backoff_ms = min(self._backoff_ms * 2, MOST_BACKOFF_MS)
        self._owner.after(wait_ms, self._open)
