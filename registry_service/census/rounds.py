"""The census: every few seconds, who holds whom, by everybody's own word.

A round asks every living node and every edge for a digest of what it holds, compares the nodes'
with the placements, and asks for names only where something differs; of users who look odd, and
of some others in their turn, it reads the log's fence. `registry_service.core.census` has the
rules. What two rounds find with the same evidence is a finding: kept among the violations with its
evidence, counted, shown in a metric that must be 0.

Edges: a bucket is named in full when its digest, or the placements of the bucket, have changed
since it was found to agree; what agreed and did not change agrees.

Never silently green: who could not be asked, and what was too much to look at, is in `missing`,
and the age of the last complete round is a metric of its own.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from registry_service import convert
from registry_service.census.asking import Questions, Session, Sessions
from registry_service.census.follower import PlacementFollower
from registry_service.core.census import (
    Confirmation,
    Holder,
    Sighting,
    Tie,
    UserView,
    differing,
    findings_of,
    looks_odd,
)
from registry_service.core.commands import DescribeCluster, PeerId
from registry_service.core.effects import AskFences, ClusterDescribed
from registry_service.driver import RegistryDriver
from registry_service.question import ask
from registry_service.store.port import StoreFailed
from steward.errors import Reason, StewardError
from steward.model.census import BUCKETS, MOST_FENCES, Digest, bucket_of
from steward.model.keys import Epoch, NodeId, NodeIncarnation, NodeRev, UserKey
from steward.runtime.clock import boot_ms, wall_ms
from steward.telemetry.catalog import RegistryMetrics
from steward.telemetry.labels import CENSUS_KINDS
from steward.telemetry.logs import BUG, fields
from steward.v1 import registry_service_pb2 as pb

REPORTER = "registry:census"
MOST_BUCKETS = 512
"""Of one node or edge that are named in one round: an eighth of all users."""
MOST_ODD = 4_000
ROLLING = 1_000
"""Users whose fence is read in each round though nothing is odd about them."""
MOST_RECORDED = 100
"""Findings that one round puts on record; the metric has all."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CensusConfig:
    """Times in milliseconds. `least_ms`, `ties_ms`: how long a sighting has to last."""

    interval_ms: int = 5_000
    answer_ms: int = 2_000
    least_ms: int = 2_000
    ties_ms: int = 4_000
    # Between the rounds of a census that somebody waits for, and how long they may take.
    again_ms: int = 1_000
    patience_ms: int = 8_000


@dataclass(slots=True)
class Round:
    """What one round saw. `at_ms` is Unix time."""

    at_ms: int = 0
    took_ms: int = 0
    nodes: int = 0
    edges: int = 0
    placements: int = 0
    managers: int = 0
    attachments: int = 0
    fences: int = 0
    missing: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return not self.missing


