"""From a question to a plan, by words and patterns: a script, not a model.

It understands a fixed vocabulary about the sales database, arithmetic, and dates. A
question with words that it does not know is refused with those words, since half an
understood question gives a wrong answer. No I/O; the same text gives the same plan.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from typing import Literal

from agent_service.agents.vocabulary import (
    ASCENDING,
    AVERAGE,
    BREAKDOWN,
    COMPARE,
    DESCENDING,
    DIMENSIONS,
    ENTITIES,
    FILLER,
    GROWTH,
    HALVES,
    LISTING,
    METRICS,
    MONTHS,
    NUMBER_WORDS,
    OPERATORS,
    QUARTERS,
    SHARE,
    TOTAL,
    YEAR,
    Dimension,
    Metric,
)


@dataclass(frozen=True, slots=True)
class SalesPlan:
    """A question about the sales. `only` restricts dimensions to values, in question order."""

    kind: Literal["ranking", "total", "average", "compare", "share", "growth", "breakdown", "list"]
    metric: Metric
    dimension: Dimension
    only: tuple[tuple[Dimension, tuple[str, ...]], ...] = ()
    descending: bool = True
    limit: int = 1

    def values(self, dimension: Dimension) -> tuple[str, ...]:
        return dict(self.only).get(dimension, ())


@dataclass(frozen=True, slots=True)
class CalculationPlan:
    """`expression` in the calculator's language."""

    expression: str


@dataclass(frozen=True, slots=True)
class ClockPlan:
    """A question about time. `start` and `end` are ISO dates, empty for today."""

    kind: Literal["time", "date", "between", "shift", "weekday"]
    start: str = ""
    end: str = ""
    days: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """What the script can't do. `greeting` marks one that was no question at all."""

    reason: str
    greeting: bool = False


Plan = SalesPlan | CalculationPlan | ClockPlan | Refusal

_WORD = re.compile(r"[a-z][a-z0-9]*(?:'[a-z]+)?|\d+(?:\.\d+)?|[^\s\w]")
_ISO_DATE = re.compile(r"\b(\d{4})-(\d{2})-(\d{2})\b")
_ARITHMETIC = re.compile(r"[\d.\s()+\-*/%,]+|\b(?:sqrt|abs|round|min|max|pi|e)\b")
_GREETING = frozenset(("hi", "hello", "hey", "help", "thanks"))
_BEFORE_MONTHS = COMPARE | {"in", "for", "during", "of", "and", "or", "to", "from", "since"}
_SUPERLATIVES = (DESCENDING | ASCENDING) - {"more", "less", "fewer"}
_MAX_LIMIT = 50


def make_plan(text: str) -> Plan:
    """The plan for a question. Never raises; what is not understood is a Refusal."""
    lowered = " ".join(text.lower().replace("\u2019", "'").split())
    if not lowered:
        return Refusal("There was no question.", greeting=True)
    if len(lowered) > 500:
        return Refusal("That is longer than the questions I understand.")
    words = _WORD.findall(lowered)
    if set(words) <= _GREETING | {",", ".", "!", "?", "there", "you", "thank"}:
        return Refusal("Hello.", greeting=True)
    if re.search(r"what (?:can|do) you (?:do|know)|what are you|who are you", lowered):
        return Refusal("Here is what I can do.", greeting=True)
    return (
        _arithmetic(lowered)
        or _time(lowered)
        or _sales(text, lowered)
        or Refusal("I don't understand that question.")
    )


def _arithmetic(text: str) -> CalculationPlan | None:
    body = re.sub(
        r"^(?:please |can you |could you )*"
        r"(?:what(?:'s| is| are)|calculate|compute|how much is|evaluate|solve)?\s*(?:the )?",
        "",
        text,
    )
    body = re.sub(r"[?=!\s]+$|\.$|,? please$", "", body)
    body = re.sub(r"(?<=\d),(?=\d{3}\b)", "", body)
    for pattern, replacement in OPERATORS:
        body = re.sub(pattern, replacement, body)
    body = " ".join(body.split())
    has_operation = re.search(r"\d\s*\)*\s*[-+*/%]|sqrt|abs|round|min|max", body)
    if not has_operation or not re.search(r"\d", body) or _ISO_DATE.search(body):
        return None
    if _ARITHMETIC.sub("", body).strip():
        return None
    return CalculationPlan(body)


