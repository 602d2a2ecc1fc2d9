"""Text that others wrote, as it may reach a terminal, a page, a log or a record."""


def plain(text: str, most: int | None = None, *, lines: bool = False) -> str:
    r"""Text without anything that steers a terminal or turns round what stands beside it.

    Args:
        text: The text; what cannot be printed is replaced, white space by a space.
        most: Letters that are kept at most; of more, the last one is "…".
        lines: Whether it may have several lines.

    Example:
        >>> plain("a\x1b[2Jb\nc", 6)
        'a�[2J…'
    """
    kept = "".join(c if c.isprintable() or (lines and c == "\n") else " " if c.isspace() else "�" for c in text)
    return kept if most is None or len(kept) <= most else kept[: most - 1] + "…"
