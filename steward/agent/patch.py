"""The difference of two JSON objects as an RFC 6902 patch.

`diff(old, new)`, applied to `old`, gives `new`. Objects are compared key by key; a list
that only grew becomes additions at its end, any other change of a list replaces it.
The patch is correct, not minimal.
"""

from typing import Any

Operation = dict[str, Any]


def diff(old: dict[str, Any], new: dict[str, Any]) -> list[Operation]:
    """Operations that turn `old` into `new`, both JSON values; empty when they are equal."""
    operations: list[Operation] = []
    _diff_object(old, new, "", operations)
    return operations


def apply(patch: list[Operation], document: dict[str, Any]) -> None:
    """Change `document` in place by a patch that `diff` has made.

    Raises KeyError or TypeError, after a part of it, when the document has not what it changes.
    """
    for operation in patch:
        *parents, last = (_unescape(part) for part in operation["path"].split("/")[1:])
        target: Any = document
        for part in parents:
            target = target[part]
        if operation["op"] == "remove":
            del target[last]
        elif isinstance(target, list):
            target.append(operation["value"])
        else:
            target[last] = operation["value"]


def _diff_object(
    old: dict[str, Any], new: dict[str, Any], path: str, operations: list[Operation]
) -> None:
    for key in old:
        if key not in new:
            operations.append({"op": "remove", "path": f"{path}/{_escape(key)}"})
    for key, value in new.items():
        place = f"{path}/{_escape(key)}"
        if key in old:
            _diff_value(old[key], value, place, operations)
        else:
            operations.append({"op": "add", "path": place, "value": value})


def _diff_value(old: Any, new: Any, path: str, operations: list[Operation]) -> None:
    if isinstance(old, dict) and isinstance(new, dict):
        _diff_object(old, new, path, operations)
    elif _equal(old, new):
        return
    elif isinstance(old, list) and isinstance(new, list) and _equal(old, new[: len(old)]):
        for item in new[len(old) :]:
            operations.append({"op": "add", "path": f"{path}/-", "value": item})
    else:
        operations.append({"op": "replace", "path": path, "value": new})


def _equal(a: Any, b: Any) -> bool:
    """Equality of JSON values; unlike in Python, 1, 1.0 and true are three values."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def _escape(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _unescape(part: str) -> str:
    return part.replace("~1", "/").replace("~0", "~")
