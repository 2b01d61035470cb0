"""Between `steward.v1` messages and the values of the core.

All that came from outside is checked here: what no honest peer sends raises
`StewardError(PROTOCOL_VIOLATION)`.
"""

from collections.abc import Callable, Iterable

from registry_service.core import commands, effects
from registry_service.core.commands import PeerId
from registry_service.core.transactions import NodeClaim
from steward.errors import Reason, StewardError
from steward.model.evidence import clean
from steward.model.keys import EdgeId, Epoch, NodeId, NodeIncarnation, NodeRev, UserKey
from steward.model.placement import Placement
from steward.model.violations import ViolationKind
from steward.tokens import MAX_ID_CHARS, is_id
from steward.v1 import placement_pb2, registry_service_pb2

MOST_USERS = 512
MOST_ITEMS = 4_096
MOST_TEXT_BYTES = 256
MOST_TRACEPARENT_CHARS = 64
MAX_EPOCH = (1 << 53) - 1


def violation(what: str) -> StewardError:
    return StewardError(Reason.PROTOCOL_VIOLATION, what)


def id_in(text: str, what: str) -> str:
    """An id as everywhere: 1 to 128 printable characters."""
    if not is_id(text):
        raise violation(f"{what} must have 1 to {MAX_ID_CHARS} printable characters")
    return text


def _text_in(text: str, what: str, *, least: int = 0) -> str:
    """A text that is kept as it is."""
    if not least <= len(text.encode()) <= MOST_TEXT_BYTES or not (text or "-").isprintable():
        raise violation(f"{what} must have {least} to {MOST_TEXT_BYTES} printable bytes")
    return text


def user_in(proto: placement_pb2.UserKey) -> UserKey:
    return UserKey(id_in(proto.tenant_id, "tenant_id"), id_in(proto.user_id, "user_id"))


def node_id_in(text: str) -> NodeId:
    return NodeId(id_in(text, "node_id"))


def incarnation_in(node_id: str, node_rev: int) -> NodeIncarnation:
    if node_rev > MAX_EPOCH:
        raise violation("a node_rev is below 2^53")
    return NodeIncarnation(node_id_in(node_id), NodeRev(node_rev))


def epoch_in(number: int) -> Epoch:
    if number > MAX_EPOCH:
        raise violation("an epoch is below 2^53")
    return Epoch(number)


def kind_in(text: str) -> ViolationKind:
    """A kind of the table; another one is a mistake, or of a newer version."""
    try:
        return ViolationKind(text)
    except ValueError:
        raise violation(
            f"{clean(text)[:64]!r} is no kind of violation; docs/violations.md lists them"
        ) from None


def traceparent_in(text: str) -> str:
    if len(text) > MOST_TRACEPARENT_CHARS or not (text or "-").isprintable():
        raise violation("a traceparent is that of W3C Trace Context")
    return text


def cause_in(text: str) -> str:
    """Why something was asked for, in the words of who asked: one line, bounded."""
    return clean(text)[:MAX_ID_CHARS]


def users_in(protos: Iterable[placement_pb2.UserKey]) -> tuple[UserKey, ...]:
    users = tuple(user_in(proto) for proto in protos)
    if len(users) > MOST_ITEMS:
        raise violation(f"at most {MOST_ITEMS} users in one message")
    return users


def queries_in(
    proto: registry_service_pb2.ResolveManagersRequest,
) -> tuple[commands.UserQuery, ...]:
    if len(proto.users) > MOST_USERS:
        raise violation(f"at most {MOST_USERS} users in one resolve")
    queries = []
    # Most users of a request are of one tenant: it is looked at once.
    tenant = ""
    for query in proto.users:
        user = query.user
        if user.tenant_id != tenant or not tenant:
            tenant = id_in(user.tenant_id, "tenant_id")
        key = UserKey(tenant, id_in(user.user_id, "user_id"))
        queries.append(commands.UserQuery(key, epoch_in(query.min_epoch), query.traceparent))
    return tuple(queries)


def claim_in(hello: registry_service_pb2.NodeHello) -> NodeClaim:
    if not hello.address.rpartition(":")[2].isdecimal():
        raise violation("address must be host:port")
    return NodeClaim(
        node_id_in(hello.node_id),
        _text_in(hello.boot_id, "boot_id"),
        _text_in(hello.nonce, "nonce", least=1),
        _text_in(hello.address, "address", least=1),
        _text_in(hello.zone, "zone"),
        hello.capacity,
        _text_in(hello.version, "version"),
        hello.pid,
    )


def edge_id_in(hello: registry_service_pb2.EdgeHello) -> EdgeId:
    return EdgeId(id_in(hello.edge_id, "edge_id"))


