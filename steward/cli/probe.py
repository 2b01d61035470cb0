"""Looks at a process through its ops port: is it ready, and what do its metrics say.

A small HTTP client of its own, because the supervisor polls while everything starts and
must not wait for the import of a big one.
"""

import asyncio
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

TIMEOUT_S = 2.0
MAX_BODY_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Readiness:
    """The answer of /readyz. `why` says what is missing."""

    ready: bool
    why: str = ""


async def readiness(address: str) -> Readiness:
    """Ask /readyz at `host:port`. A process that does not answer is not ready; never raises."""
    try:
        status, body = await http_get(address, "/readyz")
    except (OSError, TimeoutError, ValueError):
        return Readiness(False, "does not answer yet")
    if status == 200:
        return Readiness(True)
    try:
        return Readiness(False, str(json.loads(body)["why"]))
    except (ValueError, KeyError, TypeError):
        return Readiness(False, f"answers {status}")


async def metric_sums(address: str) -> Mapping[str, float]:
    """Metric name → sum over its label sets, from /metrics. Empty when there is no answer."""
    try:
        status, body = await http_get(address, "/metrics")
    except (OSError, TimeoutError, ValueError):
        return {}
    return parse_metrics(body.decode(errors="replace")) if status == 200 else {}


def parse_metrics(text: str) -> Mapping[str, float]:
    """Sums of a Prometheus text page, by metric name. Lines that can't be read are passed over."""
    sums: defaultdict[str, float] = defaultdict(float)
    for line in text.splitlines():
        labelled, brace, rest = line.rpartition("}")
        name, _, plain = line.partition(" ")
        if brace:
            name, plain = labelled.partition("{")[0], rest
        try:
            value = float(plain.split()[0])
        except (ValueError, IndexError):
            continue
        if name != "#":
            sums[name] += value
    return dict(sums)


async def http_get(address: str, path: str) -> tuple[int, bytes]:
    """One GET to `host:port`: status and body.

    Raises OSError, TimeoutError after 2 s, ValueError for what is not HTTP.
    """
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(TIMEOUT_S):
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            request = f"GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
            writer.write(request.encode())
            head = await reader.readuntil(b"\r\n\r\n")
            status = int(head.split(b" ", 2)[1])
            return status, await _body(reader)
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, IndexError) as error:
            raise ValueError(f"no HTTP answer from {address}") from error
        finally:
            writer.close()


async def _body(reader: asyncio.StreamReader) -> bytes:
    # The connection is closed by the server at the end of the answer.
    chunks: list[bytes] = []
    size = 0
    while chunk := await reader.read(65536):
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise ValueError("the answer is too long")
        chunks.append(chunk)
    return b"".join(chunks)
