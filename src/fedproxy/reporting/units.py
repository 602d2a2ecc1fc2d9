"""Numbers as people read them."""

from collections.abc import Sequence


def percent(share: float | None) -> str:
    """A share as a percentage with one decimal, without the sign; a dash for None.

    Example:
        >>> percent(0.5)
        '50.0'
    """
    return "–" if share is None else f"{100 * share:.1f}"


def decimals(value: float | None, digits: int = 3) -> str:
    """A number with so many decimals; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def points(difference: float) -> str:
    """A difference of two shares in signed percentage points.

    Example:
        >>> points(-0.015)
        '−1.5 points'
    """
    return f"{100 * difference:+.1f} points".replace("-", "−")


def size(number: float | None) -> str:
    """A number of bytes in decimal units; a dash for None.

    Example:
        >>> size(1_234_567)
        '1.2 MB'
    """
    return _scaled(number, ("B", "kB", "MB", "GB", "TB"))


def operations(number: float | None) -> str:
    """A number of floating-point operations in decimal units; a dash for None.

    Example:
        >>> operations(1_234_567)
        '1.2 MFLOP'
    """
    return _scaled(number, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def _scaled(number: float | None, units: Sequence[str]) -> str:
    if number is None:
        return "–"
    power = next((power for power in range(len(units)) if abs(number) < 1000 ** (power + 1)), len(units) - 1)
    return f"{number / 1000**power:.{min(power, 1)}f} {units[power]}"


def duration(seconds: float | None) -> str:
    """Seconds as seconds, minutes or hours; a dash for None.

    Example:
        >>> duration(192)
        '3 min 12 s'
    """
    if seconds is None:
        return "–"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count(number: int, what: str) -> str:
    """A number with its noun, plural where it must be.

    Example:
        >>> count(1, "client"), count(1200, "row")
        ('1 client', '1,200 rows')
    """
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
