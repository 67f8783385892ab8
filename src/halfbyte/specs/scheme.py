"""How one tensor is stored (`Scheme`) and which tensors get which scheme (`Recipe`).

A scheme cuts each row of a tensor into blocks of `block` weights that take `block_bytes` bytes.
Ids and layouts of most are those of GGUF (ggml.h); f32, f16 and bf16 are blocks of one. The others
are what other packages store: groups of four-bit integers under a bf16 or fp16 scale
(compressed-tensors, GPTQ, AWQ), and the `nf4` and `int8` of bitsandbytes, whose rows carry more
than their blocks. A recipe is an ordered list of globs on our tensor names, first match wins; where
a width does not suit the scheme, the scheme's fallback is taken, so a recipe always resolves.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import ceil, prod
from pathlib import Path

from halfbyte.errors import InvalidInputError, UnsupportedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """One way to store a tensor. `ggml_type` is its id in a GGUF file, None if that cannot hold it.

    A row has `row_header` bytes before its blocks, and an f32 for each span of `outer_span` weights
    that it touches: spans run through the whole tensor, over the ends of rows.
    """

    name: str
    block: int
    block_bytes: int
    ggml_type: int | None
    fallback: str | None = None
    row_header: int = 0
    outer_span: int = 0

    @property
    def bits(self) -> float:
        """Stored bits per weight, of a block."""
        return 8 * self.block_bytes / self.block

    @property
    def is_float(self) -> bool:
        """Numbers as they are, each for itself; everything else was rounded to some grid."""
        return self.block == 1 and not self.row_header

    def row_bytes(self, width: int) -> int:
        """Bytes of one row of `width` weights; the width must be whole blocks."""
        if width % self.block:
            raise InvalidInputError(
                f"{self.name} stores blocks of {self.block} weights; {width} is no multiple of it"
            )
        return self.row_extra(width) + width // self.block * self.block_bytes

    def row_extra(self, width: int) -> int:
        """Bytes of a row of `width` weights before its blocks."""
        if not self.outer_span:
            return self.row_header
        spans = 1 + ceil((width - self.block) / self.outer_span)
        return self.row_header + 4 * spans

    def bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor of this shape, without any alignment of the file."""
        return prod(shape[:-1]) * self.row_bytes(shape[-1])


def _scheme(
    name: str, block: int, size: int, ggml: int | None, fallback: str | None = None
) -> Scheme:
    return Scheme(name=name, block=block, block_bytes=size, ggml_type=ggml, fallback=fallback)


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        _scheme("f32", 1, 4, 0),
        _scheme("f16", 1, 2, 1),
        _scheme("bf16", 1, 2, 30),
        _scheme("q8_0", 32, 34, 8, "f16"),
        _scheme("q4_0", 32, 18, 2, "f16"),
        _scheme("q4_1", 32, 20, 3, "f16"),
        _scheme("q5_0", 32, 22, 6, "f16"),
        _scheme("q5_1", 32, 24, 7, "f16"),
        _scheme("iq4_nl", 32, 18, 20, "f16"),
        _scheme("q2_k", 256, 84, 10, "q4_0"),
        _scheme("q3_k", 256, 110, 11, "q4_0"),
        _scheme("q4_k", 256, 144, 12, "q4_0"),
        _scheme("q5_k", 256, 176, 13, "q5_1"),
        _scheme("q6_k", 256, 210, 14, "q8_0"),
        _scheme("iq4_xs", 256, 136, 23, "iq4_nl"),
        _scheme("int4-g32", 32, 18, None, "bf16"),
        _scheme("int4-g128", 128, 66, None, "int4-g32"),
        _scheme("uint4-g32", 32, 19, None, "bf16"),
        _scheme("uint4-g128", 128, 67, None, "uint4-g32"),
        _scheme("int4-g32-f16", 32, 18, None, "f16"),
        _scheme("int4-g128-f16", 128, 66, None, "int4-g32-f16"),
        _scheme("uint4-g32-f16", 32, 19, None, "f16"),
        _scheme("uint4-g128-f16", 128, 67, None, "uint4-g32-f16"),
        Scheme(
            name="nf4",
            block=64,
            block_bytes=33,
            ggml_type=None,
            fallback="bf16",
            row_header=8,
            outer_span=64 * 256,
        ),
        Scheme(name="int8", block=1, block_bytes=1, ggml_type=None, row_header=52),
    )
}

