"""A user that has to wait delays no other user of the same request."""

from registry_service.core import commands, effects
from registry_service.core.commands import Command, PeerId
from registry_service.core.config import RegistryConfig
from registry_service.core.registry import Registry
from registry_service.core.transactions import NodeClaim
from registry_service.store.memory import MemoryDisk
from steward.errors import Reason
from steward.model.keys import Epoch, NodeId, UserKey
from steward.model.placement import Placement

EDGE = PeerId(1)
NODE = PeerId(2)
ANN, BOB = UserKey("t", "ann"), UserKey("t", "bob")


class Cluster:
    """A registry with one node, whose store answers at once."""

    def __init__(self) -> None:
        self.disk = MemoryDisk(lambda: 0)
        self.machine = Registry(RegistryConfig())
        self.term, view = self.disk.open()
        self.sent: list[effects.ManagersResolved] = []
        self.give(0, commands.Recover(view))
        claim = NodeClaim(NodeId("n1"), "boot", "nonce", "127.0.0.1:1")
        self.give(0, commands.OpenNodeSession(NODE, claim))
        self.give(0, commands.ReportLogHead(NODE, Epoch(0)))

    def give(self, now_ms: int, command: Command) -> None:
        waiting = [command]
        while waiting:
            for effect in self.machine.handle(now_ms, waiting.pop(0)):
                if isinstance(effect, effects.Commit):
                    outcome = self.disk.apply(self.term, effect.operations)
                    waiting.append(commands.FinishTransaction(effect.transaction, outcome))
                elif isinstance(effect, effects.Send) and effect.peer == EDGE:
                    assert isinstance(effect.message, effects.ManagersResolved)
                    self.sent.append(effect.message)

    def resolve(self, as_ready: bool) -> None:
        """Ann must wait for an epoch that nobody has; bob can be placed."""
        queries = (commands.UserQuery(ANN, Epoch(1_000)), commands.UserQuery(BOB))
        self.give(10, commands.ResolveManagers(EDGE, 7, queries, as_ready))


def test_users_that_are_ready_are_answered_and_the_others_follow() -> None:
    cluster = Cluster()
    cluster.resolve(as_ready=True)
    (first,) = cluster.sent
    assert (first.request_id, first.indexes, first.more) == (7, (1,), True)
    assert isinstance(first.results[0], Placement) and first.results[0].user == BOB
    cluster.give(5_000, commands.Tick())
    second = cluster.sent[1]
    assert (second.request_id, second.indexes, second.more) == (7, (0,), False)
    refused = second.results[0]
    assert isinstance(refused, effects.UserRefused)
    assert (refused.user, refused.reason) == (ANN, Reason.MANAGER_UNAVAILABLE)


def test_a_call_is_answered_as_a_whole() -> None:
    cluster = Cluster()
    cluster.resolve(as_ready=False)
    assert cluster.sent == []
    cluster.give(5_000, commands.Tick())
    (whole,) = cluster.sent
    assert [result.user for result in whole.results] == [ANN, BOB]
    assert (whole.indexes, whole.more) == ((), False)
