"""The clock and the calendar, as tools. Everything is UTC; dates are ISO text."""

from datetime import UTC, date, datetime, timedelta


def now() -> dict[str, str]:
    """Date, time and weekday, in UTC."""
    moment = datetime.now(UTC)
    return {
        "date": moment.date().isoformat(),
        "time": moment.strftime("%H:%M:%S"),
        "weekday": moment.strftime("%A"),
    }


def days_between(start: str, end: str) -> int:
    """Days from one ISO date to another; negative when `end` is the earlier one."""
    return (date.fromisoformat(end) - date.fromisoformat(start)).days


def shift(start: str, days: int) -> dict[str, str]:
    """The date `days` after `start`, and its weekday. Raises OverflowError after year 9999."""
    moved = date.fromisoformat(start) + timedelta(days=days)
    return {"date": moved.isoformat(), "weekday": moved.strftime("%A")}
