"""What both ends of a framed connection to the log agree on; the messages are in the protos."""

PREFACE = b"steward-log/1\n"
"""The first bytes of a framed connection, by which the log tells it from HTTP/2."""
