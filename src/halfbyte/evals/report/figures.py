"""The figures of a report, each a pure function from numbers to a drawing.

Axes that carry amounts begin at zero and are linear; what is uncertain has its interval. One
accent is for the model, ink for everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from halfbyte.evals.fidelity import Fidelity
from halfbyte.evals.layers import LayerError
from halfbyte.evals.report.facts import Point
from halfbyte.evals.report.numbers import short, short_percent, size
from halfbyte.evals.report.svg import WIDTH, Scale, dot, figure, line, path, text, ticks

ROW = 30
LABELS = 92  # the room of the names on the left
TOP, BOTTOM = 8, 26
HEIGHT = 210
RIGHT = 12
LETTER, LINE = 6.6, 13  # about what a letter of a label takes
Box = tuple[float, float, float, float]  # left, top, right, bottom


def divergence(texts: Sequence[Fidelity]) -> str:
    """KL of every text: its mean, and the stretch from the median to the 99th percentile."""
    found = [(t.name, t.kl) for t in texts if t.kl is not None]
    marks = ticks(0, max(kl.p99 for _, kl in found))
    scale = Scale(0, marks[-1], LABELS, WIDTH - RIGHT)
    parts = _rows_axis(scale, marks, short, len(found))
    for row, (name, kl) in enumerate(found):
        y = TOP + ROW * (row + 0.5)
        parts += [
            text(_cut(name), 0, y + 4),
            line(scale(kl.median), y, scale(kl.p99), y, "range"),
            line(scale(kl.median), y - 5, scale(kl.median), y + 5, "range"),
            dot(scale(kl.mean), y, 4.5, "model"),
        ]
    return figure(_rows_height(len(found)), "KL divergence of each text", parts)


def perplexity(texts: Sequence[Fidelity]) -> str:
    """The change of the perplexity of every text, with two standard errors to both sides."""
    found = [
        (t.name, t.perplexity_ratio - 1, 2 * t.perplexity_ratio_error)
        for t in texts
        if t.perplexity_ratio is not None and t.perplexity_ratio_error is not None
    ]
    low = min(0.0, *(change - error for _, change, error in found))
    marks = ticks(low, max(0.0, *(change + error for _, change, error in found)))
    scale = Scale(marks[0], marks[-1], LABELS, WIDTH - RIGHT)
    parts = _rows_axis(scale, marks, short_percent, len(found))
    for row, (name, change, error) in enumerate(found):
        y = TOP + ROW * (row + 0.5)
        parts += [
            text(_cut(name), 0, y + 4),
            line(scale(change - error), y, scale(change + error), y, "range"),
            dot(scale(change), y, 4.5, "model"),
        ]
    return figure(_rows_height(len(found)), "Change of the perplexity of each text", parts)


def size_and_divergence(
    points: Sequence[Point], name: str, front: Sequence[tuple[int, float]] = ()
) -> str:
    """Every model by its size and its mean KL, `name` in the accent; a predicted front as a line,
    as far as it is of the same order."""
    highest = max(point.kl for point in points)
    near = [(size_, kl) for size_, kl in front if kl <= 2 * highest]
    x_marks = ticks(0, max(point.bytes for point in points))
    y_marks = ticks(0, max([highest, *(kl for _, kl in near)]))
    x = Scale(0, x_marks[-1], 44, WIDTH - RIGHT)
    y = Scale(0, y_marks[-1], HEIGHT - BOTTOM, TOP)
    parts = _grid(x, x_marks, size, y, y_marks, short)
    taken: list[Box] = []
    for point in sorted(points, key=lambda point: point.name != name):
        model = point.name == name
        at = x(point.bytes), y(point.kl)
        parts.append(dot(*at, 4.5 if model else 3.5, "model" if model else "other"))
        parts.append(_label(_cut(point.name, 24), at, taken, "accent" if model else ""))
    if near:
        at = [(x(size_), y(kl)) for size_, kl in near]
        parts += [path(at, "other-line"), _label("predicted", at[0], taken, "number")]
    return figure(HEIGHT, "Size and mean KL of each model", parts)


def layers(errors: Sequence[LayerError]) -> str:
    """The error of every layer by itself, and what has come together by then."""
    y_marks = ticks(0, max(max(error.own, error.carried) for error in errors))
    x = Scale(0, max(len(errors) - 1, 1), 44, WIDTH - 66)
    y = Scale(0, y_marks[-1], HEIGHT - BOTTOM, TOP)
    x_marks = [m for m in ticks(0, len(errors) - 1, 5) if m == int(m) and m < len(errors)]
    parts = _grid(x, x_marks, short, y, y_marks, short_percent)
    for numbers, kind, label in (
        ([error.own for error in errors], "other", "its own"),
        ([error.carried for error in errors], "model", "carried"),
    ):
        at = [(x(index), y(value)) for index, value in enumerate(numbers)]
        parts += [path(at, f"{kind}-line")]
        parts += [dot(*point, 2.5, kind) for point in at]
        class_ = "accent" if kind == "model" else ""
        parts.append(text(label, at[-1][0] + 7, at[-1][1] + 4, class_=class_))
    return figure(HEIGHT, "Relative error behind each layer", parts)


def training(curve: Sequence[tuple[int, float]]) -> str:
    """The held-out measure over the steps of a training."""
    y_marks = ticks(0, max(measure for _, measure in curve))
    x_marks = ticks(0, max(step for step, _ in curve), 5)
    x = Scale(0, x_marks[-1], 44, WIDTH - RIGHT)
    y = Scale(0, y_marks[-1], HEIGHT - BOTTOM, TOP)
    at = [(x(step), y(measure)) for step, measure in curve]
    parts = [*_grid(x, x_marks, short, y, y_marks, short), path(at, "model-line")]
    return figure(HEIGHT, "The held-out measure over the steps", parts)


def _label(name: str, at: tuple[float, float], taken: list[Box], class_: str) -> str:
    """A name beside a dot, in the first place that is free; the box it takes is noted."""
    width = LETTER * len(name)
    places = [
        (anchor, at[0] + right, at[1] + down)
        for down in (4, -8, 17, -22, 30)
        for anchor, right in (("start", 8), ("end", -8))
    ]
    boxes = [_box(anchor, x, y, width) for anchor, x, y in places]
    chosen = next((i for i, box in enumerate(boxes) if _is_free(box, taken)), 0)
    taken.append(boxes[chosen])
    anchor, x, y = places[chosen]
    return text(name, x, y, anchor=anchor, class_=class_)


def _box(anchor: str, x: float, y: float, width: float) -> Box:
    left = x if anchor == "start" else x - width
    return left, y - LINE, left + width, y


def _is_free(box: Box, taken: Sequence[Box]) -> bool:
    inside = box[0] >= 44 and box[2] <= WIDTH and box[1] >= 0 and box[3] < HEIGHT - BOTTOM
    return inside and not any(
        box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
        for other in taken
    )


def _rows_height(rows: int) -> float:
    return TOP + ROW * rows + BOTTOM


def _rows_axis(
    scale: Scale, marks: Sequence[float], shown: Callable[[float], str], rows: int
) -> list[str]:
    """Vertical lines at the marks, the zero line stronger, their numbers below."""
    bottom = TOP + ROW * rows
    parts = [line(scale(m), TOP, scale(m), bottom, "axis" if m == 0 else "grid") for m in marks]
    return parts + _numbers(scale, marks, shown, bottom)


def _grid(
    x: Scale,
    x_marks: Sequence[float],
    x_shown: Callable[[float], str],
    y: Scale,
    y_marks: Sequence[float],
    y_shown: Callable[[float], str],
) -> list[str]:
    left, right = x.start, max(x.end, x(x_marks[-1]))
    parts = [line(left, y(m), right, y(m), "axis" if m == 0 else "grid") for m in y_marks]
    parts += [text(y_shown(m), left - 8, y(m) + 4, anchor="end", class_="number") for m in y_marks]
    return parts + _numbers(x, x_marks, x_shown, y.start)


def _numbers(
    scale: Scale, marks: Sequence[float], shown: Callable[[float], str], bottom: float
) -> list[str]:
    """The marks' numbers; every second one where they would touch."""
    labels = [shown(mark) for mark in marks]
    widest = 7 * max(map(len, labels))
    gap = min((abs(scale(b) - scale(a)) for a, b in pairwise(marks)), default=WIDTH)
    step = 1 if gap > widest else 2
    return [
        text(label, scale(mark), bottom + 17, anchor="middle", class_="number")
        for label, mark in [*zip(labels, marks, strict=True)][::step]
    ]


def _cut(name: str, length: int = 14) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
