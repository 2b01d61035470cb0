"""Whatever a server and a network do, the session keeps its promises to the application.

The server here is a model: it holds one stream, answers each dial by the resume table, and
loses, repeats and reorders what it likes. The properties are checked on what was delivered.
"""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from steward.client.commands import (
    Close,
    Closed,
    Command,
    Deliver,
    Effect,
    Ended,
    MessageAccepted,
    MessageFailed,
    Open,
    Opened,
    Received,
    Refused,
    Send,
    SessionState,
    Shut,
    Start,
    Tick,
    Write,
)
from steward.client.core import BACKOFF_MOST_MS, DIAL_MS, ClientSession

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = st.dictionaries(
    st.sampled_from(
        [
            "stream_id", "sequence", "epoch", "resume", "id", "run_id", "duplicate", "limits",
            "queue_position", "reason", "ref", "retry_after_ms", "reconnect_after_ms",
            "token_expires_at", "message", "data", "from_sequence",
        ]
    ),
    JSON,
)  # fmt: skip
KINDS = st.sampled_from(
    [
        "ready", "accepted", "error", "heartbeat", "going_away", "authenticated", "pong",
        "agent_text", "novelty",
    ]
)  # fmt: skip
GARBAGE = st.one_of(JSON, st.builds(lambda kind, fields: {**fields, "type": kind}, KINDS, FIELDS))


class World:
    """A server, a network and an application around one session."""

    def __init__(self) -> None:
        self.session = ClientSession()
        self.now = 0
        self.epoch = 1
        self.stream = 0  # Last sequence stored.
        self.sending = 0  # Last sequence sent on the connection; 0: none is attached.
        self.dial: Open | None = None
        self.delivered: list[tuple[int, int]] = []
        self.missed_before = 0  # `new` starts here.
        self.stored: dict[str, int] = {}
        self.accepted: dict[str, int] = {}
        self.writes: list[str] = []

    def give(self, command: Command) -> None:
        for effect in self.session.handle(self.now, command):
            self.apply(effect)

    def apply(self, effect: Effect) -> None:
        match effect:
            case Open():
                assert self.dial is None, "two sockets at once"
                self.dial, self.sending = effect, 0
            case Shut():
                self.dial, self.sending = None, 0
            case Opened() if effect.resume == "new":
                self.missed_before = effect.sequence
            case Deliver():
                first = effect.frame.get("from_sequence", effect.sequence)
                for sequence in range(first, effect.sequence + 1):
                    self.delivered.append((sequence, effect.frame["epoch"]))
            case Write() if effect.frame["type"] == "user_message":
                self.writes.append(effect.frame["id"])
                if effect.frame["id"] not in self.stored:
                    self.stream += 1
                    self.stored[effect.frame["id"]] = self.stream
            case MessageAccepted():
                assert effect.id not in self.accepted, "answered twice"
                self.accepted[effect.id] = effect.sequence

    def event(self, sequence: int, epoch: int | None = None) -> dict[str, Any]:
        written = 1 if epoch is None else epoch
        return {"type": "custom", "stream_id": "s", "sequence": sequence, "epoch": written}

    def merged(self, first: int, last: int) -> dict[str, Any]:
        return self.event(last) | {"type": "agent_text", "from_sequence": first}

    def attach(self) -> None:
        """Answer the dial as the resume table says."""
        if self.dial is None or self.sending:
            return
        after = self.dial.after
        self.sending = (self.stream if after is None else after) + 1
        resume = "new" if after is None else "resumed"
        frame = {"type": "ready", "stream_id": "s", "sequence": self.stream, "resume": resume}
        self.give(Received(frame))

    def send_next(self) -> None:
        if self.sending and self.sending <= self.stream:
            self.sending += 1
            self.give(Received(self.event(self.sending - 1)))

    def send_merged(self, count: int, before: int = 0) -> None:
        """The next ones as one event; `before`: wrongly, it stands for some that were sent too."""
        if self.sending:
            first = max(1, self.sending - before)
            self.sending += count
            self.stream = max(self.stream, self.sending - 1)
            self.give(Received(self.merged(first, self.sending - 1)))

    def to_deadline(self, random: float) -> None:
        deadline = self.session.next_deadline()
        if deadline is not None:
            self.now = max(self.now, deadline)
            self.give(Tick(random))

    def check(self) -> None:
        numbers = [sequence for sequence, _ in self.delivered]
        first = self.missed_before + 1
        assert numbers == list(range(first, first + len(numbers)))
        deadline = self.session.next_deadline()
        closed = self.session.state is SessionState.CLOSED
        assert (deadline is None) == closed
        if self.dial is None and not closed:
            assert deadline is not None and deadline - self.now <= BACKOFF_MOST_MS


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.integers(1, 5)),
        st.tuples(st.just("next"), st.integers(1, 5)),
        st.tuples(st.just("merged"), st.integers(1, 5)),
        st.tuples(st.just("overlap"), st.integers(1, 3)),
        st.tuples(st.just("skip"), st.integers(1, 3)),
        st.tuples(st.just("again"), st.integers(0, 40)),
        st.tuples(st.just("attach"), st.just(0)),
        st.tuples(st.just("cut"), st.sampled_from([1000, 1001, 1006, 4001, 4004, 4008])),
        st.tuples(st.just("refuse"), st.sampled_from([0, 429, 500, 503])),
        st.tuples(st.just("deadline"), st.just(0)),
        st.tuples(st.just("wait"), st.integers(0, 20_000)),
        st.tuples(st.just("send"), st.integers(0, 5)),
        st.tuples(st.just("answer"), st.integers(0, 5)),
        st.tuples(st.just("heartbeat"), st.just(0)),
    ),
    max_size=80,
)


