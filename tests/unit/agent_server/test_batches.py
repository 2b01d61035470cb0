"""What waits for an edge travels in messages that gRPC takes, whatever the size of the events."""

from agent_service.server import MOST_BYTES_PER_BATCH, EdgeStream, Probe, batches_of
from steward.model.keys import EdgeId, Epoch, UserKey
from steward.rpc.factory import MAX_MESSAGE_BYTES
from steward.v1 import agent_service_pb2 as pb


def delivery(first: int, size: int) -> pb.Delivery:
    return pb.Delivery(first_sequence=first, last_sequence=first, events=[b"x" * size])


def test_large_events_travel_in_several_messages_in_their_order() -> None:
    items = [delivery(n, 1_000_000) for n in range(1, 41)]
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
    items = [delivery(n, 1_000_000) for n in range(1, 11)]
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
