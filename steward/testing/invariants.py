"""The invariants of ownership, checked on what one step changed.

Each check has the name of the invariant in the ownership protocol, and is counted, so that
a check that never ran is seen. A broken one raises `InvariantBroken` with what was
seen: a seed stops at the step that broke it. This part knows what everybody did and
what no process can know; none of it is told back to the processes.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from agent_service.core.journal import Append, RecordKind, Seal, Sealed
from registry_service.core.transactions import StoreOperation
from steward.client.checks import StreamChecker
from steward.model.keys import GENERATION_SHIFT, Epoch, NodeIncarnation, UserKey
from steward.model.placement import Placement

NAMES = ("S", "I1", "I2", "I3", "I4", "I5", "I6", "I7", "I8", "I9", "I10", "X", "order", "L1")


class InvariantBroken(AssertionError):
    """An invariant was seen broken. `name` is that of the protocol."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}")
        self.name = name


class Invariants:
    """What was seen so far, and the checks against it."""

    def __init__(self, clock: Callable[[], int] = lambda: 0) -> None:
        """`clock` is the world's, in ms: for what is measured, not for what is checked."""
        self.counts: Counter[str] = Counter(dict.fromkeys(NAMES, 0))
        self._clock = clock
        # Newest manager of each user that began, and since when; how long older ones acted beside.
        self._began: dict[UserKey, tuple[Epoch, int]] = {}
        self._beside: dict[tuple[UserKey, Epoch], int] = {}
        self._log: dict[UserKey, list[bytes]] = {}
        self._checkers: dict[UserKey, StreamChecker] = {}
        self._log_epoch: dict[UserKey, int] = {}
        self._sealed: dict[UserKey, Epoch] = {}
        self._activations: dict[tuple[UserKey, Epoch], str] = {}
        self._open_runs: dict[UserKey, set[str]] = {}
        # When a call was announced under which epoch.
        self._intents: dict[tuple[UserKey, str], set[int]] = {}
        self._placements: dict[tuple[UserKey, Epoch], Placement] = {}
        self._newest: dict[UserKey, Epoch] = {}
        self._nonces: dict[NodeIncarnation, str] = {}
        self._shown: dict[str, int] = {}
        self._heard: dict[tuple[str, UserKey], int] = {}
        self._fenced: dict[str, str] = {}
        self._over: dict[tuple[str, UserKey, Epoch], str] = {}
        # X holds between epochs of one generation, and not for every node.
        self._unpromised: set[NodeIncarnation] = set()
        self._executing: dict[UserKey, dict[Epoch, tuple[NodeIncarnation, Callable[[], bool]]]] = {}

    def require(self, name: str, holds: bool, text: str, *arguments: object) -> None:
        """One check. `text` is a format string: it is only made when the check fails."""
        self.counts[name] += 1
        if not holds:
            raise InvariantBroken(name, text.format(*arguments))

    # ---- the log

    def sealed(self, seal: Seal, outcome: Sealed) -> None:
        """The log took a seal: from now on this epoch and this activation alone are effective."""
        user, epoch = seal.user, seal.epoch
        last = self._sealed.get(user, Epoch(0))
        self.require("I1", epoch >= last, "{} was sealed at {}, then at {}", user, last, epoch)
        self._sealed[user] = epoch
        first = self._activations.setdefault((user, epoch), seal.activation)
        self.require(
            "S", first == seal.activation, "{}: two managers were sealed under {}", user, epoch
        )
        granted = (user, epoch) in self._placements
        self.require("I8", granted, "{} was sealed under {}, which was not granted", user, epoch)
        head = len(self._log.get(user, ()))
        seen = outcome.next_sequence - 1
        self.require(
            "I3", seen == head, "{}: a seal under {} saw {} of {} events", user, epoch, seen, head
        )

    def stored(self, append: Append, before: int) -> None:
        """The log took an append whose stream had `before` events."""
        user, epoch = append.user, append.epoch
        sealed = self._sealed.get(user)
        self.require("S", epoch == sealed, "{} wrote under {}, {} is sealed", user, epoch, sealed)
        last = self._log_epoch.get(user, 0)
        self.require("I1", epoch >= last, "{} wrote under {} after {}", user, epoch, last)
        self._log_epoch[user] = epoch
        stream = self._log.setdefault(user, [])
        expected = append.expected_sequence - 1
        seen = expected == before == len(stream)
        text = "{} wrote behind {} of {} events"
        self.require("I3", seen, text, user, expected, len(stream))
        checker = self._checkers.setdefault(user, StreamChecker())
        for stored in append.events:
            stream.append(stored.payload)
            event = orjson.loads(stored.payload)
            sequence = event["sequence"]
            text = "{}: event {} is number {}"
            self.require("I3", sequence == len(stream), text, user, sequence, len(stream))
            self._count_run(user, event)
            checker.see(event)
            findings = checker.findings
            self.require("order", not findings, "{}: {}", user, findings and findings[0])
        for record in append.records:
            if record.kind is RecordKind.CALL and not record.deleted:
                self._intents.setdefault((user, record.key), set()).add(epoch)

    def _count_run(self, user: UserKey, event: dict[str, Any]) -> None:
        match event["type"]:
            case "user_message":
                self._open_runs.setdefault(user, set()).add(event["run_id"])
            case "agent_completed":
                self._open_runs[user].discard(event["run_id"])
            case _:
                pass

    def refused(self, user: UserKey, changed: bool) -> None:
        """The log refused an operation, or had done it before: nothing may have changed."""
        self.require("I10", not changed, "{} was changed by what the log refused", user)

    # ---- the placement store

    def joined(self, incarnation: NodeIncarnation, nonce: str) -> None:
        """A process was made a node."""
        first = self._nonces.setdefault(incarnation, nonce)
        self.require("I2", first == nonce, "{} was two processes", incarnation)

    def placed(
        self,
        operation: StoreOperation,
        before: Placement | None,
        before_alive: bool,
        after: Placement | None,
        after_usable: bool,
    ) -> None:
        """An operation of the store changed a user's placement.

        `before_alive` says whether the placement that was there counted, `after_usable` whether the
        new one's incarnation lives and takes users.
        """
        compared = before is not None and getattr(operation, "epoch", None) == before.epoch
        if after is None:
            text = "{} was removed by {}"
            self.require("I8", compared, text, before, operation)
            return
        text = "{} was replaced by {}, though its node lives"
        self.require("I8", compared or not before_alive, text, before, after)
        text = "{} is on a node that is dead or draining"
        self.require("I8", after_usable, text, after)
        user, epoch = after.user, after.epoch
        newest = self._newest.get(user, Epoch(0))
        self.require("I7", epoch > newest, "{} got {} after {}", user, epoch, newest)
        self._newest[user] = epoch
        self._placements[user, epoch] = after

    def resolved(self, placement: Placement, min_epoch: int) -> None:
        """An edge or a node was told where a user is."""
        known = self._placements.get((placement.user, placement.epoch))
        self.require("I8", known is not None, "{} was not granted", placement)
        self.require("I2", known == placement, "{} is also {}", placement, known)
        text = "{} was answered to one who knows of {}"
        self.require("I8", placement.epoch >= min_epoch, text, placement, min_epoch)

    # ---- edges and clients

    def heard(self, edge: str, user: UserKey, epoch: int) -> None:
        """An edge took something of a manager (an attach, a delivery) as valid."""
        last = self._heard.get((edge, user), 0)
        text = "{} took something of {} under {} after {}"
        self.require("I5", epoch >= last, text, edge, user, epoch, last)
        self._heard[edge, user] = epoch

    def began(self, client: str, user: UserKey, after: int, head: int) -> None:
        """A connection of a client begins behind `after`; its edge knows of `head` events."""
        seen = self._shown.setdefault(client, 0)
        text = "{} had {} of {}, its edge {}, and was set to {}"
        self.require("I4", after == seen, text, client, seen, user, head, after)
        self._shown[client] = after

    def shown(self, client: str, user: UserKey, first: int, payloads: Sequence[bytes]) -> None:
        """A client was shown consecutive events of what it believes to be its user."""
        stream = self._log.get(user, [])
        last = self._shown.get(client, 0)
        for sequence, payload in enumerate(payloads, first):
            self.require("I4", sequence == last + 1, "{} saw {} after {}", client, sequence, last)
            stored = sequence <= len(stream) and stream[sequence - 1] == payload
            self.require("I4", stored, "{} saw {}, which is not stored", client, sequence)
            last = sequence
        self._shown[client] = last

    # ---- managers, tools, nodes. `process` is one life of a node.

    def tool_started(self, user: UserKey, epoch: Epoch, call_id: str) -> None:
        """A tool starts: its announcement was accepted under the epoch of its own manager."""
        intents = self._intents.get((user, call_id), set())
        text = "{}: {} started under {}, its intents are under {}"
        self.require("I6", epoch in intents, text, user, call_id, epoch, intents)

    def knows_fenced(self, process: str, cause: str) -> None:
        """A node process was told, or saw, that it is over."""
        self._fenced.setdefault(process, cause)

    def knows_over(self, process: str, user: UserKey, epoch: Epoch, cause: str) -> None:
        """A node process knows that one of its managers is over."""
        self._over.setdefault((process, user, epoch), cause)

    def acted(self, process: str, user: UserKey, epoch: Epoch, what: str) -> None:
        """A manager wrote, showed something, or started a run or a tool."""
        cause = self._fenced.get(process)
        text = "{} did {} for {} after it knew: {}"
        self.require("I9", cause is None, text, process, what, user, cause)
        cause = self._over.get((process, user, epoch))
        text = "{} did {} for {} under {} after it knew: {}"
        self.require("I9", cause is None, text, process, what, user, epoch, cause)
        executing = self._executing.get(user)
        began = self._began.get(user)
        if began is not None and epoch < began[0] and self._measured(user, epoch, began[0]):
            self._beside[user, began[0]] = self._clock() - began[1]
        if executing is not None and epoch in executing:
            newest, (where, _) = max(executing), executing[epoch]
            promised = newest >> GENERATION_SHIFT == epoch >> GENERATION_SHIFT
            alone = newest == epoch or not promised or where in self._unpromised
            text = "{} executes under {} while {} does"
            self.require("X", alone, text, user, epoch, newest)

    def executes(
        self,
        user: UserKey,
        epoch: Epoch,
        incarnation: NodeIncarnation,
        going_on: Callable[[], bool],
    ) -> None:
        """A manager of a strict tenant begins; `going_on` tells whether it still executes."""
        executing = self._executing.setdefault(user, {})
        for other, (where, goes_on) in executing.items():
            text = "{} begins to execute under {} on {} while {} does on {}"
            promised = other < epoch and where not in self._unpromised
            promised = promised and other >> GENERATION_SHIFT == epoch >> GENERATION_SHIFT
            alone = not promised or not goes_on()
            self.require("X", alone, text, user, epoch, incarnation, other, where)
        executing[epoch] = (incarnation, going_on)

    def begins(self, user: UserKey, epoch: Epoch) -> None:
        """A manager begins, of whatever tenant: the start of what `overlaps_ms` measures."""
        if user not in self._began or self._began[user][0] < epoch:
            self._began[user] = (epoch, self._clock())

    def _measured(self, user: UserKey, epoch: Epoch, newest: Epoch) -> bool:
        """Whether an overlap of these counts: one that X excludes would say nothing about it."""
        strict = self._executing.get(user, {}).get(epoch)
        if strict is None:
            return True
        return strict[0] not in self._unpromised and (
            newest >> GENERATION_SHIFT == epoch >> GENERATION_SHIFT
        )

    def overlaps_ms(self, tenant: str) -> list[int]:
        """How long after the start of a manager an older one still acted, where one did.

        What it does then is refused by the log and dropped by the edges; a tool may be among it.
        """
        return [took for (user, _), took in self._beside.items() if user.tenant == tenant]

    def promises_nothing(self, incarnation: NodeIncarnation) -> None:
        """X does not hold for this node: the store lost its key, or an operator fenced it."""
        self._unpromised.add(incarnation)

    # ---- what others ask

    def events(self, user: UserKey) -> list[bytes]:
        """The stored events of a user, as they were written."""
        return self._log.get(user, [])

    def open_runs(self, user: UserKey) -> set[str]:
        """Runs of a user that have a message or a start, and no end."""
        return self._open_runs.get(user, set())

    def granted(self, user: UserKey) -> Epoch:
        """The newest epoch that was handed out for a user."""
        return self._newest.get(user, Epoch(0))

    def largest(self) -> Epoch:
        """The largest epoch that was handed out at all."""
        return max(self._newest.values(), default=Epoch(0))