def _time(text: str) -> Plan | None:
    dates = [_date(*match.groups()) for match in _ISO_DATE.finditer(text)]
    if None in dates:
        return Refusal("One of those dates does not exist; I read dates as 2026-12-31.")
    found = [value for value in dates if value]
    amount = re.search(r"\b(\d{1,5})\s+(day|week)s?\b", text)
    if re.search(r"\bhow (?:many days|long)\b|\bdays (?:between|until|till|since)\b", text):
        if len(found) == 2:
            return ClockPlan("between", found[0], found[1])
        if len(found) == 1:
            since = "since" in text
            return ClockPlan("between", found[0] if since else "", "" if since else found[0])
        if not found and re.search(r"\buntil|till|since|between\b", text):
            return Refusal("I need the date as 2026-12-31.")
        return None
    if amount and re.search(r"\b(?:in|after|from|before|ago|plus|minus|later)\b", text):
        days = int(amount[1]) * (7 if amount[2] == "week" else 1)
        back = re.search(r"\b(?:before|ago|minus)\b", text)
        return ClockPlan("shift", found[0] if found else "", days=-days if back else days)
    if found and re.search(r"\b(?:weekday|day|date)\b", text):
        return ClockPlan("weekday", found[0])
    if re.search(r"\bwhat(?:'s| is)? (?:the )?(?:current )?time\b|\btime is it\b|^time\b", text):
        return ClockPlan("time")
    if re.search(r"\bwhat(?:'s| is)? (?:the |today's |current )*(?:date|day|weekday)\b", text):
        return ClockPlan("date")
    return ClockPlan("date") if re.search(r"^(?:the )?date(?: today)?\??$", text) else None


def _sales(original: str, lowered: str) -> Plan | None:
    only: dict[Dimension, list[str]] = {}
    periods = [period for period in (*QUARTERS, *HALVES) if re.search(period[0], lowered)]
    if len(periods) > 1:
        return Refusal("I can compare months, regions and products, but not quarters or halves.")
    for pattern, months in periods:
        _add(only, "month", months)
        lowered = re.sub(pattern, " ", lowered)
    if re.search(r"\b(?:this|next|last|previous) (?:year|month|week|quarter)\b", lowered):
        return Refusal(f"The sales database covers {YEAR} only; name a month or a quarter of it.")
    words = [word.removesuffix("'s") for word in _WORD.findall(lowered)]
    unknown: list[str] = []
    seen: set[str] = set()
    number = 0
    for position, word in enumerate(words):
        before = words[position - 1] if position else ""
        after = words[position + 1] if position + 1 < len(words) else ""
        if word in ENTITIES:
            dimension, value = ENTITIES[word]
            _add(only, dimension, (value,))
        elif word in MONTHS and (word != "may" or _is_month(original, before)):
            _add(only, "month", (MONTHS[word],))
        elif word in _KNOWN:
            seen.add(word)
        elif re.fullmatch(r"(?:19|20)\d\d", word) and word != YEAR:
            return Refusal(f"The sales database covers {YEAR} only, not {word}.")
        elif _is_limit(word, before, after):
            number = NUMBER_WORDS.get(word) or int(word)
        elif word[0].isalnum() and word not in FILLER and word != YEAR:
            unknown.append(word)
    if unknown:
        listed = ", ".join(repr(word) for word in dict.fromkeys(unknown[:5]))
        return Refusal(f"I don't know what to do with {listed}.")
    if not seen and not only:
        return None
    # The months of a quarter are one thing, not several that could be compared.
    named = [name for name in only if name != "month" or not periods]
    return _plan(seen, only, named, number, lowered)


