"""All services together, as real processes: one truth about who holds a user, and one stream.

Clients here know the protocol page alone (`steward.testing.tab`); what they saw is
checked with the rules of the protocol, byte by byte where two of them must agree.
"""

import asyncio
import hashlib
import hmac
import json
import os
import re
import signal
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from agent_service.settings import AgentSettings
from steward.client.checks import check_stream
from steward.config.settings import SettingsError, load
from steward.rpc.factory import make_channel
from steward.rpc.keys import USER_KEY, load_or_create_key
from steward.rpc.roles import Role
from steward.testing.local_cluster import LocalCluster
from steward.testing.tab import Tab, open_tab, resume_tab
from steward.testing.waiting import eventually
from steward.v1 import (
    agent_service_pb2,
    agent_service_pb2_grpc,
    auth_service_pb2,
    auth_service_pb2_grpc,
    placement_pb2,
    registry_service_pb2,
    registry_service_pb2_grpc,
)

BOUND_S = 8.0
"""A killed node's users hear of their new manager within this, at worst: the lease."""
ANSWER_S = 15.0

GOLDEN = ["agent_started", "agent_thinking", "tool_executing", "tool_completed", "agent_completed"]

Token = Callable[..., str]
Metadata = Callable[[Role], tuple[tuple[str, str], ...]]


class CommandUnknown(Exception):
    """The command line has no such command."""


def steward(cluster: LocalCluster, command: str, *words: str) -> str:
    """Run a command of `steward`. Raises CommandUnknown for one that is not there."""
    answer = cluster.try_steward(command, *words)
    if answer.returncode == 2 and f"invalid choice: '{command}'" in answer.stderr:
        raise CommandUnknown(answer.stderr)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def user_key(user: str, tenant: str = "default") -> placement_pb2.UserKey:
    return placement_pb2.UserKey(tenant_id=tenant, user_id=user)


def assert_unbroken(tab: Tab, *, complete: bool = True) -> None:
    """Every sequence once, in order, and every rule of the protocol kept."""
    first = tab.events[0]["sequence"]
    sequences = [event["sequence"] for event in tab.events]
    assert sequences == list(range(first, first + len(sequences)))
    assert check_stream(tab.events, complete=complete) == []


def of_run(tab: Tab, run_id: str) -> list[dict[str, Any]]:
    return [event for event in tab.events if event.get("run_id") == run_id]


# ---- one truth


@pytest.mark.asyncio
async def test_websocket_manager_service_integration_consistency(
    cluster: LocalCluster, http: aiohttp.ClientSession, token: Token, metadata: Metadata
) -> None:
    """Edges, registry, node, events and the operator say the same (node, epoch), always."""
    tabs = [await open_tab(http, url, token("alice")) for url in cluster.urls]
    assert len(tabs) == 2
    answer = await tabs[0].ask("m1", "before", ANSWER_S)
    before = await everybody_says(cluster, "alice", metadata)
    assert {(tab.ready["manager"]["node_id"], tab.ready["manager"]["epoch"]) for tab in tabs} == {
        before
    }
    assert answer["epoch"] == before[1]

    await asyncio.to_thread(cluster.kill, before[0])
    moved = await tabs[1].until("manager_moved", BOUND_S)
    after = await everybody_says(cluster, "alice", metadata)
    assert after[1] > before[1]
    assert after == (moved["data"]["to_node"], moved["epoch"])
    late = await open_tab(http, cluster.urls[0], token("alice"))
    assert (late.ready["manager"]["node_id"], late.ready["manager"]["epoch"]) == after
    for tab in (*tabs, late):
        await tab.close()