def node_command(
    peer: PeerId, request: registry_service_pb2.HoldNodeSessionRequest
) -> commands.Command:
    """What a node says after its hello."""
    match request.WhichOneof("body"):
        case "beat":
            beat = request.beat
            return commands.ReceiveBeat(
                peer, beat.loop_lag_ms, beat.managers, beat.open_runs, beat.log_reachable
            )
        case "renew":
            return commands.RenewLease(peer, request.renew.renewal)
        case "confirm":
            confirm = request.confirm
            return commands.ConfirmPlacements(peer, confirm.request_id, users_in(confirm.users))
        case "release":
            return _release_in(peer, request.release)
        case "drain":
            return commands.AnnounceDrain(peer)
        case "log_head":
            return commands.ReportLogHead(peer, epoch_in(request.log_head.largest_fence))
        case "adopt":
            return commands.AdoptUsers(peer, users_in(request.adopt.users))
        case other:
            raise violation(f"a node session takes no {other or 'empty message'} now")


def _release_in(
    peer: PeerId, release: registry_service_pb2.ReleasePlacements
) -> commands.ReleasePlacements:
    if len(release.placements) > MOST_ITEMS:
        raise violation(f"at most {MOST_ITEMS} placements in one release")
    return commands.ReleasePlacements(
        peer,
        release.request_id,
        tuple(
            commands.Release(
                user_in(item.user),
                epoch_in(item.epoch),
                cause_in(item.cause),
                item.handoff,
                item.activate,
            )
            for item in release.placements
        ),
    )


def edge_command(
    peer: PeerId, request: registry_service_pb2.HoldEdgeSessionRequest
) -> commands.Command:
    """What an edge says after its hello."""
    match request.WhichOneof("body"):
        case "resolve":
            resolve = request.resolve
            return commands.ResolveManagers(
                peer, resolve.request_id, queries_in(resolve), as_ready=True
            )
        case "unreachable":
            report = request.unreachable
            incarnation = incarnation_in(report.node_id, report.node_rev)
            return commands.ReportUnreachable(peer, incarnation, clean(report.evidence))
        case other:
            raise violation(f"an edge session takes no {other or 'empty message'} now")


def user_out(user: UserKey) -> placement_pb2.UserKey:
    return placement_pb2.UserKey(tenant_id=user.tenant, user_id=user.user)


def placement_out(placement: Placement) -> placement_pb2.Placement:
    return placement_pb2.Placement(
        user=user_out(placement.user),
        epoch=placement.epoch,
        node_id=placement.node_id,
        node_rev=placement.node_rev,
        address=placement.address,
    )


def _fill_placements(
    add: Callable[[], placement_pb2.Placement], placements: Iterable[Placement]
) -> None:
    """Fill placements in place, as they come in thousands."""
    for placement in placements:
        item = add()
        user = item.user
        user.tenant_id, user.user_id = placement.user
        item.epoch = placement.epoch
        item.node_id = placement.node_id
        item.node_rev = placement.node_rev
        item.address = placement.address


def resolved_out(
    resolved: effects.ManagersResolved,
) -> registry_service_pb2.ResolveManagersResponse:
    response = registry_service_pb2.ResolveManagersResponse()
    _fill_resolved(response, resolved)
    return response


def _fill_resolved(
    response: registry_service_pb2.ResolveManagersResponse, resolved: effects.ManagersResolved
) -> None:
    """The hot answer: filled in place, since each message made and copied costs a microsecond."""
    response.request_id = resolved.request_id
    response.indexes.extend(resolved.indexes)
    response.more = resolved.more
    add = response.results.add
    for result in resolved.results:
        item = add()
        user = item.user
        user.tenant_id, user.user_id = result.user
        if isinstance(result, Placement):
            out = item.placement
            out.user.CopyFrom(user)
            out.epoch = result.epoch
            out.node_id = result.node_id
            out.node_rev = result.node_rev
            out.address = result.address
        else:
            refusal = item.refusal
            refusal.reason = result.reason.value
            refusal.message = result.message
            refusal.retry_after_ms = result.retry_after_ms


def fenced_out(fenced: effects.NodeFenced) -> registry_service_pb2.NodeFenced:
    node_id, node_rev = fenced.incarnation
    return registry_service_pb2.NodeFenced(node_id=node_id, node_rev=node_rev, cause=fenced.cause)


def holdings_question(asked: effects.AskHoldings) -> registry_service_pb2.AskHoldings:
    return registry_service_pb2.AskHoldings(question=asked.question, buckets=asked.buckets)


def fences_question(asked: effects.AskFences) -> registry_service_pb2.AskFences:
    after = user_out(asked.after) if asked.after is not None else None
    return registry_service_pb2.AskFences(
        question=asked.question, users=[user_out(user) for user in asked.users], after=after
    )


