"""What waits for an edge travels in messages that gRPC takes, whatever the size of the events."""

from agent_service import convert
from agent_service.batches import MOST_BYTES_PER_BATCH, Item, Probe
from agent_service.batches import batches_of as batches_in_parts
from agent_service.core.effects import Deliver
from agent_service.edge_streams import EdgeStream
from steward.model.deliveries import HEAD, decode_texts, encode_texts, user_check
from steward.model.keys import EdgeId, Epoch, Sequence, UserKey
from steward.rpc.factory import MAX_MESSAGE_BYTES
from steward.v1 import agent_service_pb2 as pb

ALICE, BOB = UserKey("default", "alice"), UserKey("default", "bob")
EDGE = EdgeId("edge-0#1")


def batches_of(items: list[Item]) -> list[pb.NodeBatch]:
    return [batch.whole() for batch in batches_in_parts(items)]


def delivery(first: int, size: int) -> pb.Delivery:
    return pb.Delivery(first_sequence=first, last_sequence=first, events=[b"x" * size])


def test_large_events_travel_in_several_messages_in_their_order() -> None:
    items = [delivery(n, 50_000) for n in range(1, 41)]
    batches = list(batches_of(items))
    assert all(batch.ByteSize() < MAX_MESSAGE_BYTES for batch in batches)
    assert all(batch.ByteSize() <= MOST_BYTES_PER_BATCH + 1_000 for batch in batches)
    sent = [one.first_sequence for batch in batches for one in batch.deliveries]
    assert sent == list(range(1, 41))


def test_small_items_travel_together_answers_apart_from_deliveries() -> None:
    answer = pb.Answer(command_id=7, attached=pb.Attached(sequence=3))
    (batch,) = batches_of([delivery(4, 200), answer, delivery(5, 200)])
    assert [one.command_id for one in batch.answers] == [7]
    assert [one.first_sequence for one in batch.deliveries] == [4, 5]


def test_an_item_above_the_bound_travels_alone() -> None:
    large = delivery(2, MOST_BYTES_PER_BATCH + 1)
    batches = list(batches_of([delivery(1, 10), large, delivery(3, 10)]))
    assert [[one.first_sequence for one in batch.deliveries] for batch in batches] == [
        [1],
        [2],
        [3],
    ]


def test_a_probe_comes_back_behind_what_was_put_before_it() -> None:
    items = [delivery(n, 50_000) for n in range(1, 11)]
    batches = list(batches_of([*items[:9], Probe(3), items[9], Probe(4)]))
    seen: list[int] = []
    for batch in batches:
        seen += [one.first_sequence for one in batch.deliveries]
        for number in batch.probes:
            assert seen[:9] == list(range(1, 10)) if number == 3 else seen == list(range(1, 11))
    assert [number for batch in batches for number in batch.probes] == [3, 4]


def test_an_aborted_stream_takes_nothing_more() -> None:
    stream = EdgeStream(EdgeId("edge-0#1"))
    stream.probed(1)
    stream.abort()
    stream.client_taken(UserKey("default", "alice"), Epoch(3), "phone")
    assert stream.aborted
    assert len(stream.outbox) == 1, "what waits is not sent either"


def attach(channel: int, user: UserKey = ALICE) -> pb.EdgeCommand:
    command = pb.EdgeCommand(user=convert.user_to_proto(user))
    command.attach.channel = channel
    return command


def events(first: int, *payloads: bytes) -> Deliver:
    last = first + len(payloads) - 1
    return Deliver((EDGE,), Sequence(first), Sequence(last), payloads)


def waiting(stream: EdgeStream) -> pb.NodeBatch:
    (batch,) = batches_of(list(stream.outbox._items))
    return batch


def test_deliveries_to_an_edge_that_named_a_channel_are_packed() -> None:
    stream = EdgeStream(EDGE)
    stream.heard(ALICE, attach(5))
    stream.deliver(ALICE, Epoch(3), events(8, b"one", b"two"))
    stream.deliver(BOB, Epoch(4), events(1, b"three"))
    batch = waiting(stream)
    frames = encode_texts([b"one", b"two"])
    assert batch.frames == frames
    assert batch.heads == HEAD.pack(5, 3, 8, 2, len(frames), user_check(ALICE))
    assert [one.user.user_id for one in batch.deliveries] == ["bob"]


def test_consecutive_deliveries_of_a_channel_travel_as_one() -> None:
    stream = EdgeStream(EDGE)
    stream.heard(ALICE, attach(5))
    stream.heard(BOB, attach(6, BOB))
    for epoch, first in ((3, 1), (3, 2), (3, 4), (4, 5)):
        stream.deliver(ALICE, Epoch(epoch), events(first, b"a%d" % first))
        stream.deliver(BOB, Epoch(1), events(first, b"b%d" % first))
    batch = waiting(stream)
    heads = list(HEAD.iter_unpack(batch.heads))
    at, found = 0, []
    for channel, epoch, first, count, size, _ in heads:
        found.append((channel, epoch, first, decode_texts(batch.frames[at : at + size])))
        assert len(found[-1][3]) == count
        at += size
    assert at == len(batch.frames)
    assert [one for one in found if one[0] == 5] == [
        (5, 3, 1, [b"a1", b"a2"]),
        (5, 3, 4, [b"a4"]),
        (5, 4, 5, [b"a5"]),
    ]
    assert [one[3] for one in found if one[0] == 6] == [[b"b1", b"b2"], [b"b4", b"b5"]]


def test_the_check_is_of_the_user_whose_manager_sends_not_of_who_named_the_channel() -> None:
    stream = EdgeStream(EDGE)
    stream.heard(ALICE, attach(5))
    stream._channels[BOB] = 5
    stream.deliver(BOB, Epoch(3), events(1, b"secret"))
    *_, check = HEAD.unpack(waiting(stream).heads)
    assert check == user_check(BOB) != user_check(ALICE)


def test_a_channel_ends_with_a_detach_or_an_attach_that_names_none() -> None:
    for last in (pb.EdgeCommand(detach=pb.Detach()), attach(0)):
        stream = EdgeStream(EDGE)
        stream.heard(ALICE, attach(5))
        stream.heard(ALICE, last)
        stream.deliver(ALICE, Epoch(3), events(1, b"one"))
        batch = waiting(stream)
        assert not batch.heads and len(batch.deliveries) == 1


def test_packed_deliveries_keep_to_the_bound_of_a_message() -> None:
    stream = EdgeStream(EDGE)
    stream.heard(ALICE, attach(5))
    for first in range(1, 11):
        stream.deliver(ALICE, Epoch(3), events(first, b"x" * 50_000))
    stream.probed(9)
    batches = list(batches_of(list(stream.outbox._items)))
    assert len(batches) > 1
    assert all(batch.ByteSize() <= MOST_BYTES_PER_BATCH + 1_000 for batch in batches)
    assert [list(batch.probes) for batch in batches][-1] == [9]
    sequences = [
        first + n
        for batch in batches
        for _, _, first, count, _, _ in HEAD.iter_unpack(batch.heads)
        for n in range(count)
    ]
    assert sequences == list(range(1, 11))
