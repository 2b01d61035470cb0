"""Reserved ports: nobody else gets them, the child does, again and again."""

import socket
from collections.abc import Iterator

import pytest

from steward.cli.ports import PortInUse, PortReservations


@pytest.fixture
def ports() -> Iterator[PortReservations]:
    reservations = PortReservations()
    yield reservations
    reservations.close()


def listener(port: int) -> socket.socket:
    """A server as our children make theirs."""
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    server.bind(("127.0.0.1", port))
    server.listen()
    return server


def test_a_child_listens_on_a_reserved_port_again_and_again(ports: PortReservations) -> None:
    port = ports.reserve()
    for _ in range(2):
        with listener(port) as server, socket.create_connection(("127.0.0.1", port)):
            accepted, _address = server.accept()
            with accepted:
                assert accepted.getsockname()[1] == port


def test_a_port_with_a_listener_is_in_use(ports: PortReservations) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(PortInUse, match=f"port 127.0.0.1:{port} is in use"):
            ports.reserve(port)


def test_a_port_that_another_cluster_reserved_is_in_use(ports: PortReservations) -> None:
    port = ports.reserve()
    other = PortReservations()
    with pytest.raises(PortInUse):
        other.reserve(port)
    with listener(port), pytest.raises(PortInUse):
        other.reserve(port)


def test_a_closed_reservation_gives_the_port_back(ports: PortReservations) -> None:
    port = ports.reserve()
    ports.close()
    other = PortReservations()
    assert other.reserve(port) == port
    other.close()


def test_ports_that_do_not_exist_are_refused(ports: PortReservations) -> None:
    with pytest.raises(PortInUse, match="can't be used"):
        ports.reserve(70_000)


def test_free_ports_are_all_different(ports: PortReservations) -> None:
    assert len({ports.reserve() for _ in range(50)}) == 50
