"""Numbers as people read them: a few digits, a unit, a true minus."""

from __future__ import annotations

from math import isfinite

RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MINUS = "−"
UNITS = ("B", "kB", "MB", "GB", "TB")


def plain(value: float) -> str:
    """Three digits: 0.0281, 0.400, 165, 1,530, 2.1×10⁻⁵, 0."""
    if not isfinite(value):
        return "not a number" if value != value else "infinite"
    if not value:
        return "0"
    if abs(value) < 1e-4:
        digits, _, power = f"{value:.1e}".partition("e")
        return f"{digits}×10{str(int(power)).translate(RAISED)}".replace("-", MINUS)
    shown = f"{value:#.3g}".rstrip(".") if abs(value) < 1e3 else f"{value:,.0f}"
    return shown.replace("-", MINUS)


def short(value: float) -> str:
    """As few digits as say it: 0.1, 5. For round numbers."""
    return f"{value:.6g}".replace("-", MINUS)


def percent(value: float) -> str:
    """A fraction in percent: 85.6%, 2.29%."""
    return f"{100 * value:.{1 if abs(value) >= 0.1 else 2}f}%".replace("-", MINUS)


def short_percent(value: float) -> str:
    """A round fraction in percent: 5%, 2.5%."""
    return f"{short(100 * value)}%"


def change(value: float) -> str:
    """A fraction in percent with its sign."""
    return ("+" if value > 0 else "") + percent(value)


def size(value: float) -> str:
    """Bytes in powers of a thousand: 5.43 MB."""
    unit = 0
    while value >= 1000 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {UNITS[unit]}"


def count(value: float) -> str:
    """A number of things: 8.05 M, 12.2 B."""
    for factor, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.0f}"
