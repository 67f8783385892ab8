"""A jinja2 environment for templates that nobody has reviewed: no reach, no endless work.

jinja2's immutable sandbox keeps a template from everything but the values it is given. On top of
it a budget bounds the work: each turn of a loop, call, filter and operator is a step that looks at
the processor time used; what is printed is counted; and no step may build a value that is too
large. The price: loop bodies get a step of ours, `~` runs as `+` on strings, and a width or a
count above 1000 is refused.

A budget belongs to one rendering: a sandbox is not shared between threads.

Source: jinja2's sandbox documentation; CVE-2024-34359 (a template in a GGUF that ran code).
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Mapping, Sized
from datetime import datetime
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS = 2.0
MAX_PRINTED = 2**24  # characters, captured blocks counted each time
MAX_VALUE = 2**22  # characters of one value
MAX_ITEMS = 2**16  # of one value; a filter may compare or copy each of them
MAX_COUNT = 1000  # a width, an indentation, a batch
MAX_BITS = 4096  # of a whole number
_ITEM_WEIGHT = 8  # about the characters of a number or of a list's brackets, printed

_COUNTED = frozenset(
    {"center", "indent", "batch", "slice", "round", "truncate", "tojson"}
    | {"ljust", "rjust", "zfill", "expandtabs"}
)
# Their time grows faster than their text, and no step can look at the clock inside of them.
_REMOVED = frozenset({"wordwrap", "urlize"})
_MULTIPLYING = frozenset({"replace", "join", "indent", "expandtabs"})
_PRINTING = frozenset({"tojson", "string", "join", "pprint"})
_WIDE_FORMAT = re.compile(r"\d{4,}|\*|\{[^}]*\{")


class RefusedError(TemplateError):
    """Raised by a template itself: these messages cannot be rendered."""


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment that chat templates expect, with a budget for one rendering."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constants are computed while rendering, within the budget
            finalize=self._print,
            extensions=[_Generation, loopcontrols],
        )
        self.filters["tojson"] = _tojson
        self.filters = {
            name: self._watched(name, run)
            for name, run in self.filters.items()
            if name not in _REMOVED
        }
        functions: dict[str, Any] = self.globals
        functions |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        del functions["lipsum"]
        self._deadline = 0.0
        self._printed = 0

    def start(self) -> None:
        """Begin a rendering: the budget is whole again."""
        self._deadline = time.thread_time() + MAX_SECONDS
        self._printed = 0

    def step(self, printed: int = 0) -> str:
        """One unit of work that prints so many characters; returns empty text."""
        self._printed += printed
        if time.thread_time() > self._deadline:
            raise SecurityError(f"it works for more than {MAX_SECONDS:g} s")
        if self._printed > MAX_PRINTED:
            raise SecurityError(f"it prints more than {MAX_PRINTED} characters")
        return ""

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Every call in a template comes through here."""
        # A bound str.format is wrapped by jinja2's own sandbox.
        receiver = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        self._check(getattr(__obj, "__name__", ""), receiver, *args, *kwargs.values())
        return _small(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Every intercepted operator comes through here."""
        self.step()
        if operator == "*" and _size(left) * _size(right) * _repeats(left, right) > MAX_VALUE:
            raise SecurityError("it repeats something too often")
        if operator == "**" and _bits(left) * abs(right) > MAX_BITS:
            raise SecurityError("it raises to a power that is too large")
        if operator == "%" and isinstance(left, str):
            self._check("format", left, right)
        return _small(super().call_binop(context, operator, left, right))

    def _watched(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)  # keeps jinja2's marks on filters that want the context
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._check(name, *args, *kwargs.values())
            return _small(run(*args, **kwargs))

        return watched

    def _check(self, name: str, *values: Any) -> None:
        """Refuse a call before it does its work. The first value is what it works on."""
        self.step()
        if name in _COUNTED and any(_bits(v) and abs(v) > MAX_COUNT for v in values[1:]):
            raise SecurityError(f"it calls {name} with a number above {MAX_COUNT}")
        if name in _MULTIPLYING and _product(values) > MAX_VALUE * 16:
            raise SecurityError(f"it calls {name} on texts that are too long")
        if name in _PRINTING:
            _weigh(values)
        if name in ("format", "format_map") and _WIDE_FORMAT.search(str(values[0])):
            raise SecurityError("it formats with a width that is too large")

    @pass_context  # which also keeps jinja2 from printing constants while compiling
    def _print(self, _context: Context, value: Any) -> Any:
        self.step(_weigh(value))
        return value

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        _count_steps(source)
        return super()._generate(source, *args, **kwargs)


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks answers for training; its text stays."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _count_steps(source: nodes.Template) -> None:
    """Make each loop body and macro begin with a step, and each `~` a sum of strings."""
    for node in [*source.find_all((nodes.For, nodes.Macro, nodes.CallBlock))]:
        literal = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        step = nodes.Call(
            nodes.EnvironmentAttribute("step"), [nodes.Const(literal)], [], None, None
        )
        node.body.insert(0, nodes.ExprStmt(step))
    _replace_concats(source)


def _replace_concats(parent: nodes.Node) -> None:
    for field, value in parent.iter_fields():
        if isinstance(value, list):
            setattr(parent, field, [_without_concat(item) for item in value])
        else:
            setattr(parent, field, _without_concat(value))


def _without_concat(value: Any) -> Any:
    if isinstance(value, nodes.Node):
        _replace_concats(value)
    if not isinstance(value, nodes.Concat):
        return value
    texts = [
        nodes.Filter(node, "string", [], [], None, None, lineno=value.lineno)
        for node in value.nodes
    ]
    joined: nodes.Expr = texts[0]
    for text in texts[1:]:
        joined = nodes.Add(joined, text, lineno=value.lineno)
    return joined


def _small(value: Any) -> Any:
    most = MAX_VALUE if isinstance(value, str) else MAX_ITEMS
    if _size(value) > most or _bits(value) > MAX_BITS:
        raise SecurityError("it builds a value that is too large")
    return value


def _size(value: Any) -> int:
    return len(value) if isinstance(value, Sized) else 1


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _repeats(left: Any, right: Any) -> int:
    """How often a sequence is repeated by a product; a product of numbers repeats nothing."""
    if isinstance(left, int) and isinstance(right, int):
        return 1
    return max((abs(value) for value in (left, right) if isinstance(value, int)), default=1)


def _product(values: tuple[Any, ...]) -> int:
    """The two largest factors: a text's length, a list's, or a count."""
    factors = sorted(max(_size(v), v if isinstance(v, int) else 1) for v in values)
    return factors[-1] * (factors[-2] if len(factors) > 1 else 1)


def _weigh(value: Any) -> int:
    """About how many characters a value prints as; refused beyond `MAX_VALUE`."""
    weight, pending = 0, [value]
    while pending:
        item = pending.pop()
        weight += len(item) if isinstance(item, str) else _ITEM_WEIGHT
        if isinstance(item, Mapping):
            pending.extend(item.keys())
            pending.extend(item.values())
        elif isinstance(item, list | tuple):
            pending.extend(item)
        if weight + len(pending) > MAX_VALUE:
            raise SecurityError("it prints a value that is too large")
    return weight


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As Transformers defines it for chat templates: plain JSON, no HTML escapes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise RefusedError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern[:MAX_COUNT])
