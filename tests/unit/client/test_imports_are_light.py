"""Importing the package costs nothing, and the client never pulls in gRPC."""

import subprocess
import sys


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after `code`."""
    program = f"{code}\nimport sys\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = modules_after("import steward")
    assert not loaded & {"grpc", "aiohttp", "google", "orjson", "rich", "jwt", "opentelemetry"}


def test_the_client_needs_no_grpc() -> None:
    loaded = modules_after("from steward import Client; assert Client.__name__ == 'Client'")
    assert "aiohttp" in loaded
    assert not loaded & {"grpc", "google", "uvloop", "opentelemetry", "jwt", "cryptography"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    loaded = modules_after("import steward\nassert not hasattr(steward, 'Server')")
    assert "aiohttp" not in loaded
