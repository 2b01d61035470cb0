"""Python's cycle collector, for a process that holds many objects for long.

By default it looks through all young objects after each 700 that stay, which a server that takes
thousands of connections does all the time, and through everything that was imported again and
again. Reference counts free what has no cycles, whatever is set here.
"""

import gc

YOUNG = 20_000
"""Objects that stay before the young ones are looked through."""


def settle() -> None:
    """To be called once, when a process has started: what is there now stays, and is not
    looked at again; what comes is looked at less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, 20, 20)