async def everybody_says(cluster: LocalCluster, user: str, metadata: Metadata) -> tuple[str, int]:
    """(node, epoch) of a user by registry, operator's command and nodes, who must agree."""
    address = cluster.processes["registry"]["grpc"]
    async with make_channel(address) as channel:
        registry = registry_service_pb2_grpc.RegistryServiceStub(channel)
        operator = metadata(Role.OPERATOR)
        found = await registry.FindPlacement(
            registry_service_pb2.FindPlacementRequest(user=user_key(user)),
            metadata=operator,
            timeout=ANSWER_S,
        )
        resolved = await registry.ResolveManagers(
            registry_service_pb2.ResolveManagersRequest(
                users=[registry_service_pb2.UserQuery(user=user_key(user))]
            ),
            metadata=operator,
            timeout=ANSWER_S,
        )
    assert found.node_alive
    assert found.placement == resolved.results[0].placement
    placement = found.placement
    told = json.loads(await asyncio.to_thread(steward, cluster, "where", user, "--json"))
    assert (told["node_id"], told["epoch"]) == (placement.node_id, placement.epoch)
    for node_id, entry in cluster.processes.items():
        if entry["role"] != "agent" or not cluster.left([entry["pid"]]):
            continue
        here = node_id == placement.node_id
        attached = await attach(entry["grpc"], user, placement.epoch, metadata)
        assert attached.WhichOneof("body") == ("attached" if here else "refused")
        assert attached.epoch == placement.epoch
        if here:
            stale = await attach(entry["grpc"], user, placement.epoch - 1, metadata)
            assert stale.refused.refusal.reason == "EPOCH_STALE"
            assert stale.refused.known_epoch == placement.epoch
    return placement.node_id, placement.epoch


async def attach(
    address: str, user: str, epoch: int, metadata: Metadata
) -> agent_service_pb2.Answer:
    """What a node answers to an edge that believes in this epoch."""
    request = agent_service_pb2.HoldEdgeStreamRequest
    async with make_channel(address) as channel:
        stub = agent_service_pb2_grpc.AgentServiceStub(channel)
        stream = stub.HoldEdgeStream(metadata=metadata(Role.EDGE))
        hello = agent_service_pb2.EdgeStreamHello(cluster="steward", edge_id="edge-test")
        await stream.write(request(hello=hello))
        welcome = await asyncio.wait_for(stream.read(), ANSWER_S)
        assert welcome.WhichOneof("body") == "welcome"
        command = agent_service_pb2.EdgeCommand(
            user=user_key(user), epoch=epoch, command_id=1, attach=agent_service_pb2.Attach()
        )
        batch = agent_service_pb2.CommandBatch(commands=[command])
        await stream.write(request(commands=batch))
        while True:
            message = await asyncio.wait_for(stream.read(), ANSWER_S)
            for answer in message.batch.answers:
                if answer.command_id == 1:
                    stream.cancel()
                    return answer


# ---- delivery


@pytest.mark.asyncio
async def test_websocket_event_delivery_consistency_integration(
    cluster: LocalCluster, http: aiohttp.ClientSession, token: Token
) -> None:
    """Three users with two tabs each: the same bytes, in order, through a break and a kill."""
    users = ("dora", "emil", "fred")
    tabs: dict[str, list[Tab]] = {
        user: [await open_tab(http, url, token(user)) for url in cluster.urls] for user in users
    }
    for user in users:
        await tabs[user][0].send("m1", f"marker-{user} slowly", agent="count")
    for user in users:
        for tab in tabs[user]:
            await tab.until("agent_text", ANSWER_S)
    for user in users:
        first, dropped = tabs[user]
        dropped.drop()
        await first.until_sequence(dropped.sequence + 2, ANSWER_S)  # It has missed something.
        tabs[user] = [first, await resume_tab(http, cluster.urls[0], token(user), dropped)]
        assert tabs[user][1].ready["resume"] == "resumed"
    killed = tabs[users[0]][0].ready["manager"]["node_id"]
    await asyncio.to_thread(cluster.kill, killed)
    for user in users:
        await tabs[user][1].send("m2", f"marker-{user} again")
    for user in users:
        for tab in tabs[user]:
            while [e["type"] for e in tab.events].count("agent_completed") < 2:
                await tab.until("agent_completed", ANSWER_S)

    for user in users:
        first, second = tabs[user]
        assert first.texts == second.texts
        assert_unbroken(first)
        assert first.events[0]["sequence"] == 1
        assert {m for text in first.texts for m in re.findall(r"marker-\w+", text)} == {
            f"marker-{user}"
        }
        outcomes = [e["data"]["outcome"] for e in first.events if e["type"] == "agent_completed"]
        assert outcomes == ["success", "success"]
        on_the_killed = first.ready["manager"]["node_id"] == killed
        assert ("manager_moved" in [e["type"] for e in first.events]) == on_the_killed
        said = [e["data"]["delta"] for e in first.events if e["type"] == "agent_text"]
        assert "".join(said).startswith(
            "".join(f"marker-{user} slowly:{number} " for number in range(25))
        ), "nothing said twice, nothing left out"
        for tab in tabs[user]:
            await tab.close()


