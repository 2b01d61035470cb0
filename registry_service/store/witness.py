"""How far a store was, kept beside it: what shows that an older copy of the store was put back.

A restored store has forgotten numbers that are out in the world. The witness is no part of a
backup, so that a store which is behind its witness, or has none, is taken for restored: it gets
a generation above all that either knows of, before anything is served.

It is written after each transaction and not flushed: a process that is killed loses nothing of
it, a machine that loses power some seconds. So it is never ahead of a store that is as it was
left. It does not see a restore that put back the witness too, as a snapshot of a whole volume
does: then whoever restores names the generation (`registry.least_generation`).
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

_RECORD_BYTES = 256


@dataclass(frozen=True, slots=True)
class Witness:
    """A store at one moment. `instance` is random, once for each store that was made new."""

    instance: str
    term: int
    generation: int
    revision: int


def needed_generation(found: Witness, witness: Witness | None, least: int) -> tuple[int, str]:
    """The generation with which a store may serve, and why, if that is above what it has.

    `found` is the store as it is, `witness` what was beside it, `least` what the operator wants.
    """
    doubt = _doubt(found, witness)
    if doubt:
        known = max(found.generation, witness.generation if witness is not None else 0)
        return max(known + 1, least), doubt
    if least > found.generation:
        return least, f"registry.least_generation is {least}"
    return found.generation, ""


def _doubt(found: Witness, witness: Witness | None) -> str:
    """Why this may be an older store than the one that was served last; empty if it is not."""
    if witness is None:
        # A store that never granted anything is new.
        return "the store has no witness: restored?" if found.revision else ""
    if witness.instance != found.instance:
        return "the witness is of another store: replaced?"
    went_back = (
        found.revision < witness.revision
        or found.generation < witness.generation
        or found.term < witness.term
    )
    if went_back:
        was = f"{witness.revision}, generation {witness.generation}, term {witness.term}"
        now = f"{found.revision}, {found.generation}, {found.term}"
        return f"the store was at revision {was}, and is at {now}: restored"
    return ""


class WitnessFile:
    """A witness in a file of one record. Used by one thread, between `start` and `close`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None

    def read(self) -> Witness | None:
        """What is there; None when there is nothing, or nothing that can be understood."""
        try:
            witness = Witness(**json.loads(self._path.read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        numbers = (witness.term, witness.generation, witness.revision)
        return witness if all(type(number) is int for number in numbers) else None

    def start(self, witness: Witness) -> None:
        """Make the file, or take it over, and have it on disk. Raises OSError."""
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self._file, _RECORD_BYTES)
        self.write(witness)
        os.fsync(self._file)
        directory = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def write(self, witness: Witness) -> None:
        """After a transaction. Not flushed. Raises OSError."""
        assert self._file is not None
        record = json.dumps(asdict(witness)).ljust(_RECORD_BYTES - 1) + "\n"
        os.pwrite(self._file, record.encode(), 0)

    def close(self) -> None:
        """Flush and let go. Safe to call twice."""
        file, self._file = self._file, None
        if file is not None:
            os.fsync(file)
            os.close(file)
