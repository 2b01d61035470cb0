"""The stores of a cluster of machines: etcd and PostgreSQL, asked once each, with a deadline.

What is asked changes nothing: the health and version of each member of etcd over HTTP; of a
PostgreSQL database what a service checks before it uses one.
"""

import asyncio
import json
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from steward.cli.checkup.finding import Finding, failed, good, warning
from steward.cli.checkup.machine import numbers
from steward.postgres.connecting import Database, Use
from steward.runtime.service import EnvironmentUnusable

AREA = "stores"
TIMEOUT_S = 5.0
OLDEST_ETCD, GOOD_ETCD = (3, 4), (3, 5, 13)
_URL = re.compile(r"etcd://([^/]+)/(.+)")


def etcd(
    url: str, authorities: Path | None, certificate: Path | None, key: Path | None
) -> Iterator[Finding]:
    """A finding for each member that a URL names, and one of their number."""
    found = _URL.fullmatch(url)
    if found is None:
        yield failed(AREA, "registry.store", "is no etcd URL", "etcd://host:2379,host:2379/name")
        return
    secure = authorities is not None or certificate is not None
    try:
        context = _context(authorities, certificate, key) if secure else None
    except (OSError, ValueError) as error:
        yield failed(AREA, "etcd", f"no TLS: {error}", "see the certificates above")
        return
    addresses = found[1].split(",")
    for address in addresses:
        yield _member(f"{'https' if secure else 'http'}://{address}", context)
    if len(addresses) < 3:
        yield warning(
            AREA,
            "etcd",
            f"{len(addresses)} address is known",
            "name all members (three or five), or one that is away is the end of the registry",
        )


def _context(
    authorities: Path | None, certificate: Path | None, key: Path | None
) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authorities)
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context


def _member(base: str, context: ssl.SSLContext | None) -> Finding:
    name = f"etcd {base.partition('//')[2]}"
    try:
        version = str(_get(f"{base}/version", context)["etcdserver"])
        health = _get(f"{base}/health", context)
    except (OSError, ValueError, KeyError) as error:
        return failed(AREA, name, f"does not answer: {error}", "start it, or let it be reached")
    if str(health.get("health")) != "true":
        return failed(
            AREA,
            name,
            f"{version}, not healthy: {health.get('reason') or 'no leader, or an alarm'}",
            "look at `etcdctl endpoint status` and `etcdctl alarm list`",
        )
    if numbers(version) < OLDEST_ETCD:
        return failed(AREA, name, version, "install etcd 3.5.13 or newer")
    if numbers(version) < GOOD_ETCD:
        return warning(
            AREA,
            name,
            f"{version} may lose live leases after its leader was frozen",
            "install etcd 3.5.13 or newer",
        )
    return good(AREA, name, version)


def _get(url: str, context: ssl.SSLContext | None) -> dict[str, object]:
    # An unhealthy member says why, with another status than 200.
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S, context=context) as answer:
            body = answer.read(65536)
    except urllib.error.HTTPError as error:
        body = error.read(65536)
    value = json.loads(body)
    if not isinstance(value, dict):
        raise ValueError("is no etcd")
    return value


class _Examined(Database):
    USE: ClassVar[Use] = Use("the PostgreSQL database", "the URL", "steward-doctor")


def postgres(name: str, url: str, pooled: bool) -> Finding:
    """One database, by the setting `name` that holds its URL."""
    try:
        return good(AREA, name, asyncio.run(_Examined(url, pooled).examine()))
    except EnvironmentUnusable as error:
        return failed(AREA, name, str(error), "see docs/stores.md for how it is set up")
    except (OSError, TimeoutError) as error:
        return failed(
            AREA,
            name,
            f"does not answer: {str(error) or 'not in time'}",
            "start it, or let it be reached",
        )