def play(world: World, step: str, n: int) -> None:
    match step:
        case "publish":
            world.stream += n
        case "next":
            for _ in range(n):
                world.send_next()
        case "merged":
            world.send_merged(n)
        case "overlap":
            world.send_merged(n)
            world.send_merged(2, before=n)
        case "skip" if world.sending:
            world.sending += n
        case "again" if world.sending and 0 < n <= world.stream:
            world.give(Received(world.event(n)))
        case "attach":
            world.attach()
        case "cut" if world.dial is not None:
            world.dial, world.sending = None, 0
            world.give(Closed(n, random=0.5))
        case "refuse" if world.dial is not None and not world.sending:
            world.dial = None
            world.give(Refused(n, random=0.5))
        case "deadline":
            world.to_deadline(0.5)
        case "wait":
            world.now += n
            world.give(Tick(0.5))
        case "send":
            message_id = f"m{n}"
            if message_id not in world.accepted:
                frame = {"type": "user_message", "id": message_id, "content": "x"}
                world.give(Send(frame))
        case "answer" if world.sending and f"m{n}" in world.stored:
            sequence = world.stored[f"m{n}"]
            frame = {"type": "accepted", "id": f"m{n}", "run_id": "r", "sequence": sequence}
            world.give(Received(frame))
        case "heartbeat" if world.sending:
            world.give(Received({"type": "heartbeat", "sequence": world.stream}))


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_events_are_delivered_once_and_in_order_whatever_happens(
    steps: list[tuple[str, int]],
) -> None:
    world = World()
    world.give(Start())
    for step, n in steps:
        play(world, step, n)
        world.check()
    # When the faults stop, everything arrives, and every message is answered.
    for _ in range(4):
        world.to_deadline(0.5) if world.dial is None else None
        world.attach()
        while world.sending and world.sending <= world.stream:
            world.send_next()
        if world.sending:
            world.give(Received({"type": "heartbeat", "sequence": world.stream}))
    for message_id in world.session.pending:
        play(world, "answer", int(message_id[1:]))
    world.check()
    assert world.session.state is SessionState.OPEN
    assert not world.session.pending
    last = world.delivered[-1][0] if world.delivered else world.missed_before
    assert last == world.stream


@settings(max_examples=300, deadline=None)
@given(st.lists(GARBAGE, max_size=12))
def test_no_frame_breaks_the_session(frames: list[Any]) -> None:
    session = ClientSession()
    now = 0
    effects: list[Effect] = list(session.handle(now, Start()))
    for frame in frames:
        effects += session.handle(now, Received(frame))
        deadline = session.next_deadline()
        assert deadline is not None
        if session.state is not SessionState.OPEN:
            now = max(now, min(deadline, now + DIAL_MS))
            effects += session.handle(now, Tick())
    numbers = [e.sequence for e in effects if isinstance(e, Deliver | Opened)]
    assert all(isinstance(n, int) and n >= 0 for n in numbers)


@settings(max_examples=100, deadline=None)
@given(STEPS)
def test_close_answers_every_message_and_ends_once(steps: list[tuple[str, int]]) -> None:
    world = World()
    world.give(Start())
    for step, n in steps:
        play(world, step, n)
    pending = world.session.pending
    effects = world.session.handle(world.now, Close())
    assert [e.id for e in effects if isinstance(e, MessageFailed)] == list(pending)
    assert isinstance(effects[-1], Ended) and effects[-1].reason is None
    assert any(isinstance(e, Shut) for e in effects) == (world.dial is not None)
    assert world.session.handle(world.now, Close()) == []
    assert world.session.next_deadline() is None


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 30))
def test_backoff_stays_between_zero_and_its_ceiling(random: float, failures: int) -> None:
    session = ClientSession()
    session.handle(0, Start())
    now = 0
    for number in range(failures):
        session.handle(now, Refused(0, random=random))
        deadline = session.next_deadline()
        assert deadline is not None
        assert 0 <= deadline - now <= min(BACKOFF_MOST_MS, 250 * 2**number)
        now = deadline
        session.handle(now, Tick())
