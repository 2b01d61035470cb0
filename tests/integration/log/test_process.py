"""The log process from outside: its lock, who may call it, its metrics, its end."""

import asyncio
import os
import signal
import stat
from pathlib import Path

import grpc
import pytest
from logprocess import LogChild, eventually

from agent_service.core.journal import Append, Committed, Fenced, Seal, Sealed, StoredEvent
from agent_service.log.port import ReadRange
from agent_service.log.remote import RemoteLog
from steward.errors import Reason
from steward.model.keys import Epoch, NodeId, Sequence, UserKey
from steward.rpc.factory import call_metadata, make_channel
from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.rpc.roles import Role, RoleCredentials
from steward.rpc.status import error_of
from steward.v1 import agent_service_pb2, log_service_pb2, log_service_pb2_grpc, placement_pb2

pytestmark = pytest.mark.asyncio
ALICE = UserKey("default", "alice")


def metadata(data: Path, role: Role) -> tuple[tuple[str, str], ...]:
    key = load_or_create_key(data, CONTROL_KEY)
    return call_metadata(RoleCredentials(key, role, "steward", "test"))


async def refusal(call) -> Reason:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    return error_of(failure.value).reason


async def conversation(rig, *bodies, role: Role = Role.AGENT) -> Reason:
    """How the log ends a stream on which these messages are sent."""
    async with make_channel(rig.child.address) as channel:
        stub = log_service_pb2_grpc.LogServiceStub(channel)
        call = stub.HoldLogStream(metadata=metadata(rig.child.data, role))
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            for body in bodies:
                await call.write(log_service_pb2.HoldLogStreamRequest(**body))
            async with asyncio.timeout(5):
                while await call.read() is not grpc.aio.EOF:
                    pass
        return error_of(failure.value).reason


HELLO = {"hello": log_service_pb2.LogHello(cluster="steward", node_id="n9")}


def batch(**fields) -> dict:
    return {"batch": log_service_pb2.LogBatch(**fields)}


async def test_second_process_on_the_same_data_is_refused_with_code_2(remote_rig) -> None:
    second = LogChild(remote_rig.child.data)
    process = await second.spawn()
    assert await asyncio.wait_for(process.wait(), 15) == 2
    text = await second.errors()
    assert "open in another process" in text
    assert len(text.strip().splitlines()) == 1


async def test_lock_is_free_after_kill(remote_rig) -> None:
    await remote_rig.child.end(signal.SIGKILL)
    await remote_rig.child.start()
    assert isinstance(await remote_rig.log.seal(Seal(ALICE, Epoch(1), "a")), Sealed)


async def test_sigterm_ends_the_process_with_code_0_and_keeps_everything(remote_rig) -> None:
    assert isinstance(await remote_rig.log.seal(Seal(ALICE, Epoch(1), "a")), Sealed)
    append = Append(ALICE, Epoch(1), 1, Sequence(1), (StoredEvent(b"1", "main"),), ())
    assert await remote_rig.log.append(append) == Committed(Sequence(2))
    assert await remote_rig.child.end(signal.SIGTERM) == 0
    assert not (remote_rig.child.data / "events.db-wal").exists()
    await remote_rig.child.start()
    assert (await remote_rig.log.read(ALICE, ReadRange())).events == (b"1",)


async def test_files_are_for_their_owner_alone(remote_rig) -> None:
    assert isinstance(await remote_rig.log.seal(Seal(ALICE, Epoch(1), "a")), Sealed)
    names = [name for name in os.listdir(remote_rig.child.data) if name.startswith("events.")]
    assert sorted(names) == ["events.db", "events.db-shm", "events.db-wal", "events.lock"]
    for name in names:
        assert stat.S_IMODE((remote_rig.child.data / name).stat().st_mode) == 0o600


async def test_only_the_roles_of_the_table_may_call(remote_rig) -> None:
    data = remote_rig.child.data
    user = placement_pb2.UserKey(tenant_id="default", user_id="alice")
    async with make_channel(remote_rig.child.address) as channel:
        stub = log_service_pb2_grpc.LogServiceStub(channel)
        describe = log_service_pb2.DescribeLogRequest()
        for role in (Role.AGENT, Role.OPERATOR):
            answer = await stub.DescribeLog(describe, metadata=metadata(data, role))
            assert answer.log_id
        for role in (Role.EDGE, Role.AUTH, Role.REGISTRY, Role.LOG):
            call = stub.DescribeLog(describe, metadata=metadata(data, role))
            assert await refusal(call) is Reason.PERMISSION_DENIED
        assert await refusal(stub.DescribeLog(describe)) is Reason.PERMISSION_DENIED
        for method in (stub.ReadStream, stub.ReadThreads):
            request = (
                agent_service_pb2.ReadEventsRequest(user=user)
                if method is stub.ReadStream
                else agent_service_pb2.ListThreadsRequest(user=user)
            )
            call = method(request, metadata=metadata(data, Role.OPERATOR))
            assert await refusal(call) is Reason.PERMISSION_DENIED
    assert await conversation(remote_rig, HELLO, role=Role.EDGE) is Reason.PERMISSION_DENIED