def _plan(
    seen: set[str],
    only: dict[Dimension, list[str]],
    named: list[Dimension],
    number: int,
    text: str,
) -> SalesPlan | Refusal:
    metric: Metric = next((METRICS[word] for word in METRICS if word in seen), "revenue")
    asked = next((DIMENSIONS[word] for word in DIMENSIONS if word in seen), None)
    restricted = tuple((dimension, tuple(values)) for dimension, values in only.items())
    several = next((name for name in named if len(only[name]) > 1 and asked in (None, name)), None)
    ordered = bool(seen & (DESCENDING | ASCENDING))
    if seen & SHARE:
        part = _part(only, text)
        if part is None:
            return SalesPlan("share", metric, asked or "region", limit=_MAX_LIMIT)
        return SalesPlan("share", metric, part, restricted, limit=_MAX_LIMIT)
    if seen & GROWTH:
        if len(only.get("month", ())) not in (0, 2):
            return Refusal("For a change I need two months, or none for the whole year.")
        return SalesPlan("growth", metric, "month", restricted)
    if seen & AVERAGE:
        return SalesPlan("average", metric, asked or "month", restricted)
    if several is not None and (seen & COMPARE or ordered):
        return SalesPlan("compare", metric, several, restricted, limit=_MAX_LIMIT)
    if ordered:
        lowest = bool(seen & ASCENDING)
        return SalesPlan("ranking", metric, asked or "product", restricted, not lowest, number or 1)
    if asked is None:
        return SalesPlan("total", metric, "region", restricted)
    measured = seen & (TOTAL | set(METRICS)) - {"many"}
    if not measured and not seen & (BREAKDOWN | COMPARE):
        return SalesPlan("list", metric, asked)
    return SalesPlan("breakdown", metric, asked, restricted, limit=_MAX_LIMIT)


def _part(only: dict[Dimension, list[str]], text: str) -> Dimension | None:
    """The dimension whose share is asked for.

    That of "from West"; else the first one named, but for that of "share of tents", the whole.
    """
    source = re.search(r"\bfrom (?:the )?([a-z]+)", text)
    if source is not None and source[1] in ENTITIES:
        return ENTITIES[source[1]][0]
    names: list[Dimension] = [name for name in only if name != "month"] or list(only)
    of = re.search(rf"\b(?:{'|'.join(sorted(SHARE))}) of (?:all |the )*([a-z]+)", text)
    if of is not None and of[1] in ENTITIES and len(names) > 1:
        names.remove(ENTITIES[of[1]][0])
    return names[0] if names else None


def _add(only: dict[Dimension, list[str]], dimension: Dimension, values: Iterable[str]) -> None:
    chosen = only.setdefault(dimension, [])
    chosen.extend(value for value in values if value not in chosen)


def _is_limit(word: str, before: str, after: str) -> bool:
    """Whether a number is that of "top 3 products", "two best regions"."""
    if word not in NUMBER_WORDS and not (word.isdigit() and 0 < int(word) <= _MAX_LIMIT):
        return False
    return before in _SUPERLATIVES or after in _SUPERLATIVES or after in DIMENSIONS


def _is_month(original: str, before: str) -> bool:
    """Whether "may" is the month here and not the verb."""
    return before in _BEFORE_MONTHS or bool(re.search(r"(?<!^)\bMay\b", original))


def _date(year: str, month: str, day: str) -> str | None:
    try:
        return date(int(year), int(month), int(day)).isoformat()
    except ValueError:
        return None


_KNOWN = (
    DESCENDING
    | ASCENDING
    | TOTAL
    | AVERAGE
    | COMPARE
    | SHARE
    | GROWTH
    | BREAKDOWN
    | LISTING
    | frozenset(METRICS)
    | frozenset(DIMENSIONS)
)
