"""What the played network and clocks promise to the parts that stand on them."""

from functools import partial
from typing import Any

import pytest

from steward.testing.simulated_network import End, Network, Process, Uplink
from steward.testing.world import Clock, World


class Peer(Process):
    """Remembers what it is told."""

    def __init__(self, world: World, network: Network, name: str) -> None:
        super().__init__(world, network, name)
        self.told: list[Any] = []
        self.ended = 0

    def begin(self) -> None:
        self.told = []

    def accepted(self, end: End, hello: Any) -> None:
        def over() -> None:
            self.ended += 1

        end.on_message = self.told.append
        end.on_end = over


def pair(seed: int, slow: float = 0.0) -> tuple[World, Network, Peer, Peer, Uplink]:
    world = World(seed)
    network = Network(world)
    network.slow = slow
    one, other = Peer(world, network, "one"), Peer(world, network, "other")
    one.start()
    other.start()
    uplink = Uplink(one, lambda: (other, "hello"), up=lambda: None, message=one.told.append)
    world.run(world.now_ms + 100)
    assert uplink.connected
    return world, network, one, other, uplink


@pytest.mark.parametrize("seed", range(30))
def test_a_stream_keeps_its_order_through_delays_pauses_and_partitions(seed: int) -> None:
    world, network, _, other, uplink = pair(seed, slow=1.0)
    for number in range(200):
        world.at(1_200 + number * 20, partial(uplink.send, number))
    world.at(1_500, lambda: other.pause(700))
    world.at(2_600, lambda: network.block("one", "other", 900))
    world.run(20_000)
    assert other.told == list(range(200))


def test_a_blocked_direction_delays_and_the_other_one_does_not() -> None:
    world, network, one, other, uplink = pair(1)
    network.block("one", "other", 5_000)
    uplink.send("late")
    next(iter(other.ends)).send("at once")
    world.run(world.now_ms + 1_000)
    assert (other.told, one.told) == ([], ["at once"])
    world.run(world.now_ms + 5_000)
    assert other.told == ["late"]


def test_what_was_sent_before_a_crash_arrives_before_its_end() -> None:
    world, _, one, other, uplink = pair(2)
    uplink.send("last words")
    one.crash()
    world.run(world.now_ms + 100)
    assert (other.told, other.ended) == (["last words"], 1)


def test_a_machine_that_is_gone_is_noticed_by_keepalive_alone() -> None:
    world, _, one, other, _ = pair(3)
    one.crash(silent=True)
    world.run(world.now_ms + 9_000)
    assert other.ended == 0
    world.run(world.now_ms + 7_000)
    assert other.ended == 1


def test_timers_of_a_dead_process_never_fire() -> None:
    world, _, one, _, _ = pair(4)
    fired: list[str] = []
    one.after(500, lambda: fired.append("of the first life"))
    one.crash()
    one.start()
    one.after(500, lambda: fired.append("of the second"))
    world.run(world.now_ms + 1_000)
    assert fired == ["of the second"]


def test_a_clock_runs_at_its_rate_and_never_back() -> None:
    world = World(1)
    slow, fast = Clock(world, 900), Clock(world, 1_100)
    began = slow.now(), fast.now()
    world.run(world.now_ms + 10_000)
    assert (slow.now() - began[0], fast.now() - began[1]) == (9_000, 11_000)
    assert (slow.world_ms(900), fast.world_ms(1_100)) == (1_000, 1_000)
    slow.jump(5_000)
    assert slow.now() - began[0] == 14_000