async def test_stream_that_breaks_the_contract_is_ended_with_its_reason(remote_rig) -> None:
    user = placement_pb2.UserKey(tenant_id="t", user_id="u")
    seal = log_service_pb2.SealStream(request_id=1, user=user, epoch=1, activation="a")
    append = log_service_pb2.AppendEvents(
        request_id=1, user=user, epoch=1, append_number=1, expected_sequence=1
    )
    other = {"hello": log_service_pb2.LogHello(cluster="other", node_id="n9")}
    assert await conversation(remote_rig, other) is Reason.PERMISSION_DENIED
    broken = Reason.PROTOCOL_VIOLATION
    assert await conversation(remote_rig, batch(seals=[seal])) is broken
    assert await conversation(remote_rig, HELLO, HELLO) is broken
    for change in (
        {"epoch": 0},
        {"epoch": 1 << 60},
        {"append_number": 0},
        {"expected_sequence": (1 << 64) - 1},
        {"user": placement_pb2.UserKey(tenant_id="t")},
        {"records": [log_service_pb2.Record(key="k")]},
        {"records": [log_service_pb2.Record(kind="RECORD_KIND_THREAD", key="k", value=b"{}")]},
    ):
        bad = log_service_pb2.AppendEvents()
        bad.CopyFrom(append)
        for name in change:
            bad.ClearField(name)
        bad.MergeFrom(log_service_pb2.AppendEvents(**change))
        assert await conversation(remote_rig, HELLO, batch(appends=[bad])) is broken, change
    nameless = log_service_pb2.SealStream(request_id=1, user=user, epoch=1)
    assert await conversation(remote_rig, HELLO, batch(seals=[nameless])) is broken
    # The process and its other streams are as before.
    assert isinstance(await remote_rig.log.seal(Seal(ALICE, Epoch(1), "a")), Sealed)


async def test_node_of_another_cluster_never_connects_and_says_why(remote_rig) -> None:
    data = remote_rig.child.data
    key = load_or_create_key(data, CONTROL_KEY)
    stranger = RemoteLog(
        remote_rig.child.address,
        "other",
        NodeId("n2"),
        RoleCredentials(key, Role.AGENT, "other", "n2"),
    )
    await stranger.open()
    await eventually(lambda: "cluster" in (stranger.unready() or ""))
    assert not stranger.connected
    await stranger.close()


async def test_two_nodes_share_one_log_and_the_fence_holds_between_them(remote_rig) -> None:
    child: LogChild = remote_rig.child
    key = load_or_create_key(child.data, CONTROL_KEY)
    other = RemoteLog(
        child.address, "steward", NodeId("n2"), RoleCredentials(key, Role.AGENT, "steward", "n2")
    )
    await other.open()
    event = (StoredEvent(b"1", "main"),)
    assert isinstance(await remote_rig.log.seal(Seal(ALICE, Epoch(1), "a")), Sealed)
    old = Append(ALICE, Epoch(1), 1, Sequence(1), event, ())
    assert await remote_rig.log.append(old) == Committed(Sequence(2))
    assert isinstance(await other.seal(Seal(ALICE, Epoch(2), "b")), Sealed)
    late = Append(ALICE, Epoch(1), 2, Sequence(2), event, ())
    assert await remote_rig.log.append(late) == Fenced(Epoch(2))
    new = Append(ALICE, Epoch(2), 1, Sequence(2), event, ())
    assert await other.append(new) == Committed(Sequence(3))
    await other.close()


async def test_metrics_count_by_outcome(remote_rig) -> None:
    log = remote_rig.log
    assert isinstance(await log.seal(Seal(ALICE, Epoch(2), "a")), Sealed)
    assert await log.seal(Seal(ALICE, Epoch(1), "b")) == Fenced(Epoch(2))
    event = (StoredEvent(b"1", "main"), StoredEvent(b"2", "main"))
    append = Append(ALICE, Epoch(2), 1, Sequence(1), event, ())
    assert await log.append(append) == Committed(Sequence(3))
    assert await log.append(append) == Committed(Sequence(3))
    await log.append(Append(ALICE, Epoch(1), 1, Sequence(1), event, ()))
    await log.append(Append(ALICE, Epoch(2), 2, Sequence(1), event, ()))
    text = await remote_rig.child.metrics()
    for line in (
        "steward_log_events_total 2.0",
        'steward_log_appends_total{outcome="committed"} 1.0',
        'steward_log_appends_total{outcome="repeated"} 1.0',
        'steward_log_appends_total{outcome="fenced"} 1.0',
        'steward_log_appends_total{outcome="conflict"} 1.0',
        'steward_log_seals_total{outcome="sealed"} 1.0',
        'steward_log_seals_total{outcome="fenced"} 1.0',
        'steward_refusals_total{kind="stale_append"} 2.0',
        'steward_refusals_total{kind="stale_seal"} 1.0',
    ):
        assert line in text
