"""The words that the scripted planner knows, as data."""

from typing import Literal

Dimension = Literal["region", "product", "month"]
Metric = Literal["revenue", "units"]

YEAR = "2025"

ENTITIES: dict[str, tuple[Dimension, str]] = {
    **{name.lower(): ("region", name) for name in ("North", "South", "East", "West")},
    **{
        form: ("product", name)
        for name in ("Tent", "Backpack", "Stove", "Lantern", "Kettle")
        for form in (name.lower(), f"{name.lower()}s")
    },
}

_MONTH_NAMES = (
    "january february march april may june july august september october november december".split()
)
MONTHS = {
    form: f"{YEAR}-{number:02d}"
    for number, name in enumerate(_MONTH_NAMES, 1)
    for form in (name, name[:3])
}
MONTH_TITLES = {
    f"{YEAR}-{number:02d}": name.capitalize() for number, name in enumerate(_MONTH_NAMES, 1)
}


def _months(first: int, last: int) -> tuple[str, ...]:
    return tuple(f"{YEAR}-{number:02d}" for number in range(first, last + 1))


QUARTERS = tuple(
    (rf"\bq ?{quarter}\b|\b{name} quarter\b", _months(3 * quarter - 2, 3 * quarter))
    for quarter, name in enumerate(("first", "second", "third", "fourth"), 1)
)
HALVES = (
    (r"\bh ?1\b|\bfirst half\b", _months(1, 6)),
    (r"\bh ?2\b|\bsecond half\b", _months(7, 12)),
)

DIMENSIONS: dict[str, Dimension] = {
    "region": "region",
    "regions": "region",
    "where": "region",
    "product": "product",
    "products": "product",
    "item": "product",
    "items": "product",
    "month": "month",
    "months": "month",
    "monthly": "month",
    "when": "month",
}

METRICS: dict[str, Metric] = {
    "units": "units",
    "unit": "units",
    "pieces": "units",
    "quantity": "units",
    "many": "units",
    "revenue": "revenue",
    "sales": "revenue",
    "sale": "revenue",
    "turnover": "revenue",
    "money": "revenue",
    "dollars": "revenue",
    "income": "revenue",
    "sell": "revenue",
    "sold": "revenue",
    "sells": "revenue",
    "selling": "revenue",
    "earn": "revenue",
    "earned": "revenue",
}

DESCENDING = frozenset(
    "most best top highest largest biggest leading greatest strongest more better higher "
    "larger bigger".split()
)
ASCENDING = frozenset(
    "least worst bottom lowest smallest fewest weakest less fewer lower smaller worse".split()
)
TOTAL = frozenset("total totals much sum overall altogether".split())
AVERAGE = frozenset("average mean avg".split())
COMPARE = frozenset("compare compared comparison versus vs difference than between against".split())
SHARE = frozenset("share percent percentage proportion fraction".split())
GROWTH = frozenset(
    "growth grow grew grown change changed increase increased decrease decreased develop "
    "developed trend".split()
)
BREAKDOWN = frozenset("by per each every breakdown split".split())
LISTING = frozenset("list show exist available there names".split())

FILLER = frozenset(
    "a all an and any are as at came can come could data database did do does during "
    "for from get give had has have hello hey hi how i in is it its made make may me my number "
    "of on one ones only or our out over please see shop so tell that the their them these they "
    "to us was we were what what's which who whole will with would year you your".split()
)

NUMBER_WORDS = {
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
}

OPERATORS = (
    (r"square root of\s*\(?([\d.]+)\)?", r"sqrt(\1)"),
    (r"([\d.]+)\s*(?:%|percent)\s+of\s+", r"\1 / 100 * "),
    (r"\bto the power of\b|\^", " ** "),
    (r"\bsquared\b", " ** 2"),
    (r"\bcubed\b", " ** 3"),
    (r"\bmultiplied by\b|\btimes\b|\u00d7|\u00b7|(?<=\d)\s*x\s*(?=\d)", " * "),
    (r"\bdivided by\b|\bover\b|\u00f7", " / "),
    (r"\bmodulo\b|\bmod\b", " % "),
    (r"\bplus\b", " + "),
    (r"\bminus\b|\u2212|\u2013", " - "),
)
