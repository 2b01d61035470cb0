"""JSON bytes that are kept: for a user, a run, an event, for as long as it is there."""

import orjson


def kept_json(value: object) -> bytes:
    """The JSON of a value, in memory of its own size.

    What orjson returns holds on to the 4 KiB in which it was written. For bytes that are sent and
    forgotten that is the quickest way; kept once per user it would be most of what a user costs.
    """
    return b"%b" % orjson.dumps(value)
