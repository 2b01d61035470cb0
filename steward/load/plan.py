"""What a load generator is to do, and what each of its processes does of it."""

from collections.abc import Sequence
from dataclasses import dataclass

MOST_USERS = 100_000
MOST_TABS = 32
MOST_SECONDS = 3600.0
MOST_RATE = 1_000_000.0
MOST_WORKERS = 64


class WrongPlan(ValueError):
    """A plan that can't be carried out. One line for an operator."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """`rate` is in events per second over all users; 0: as many as they can."""

    addresses: tuple[str, ...]
    """`host:port` of each edge; connections go to them in turn."""
    secure: bool
    users: tuple[tuple[str, str], ...]
    """Name and token of each."""
    tabs: int
    rate: float
    seconds: float
    agent: str
    workers: int

    def __post_init__(self) -> None:
        for name, value, most in (
            ("users", len(self.users), MOST_USERS),
            ("tabs", self.tabs, MOST_TABS),
            ("workers", self.workers, MOST_WORKERS),
        ):
            if not 1 <= value <= most:
                raise WrongPlan(f"--{name} {value}: 1 to {most:,} are possible")
        if not 0 < self.seconds <= MOST_SECONDS:
            raise WrongPlan(f"--seconds {self.seconds:g}: up to {MOST_SECONDS:g} are possible")
        if not 0 <= self.rate <= MOST_RATE:
            raise WrongPlan(f"--rate {self.rate:g}: up to {MOST_RATE:,.0f} are possible")

    @property
    def connections(self) -> int:
        return len(self.users) * self.tabs


@dataclass(frozen=True, slots=True)
class Share:
    """The users of one process. `first` is the number of the first one among all users."""

    plan: LoadPlan
    users: tuple[tuple[str, str], ...]
    first: int
    cpu: int | None

    def message(self, index: int) -> str:
        """What the index-th user of this share says to the agent: the users take turns."""
        plan = self.plan
        each = plan.rate / len(plan.users)
        phase_ms = 1000 * (self.first + index) / plan.rate if plan.rate else 0.0
        return f"{plan.seconds:g} {each:.6g} {phase_ms:.3f}"


def shares(plan: LoadPlan, cpus: Sequence[int]) -> list[Share]:
    """Split the users over the processes, each on a CPU of its own if one is left for the rest."""
    count = min(plan.workers, len(plan.users))
    own = list(cpus[-count:]) if count < len(cpus) else [None] * count
    size, more = divmod(len(plan.users), count)
    found, first = [], 0
    for number, cpu in enumerate(own):
        end = first + size + (number < more)
        found.append(Share(plan, plan.users[first:end], first, cpu))
        first = end
    return found