# ---- many


@pytest.mark.asyncio
@pytest.mark.parametrize("sockets", [8, 50, 1000])
async def test_multi_user_concurrent_session_isolation_integration(
    sockets: int,
    cluster: LocalCluster,
    http: aiohttp.ClientSession,
    token: Token,
    request: pytest.FixtureRequest,
) -> None:
    """Running agents on every socket's user while a node dies and comes back: no crossing, no gap.

    Each user has two tabs, on two edges.
    """
    users = [f"crowd-{sockets}-{number}" for number in range(sockets // 2)]
    at_once = asyncio.Semaphore(50)

    async def connect(user: str, url: str) -> Tab:
        async with at_once:
            return await open_tab(http, url, token(user))

    began = time.monotonic()
    opened = await asyncio.gather(*(connect(user, url) for user in users for url in cluster.urls))
    connected_s = time.monotonic() - began
    tabs = {user: (opened[2 * i], opened[2 * i + 1]) for i, user in enumerate(users)}
    victim = opened[0].ready["manager"]["node_id"]

    async def talk(user: str) -> None:
        first, second = tabs[user]
        await first.send("m1", f"marker-{user}-", agent="count")
        await second.send("m2", f"marker-{user}-", thread="side")
        for tab in (first, second):
            while [e["type"] for e in tab.events].count("agent_completed") < 2:
                await tab.until("agent_completed", 60)

    async def a_node_dies_and_comes_back() -> None:
        await eventually(lambda: opened[0].events, "the first runs", 30)
        pid = cluster.kill(victim)  # Not in a thread: while the first user's agent runs.
        await eventually(lambda: cluster.processes[victim]["pid"] != pid, "it is back", 30)

    await asyncio.gather(a_node_dies_and_comes_back(), *(talk(user) for user in users))
    took_s = time.monotonic() - began

    moved = 0
    for user in users:
        first, second = tabs[user]
        assert first.texts == second.texts
        assert_unbroken(first)
        assert first.events[0]["sequence"] == 1
        assert {m for text in first.texts for m in re.findall(r"marker-[\w-]+-", text)} == {
            f"marker-{user}-"
        }
        moved += any(event["type"] == "manager_moved" for event in first.events)
        on_victim = first.ready["manager"]["node_id"] == victim
        assert on_victim or "manager_moved" not in {event["type"] for event in first.events}
    assert moved
    events = sum(len(tab.events) for tab in opened)
    print(f"{sockets} sockets connected in {connected_s:.2f} s; {events} events in {took_s:.1f} s")
    await asyncio.gather(*(tab.close() for tab in opened))


@pytest.mark.asyncio
async def test_multi_user_concurrent_session_isolation_integration_while_nodes_drain(
    cluster: LocalCluster, http: aiohttp.ClientSession, token: Token
) -> None:
    """A node is drained under running agents: sockets stay open, no crossing, no gap."""
    users = [f"rolling-{number}" for number in range(12)]
    tabs = {
        user: [await open_tab(http, url, token(user)) for url in cluster.urls] for user in users
    }
    homes = [first.ready["manager"]["node_id"] for first, _ in tabs.values()]
    drained = max(set(homes), key=homes.count)
    for user in users:
        await tabs[user][0].send("m1", f"marker-{user}- slowly", agent="count")
    for user in users:
        await tabs[user][0].until("agent_text", ANSWER_S)
    said = await asyncio.to_thread(steward, cluster, "drain", drained)
    assert f"{drained} is drained" in said
    for user in users:
        for tab in tabs[user]:
            if "agent_completed" not in [event["type"] for event in tab.events]:
                await tab.until("agent_completed", ANSWER_S)
    for user in users:
        first, second = tabs[user]
        assert first.texts == second.texts
        assert_unbroken(first)
        assert first.events[0]["sequence"] == 1
        assert {m for text in first.texts for m in re.findall(r"marker-[\w-]+-", text)} == {
            f"marker-{user}-"
        }
        assert first.events[-1]["data"]["outcome"] == "success"
        causes = [e["data"]["cause"] for e in first.events if e["type"] == "manager_moved"]
        was_there = first.ready["manager"]["node_id"] == drained
        assert causes == (["handoff"] if was_there else [])
        for tab in (first, second):
            assert [frame["type"] for frame in tab.frames].count("ready") == 1
            await tab.close()
    # A new process under its name takes users again.
    pid = await asyncio.to_thread(cluster.kill, drained)
    await eventually(lambda: cluster.processes[drained]["pid"] != pid, "it is back", 30)


# ---- auth


def claims(**changes: Any) -> dict[str, Any]:
    now = time.time()
    usual = {
        "iss": "steward",
        "aud": "steward",
        "sub": "gina",
        "tid": "default",
        "iat": now,
        "exp": int(now) + 600,
        "jti": "a-token",
    }
    return {name: value for name, value in {**usual, **changes}.items() if value is not None}


def forged(kind: str, key: Ed25519PrivateKey) -> str:
    """A token that must not be accepted."""
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    good = jwt.encode(claims(), key, algorithm="EdDSA")
    match kind:
        case "expired":
            return jwt.encode(claims(exp=int(time.time()) - 1), key, algorithm="EdDSA")
        case "wrong audience":
            return jwt.encode(claims(aud="steward-control"), key, algorithm="EdDSA")
        case "wrong issuer":
            return jwt.encode(claims(iss="somebody"), key, algorithm="EdDSA")
        case "no subject":
            return jwt.encode(claims(sub=None), key, algorithm="EdDSA")
        case "alg none":
            return jwt.encode(claims(), None, algorithm="none")
        case "public key as a secret":
            head = jwt.utils.base64url_encode(b'{"alg":"HS256","typ":"JWT"}')
            body = head + b"." + jwt.utils.base64url_encode(json.dumps(claims()).encode())
            signature = hmac.digest(public, body, hashlib.sha256)
            return (body + b"." + jwt.utils.base64url_encode(signature)).decode()
        case "wrong key":
            return jwt.encode(claims(), Ed25519PrivateKey.generate(), algorithm="EdDSA")
        case "changed after signing":
            head, body, signature = good.split(".")
            other = json.loads(jwt.utils.base64url_decode(body)) | {"sub": "somebody-else"}
            changed = jwt.utils.base64url_encode(json.dumps(other).encode()).decode()
            return f"{head}.{changed}.{signature}"
        case _:
            return "no.token.at-all"


async def refusal(
    http: aiohttp.ClientSession, url: str, token: str, **query: Any
) -> tuple[int, Any]:
    """HTTP status and headers with which a handshake is refused."""
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await open_tab(http, url, token, **query)
    return refused.value.status, refused.value.headers


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "kind",
    [
        "expired",
        "wrong audience",
        "wrong issuer",
        "no subject",
        "alg none",
        "public key as a secret",
        "wrong key",
        "changed after signing",
        "nonsense",
    ],
)
async def test_websocket_manager_auth_service_integration(
    kind: str, cluster: LocalCluster, http: aiohttp.ClientSession
) -> None:
    """A token that is not good opens nothing, by any of the ways; a good one beside it does."""
    key = load_or_create_key(cluster.data, USER_KEY)
    bad = forged(kind, key)
    url = cluster.url
    assert (await refusal(http, url, bad))[0] == 401
    headers = {"Authorization": f"Bearer {bad}"}
    for method, path in (("POST", "/v1/tickets"), ("GET", "/v1/events"), ("GET", "/v1/threads")):
        async with http.request(method, url + path, headers=headers) as answer:
            body = await answer.json()
            assert answer.status == 401
            wanted = "TOKEN_EXPIRED" if kind == "expired" else "TOKEN_INVALID"
            assert body["reason"] == wanted
            assert bad not in str(body)
    good = await open_tab(http, url, jwt.encode(claims(), key, algorithm="EdDSA"))
    assert good.ready["user_id"] == "gina"
    await good.close()


@pytest.mark.asyncio
async def test_websocket_manager_auth_service_integration_of_tickets_and_tenants(
    cluster: LocalCluster, http: aiohttp.ClientSession, token: Token
) -> None:
    """A ticket is good once, also in a race; the same name in two tenants is two users."""
    ours = await open_tab(http, cluster.url, token("hugo", tenant="acme"))
    await ours.ask("m1", "the secret of acme", ANSWER_S)
    theirs = await open_tab(http, cluster.url, token("hugo", tenant="globex"), after=0)
    assert theirs.ready["sequence"] == 0
    assert theirs.ready["stream_id"] != ours.ready["stream_id"]
    assert (theirs.ready["tenant_id"], ours.ready["tenant_id"]) == ("globex", "acme")
    await theirs.ask("m1", "theirs", ANSWER_S)
    assert not any("secret" in text for text in theirs.texts)
    headers = {"Authorization": f"Bearer {token('hugo', tenant='globex')}"}
    async with http.get(f"{cluster.url}/v1/threads/main/events", headers=headers) as answer:
        assert answer.status == 200
        assert "secret" not in await answer.text()

    async with http.post(f"{cluster.url}/v1/tickets", headers=headers) as answer:
        ticket = (await answer.json())["ticket"]

    async def redeem(url: str) -> bool:
        try:
            tab = await open_tab(http, url, ticket=ticket)
        except aiohttp.WSServerHandshakeError as refused:
            assert refused.status == 401
            return False
        assert (tab.ready["tenant_id"], tab.ready["user_id"]) == ("globex", "hugo")
        await tab.close()
        return True

    race = await asyncio.gather(*(redeem(url) for url in cluster.urls * 5))
    assert sum(race) == 1
    assert not await redeem(cluster.url)
    await ours.close()
    await theirs.close()


@pytest.mark.asyncio
async def test_websocket_manager_auth_service_integration_of_revocation(
    cluster: LocalCluster, http: aiohttp.ClientSession, token: Token, metadata: Metadata
) -> None:
    """Revoking a user closes its live sockets at every edge and its tokens; nobody else's."""
    old = token("ida")
    tabs = [await open_tab(http, url, old) for url in cluster.urls]
    bystander = await open_tab(http, cluster.url, token("jan"))
    began = time.monotonic()
    async with make_channel(cluster.processes["auth"]["grpc"]) as channel:
        stub = auth_service_pb2_grpc.AuthServiceStub(channel)
        request = auth_service_pb2.RevokeUserRequest(user=user_key("ida"))
        await stub.RevokeUser(request, metadata=metadata(Role.OPERATOR), timeout=ANSWER_S)
    assert [await tab.until_closed(ANSWER_S) for tab in tabs] == [4503, 4503]
    print(f"revocation closed both sockets within {(time.monotonic() - began) * 1000:.0f} ms")
    for url in cluster.urls:
        assert (await refusal(http, url, old))[0] in (401, 403)
    new = await open_tab(http, cluster.url, token("ida"))
    assert (await bystander.ask("m1", "still here", ANSWER_S))["data"]["outcome"] == "success"
    await new.close()
    await bystander.close()


@pytest.mark.asyncio
async def test_websocket_manager_auth_service_integration_of_an_outage(
    cluster: LocalCluster, http: aiohttp.ClientSession, token: Token
) -> None:
    """Without auth nobody new comes in, and is told when to come again; who is in stays."""
    tab = await open_tab(http, cluster.url, token("kim"))
    pid = await asyncio.to_thread(cluster.kill, "auth", signal.SIGSTOP)
    try:
        waiting = asyncio.create_task(refusal(http, cluster.urls[1], token("kim")))
        answer = await tab.ask("m1", "is anybody there?", ANSWER_S)
        assert answer["data"]["outcome"] == "success"
        status, headers = await asyncio.wait_for(waiting, ANSWER_S)
        assert status == 503
        assert int(headers["Retry-After"]) >= 1
    finally:
        os.kill(pid, signal.SIGCONT)

    async def comes_in() -> bool:
        try:
            again = await open_tab(http, cluster.urls[1], token("kim"))
        except aiohttp.WSServerHandshakeError as refused:
            assert refused.status == 503
            return False
        await again.close()
        return True

    await eventually(comes_in, "auth is back")
    await tab.close()


# ---- store


async def stored(cluster: LocalCluster, user: str, metadata: Metadata) -> list[str]:
    """All events of a user as the log has them, read through any node, bypassing the edge."""
    entries = [e for e in cluster.processes.values() if e["role"] == "agent"]
    texts: list[str] = []
    async with make_channel(entries[0]["grpc"]) as channel:
        stub = agent_service_pb2_grpc.AgentServiceStub(channel)
        while True:
            page = await stub.ReadEvents(
                agent_service_pb2.ReadEventsRequest(
                    user=user_key(user), after=len(texts), limit=1000
                ),
                metadata=metadata(Role.OPERATOR),
                timeout=ANSWER_S,
            )
            texts += [event.decode() for event in page.events]
            if not page.more:
                return texts


@pytest.mark.asyncio
async def test_websocket_manager_database_service_integration(
    cluster: LocalCluster, http: aiohttp.ClientSession, token: Token, metadata: Metadata
) -> None:
    """What was shown is stored; after a restart of node, registry and store it is the same."""
    tab = await open_tab(http, cluster.url, token("lena"))
    await tab.ask("m1", "one", ANSWER_S)
    await tab.ask("m2", "two", ANSWER_S, agent="count")
    shown = list(tab.texts)
    assert await stored(cluster, "lena", metadata) == shown
    await tab.close()

    holder = tab.ready["manager"]["node_id"]
    for process_id in (holder, "registry", "log"):
        await asyncio.to_thread(cluster.kill, process_id)
    await asyncio.to_thread(cluster.wait_healed)
    again = await open_tab(http, cluster.urls[1], token("lena"), after=0)
    await again.until_sequence(len(shown), ANSWER_S)
    assert again.texts[: len(shown)] == shown
    assert again.ready["stream_id"] == tab.ready["stream_id"]
    assert again.ready["manager"]["epoch"] > tab.ready["manager"]["epoch"]
    await again.close()
    assert (await stored(cluster, "lena", metadata))[: len(shown)] == shown

    # And it goes on: the same id is still known, another one is a new run.
    last = await open_tab(http, cluster.url, token("lena"), after=0)
    await last.send("m1", "another text")
    accepted = await last.until("accepted", ANSWER_S, id="m1")
    assert accepted["duplicate"] is True
    assert (await last.ask("m3", "three", ANSWER_S))["data"]["outcome"] == "success"
    assert_unbroken(last)
    await last.close()


@pytest.mark.asyncio
async def test_websocket_manager_database_service_integration_of_an_outage(
    cluster: LocalCluster, http: aiohttp.ClientSession, token: Token, metadata: Metadata
) -> None:
    """While the store stands still nothing is promised or shown; afterwards nothing is missing."""
    tab = await open_tab(http, cluster.url, token("mona"))
    await tab.ask("m1", "before", ANSWER_S)
    before = len(tab.frames)
    pid = await asyncio.to_thread(cluster.kill, "log", signal.SIGSTOP)
    try:
        await tab.send("m2", "during")
        with pytest.raises(TimeoutError):
            await tab.read(0.5)
        assert len(tab.frames) == before, "neither accepted nor an event came"
    finally:
        os.kill(pid, signal.SIGCONT)
    await tab.until("accepted", ANSWER_S, id="m2")
    while [e["type"] for e in tab.events].count("agent_completed") < 2:
        await tab.until("agent_completed", ANSWER_S)
    assert_unbroken(tab)
    assert {event["epoch"] for event in tab.events} == {tab.ready["manager"]["epoch"]}, "not moved"

    # Killed instead: what was under way is sent again, once.
    await tab.send("m3", "counting", agent="count")
    await tab.until("agent_text", ANSWER_S)
    await asyncio.to_thread(cluster.kill, "log")
    while [e["type"] for e in tab.events].count("agent_completed") < 3:
        await tab.until("agent_completed", ANSWER_S)
    assert tab.events[-1]["data"]["outcome"] == "success"
    assert_unbroken(tab)
    gap_s = max(b - a for a, b in zip(tab.at[:-1], tab.at[1:], strict=True))
    print(f"longest pause with the log killed: {gap_s * 1000:.0f} ms")
    await asyncio.to_thread(cluster.wait_healed)
    assert await stored(cluster, "mona", metadata) == tab.texts
    await tab.close()


# ---- agents


@pytest.mark.asyncio
async def test_websocket_manager_agent_service_integration(
    cluster: LocalCluster, http: aiohttp.ClientSession, token: Token
) -> None:
    """A real agent: the five events with every field that the protocol asks for."""
    tab = await open_tab(http, cluster.url, token("nora"))
    sent_at = time.monotonic()
    await tab.ask("m1", "abc", ANSWER_S)
    assert_unbroken(tab)
    run_id = next(f for f in tab.frames if f["type"] == "accepted")["run_id"]
    events = of_run(tab, run_id)
    message, *rest = [event for event in events if event["type"] != "agent_text"]
    assert [event["type"] for event in rest] == GOLDEN
    assert message["data"] == {"id": "m1", "content": "abc"}
    started, thinking, executing, completed, ended = (event["data"] for event in rest)
    assert started == {"input": "abc", "attempt": 1}
    assert thinking == {"thought": "about abc", "delta": False, "step": 1, "total_steps": 2}
    assert executing["tool_name"] == "reverse" and executing["arguments"] == {"text": "abc"}
    assert completed["tool_call_id"] == executing["tool_call_id"]
    assert (completed["tool_name"], completed["success"]) == ("reverse", True)
    assert completed["result"] == "cba" and completed["duration_ms"] >= 0
    assert (ended["outcome"], ended["response"]) == ("success", "abc is cba")
    assert ended["duration_ms"] >= 0
    for event in rest:
        assert event["agent"] == "golden" and event["thread_id"] == "main"
        assert event["trace"] == message["trace"]
        assert not [name for name, value in event.items() if value is None]
    at = dict(zip((e["type"] for e in tab.events), tab.at, strict=True))
    print(f"agent_started after {(at['agent_started'] - sent_at) * 1000:.0f} ms")
    await tab.close()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("ending", "outcome", "error"),
    [
        ("cancel", "cancelled", None),
        ("error", "failed", "LookupError"),
        ("crash", "failed", "Interrupted"),
        ("crashes", "interrupted", "Interrupted"),
    ],
)
async def test_websocket_manager_agent_service_integration_of_bad_endings(
    ending: str,
    outcome: str,
    error: str | None,
    cluster: LocalCluster,
    http: aiohttp.ClientSession,
    token: Token,
) -> None:
    """However a run ends, it ends once, its open tool call completed before.

    One whose agent is not to be called again ends with its node; any other is continued, but
    not for ever: with the third node it may be the cause.
    """
    user = f"olaf-{ending}"
    tab = await open_tab(http, cluster.url, token(user))
    agents = {"error": "fail", "crash": "once"}
    await tab.send("m1", "something", agent=agents.get(ending, "wait"))
    run_id = (await tab.until("accepted", ANSWER_S))["run_id"]
    if "tool_executing" not in {event["type"] for event in tab.events}:
        await tab.until("tool_executing", ANSWER_S)
    if ending == "cancel":
        await tab.socket.send_json({"type": "cancel", "run_id": run_id})
        await tab.socket.send_json({"type": "cancel", "run_id": run_id})
    elif ending == "crash":
        await asyncio.to_thread(cluster.kill, tab.ready["manager"]["node_id"])
    elif ending == "crashes":
        node = tab.ready["manager"]["node_id"]
        for _ in range(2):
            await asyncio.to_thread(cluster.kill, node)
            node = (await tab.until("manager_moved", ANSWER_S))["data"]["to_node"]
        await asyncio.to_thread(cluster.kill, node)
    if "agent_completed" not in {event["type"] for event in tab.events}:
        await tab.until("agent_completed", ANSWER_S)
    # A second end would come before the next run's.
    assert (await tab.ask("m2", "next", ANSWER_S))["data"]["outcome"] == "success"
    assert_unbroken(tab)
    ends = [e for e in of_run(tab, run_id) if e["type"] == "agent_completed"]
    assert [e["data"]["outcome"] for e in ends] == [outcome]
    assert of_run(tab, run_id)[-1] == ends[0]
    (call,) = [e for e in of_run(tab, run_id) if e["type"] == "tool_completed"]
    assert call["data"]["success"] is False
    if error is not None:
        assert ends[0]["data"]["error"]["type"] == error
    await tab.close()


@pytest.mark.xfail(
    strict=True, raises=SettingsError, reason="limits: the time that a run may take (agent.run_ms)"
)
def test_websocket_manager_agent_service_integration_of_a_timeout() -> None:
    settings = load(AgentSettings, ["--run-ms", "500"], {})
    assert settings.run_ms == 500  # type: ignore[attr-defined]
