"""How many operations travel together, and how many placements are remembered."""

from registry_service.core import commands, effects
from registry_service.core.commands import PeerId, TransactionId
from registry_service.core.config import RegistryConfig
from registry_service.core.effects import Commit
from registry_service.core.node import NodeTable
from registry_service.core.pipeline import Answer, StorePipeline
from registry_service.core.placements import Placements
from registry_service.core.registry import Registry
from registry_service.core.transactions import (
    Committed,
    NodeClaim,
    PlacementRead,
    ReadPlacement,
    StoreView,
    Unknown,
)
from registry_service.core.turn import Turn
from registry_service.store.memory import MemoryDisk
from steward.model.keys import EdgeId, Epoch, NodeId, NodeRev, Revision, UserKey
from steward.model.placement import Placement

EDGE, NODE = PeerId(1), PeerId(2)


def user(number: int) -> UserKey:
    return UserKey("t", f"user-{number}")


def placement(number: int, epoch: int) -> Placement:
    return Placement(user(number), Epoch(epoch), NodeId("n1"), NodeRev(1), "h:1")


def commits(turn: Turn) -> list[Commit]:
    return [effect for effect in turn.finish() if isinstance(effect, Commit)]


def test_a_batch_takes_what_the_engine_takes_and_no_more() -> None:
    for most, sizes in ((3, [3, 3]), (100, [5, 5])):
        turn = Turn()
        store = StorePipeline(turn, batch=5, in_flight=2)
        store.recover(StoreView(0, Revision(0), most_operations=most))
        for number in range(20):
            store.submit(ReadPlacement(user(number)), lambda answer: None)
        store.flush()
        assert [len(commit.operations) for commit in commits(turn)] == sizes


def test_an_operation_is_decided_once_and_told_whether_it_was_repeated() -> None:
    turn = Turn()
    turn.revision = Revision(7)
    store = StorePipeline(turn, batch=5, in_flight=1)
    made: list[UserKey] = []
    told: list[tuple[UserKey, Revision | None]] = []

    def make(subject: UserKey) -> ReadPlacement:
        made.append(subject)
        return ReadPlacement(subject)

    def then(answer: Answer) -> None:
        told.append((answer.subject, answer.repeated_since))

    store.submit_late(make, user(1), then)
    store.flush()
    turn.revision = Revision(9)
    store.finish(TransactionId(1), Unknown())
    store.flush()
    first, second = commits(turn)
    assert first.operations == second.operations
    store.finish(TransactionId(2), Committed((PlacementRead(None, False),), Revision(9)))
    assert made == [user(1)]
    assert told == [(user(1), 7)]


def test_the_oldest_placements_are_forgotten_when_there_are_too_many() -> None:
    config = RegistryConfig(cached_placements=1_000)
    turn = Turn()
    placements = Placements(config, turn, NodeTable(config, turn))
    for number in range(5_000):
        placements.learn(placement(number, number + 1))
        if number % 500 == 499:
            known = [placements.last(user(each)) is not None for each in range(number + 1)]
            assert sum(known) <= 1_000
            assert sum(known) > min(number, 990)
            assert known == sorted(known)
            assert known[-1]


def test_users_of_a_large_request_are_placed_in_one_batch_if_the_engine_takes_it() -> None:
    disk = MemoryDisk(lambda: 0)
    term, view = disk.open()
    machine = Registry(RegistryConfig())
    size = view.most_operations
    sizes: list[int] = []
    answers: list[effects.ManagersResolved] = []
    queries = tuple(commands.UserQuery(user(number)) for number in range(2 * size))
    waiting: list[commands.Command] = [
        commands.Recover(view),
        commands.OpenNodeSession(NODE, NodeClaim(NodeId("n1"), "boot", "nonce", "h:1")),
        commands.ReportLogHead(NODE, Epoch(0)),
        commands.OpenEdgeSession(EDGE, EdgeId("e1")),
        commands.ResolveManagers(EDGE, 1, queries),
    ]
    while waiting:
        for effect in machine.handle(0, waiting.pop(0)):
            if isinstance(effect, Commit):
                sizes.append(len(effect.operations))
                outcome = disk.apply(term, effect.operations)
                waiting.insert(0, commands.FinishTransaction(effect.transaction, outcome))
            elif isinstance(effect, effects.Send):
                if isinstance(effect.message, effects.ManagersResolved):
                    answers.append(effect.message)
    assert sizes[-2:] == [size, size]
    (answer,) = answers
    assert [result.user for result in answer.results] == [query.user for query in queries]