# The schemes that hold every value of another exactly, besides f32, which holds them all, best
# first. An integer times an fp16 scale is q8_0, and q4_0 if it is in -8..7; q3_k's scales and
# integers are a part of q6_k's.
HOLDERS: dict[str, tuple[str, ...]] = {
    "q4_0": ("q8_0", "int4-g32-f16"),
    "q5_0": ("q8_0",),
    "iq4_nl": ("q8_0",),
    "q3_k": ("q6_k",),
} | {
    f"{kind}-g{group}{scale}": holders
    for kind, holders in (("int4", ("q4_0", "q8_0")), ("uint4", ("q8_0",)))
    for group in (32, 128)
    for scale in ("", "-f16")
}


def scheme_of(name: str) -> Scheme:
    """The scheme of that name; `UnsupportedError` names the known ones."""
    try:
        return SCHEMES[name.lower()]
    except KeyError:
        known = ", ".join(SCHEMES)
        raise UnsupportedError(f"unknown scheme '{name}'", hint=f"known: {known}") from None


def holds(scheme: Scheme, other: Scheme) -> bool:
    """Whether `scheme` holds every value of `other` exactly."""
    return scheme.name in (other.name, *HOLDERS.get(other.name, ()), "f32")


def lossless_target(scheme: Scheme, available: Collection[Scheme]) -> Scheme:
    """The smallest of the available schemes that holds exactly what `scheme` does; itself if there.

    `halfbyte.numerics.codec.convert` goes there without a rounding. Raises `UnsupportedError`.
    """
    for name in (scheme.name, *HOLDERS.get(scheme.name, ()), "f32"):
        if SCHEMES[name] in available:
            return SCHEMES[name]
    names = ", ".join(other.name for other in available)
    raise UnsupportedError(f"nothing among {names} holds {scheme.name} without a loss")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """An ordered list of (glob on our tensor names, scheme name); the first match wins."""

    name: str
    rules: tuple[tuple[str, str], ...]

    def scheme_for(self, name: str, shape: Sequence[int]) -> Scheme:
        """The scheme of one tensor, after the fallbacks for its width.

        Vectors (norms, biases, scalars) and routers are always f32: they are small and everything
        hangs on them. Raises `InvalidInputError` when no rule matches.
        """
        if len(shape) < 2 or name.endswith("router.weight"):
            return SCHEMES["f32"]
        for pattern, wanted in self.rules:
            if fnmatchcase(name, pattern):
                return _fitting(scheme_of(wanted), shape[-1])
        raise InvalidInputError(
            f"no rule of recipe '{self.name}' matches", where=name, hint='end it with a rule "*"'
        )


def _fitting(scheme: Scheme, width: int) -> Scheme:
    while width % scheme.block:
        if scheme.fallback is None:
            raise AssertionError(f"{scheme.name} has no fallback for width {width}")
        scheme = SCHEMES[scheme.fallback]
    return scheme


def _uniform(name: str) -> Recipe:
    return Recipe(name=name, rules=(("*", name),))


def _linears(name: str) -> Recipe:
    """As the checkpoints of other packages are: what is no linear of a layer stays bf16."""
    return Recipe(name=name, rules=(("layers.*", name), ("*", "bf16")))


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="q4_0",
            rules=(
                ("embed.weight", "q6_k"),
                ("head.weight", "q6_k"),
                ("per_layer.project.weight", "q8_0"),
                ("*", "q4_0"),
            ),
        ),
        Recipe(name="q4_0-pure", rules=(("*", "q4_0"),)),
        _uniform("q8_0"),
        _uniform("bf16"),
        _uniform("f16"),
        _uniform("f32"),
        *(_linears(f"{kind}-g{group}") for kind in ("int4", "uint4") for group in (32, 128)),
        _linears("nf4"),
        _linears("int8"),
    )
}


def recipe_of(reference: str) -> Recipe:
    """A built-in recipe by name, or a TOML file of `"glob" = "scheme"` lines under `[rules]`."""
    if reference in RECIPES:
        return RECIPES[reference]
    path = Path(reference)
    if path.suffix == ".toml" and path.is_file():
        return _recipe_from_toml(path)
    raise InvalidInputError(
        f"unknown recipe '{reference}'",
        hint=f"one of {', '.join(RECIPES)}, or a .toml file with a [rules] table",
    )


def _recipe_from_toml(path: Path) -> Recipe:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"not a TOML file: {error}", where=path) from error
    rules = document.get("rules")
    if not isinstance(rules, dict) or not rules or set(document) - {"rules", "name"}:
        raise InvalidInputError(
            "a recipe has one table [rules] of glob = scheme (and may have a name)", where=path
        )
    pairs = tuple((str(pattern), scheme_of(str(scheme)).name) for pattern, scheme in rules.items())
    return Recipe(name=str(document.get("name", path.stem)), rules=pairs)
