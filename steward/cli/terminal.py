"""Takes the terminal when `make` started us, so that Ctrl-C reaches the supervisor alone.

`make` dies of a Ctrl-C that it shares with its recipe, and says so with an error, though
the recipe stopped in order. Inside of `Foreground` this process is the terminal's
foreground group by itself and `make` sees nothing but its exit code. Started by a
shell we already are; then, and without a terminal, nothing is done.
"""

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress


@contextmanager
def foreground(environ: Mapping[str, str]) -> Iterator[None]:
    """Be the terminal's foreground process group, if `make` shares it with us."""
    group = os.getpgrp()
    if "MAKELEVEL" not in environ or not _shares_terminal(group):
        yield
        return
    os.setpgid(0, 0)
    _give_terminal_to(os.getpgrp())
    # Nobody would notice that we are stopped, and nobody could continue us.
    before = signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, before)
        _give_terminal_to(group)
        with suppress(OSError):
            os.setpgid(0, group)


def _shares_terminal(group: int) -> bool:
    try:
        return group != os.getpid() and os.tcgetpgrp(sys.stdin.fileno()) == group
    except (OSError, ValueError):
        return False


def _give_terminal_to(group: int) -> None:
    # A background process that changes the terminal gets SIGTTOU, which would stop it.
    before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    try:
        with suppress(OSError):
            os.tcsetpgrp(sys.stdin.fileno(), group)
    finally:
        signal.signal(signal.SIGTTOU, before)
