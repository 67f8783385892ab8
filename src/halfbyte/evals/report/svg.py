"""The little of SVG that the figures need: elements, a linear scale, and round ticks.

Colours and fonts are classes, which the page's style sheet paints for light and for dark. Figures
are 340 units wide, about as wide as a telephone, so that their letters are letters everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10
from xml.sax.saxutils import escape, quoteattr

WIDTH = 340


def element(name: str, content: str = "", **attributes: str | float) -> str:
    """An element; `class_` is class, and other underscores are hyphens."""
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}={quoteattr(_short(value))}"
        for key, value in attributes.items()
    )
    return f"<{name}{given}>{content}</{name}>"


def text(content: str, x: float, y: float, *, anchor: str = "start", class_: str = "") -> str:
    """A line of text from, to or around `x`, standing on `y`."""
    return element("text", escape(content), x=x, y=y, text_anchor=anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def dot(x: float, y: float, radius: float, class_: str) -> str:
    return element("circle", cx=x, cy=y, r=radius, class_=class_)


def path(points: Iterable[tuple[float, float]], class_: str) -> str:
    """A line through points."""
    steps = " L".join(f"{_short(x)} {_short(y)}" for x, y in points)
    return element("path", d=f"M{steps}", class_=class_)


def figure(height: float, title: str, parts: Iterable[str]) -> str:
    """A drawing; `title` says what it shows to those who do not see it."""
    return element(
        "svg",
        "".join(parts),
        viewBox=f"0 0 {WIDTH} {_short(height)}",
        role="img",
        aria_label=title,
    )


def _short(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.5g}"


@dataclass(frozen=True, slots=True)
class Scale:
    """Values from `low` to `high`, drawn from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `count` steps apart."""
    span = high - low
    if not isfinite(span) or span <= 0:
        return [low, low + 1]
    raw = span / count
    power = 10.0 ** floor(log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]
