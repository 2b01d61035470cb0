"""What waits for an edge travels in messages that gRPC takes, whatever the size of the events."""

from agent_service.server import MOST_BYTES_PER_BATCH, batches_of
from steward.rpc.factory import MAX_MESSAGE_BYTES
from steward.v1 import agent_service_pb2 as pb


def delivery(first: int, size: int) -> pb.Delivery:
    return pb.Delivery(first_sequence=first, last_sequence=first, events=[b"x" * size])


def test_large_events_travel_in_several_messages_in_their_order() -> None:
    items: list[pb.Answer | pb.Delivery] = [delivery(n, 1_000_000) for n in range(1, 41)]
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
