"""Between `steward.v1` messages and the values of the core.

All that came from outside is checked here: what no honest peer sends raises
`StewardError(PROTOCOL_VIOLATION)`.
"""

from collections.abc import Iterable

from registry_service.core import commands, effects
from registry_service.core.commands import PeerId
from registry_service.core.transactions import NodeClaim
from steward.errors import Reason, StewardError
from steward.model.keys import EdgeId, Epoch, NodeId, NodeIncarnation, NodeRev, UserKey
from steward.model.placement import Placement
from steward.v1 import placement_pb2, registry_service_pb2

MOST_USERS = 512
MOST_ITEMS = 4_096
MOST_ID_BYTES = 256
MAX_EPOCH = (1 << 53) - 1


def violation(what: str) -> StewardError:
    return StewardError(Reason.PROTOCOL_VIOLATION, what)


def _id(text: str, what: str) -> str:
    if not text or len(text.encode()) > MOST_ID_BYTES:
        raise violation(f"{what} must have 1 to {MOST_ID_BYTES} bytes")
    return text


def user_in(proto: placement_pb2.UserKey) -> UserKey:
    return UserKey(_id(proto.tenant_id, "tenant_id"), _id(proto.user_id, "user_id"))


def _epoch_in(number: int) -> Epoch:
    if number > MAX_EPOCH:
        raise violation("an epoch is below 2^53")
    return Epoch(number)


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
    return tuple(
        commands.UserQuery(user_in(query.user), _epoch_in(query.min_epoch)) for query in proto.users
    )


def claim_in(hello: registry_service_pb2.NodeHello) -> NodeClaim:
    if not hello.address.rpartition(":")[2].isdecimal():
        raise violation("address must be host:port")
    return NodeClaim(
        NodeId(_id(hello.node_id, "node_id")),
        hello.boot_id,
        _id(hello.nonce, "nonce"),
        _id(hello.address, "address"),
        hello.zone,
        hello.capacity,
        hello.version,
        hello.pid,
    )


def edge_id_in(hello: registry_service_pb2.EdgeHello) -> EdgeId:
    return EdgeId(_id(hello.edge_id, "edge_id"))


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
        case "refusal":
            refusal = request.refusal
            return commands.ReportRefusal(
                peer,
                refusal.kind,
                user_in(refusal.user) if refusal.HasField("user") else None,
                _epoch_in(refusal.epoch),
                refusal.evidence,
                refusal.traceparent,
            )
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
            commands.Release(user_in(item.user), _epoch_in(item.epoch), item.cause)
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
            incarnation = NodeIncarnation(NodeId(report.node_id), NodeRev(report.node_rev))
            return commands.ReportUnreachable(peer, incarnation, report.evidence)
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


def resolved_out(
    resolved: effects.ManagersResolved,
) -> registry_service_pb2.ResolveManagersResponse:
    """The hot answer: filled in place, since each message made and copied costs a microsecond."""
    response = registry_service_pb2.ResolveManagersResponse(
        request_id=resolved.request_id, indexes=resolved.indexes, more=resolved.more
    )
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
    return response


def fenced_out(fenced: effects.NodeFenced) -> registry_service_pb2.NodeFenced:
    node_id, node_rev = fenced.incarnation
    return registry_service_pb2.NodeFenced(node_id=node_id, node_rev=node_rev, cause=fenced.cause)


def node_response(message: effects.Message) -> registry_service_pb2.HoldNodeSessionResponse:
    """A message to a node, ready for its stream."""
    response = registry_service_pb2.HoldNodeSessionResponse
    match message:
        case effects.RegistryBeat(beat):
            return response(beat=registry_service_pb2.NodeBeat(beat=beat))
        case effects.LeaseRenewed(renewal, ttl_ms):
            renewed = registry_service_pb2.LeaseRenewed(renewal=renewal, ttl_ms=ttl_ms)
            return response(renewed=renewed)
        case effects.PlacementsGranted(placements):
            granted = registry_service_pb2.PlacementsGranted(
                placements=[placement_out(placement) for placement in placements]
            )
            return response(granted=granted)
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
        case effects.NodeWelcome(node_rev, ttl_ms, beat_ms, registry_id):
            welcome = registry_service_pb2.NodeWelcome(
                node_rev=node_rev, ttl_ms=ttl_ms, beat_ms=beat_ms, registry_id=registry_id
            )
            return response(welcome=welcome)
        case _:
            raise TypeError(f"{type(message).__name__} is no message to a node")


def edge_response(message: effects.Message) -> registry_service_pb2.HoldEdgeSessionResponse:
    """A message to an edge, ready for its stream."""
    response = registry_service_pb2.HoldEdgeSessionResponse
    match message:
        case effects.ManagersResolved():
            return response(resolved=resolved_out(message))
        case effects.NodeFenced():
            return response(node_fenced=fenced_out(message))
        case effects.EdgeWelcome(registry_id):
            return response(welcome=registry_service_pb2.EdgeWelcome(registry_id=registry_id))
        case _:
            raise TypeError(f"{type(message).__name__} is no message to an edge")


def cluster_out(
    cluster: str, described: effects.ClusterDescribed
) -> registry_service_pb2.DescribeClusterResponse:
    nodes = [
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
        for node in described.nodes
    ]
    return registry_service_pb2.DescribeClusterResponse(
        cluster=cluster,
        nodes=nodes,
        revision=described.revision,
        placements=described.placements,
        edges=described.edges,
    )
