"""The driver on a real store: what must end the process, and what a dial says."""

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from registry_service.core.commands import (
    DialOutcome,
    OpenNodeSession,
    PeerId,
    ReportLogHead,
    ResolveManagers,
    UserQuery,
)
from registry_service.core.config import RegistryConfig
from registry_service.core.effects import (
    AskLogHead,
    ManagersResolved,
    Message,
    PlacementsGranted,
)
from registry_service.core.registry import Registry
from registry_service.core.transactions import NodeClaim
from registry_service.driver import RegistryDriver
from registry_service.store.memory import MemoryDisk, MemoryStore
from registry_service.store.port import PlacementStore
from registry_service.store.sqlite import SqliteStore
from registry_service.uplink import TcpDialer
from steward.model.keys import Epoch, NodeId, UserKey
from steward.runtime.clock import boot_ms
from steward.telemetry.catalog import RegistryMetrics

pytestmark = pytest.mark.asyncio


class Mailbox:
    """A peer that keeps what it is sent, beside the revision of the disk at that moment."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.changed = asyncio.Event()
        # What a node does when it is asked for the head of its log.
        self.asked: Callable[[], None] | None = None

    def deliver(self, message: Message) -> None:
        self.messages.append(message)
        self.changed.set()
        if isinstance(message, AskLogHead) and self.asked is not None:
            self.asked()

    def end(self) -> None:
        self.changed.set()

    async def wait_for(self, kind: type[Message]) -> Message:
        async with asyncio.timeout(10):
            while True:
                for message in self.messages:
                    if isinstance(message, kind):
                        return message
                self.changed.clear()
                await self.changed.wait()


def make_driver(store: PlacementStore) -> RegistryDriver:
    machine = Registry(RegistryConfig())
    return RegistryDriver(
        machine, store, TcpDialer(), RegistryMetrics(CollectorRegistry()), boot_ms
    )


def join(driver: RegistryDriver, mailbox: Mailbox) -> PeerId:
    peer = driver.connect(mailbox)
    mailbox.asked = lambda: driver.submit(ReportLogHead(peer, Epoch(0)))
    driver.submit(OpenNodeSession(peer, NodeClaim(NodeId("n1"), "boot", "a", "127.0.0.1:1")))
    return peer


def resolve(driver: RegistryDriver, mailbox: Mailbox) -> None:
    peer = driver.connect(mailbox)
    driver.submit(ResolveManagers(peer, 1, (UserQuery(UserKey("t", "ann"), Epoch(0)),)))


async def test_a_node_has_its_grant_before_the_edge_has_its_answer() -> None:
    driver = make_driver(MemoryStore(MemoryDisk(lambda: 0)))
    await driver.start()
    both = Mailbox()
    join(driver, both)
    resolve(driver, both)
    await both.wait_for(ManagersResolved)
    kinds = [type(message) for message in both.messages]
    assert kinds.index(PlacementsGranted) < kinds.index(ManagersResolved)
    await driver.stop()
    await driver.stop()


async def test_a_store_that_fails_for_good_ends_the_process(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "registry.db", lambda: 0)
    driver = make_driver(store)
    await driver.start()
    await store._call(lambda: store._opened().execute("DROP TABLE meta"))
    edge = Mailbox()
    join(driver, edge)
    async with asyncio.timeout(10):
        assert "no such table: meta" in await driver.failed()
    assert edge.messages == []
    await driver.stop()


async def test_a_registry_whose_term_was_raised_ends(tmp_path: Path) -> None:
    disk = MemoryDisk(lambda: 0)
    driver = make_driver(MemoryStore(disk))
    await driver.start()
    disk.open()
    node = Mailbox()
    join(driver, node)
    async with asyncio.timeout(10):
        assert "term 2" in await driver.failed()
    assert node.messages == []
    await driver.stop()


async def test_a_dial_tells_a_refusal_from_everything_else() -> None:
    dialer = TcpDialer()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert await dialer.dial(address) is DialOutcome.ACCEPTED
    assert await dialer.dial(address) is DialOutcome.REFUSED
    assert await dialer.dial("no-such-host.invalid:1") is DialOutcome.TIMED_OUT
