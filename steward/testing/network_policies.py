"""Kubernetes' network policies, evaluated: who may speak to whom.

A connection needs the leave of the policies of both ends. Policies add up: a pod that none
selects for a direction may do everything there, another only what one of them lets through.
Ports are numbers here, and an `ipBlock` is for addresses outside the cluster.
"""

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from steward.testing.manifests import (
    Manifest,
    Manifests,
    all_workloads,
    labels_of,
    of_kind,
    selects,
)

NEWCOMER = "newcomer"


@dataclass(frozen=True, slots=True)
class Party:
    """One end of a connection: a pod in some namespace, or an address outside."""

    name: str
    namespace: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    address: str = ""


Flow = tuple[str, str, str, int]
"""From, to, protocol, port of the destination."""


def own_parties(manifests: Manifests) -> dict[str, Party]:
    """The pods of the rendered workloads, one of each, by the names of these; and a newcomer.

    That one is a pod without labels in the same namespace: whatever else may come to run there.
    """
    namespace = next(iter(of_kind(manifests, "Namespace")))
    return {NEWCOMER: Party(NEWCOMER, namespace)} | {
        m["metadata"]["name"]: Party(m["metadata"]["name"], namespace, tuple(labels_of(m).items()))
        for m in all_workloads(manifests)
    }


def fits_peer(peer: Manifest, party: Party, namespace: str) -> bool:
    """Whether a rule of a policy in `namespace` means `party`."""
    if "ipBlock" in peer:
        network = ipaddress.ip_network(peer["ipBlock"]["cidr"])
        return bool(party.address) and ipaddress.ip_address(party.address) in network
    if party.address:
        return False
    if "namespaceSelector" in peer:
        labels = {"kubernetes.io/metadata.name": party.namespace}
        if not selects(peer["namespaceSelector"], labels):
            return False
    elif party.namespace != namespace:
        return False
    return selects(peer.get("podSelector", {}), dict(party.labels))


def lets(
    policies: Sequence[Manifest], way: str, pod: Party, other: Party, protocol: str, port: int
) -> bool:
    """Whether the policies of one direction let `pod` and `other` speak, as Kubernetes does."""
    key = "to" if way == "Egress" else "from"
    isolated = False
    for policy in policies:
        spec = policy["spec"]
        if way not in spec["policyTypes"] or not selects(spec["podSelector"], dict(pod.labels)):
            continue
        isolated = True
        for rule in spec.get(way.lower(), []):
            here = key not in rule or any(fits_peer(p, other, pod.namespace) for p in rule[key])
            ports = [(p["protocol"], p["port"]) for p in rule.get("ports", [])]
            if here and (not ports or (protocol, port) in ports):
                return True
    return not isolated


def allowed_flows(
    manifests: Manifests, others: Iterable[Party], ports: Iterable[tuple[str, int]]
) -> set[Flow]:
    """What the policies let through on these ports, among our pods and between them and others."""
    policies = list(of_kind(manifests, "NetworkPolicy").values())
    own = own_parties(manifests)
    everybody = [*own.values(), *others]
    return {
        (source.name, target.name, protocol, port)
        for source, target, (protocol, port) in product(everybody, everybody, ports)
        if (source.name in own or target.name in own)
        and (source.name not in own or lets(policies, "Egress", source, target, protocol, port))
        and (target.name not in own or lets(policies, "Ingress", target, source, protocol, port))
    }
