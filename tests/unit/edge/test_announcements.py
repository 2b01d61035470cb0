"""`Announcements`: of connections with one client id the newest stays, at whatever edge."""

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from edge.core.announcements import Announcements


def announced(*markers: int) -> Announcements:
    """One client id, announced with these markers, one after the other."""
    here = Announcements()
    for marker in markers:
        here.begin("tab")
        here.sent("tab", marker)
    return here


def test_a_connection_that_the_manager_heard_of_loses_to_a_later_one_elsewhere() -> None:
    here = announced(1)
    here.came_back(1, epoch=7)
    assert here.loses("tab", 7) and not list(here.open())


def test_a_connection_whose_marker_is_under_way_is_the_newer_one() -> None:
    here = announced(1)
    assert not here.loses("tab", 7)
    here.begin("other")
    here.came_back(0, epoch=7)
    here.came_back(99, epoch=7)
    assert list(here.open()) == ["tab", "other"], "other answers say nothing of it"


def test_a_newer_connection_at_the_same_edge_needs_its_own_marker() -> None:
    here = announced(1, 2)
    here.came_back(1, epoch=7)
    assert not here.loses("tab", 7)
    here.came_back(2, epoch=7)
    assert here.loses("tab", 7)


def test_a_connection_that_comes_again_is_newer_than_what_was_heard_of_the_one_before() -> None:
    here = announced(1)
    here.came_back(1, epoch=7)
    here.begin("tab")
    assert not here.loses("tab", 7)


def test_the_word_of_an_earlier_manager_ends_nobody() -> None:
    here = announced(1)
    here.came_back(1, epoch=8)
    assert not here.loses("tab", 7) and here.loses("tab", 9)


def test_who_left_is_neither_announced_again_nor_ended() -> None:
    here = announced(1)
    here.end("tab")
    here.sent("tab", 2)
    here.came_back(1, epoch=7)
    here.came_back(2, epoch=7)
    assert not list(here.open()) and not here.loses("tab", 7)


class _Edge:
    """One edge with FIFO streams to and from the manager."""

    def __init__(self) -> None:
        self.announcements = Announcements()
        self.connected = 0
        self.out: deque[int] = deque()
        self.inbox: deque[int | None] = deque()

    def connect(self, number: int) -> None:
        self.connected = number
        self.announcements.begin("tab")
        self.announcements.sent("tab", number)
        self.out.append(number)

    def take(self) -> None:
        marker = self.inbox.popleft()
        if marker is not None:
            self.announcements.came_back(marker, epoch=1)
        elif self.announcements.loses("tab", 1):
            self.announcements.end("tab")
            self.connected = 0


@given(
    count=st.integers(2, 4),
    steps=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=40),
)
def test_however_edges_race_exactly_the_last_one_at_the_manager_survives(
    count: int, steps: list[tuple[int, int]]
) -> None:
    edges = [_Edge() for _ in range(count)]
    last = 0
    numbers = iter(range(1, 1000))

    def handle(edge: _Edge) -> None:
        nonlocal last
        last = edge.out.popleft()
        edge.inbox.append(last)
        for other in edges:
            if other is not edge:
                other.inbox.append(None)

    for what, which in steps:
        edge = edges[which % count]
        if what == 0:
            edge.connect(next(numbers))
        elif what == 1 and edge.out:
            handle(edge)
        elif what == 2 and edge.inbox:
            edge.take()
    for edge in edges:
        while edge.out:
            handle(edge)
    for edge in edges:
        while edge.inbox:
            edge.take()
    assert [edge.connected for edge in edges if edge.connected] == ([last] if last else [])