class Census:
    """Takes rounds, one at a time. `run` as one task."""

    def __init__(
        self,
        driver: RegistryDriver,
        metrics: RegistryMetrics,
        config: CensusConfig | None = None,
    ) -> None:
        self.config = config or CensusConfig()
        self.nodes = Sessions()
        self.edges = Sessions()
        self.questions = Questions()
        self.confirmation = Confirmation(self.config.least_ms, self.config.ties_ms)
        self.last = Round()
        self.complete_ms: int | None = None
        """When the last complete round was, on the boot clock."""
        self._driver = driver
        self._metrics = metrics
        self._follower = PlacementFollower(driver.store)
        self._lock = asyncio.Lock()
        self._began_ms = boot_ms()
        # By edge session and bucket: the digest, and the placements' stamp, that agreed.
        self._agreed: dict[Session, dict[int, tuple[tuple[int, int], tuple[int, int]]]] = {}
        self._rolling: list[UserKey] = []
        self._turn = 0
        metrics.census_age.set_function(self._age_s)

    def node_closed(self, name: str, peer: PeerId) -> None:
        """The session of a node is over. Safe to call twice."""
        self.nodes.closed(name, peer)
        self.questions.gone(peer)

    def edge_closed(self, name: str, peer: PeerId) -> None:
        """The session of an edge is over. Safe to call twice."""
        self.edges.closed(name, peer)
        self.questions.gone(peer)

    async def run(self) -> None:
        """A round every `interval_ms`, until cancelled. An interval of 0: none by itself."""
        while self.config.interval_ms:
            await asyncio.sleep(self.config.interval_ms / 1000)
            try:
                await self.take()
            except (StewardError, StoreFailed, TimeoutError) as error:
                _log.warning("no census could be taken", extra=fields(why=str(error)))
            except Exception:
                # Nobody would take the next one. Should it go on, the age of the last tells.
                _log.exception("a census failed by an error of this process", extra=fields(do=BUG))

    async def take(self) -> Round:
        """One round. Raises StewardError(STORE_UNAVAILABLE), StoreFailed."""
        async with self._lock:
            began = time.perf_counter()
            seen = Round(at_ms=wall_ms())
            sightings = await self._look(seen)
            seen.took_ms = int((time.perf_counter() - began) * 1000)
            fresh = self.confirmation.look(boot_ms(), sightings, seen.complete)
            self._publish(seen, fresh, time.perf_counter() - began)
            return seen

    async def settle(self) -> Round:
        """Rounds until everything that was seen is a finding, or was only in motion."""
        give_up_ms = boot_ms() + self.config.patience_ms
        seen = await self.take()
        while (self.confirmation.waiting or seen.missing) and boot_ms() < give_up_ms:
            await asyncio.sleep(self.config.again_ms / 1000)
            seen = await self.take()
        if self.confirmation.waiting:
            count = len(self.confirmation.waiting)
            seen.missing.append(f"{count} disagreements were too new to tell from a move")
        return seen

    def _age_s(self) -> float:
        since = self.complete_ms if self.complete_ms is not None else self._began_ms
        return (boot_ms() - since) / 1000

    def _publish(self, seen: Round, fresh: Iterable[Sighting], took_s: float) -> None:
        if seen.complete:
            self.complete_ms = boot_ms()
        elif seen.missing != self.last.missing:
            why = "; ".join(seen.missing)[:500]
            _log.warning("a census could not ask everybody", extra=fields(why=why))
        self.last = seen
        self._metrics.census_seconds.observe(took_s)
        for sighting in fresh:
            self._metrics.breaches.labels(sighting.kind.value).inc()
        counts = dict.fromkeys(CENSUS_KINDS, 0)
        confirmed = self.confirmation.confirmed
        for sighting in confirmed:
            counts[sighting.kind.value] += 1
        for kind, count in counts.items():
            self._metrics.census_findings.labels(kind).set(count)
        # The recorder keeps equal ones once a minute, with how often they were seen.
        for sighting in sorted(confirmed, key=lambda each: confirmed[each])[:MOST_RECORDED]:
            self._driver.recorder.notice(sighting.violation(), REPORTER)

    # ---- one look

    async def _look(self, seen: Round) -> list[Sighting]:
        await self._follower.check_page()
        living = await self._living()
        nodes = {
            session: incarnation
            for incarnation in living
            if (session := self.nodes.named(incarnation.node_id)) is not None
        }
        edges = self.edges.all()
        self._agreed = {edge: self._agreed.get(edge, {}) for edge in edges}
        within_s = self.config.answer_ms / 1000
        asked = [*nodes, *edges]
        digests = await self.questions.ask_all(dict.fromkeys(asked, ()), within_s)
        # Who was fenced meanwhile is none that could be missing.
        living &= await self._living()
        held: dict[NodeIncarnation, Digest] = {}
        tied: dict[Session, Digest] = {}
        for session in asked:
            report = digests.get(session)
            incarnation = nodes.get(session)
            if incarnation is not None and incarnation not in living:
                continue
            if report is None and incarnation is None and session not in self.edges.all():
                continue  # An edge that ended.
            if report is None or (incarnation and report.node_rev != incarnation.node_rev):
                seen.missing.append(f"{session.name} did not answer")
            elif incarnation is not None:
                held[incarnation] = _digest_of(report)
            else:
                tied[session] = _digest_of(report)
        for incarnation in living - set(nodes.values()):
            seen.missing.append(f"{incarnation.node_id} has no session")
        seen.nodes, seen.edges = len(held), len(tied)
        seen.managers = sum(count for digest in held.values() for count, _ in digest.values())
        seen.attachments = sum(count for digest in tied.values() for count, _ in digest.values())
        await self._follower.advance()
        seen.placements = len(self._follower.index)
        wanted = self._buckets_to_name(nodes, held, tied, seen)
        named = await self.questions.ask_all(wanted, within_s)
        await self._follower.advance()
        for session in wanted:
            report = named.get(session)
            over = session not in (*self.nodes.all(), *self.edges.all())
            if (report is None and not over) or (report is not None and report.cut):
                what = "named too many" if report is not None else "did not name who differs"
                seen.missing.append(f"{session.name} {what}")
                named.pop(session, None)
        look = _Look(self._follower, nodes, held, named, wanted)
        views = [look.view(user) for user in look.users()]
        odd = [view for view in views if looks_odd(view)]
        if len(odd) > MOST_ODD:
            seen.missing.append(f"{len(odd)} users differ; {MOST_ODD} of them were looked at")
            odd = odd[:MOST_ODD]
        rolling = self._rolling_users()
        users = list(dict.fromkeys([*rolling, *(view.user for view in odd)]))
        fences = await self._fences(users, seen)
        await self._follower.advance()
        found = []
        for user in users:
            fence = None if fences is None else fences.get(user, Epoch(0))
            found += findings_of(look.view(user, fence), living)
        self._note_agreement(look, tied)
        return found

    def _buckets_to_name(
        self,
        nodes: Mapping[Session, NodeIncarnation],
        held: Mapping[NodeIncarnation, Digest],
        tied: Mapping[Session, Digest],
        seen: Round,
    ) -> dict[Session, tuple[int, ...]]:
        index = self._follower.index
        again = {bucket_of(user) for user in self.confirmation.users}
        odd = set(again)
        wanted: dict[Session, set[int]] = {}
        for session, incarnation in nodes.items():
            if incarnation in held:
                differ = differing(held[incarnation], index.digest(incarnation))
                wanted[session] = differ | again
                odd |= differ
        for edge, digest in tied.items():
            agreed = self._agreed[edge]
            new = {b for b, of in digest.items() if agreed.get(b) != (of, index.stamp(b))}
            wanted[edge] = new | (odd & digest.keys())
        for session, buckets in wanted.items():
            if len(buckets) > MOST_BUCKETS:
                few = f"{MOST_BUCKETS} of {len(buckets)} buckets that differ were named"
                seen.missing.append(f"{session.name}: {few}")
                # Others in the next round.
                ordered = sorted(buckets, key=lambda b: (b - self._turn) % BUCKETS)
                wanted[session] = set(ordered[:MOST_BUCKETS])
        return {session: tuple(sorted(buckets)) for session, buckets in wanted.items() if buckets}

    def _rolling_users(self) -> list[UserKey]:
        if not self._rolling:
            self._rolling = self._follower.index.users()
        now, self._rolling = self._rolling[:ROLLING], self._rolling[ROLLING:]
        self._turn += MOST_BUCKETS
        return now

    async def _fences(self, users: list[UserKey], seen: Round) -> dict[UserKey, Epoch] | None:
        """The log's fences, read by any node; None when there was nobody to ask."""
        found: dict[UserKey, Epoch] = {}
        for start in range(0, len(users), MOST_FENCES):
            part = tuple(users[start : start + MOST_FENCES])
            report = await self.read_fences(partial(AskFences, users=part))
            if isinstance(report, str):
                seen.missing.append(f"the log's fences: {report}")
                return None
            for owned in report.fences:
                found[convert.user_in(owned.user)] = convert.epoch_in(owned.epoch)
        seen.fences = len(users)
        return found

    async def read_fences(self, question: Callable[[int], AskFences]) -> pb.ReportFences | str:
        """Ask the nodes in turn until one has read the log; else why none could."""
        why = "there is no node to ask"
        for session in self.nodes.all():
            report = await self.questions.ask_fences(
                session, question, self.config.answer_ms / 1000 + 0.5
            )
            if report is not None and not report.failed:
                return report
            why = f"{session.name}: {report.failed if report is not None else 'no answer'}"
        return why

    def _note_agreement(self, look: "_Look", tied: Mapping[Session, Digest]) -> None:
        index = self._follower.index
        for edge, digest in tied.items():
            agreed = self._agreed[edge]
            for bucket in look.named_buckets(edge):
                of = digest.get(bucket)
                if of is not None and look.agrees(edge, bucket):
                    agreed[bucket] = (of, index.stamp(bucket))
                else:
                    agreed.pop(bucket, None)
            for bucket in agreed.keys() - digest.keys():
                del agreed[bucket]

    async def _living(self) -> set[NodeIncarnation]:
        described = await self._describe()
        return {node.record.incarnation for node in described.nodes}

    async def _describe(self) -> ClusterDescribed:
        try:
            described = await ask(self._driver, DescribeCluster, self.config.answer_ms / 1000)
        except TimeoutError:
            raise StewardError(Reason.STORE_UNAVAILABLE, "the registry is busy") from None
        assert isinstance(described, ClusterDescribed)
        return described


