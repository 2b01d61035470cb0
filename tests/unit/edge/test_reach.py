"""`Reach`: a stream that carries nothing is a dead one, and an edge that slept blames nobody."""

from itertools import count

from edge.core.reach import (
    DEAD_STREAM_MS,
    GIVEN_UP_MS,
    PROBE_MS,
    SILENT_MS,
    CloseStream,
    Effect,
    GiveUp,
    Reach,
    SendProbe,
    Suspect,
)


class Node:
    """A `Reach` with its clock and its numbers."""

    def __init__(self) -> None:
        self.reach = Reach(0)
        self.now = 0
        self._numbers = count(1)

    def open(self) -> int:
        (probe,) = self.reach.opened(next(self._numbers))
        assert isinstance(probe, SendProbe)
        return probe.number

    def tick(self, step_ms: int = PROBE_MS) -> list[Effect]:
        self.now += step_ms
        return self.reach.tick(self.now, next(self._numbers))

    def until_given_up(self) -> list[Effect]:
        for _ in range(GIVEN_UP_MS // PROBE_MS + 2):
            effects = self.tick()
            if GiveUp() in effects:
                return effects
        raise AssertionError("it was never given up")


def proven() -> Node:
    node = Node()
    node.reach.echoed(node.open())
    assert node.reach.proven
    return node


def test_an_open_stream_proves_nothing_until_its_probe_comes_back() -> None:
    node = Node()
    number = node.open()
    assert not node.reach.proven
    node.reach.heard()
    node.reach.echoed(number + 1)
    assert not node.reach.proven
    node.reach.echoed(number)
    assert node.reach.proven


def test_a_quiet_stream_is_asked_and_a_busy_one_is_not() -> None:
    node = proven()
    assert node.tick() == []  # its echo has just come in
    (probe,) = node.tick()
    assert isinstance(probe, SendProbe)
    node.reach.echoed(probe.number)
    for _ in range(20):
        node.reach.heard()
        assert node.tick() == []
    assert node.reach.proven and node.reach.silent_ms == 0


def test_silence_is_told_again_and_again_and_unproves() -> None:
    node = proven()
    node.tick()
    (probe,) = node.tick()
    assert node.tick() == []
    for _ in range(3):
        (suspect,) = node.tick()
        assert isinstance(suspect, Suspect)
    assert not node.reach.proven and not node.reach.given_up
    node.reach.echoed(getattr(probe, "number", 0))
    assert node.reach.proven and node.reach.silent_ms == 0


def test_a_silent_stream_is_closed_long_before_its_node_is_given_up() -> None:
    node = proven()
    while CloseStream() not in (effects := node.tick()):
        assert GiveUp() not in effects
    assert DEAD_STREAM_MS <= node.now < GIVEN_UP_MS
    node.reach.closed()
    assert [type(e) for e in node.until_given_up()] == [Suspect, GiveUp]
    assert node.now >= GIVEN_UP_MS
    assert [type(e) for e in node.tick()] == [Suspect, GiveUp]


def test_a_new_stream_has_its_own_time_and_one_echo_clears_the_node() -> None:
    node = proven()
    node.until_given_up()
    node.reach.closed()
    number = node.open()
    assert CloseStream() not in node.tick()
    assert node.reach.given_up
    node.reach.echoed(number)
    assert node.reach.proven and not node.reach.given_up


def test_a_node_that_can_not_be_dialled_is_suspected_and_given_up_as_well() -> None:
    node = Node()
    for _ in range(SILENT_MS // PROBE_MS):
        effects = node.tick()
    assert [type(e) for e in effects] == [Suspect]
    assert [type(e) for e in node.until_given_up()] == [Suspect, GiveUp]


def test_a_stream_that_never_brings_its_probe_back_is_dead_whatever_else_it_says() -> None:
    node = Node()
    node.open()
    for _ in range(GIVEN_UP_MS // PROBE_MS):
        node.reach.heard()
        effects = node.tick()
    assert CloseStream() in effects and not node.reach.proven


def test_an_edge_that_stood_still_blames_nobody_for_that_time() -> None:
    node = proven()
    node.tick()
    node.tick()  # a probe is under way
    assert node.tick(60_000) == []
    assert node.reach.silent_ms < SILENT_MS and node.reach.proven


def test_a_clock_that_does_not_move_is_no_silence() -> None:
    node = Node()
    for _ in range(100):
        assert node.tick(0) == []
