"""How one tensor is stored (`Scheme`) and which tensors get which scheme (`Recipe`).

A scheme cuts each row of a tensor into blocks of `block` weights that take `block_bytes` bytes.
Ids and layouts of the block schemes are those of GGUF (ggml.h); f32, f16 and bf16 are blocks of
one. A recipe is an ordered list of globs on our tensor names, first match wins; where a width does
not suit the scheme, the scheme's fallback is taken, so a recipe always resolves.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path

from halfbyte.errors import InvalidInputError, UnsupportedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """One way to store a tensor. `ggml_type` is its id in a GGUF file."""

    name: str
    block: int
    block_bytes: int
    ggml_type: int
    fallback: str | None = None

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.block_bytes / self.block

    def row_bytes(self, width: int) -> int:
        """Bytes of one row of `width` weights; the width must be whole blocks."""
        if width % self.block:
            raise InvalidInputError(
                f"{self.name} stores blocks of {self.block} weights; {width} is no multiple of it"
            )
        return width // self.block * self.block_bytes

    def bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor of this shape, without any alignment of the file."""
        return prod(shape[:-1]) * self.row_bytes(shape[-1])


def _scheme(name: str, block: int, size: int, ggml: int, fallback: str | None = None) -> Scheme:
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
    )
}

# The schemes that hold every value of another exactly, besides f32, which holds them all. q3_k's
# scales and integers are a part of q6_k's; an integer times an fp16 scale is q8_0.
HOLDERS = {"q4_0": "q8_0", "q5_0": "q8_0", "iq4_nl": "q8_0", "q3_k": "q6_k"}


def scheme_of(name: str) -> Scheme:
    """The scheme of that name; `UnsupportedError` names the known ones."""
    try:
        return SCHEMES[name.lower()]
    except KeyError:
        known = ", ".join(SCHEMES)
        raise UnsupportedError(f"unknown scheme '{name}'", hint=f"known: {known}") from None


def lossless_target(scheme: Scheme, available: Collection[Scheme]) -> Scheme:
    """The smallest of the available schemes that holds exactly what `scheme` does; itself if there.

    `halfbyte.numerics.codec.convert` goes there without a rounding. Raises `UnsupportedError`.
    """
    holders = (scheme.name, HOLDERS.get(scheme.name), "f32")
    for candidate in (SCHEMES[name] for name in holders if name):
        if candidate in available:
            return candidate
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