def node_response(message: effects.Message) -> registry_service_pb2.HoldNodeSessionResponse:
    """A message to a node, ready for its stream."""
    response = registry_service_pb2.HoldNodeSessionResponse
    match message:
        case effects.RegistryBeat(beat):
            return response(beat=registry_service_pb2.NodeBeat(beat=beat))
        case effects.LeaseRenewed(renewal, ttl_ms):
            renewed = registry_service_pb2.LeaseRenewed(renewal=renewal, ttl_ms=ttl_ms)
            return response(renewed=renewed)
        case effects.PlacementsGranted(placements, activate):
            out = response()
            out.granted.activate = activate
            _fill_placements(out.granted.placements.add, placements)
            return out
        case effects.PlacementsConfirmed(request_id, placements):
            confirmed = registry_service_pb2.PlacementsConfirmed(
                request_id=request_id,
                placements=[placement_out(placement) for placement in placements],
            )
            return response(confirmed=confirmed)
        case effects.PlacementsReleased(request_id, deleted):
            released = registry_service_pb2.PlacementsReleased(
                request_id=request_id, deleted=deleted
            )
            return response(released=released)
        case effects.NodeFenced():
            return response(fenced=fenced_out(message))
        case effects.NodeWelcome(node_rev, ttl_ms, beat_ms, registry_id, strict_tenants):
            welcome = registry_service_pb2.NodeWelcome(
                node_rev=node_rev,
                ttl_ms=ttl_ms,
                beat_ms=beat_ms,
                registry_id=registry_id,
                strict_tenants=strict_tenants,
            )
            return response(welcome=welcome)
        case effects.HandOffUsers(users, cause):
            hand_off = registry_service_pb2.HandOffUsers(users=_owned_out(users), cause=cause)
            return response(hand_off=hand_off)
        case effects.EvictManagers(users):
            return response(evict=registry_service_pb2.EvictManagers(users=_owned_out(users)))
        case effects.ClusterMembers(node_ids):
            return response(members=registry_service_pb2.ClusterMembers(node_ids=node_ids))
        case effects.AskLogHead():
            return response(ask_log_head=registry_service_pb2.AskLogHead())
        case effects.AskHoldings():
            return response(ask_holdings=holdings_question(message))
        case effects.AskFences():
            return response(ask_fences=fences_question(message))
        case _:
            raise TypeError(f"{type(message).__name__} is no message to a node")


def edge_response(message: effects.Message) -> registry_service_pb2.HoldEdgeSessionResponse:
    """A message to an edge, ready for its stream."""
    response = registry_service_pb2.HoldEdgeSessionResponse
    match message:
        case effects.ManagersResolved():
            out = response()
            _fill_resolved(out.resolved, message)
            return out
        case effects.NodeFenced():
            return response(node_fenced=fenced_out(message))
        case effects.EdgeWelcome(registry_id):
            return response(welcome=registry_service_pb2.EdgeWelcome(registry_id=registry_id))
        case effects.PlacementMoved(placement):
            moved = registry_service_pb2.PlacementMoved(placement=placement_out(placement))
            return response(moved=moved)
        case effects.ClusterNodes(nodes):
            return response(nodes=registry_service_pb2.ClusterNodes(nodes=_nodes_out(nodes)))
        case effects.EvictSessions(user, cause):
            evicted = registry_service_pb2.UserEvicted(user=user_out(user), cause=cause)
            return response(evicted=evicted)
        case effects.AskHoldings():
            return response(ask_holdings=holdings_question(message))
        case effects.AskConnections(question, users):
            asked = registry_service_pb2.AskConnections(
                question=question, users=[user_out(user) for user in users]
            )
            return response(ask_connections=asked)
        case _:
            raise TypeError(f"{type(message).__name__} is no message to an edge")


def cluster_out(
    cluster: str, described: effects.ClusterDescribed
) -> registry_service_pb2.DescribeClusterResponse:
    return registry_service_pb2.DescribeClusterResponse(
        cluster=cluster,
        nodes=_nodes_out(described.nodes),
        revision=described.revision,
        placements=described.placements,
        edges=described.edges,
    )


def _owned_out(users: Iterable[effects.OwnedUser]) -> list[registry_service_pb2.OwnedUser]:
    return [
        registry_service_pb2.OwnedUser(user=user_out(user), epoch=epoch) for user, epoch in users
    ]


def _nodes_out(nodes: Iterable[effects.NodeStatus]) -> list[placement_pb2.Node]:
    return [
        placement_pb2.Node(
            node_id=node.record.claim.node_id,
            node_rev=node.record.node_rev,
            address=node.record.claim.address,
            zone=node.record.claim.zone,
            capacity=node.record.claim.capacity,
            version=node.record.claim.version,
            draining=node.draining,
            managers=node.managers,
        )
        for node in nodes
    ]
