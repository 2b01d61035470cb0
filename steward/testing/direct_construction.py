"""`python -m steward.testing.direct_construction`: try every way to make a manager by hand.

Prints one JSON line per way: `{"way", "refused", "said"}`. Exit code 0 when all were refused
by the guard itself (an audit event and a RuntimeError that names the right way), else 1.
`steward attack` starts it as a process of its own and reports what was refused.
"""

import copy
import json
import pickle
import sys
from collections.abc import Callable
from typing import Any

from agent_service.core.grants import AUDIT_EVENT, Grant
from agent_service.core.manager import Manager

# What a type checker would refuse is what is tried.
_manager: Any = Manager
_grant: Any = Grant


def _hollow(how: Callable[[object], object]) -> Callable[[], object]:
    return lambda: how(object.__new__(Manager))


WAYS: dict[str, Callable[[], object]] = {
    "class call": lambda: _manager(),
    "class call with a made-up grant": lambda: _manager(object(), object(), object()),
    "__new__": lambda: Manager.__new__(Manager),
    "subclass": lambda: type("Mine", (Manager,), {}),
    "copy": _hollow(copy.copy),
    "pickle": _hollow(pickle.dumps),
    "a grant made by hand": lambda: _grant(object(), object()),
}


def main() -> int:
    heard: list[str] = []
    sys.addaudithook(
        lambda event, args: heard.append(str(args[0])) if event == AUDIT_EVENT else None
    )
    passed = True
    for way, attempt in WAYS.items():
        before = len(heard)
        try:
            attempt()
        except RuntimeError as refusal:
            refused, said = len(heard) > before, str(refusal)
        except Exception as error:
            refused, said = False, f"{type(error).__name__}: {error}"
        else:
            refused, said = False, "it was made"
        passed = passed and refused
        print(json.dumps({"way": way, "refused": refused, "said": said}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
