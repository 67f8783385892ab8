"""Published rope scalings as divisors of the frequencies.

Sources: the `rope_scaling` fields of the models' config.json; Llama 3.1's rule is that of Meta's
reference code (wavelengths above `original / low_freq_factor` are divided by `factor`, those below
`original / high_freq_factor` are kept, in between the two blend linearly in 1/wavelength).
"""

from __future__ import annotations

import struct
from math import inf, isinf, pi
from typing import Any

from halfbyte.errors import UnsupportedError
from halfbyte.families.family import Header
from halfbyte.families.fields import Fields
from halfbyte.specs import RopeSpec

KNOWN = ("default", "linear", "llama3", "proportional")


def rope_of(fields: Fields, head_dim: int, theta: float) -> RopeSpec:
    """The rope of a config's `rope_scaling` or `rope_parameters` table (both old and new keys)."""
    kind = fields.get("rope_type", fields.get("type", "default"))
    theta = fields.number("rope_theta", theta)
    half = head_dim // 2
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind == "linear":
        factor = fields.number("factor")
        return RopeSpec(
            theta=theta, divisors=(factor,) * half, scaling=f"linear, factor {factor:g}"
        )
    if kind == "llama3":
        return _llama3(fields, head_dim, theta)
    if kind == "proportional":
        return _proportional(fields, head_dim, theta)
    raise UnsupportedError(f"rope type '{kind}'", hint=f"known rope types: {', '.join(KNOWN)}")


def rope_parameters(rope: RopeSpec) -> dict[str, Any]:
    """The `rope_parameters` of a config.json: the inverse of `rope_of`.

    Raises `UnsupportedError` for divisors that follow no published rule with few numbers.
    """
    theta = {"rope_theta": rope.theta}
    if rope.divisors is None:
        return {"rope_type": "default", **theta}
    if rope.linear_factor is not None:
        return {"rope_type": "linear", "factor": rope.linear_factor, **theta}
    turning = [divisor for divisor in rope.divisors if not isinf(divisor)]
    rotated = len(turning)
    if len(set(turning)) != 1:
        raise UnsupportedError(
            "rope divisors that no config.json can say", hint="start from the original checkpoint"
        )
    factor = {} if turning[0] == 1 else {"factor": turning[0]}
    share = {"partial_rotary_factor": rotated / len(rope.divisors)}
    return {"rope_type": "proportional", **share, **factor, **theta}


def stored_rope(header: Header, head_dim: int, theta: float) -> RopeSpec:
    """The rope that a GGUF's header gives: stored divisors, a linear factor, or none."""
    fields = header.fields()
    theta = fields.number("rope.freq_base", theta)
    # Older files give the factor, sometimes by another name, and no type; 0 is none.
    factors = ("rope.scaling.factor", "rope.scale_linear")
    factor_key = next((key for key in factors if fields.get(key)), None)
    kind = fields.get("rope.scaling.type", "linear" if factor_key else "none")
    if header.rope_divisors is not None:
        return RopeSpec(theta=theta, divisors=header.rope_divisors, scaling="stored in the file")
    if kind == "linear":
        factor = fields.number(factor_key or factors[0])
        divisors = (factor,) * (head_dim // 2)
        return RopeSpec(theta=theta, divisors=divisors, scaling=f"linear, factor {factor:g}")
    if kind != "none":
        raise UnsupportedError(
            f"rope scaling '{kind}'", hint="known: none, linear, stored divisors"
        )
    return RopeSpec(theta=theta)


def _llama3(fields: Fields, head_dim: int, theta: float) -> RopeSpec:
    factor = fields.number("factor")
    low = fields.number("low_freq_factor")
    high = fields.number("high_freq_factor")
    original = fields.integer("original_max_position_embeddings")
    divisors: list[float] = []
    for pair in range(head_dim // 2):
        wavelength = 2 * pi * theta ** (2 * pair / head_dim)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            kept = (original / wavelength - low) / (high - low)
            divisors.append(_f32(1.0 / ((1.0 - kept) / factor + kept)))
    scaling = f"llama3, factor {factor:g} above {original} positions"
    return RopeSpec(theta=theta, divisors=tuple(divisors), scaling=scaling)


def _f32(value: float) -> float:
    """What a file that stores f32 would say."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def _proportional(fields: Fields, head_dim: int, theta: float) -> RopeSpec:
    fraction = fields.number("partial_rotary_factor", 1.0)
    factor = fields.number("factor", 1.0)
    rotated = int(fraction * head_dim) // 2
    divisors = (factor,) * rotated + (inf,) * (head_dim // 2 - rotated)
    scaling = f"proportional, {rotated} of {head_dim // 2} pairs rotate"
    return RopeSpec(theta=theta, divisors=divisors, scaling=scaling)
