"""The floor under all epochs: no grant below what the event log has seen (P18).

A store that was restored from a backup has forgotten numbers that are out in the world, and
would grant them again. So a registry that starts grants nothing until a node has told it the
largest fence in the log. Guarantees: every epoch that it grants is above that fence; if the
fence is above all that the store ever granted, the store lost its past, which is recorded as a
breach, and the generation is raised, durably, before anything else; every node of the lost
past is fenced by that and comes again as a new incarnation. Resolves of living
placements are served meanwhile.
"""

from registry_service.core.commands import PeerId, ReportLogHead
from registry_service.core.config import RegistryConfig
from registry_service.core.effects import AskLogHead, GenerationRaised
from registry_service.core.fencing import Fencing
from registry_service.core.node import NodeTable
from registry_service.core.pipeline import Answer, StorePipeline
from registry_service.core.refusals import Refusals
from registry_service.core.transactions import GenerationIs, RaiseGeneration, StoreView
from registry_service.core.turn import Turn
from steward.model.keys import GENERATION_SHIFT, MAX_GENERATION, Epoch
from steward.model.violations import Violation, ViolationKind


class LogFloor:
    """Asks one node at a time, until one answered."""

    def __init__(
        self,
        config: RegistryConfig,
        turn: Turn,
        store: StorePipeline,
        nodes: NodeTable,
        fencing: Fencing,
        refusals: Refusals,
    ) -> None:
        self._config = config
        self._turn = turn
        self._store = store
        self._nodes = nodes
        self._fencing = fencing
        self._refusals = refusals
        self._asked: PeerId | None = None
        self._ask_again_ms = 0
        self._raising = 0
        self._recorded = Epoch(0)

    def recover(self, view: StoreView) -> None:
        self._turn.generation = view.generation
        if view.raised:
            self._turn.emit(GenerationRaised(view.generation, view.raised))
        self._turn.may_place = not self._config.log_floor

    def ask(self) -> None:
        """Ask a node, if that is needed and nobody is being asked. Each in its turn."""
        if self._turn.may_place or self._raising:
            return
        sessions = [node.session for node in self._nodes if node.session and not node.fencing]
        if not sessions:
            self._asked = None
            return
        if self._asked in sessions and self._turn.now_ms < self._ask_again_ms:
            return
        after = sessions.index(self._asked) + 1 if self._asked in sessions else 0
        self._asked = sessions[after % len(sessions)]
        self._ask_again_ms = self._turn.now_ms + self._config.log_head_wait_ms
        self._turn.send(self._asked, AskLogHead())

    def report(self, report: ReportLogHead) -> None:
        """What a node knows of the log, asked for or not."""
        node = self._nodes.of_session(report.peer)
        if node is None or self._raising:
            return
        fence = report.largest_fence
        if fence <= self._granted():
            self._know()
            return
        self._turn.may_place = False
        if fence > self._recorded:
            self._recorded = fence
            evidence = f"the log has fence {fence}; the store granted none above {self._granted()}"
            kind = ViolationKind.FENCE_ABOVE_REGISTRY
            self._refusals.record(Violation(kind, evidence, epoch=fence, node=node.incarnation))
        generation = (fence >> GENERATION_SHIFT) + 1
        if generation > MAX_GENERATION:
            return  # No epoch is left to grant; the breach says so, and people must decide.
        self._raising = generation
        cause = f"the log has fence {fence}"
        self._store.submit(RaiseGeneration(generation, cause), self._raised, first=True)

    def _raised(self, answer: Answer) -> None:
        assert isinstance(answer.operation, RaiseGeneration)
        assert isinstance(answer.result, GenerationIs)
        self._raising = 0
        self._turn.generation = answer.result.generation
        self._turn.emit(GenerationRaised(answer.result.generation, answer.operation.cause))
        self._fencing.raised(answer.result.generation)
        self._know()

    def _know(self) -> None:
        self._asked = None
        if not self._turn.may_place:
            self._turn.may_place = True
            self._turn.more_room = True

    def _granted(self) -> Epoch:
        """No epoch above this one was ever granted, as far as the store knows."""
        return Epoch(self._turn.generation << GENERATION_SHIFT | self._turn.revision)

    def next_deadline(self) -> int | None:
        if self._turn.may_place or self._raising or self._asked is None:
            return None
        return self._ask_again_ms
