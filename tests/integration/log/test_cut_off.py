"""A node and a log that can't hear each other: known within a second, and nothing lost by it."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from logprocess import eventually

from agent_service.core.journal import Append, Committed, Seal, Sealed, StoredEvent
from agent_service.log.port import ReadRange
from agent_service.log.remote import RemoteLog
from agent_service.log.stream import MOST_QUIET_PINGS, PING_S
from steward.model.keys import Epoch, NodeId, Sequence, UserKey
from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.rpc.roles import Role, RoleCredentials
from steward.testing.proxy import CutProxy

pytestmark = pytest.mark.asyncio
ALICE = UserKey("default", "alice")
SLACK_S = 1.0
"""What a busy machine may add."""


def append(number: int) -> Append:
    event = StoredEvent(str(number).encode(), "main")
    return Append(ALICE, Epoch(1), number, Sequence(number), (event,), ())


@pytest_asyncio.fixture
async def proxy(remote_rig: Any) -> AsyncIterator[CutProxy]:
    async with CutProxy(remote_rig.child.address) as proxy:
        yield proxy


@pytest_asyncio.fixture
async def far(remote_rig: Any, proxy: CutProxy) -> AsyncIterator[RemoteLog]:
    """A node's log behind the proxy, connected and sealed for alice."""
    key = load_or_create_key(remote_rig.child.data, CONTROL_KEY)
    credentials = RoleCredentials(key, Role.AGENT, "steward", "n2")
    log = RemoteLog(proxy.address, "steward", NodeId("n2"), credentials)
    await log.open()
    await eventually(lambda: log.connected)
    assert isinstance(await log.seal(Seal(ALICE, Epoch(1), "a")), Sealed)
    yield log
    await log.close()


async def test_a_log_that_is_cut_off_is_known_as_unreachable_within_about_a_second(
    far: RemoteLog, proxy: CutProxy, remote_rig: Any
) -> None:
    await asyncio.sleep(2 * PING_S * MOST_QUIET_PINGS)
    assert far.connected, "an idle stream is alive"
    proxy.cut()
    began = time.monotonic()
    await eventually(lambda: not far.connected)
    assert time.monotonic() - began < PING_S * (MOST_QUIET_PINGS + 1) + SLACK_S
    assert "silent" in (far.unready() or "")
    assert remote_rig.remote.connected, "who is not cut off does not notice"


async def test_what_was_sent_into_the_void_is_committed_once_when_the_way_is_open_again(
    far: RemoteLog, proxy: CutProxy
) -> None:
    assert await far.append(append(1)) == Committed(Sequence(2))
    proxy.cut()
    sent = far.append(append(2))
    await eventually(lambda: not far.connected)
    assert not sent.done()
    proxy.mend()
    began = time.monotonic()
    # Both the old stream's bytes and the new one's may arrive: the log takes it once.
    assert await asyncio.wait_for(sent, 10) == Committed(Sequence(3))
    assert time.monotonic() - began < 2.5 + SLACK_S
    assert await far.append(append(3)) == Committed(Sequence(4))
    assert (await far.read(ALICE, ReadRange())).events == (b"1", b"2", b"3")


async def test_a_log_that_stood_still_is_found_again_and_answers(
    far: RemoteLog, remote_rig: Any
) -> None:
    pid = remote_rig.child.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        sent = far.append(append(1))
        await eventually(lambda: not far.connected)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert await asyncio.wait_for(sent, 10) == Committed(Sequence(2))
    await eventually(lambda: far.connected)


async def test_a_log_that_was_killed_is_found_as_soon_as_it_is_back(
    far: RemoteLog, remote_rig: Any
) -> None:
    await remote_rig.child.end(signal.SIGKILL)
    sent = far.append(append(1))
    # Long enough that every backoff has grown to its bound.
    await asyncio.sleep(3)
    await remote_rig.child.start()
    ready = time.monotonic()
    assert await asyncio.wait_for(sent, 10) == Committed(Sequence(2))
    assert time.monotonic() - ready < SLACK_S


async def test_a_log_that_is_away_is_dialled_at_least_every_quarter_of_a_second(
    tmp_path: Path,
) -> None:
    dials: list[float] = []

    def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        dials.append(time.monotonic())
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    key = load_or_create_key(tmp_path, CONTROL_KEY)
    credentials = RoleCredentials(key, Role.AGENT, "steward", "n2")
    log = RemoteLog(f"127.0.0.1:{port}", "steward", NodeId("n2"), credentials)
    await log.open()
    await eventually(lambda: dials and dials[-1] - dials[0] > 4, 20)
    await log.close()
    server.close()
    assert max(later - earlier for earlier, later in pairwise(dials)) < 0.25 + SLACK_S / 2
