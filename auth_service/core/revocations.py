"""Whose tokens ended before their time.

A revocation is a mark per user: what was issued before it is no longer good, what is
issued later is. Marks only grow, and are never forgotten: a clock that was wrong for a
minute must not bring a revoked token back. Edges are told only the relevant ones, those
that a token could still fall under.

A mark counts from the moment it is noted here, before it is stored: that errs on the side
of refusing.
"""

from collections.abc import Mapping

from steward.errors import Reason, StewardError
from steward.model.keys import UserKey


class Revocations:
    """The marks of all users, in memory. Times are Unix milliseconds."""

    __slots__ = ("_lifetime_ms", "_marks")

    def __init__(self, marks: Mapping[UserKey, int], max_lifetime_ms: int) -> None:
        self._marks = dict(marks)
        self._lifetime_ms = max_lifetime_ms

    def next_mark(self, user: UserKey, now_ms: int) -> int:
        """The mark that ends everything issued to `user` up to and including now.

        Never lower than an earlier one, also when the clock was set back.
        """
        return max(now_ms + 1, self._marks.get(user, 0))

    def note(self, user: UserKey, issued_before_ms: int) -> bool:
        """Take a mark into account; whether it is news. Safe to repeat, in any order."""
        news = issued_before_ms > self._marks.get(user, 0)
        if news:
            self._marks[user] = issued_before_ms
        return news

    def check(self, user: UserKey, issued_at_ms: int) -> None:
        """Raises StewardError(TOKEN_REVOKED) for what was issued before the user's mark."""
        if issued_at_ms < self._marks.get(user, 0):
            raise StewardError(
                Reason.TOKEN_REVOKED, "the access of this user was revoked; log in anew"
            )

    def relevant(self, now_ms: int) -> list[tuple[UserKey, int]]:
        """The marks that a token which is still alive could fall under."""
        oldest = now_ms - self._lifetime_ms
        return [(user, mark) for user, mark in self._marks.items() if mark > oldest]
