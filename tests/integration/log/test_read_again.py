"""A read that the log's side gave up is tried again: no node ends by one slow read."""

from pathlib import Path
from typing import Any

import grpc
import pytest

from agent_service.log.port import ReadRange
from agent_service.log.remote import RemoteLog
from steward.model.keys import NodeId, UserKey
from steward.rpc.keys import CONTROL_KEY, load_or_create_key
from steward.rpc.roles import Role, RoleCredentials
from steward.v1 import agent_service_pb2, log_service_pb2_grpc


class SlowOnce(log_service_pb2_grpc.LogServiceServicer):
    """Ends the first read as gRPC's server does when it sees the deadline before the client."""

    def __init__(self) -> None:
        self.asked = 0

    async def ReadStream(self, request: Any, context: Any) -> Any:
        self.asked += 1
        if self.asked == 1:
            await context.abort(grpc.StatusCode.CANCELLED, "CANCELLED")
        return agent_service_pb2.ReadEventsResponse(stream_id="s", head=7)


@pytest.mark.asyncio
async def test_read_that_the_log_saw_the_deadline_of_is_tried_again(tmp_path: Path) -> None:
    servicer = SlowOnce()
    server = grpc.aio.server()
    log_service_pb2_grpc.add_LogServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    key = load_or_create_key(tmp_path, CONTROL_KEY)
    credentials = RoleCredentials(key, Role.AGENT, "steward", "node-0")
    log = RemoteLog(f"127.0.0.1:{port}", "steward", NodeId("node-0"), credentials)
    await log.open()
    try:
        page = await log.read(UserKey("default", "alice"), ReadRange())
        assert (page.head, servicer.asked) == (7, 2)
    finally:
        await log.close()
        await server.stop(None)