class _Look:
    """The answers of one round, by user."""

    def __init__(
        self,
        follower: PlacementFollower,
        nodes: Mapping[Session, NodeIncarnation],
        held: Mapping[NodeIncarnation, Digest],
        named: Mapping[Session, pb.ReportHoldings],
        wanted: Mapping[Session, tuple[int, ...]],
    ) -> None:
        self._index = follower.index
        self._named = {session: frozenset(wanted[session]) for session in named}
        self._of_node = {nodes[s]: buckets for s, buckets in self._named.items() if s in nodes}
        # Buckets in which a node is known to hold whom it should, by its digest.
        self._differ = {
            node: differing(digest, self._index.digest(node)) for node, digest in held.items()
        }
        self._holders: dict[UserKey, list[Holder]] = {}
        self._ties: dict[UserKey, list[Tie]] = {}
        self._tied: dict[tuple[Session, int], list[tuple[UserKey, Tie]]] = {}
        for session, report in named.items():
            for holding in report.holdings:
                user, epoch = convert.user_in(holding.user), convert.epoch_in(holding.epoch)
                if session in nodes:
                    holder = Holder(nodes[session], epoch, holding.making)
                    self._holders.setdefault(user, []).append(holder)
                else:
                    at = NodeIncarnation(NodeId(holding.node_id), NodeRev(holding.node_rev))
                    tie = Tie(session.name, at, epoch)
                    self._ties.setdefault(user, []).append(tie)
                    self._tied.setdefault((session, bucket_of(user)), []).append((user, tie))

    def users(self) -> set[UserKey]:
        """Everybody in what was named, also by the registry alone."""
        buckets = {bucket for buckets in self._of_node.values() for bucket in buckets}
        placed = {user for bucket in buckets for user in self._index.users_of(bucket)}
        return placed | self._holders.keys() | self._ties.keys()

    def named_buckets(self, session: Session) -> frozenset[int]:
        return self._named.get(session, frozenset())

    def agrees(self, edge: Session, bucket: int) -> bool:
        """Whether the placements are where the edge has its users of a bucket."""
        return all(
            (tie.node, tie.epoch) == self._index.get(user)
            for user, tie in self._tied.get((edge, bucket), ())
        )

    def view(self, user: UserKey, fence: Epoch | None = None) -> UserView:
        """What is known of a user; nothing is guessed where a node was not heard."""
        placed = self._index.get(user)
        holders = list(self._holders.get(user, ()))
        known = True
        if placed is not None and bucket_of(user) not in self._of_node.get(placed.node, ()):
            # Where its digest agrees the node has whom it should have.
            differ = self._differ.get(placed.node)
            known = differ is not None and bucket_of(user) not in differ
            if known:
                holders.append(Holder(placed.node, placed.epoch, making=False))
        return UserView(user, placed, tuple(holders), tuple(self._ties.get(user, ())), fence, known)


def _digest_of(report: pb.ReportHoldings) -> Digest:
    return {
        bucket: (count, total)
        for bucket, count, total in zip(report.buckets, report.counts, report.sums, strict=True)
    }
