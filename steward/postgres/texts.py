"""Any text in a PostgreSQL column: NUL, which it can't hold, is escaped by a backslash."""


def stored(text: str) -> str:
    """What is kept for `text`. Texts with neither NUL nor backslash are kept as they are."""
    if "\0" not in text and "\\" not in text:
        return text
    return text.replace("\\", "\\\\").replace("\0", "\\0")


def original(text: str) -> str:
    """The text that `stored` made this of."""
    if "\\" not in text:
        return text
    return "\\".join(part.replace("\\0", "\0") for part in text.split("\\\\"))
