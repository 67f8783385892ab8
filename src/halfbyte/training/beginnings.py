"""What a new drafter is, and what it starts from: its target's own last layers.

A drafter as wide as its target begins as copies of the target's last layers, norm and head, so it
drafts before it has learned anything. A narrower one begins as their projections on the directions
in which the target's head spreads most; norms that have no place there become plain numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.errors import InvalidInputError
from halfbyte.families.gemma4_assistant import drafter_for
from halfbyte.formats.checkpoint import Source
from halfbyte.numerics.codec import decode
from halfbyte.specs import ModelSpec

NARROWEST, WIDEST, STEP = 256, 1024, 256
LARGE = 1024  # targets from this width on get four layers, others two
QUIET = 0.3  # what a branch's norm starts from where the target's branch has none


def shape(
    target: ModelSpec,
    *,
    layers: int | None = None,
    hidden: int | None = None,
    width: int | None = None,
    head_rows: int | None = None,
    fingerprint: str | None = None,
) -> ModelSpec:
    """The spec of a drafter for a target, with what is not given chosen by its size.

    Where the target has sliding layers, all but the last layer of the drafter read the last of
    these, and the last one the target's last full layer, as Gemma 4's assistants do; else they read
    the last full layers.
    """
    count = layers or (4 if target.hidden >= LARGE else 2)
    fourth = -(-target.hidden // (4 * STEP)) * STEP
    hidden = hidden or min(target.hidden, max(NARROWEST, fourth), WIDEST)
    if hidden > target.hidden:
        raise InvalidInputError(f"a drafter of width {hidden} beside a target of {target.hidden}")
    return drafter_for(
        target,
        reads=_reads(target, count),
        hidden=hidden,
        width=width or 4 * hidden,
        head_rows=head_rows,
        fingerprint=fingerprint,
    )


def _reads(target: ModelSpec, count: int) -> list[int]:
    sliding, full = _own(target, sliding=True), _own(target, sliding=False)
    if not full:
        raise InvalidInputError("the target has no layer that sees everything")
    if sliding:
        return [sliding[-1]] * (count - 1) + [full[-1]]
    if count > len(full):
        raise InvalidInputError(f"{count} layers for a target of {len(full)}")
    return full[-count:]


def _own(target: ModelSpec, *, sliding: bool) -> list[int]:
    """The layers of a kind that keep keys of their own."""
    return [
        index
        for index, layer in enumerate(target.layers)
        if layer.kv_source is None and (layer.attention.window is not None) is sliding
    ]


def first_copied(spec: ModelSpec, target: ModelSpec) -> int:
    """The layer of the target that a drafter's first layer begins as."""
    return _sources(spec, target)[0]


def beginning(
    spec: ModelSpec, target: Source, entry: Tensor, tokens: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """The weights f32 of a new drafter, by our names.

    `entry` [H, 2 H] makes the stream before `first_copied` of what the drafter is given; `tokens`
    are those of its shortlist.
    """
    return _Beginning(spec, target).weights(entry, tokens)


def _sources(spec: ModelSpec, target: ModelSpec) -> list[int]:
    """The layer of the target that each layer begins as: the last ones of its kind."""
    kinds = [layer.attention.window is not None for layer in spec.layers]
    found: list[int] = []
    for index, kind in enumerate(kinds):
        after = sum(other is kind for other in kinds[index:])
        own = _own(target, sliding=kind)
        found.append(own[-min(after, len(own))])
    return found


class _Beginning:
    def __init__(self, spec: ModelSpec, target: Source) -> None:
        self._spec, self._target = spec, target
        self._chance = torch.Generator().manual_seed(0)
        self._head = self._read(target.spec.head_name)
        # [H, d]; None where it is the identity.
        self._basis = None if spec.hidden == target.spec.hidden else self._directions()

    def weights(self, entry: Tensor, tokens: Sequence[int] | None) -> dict[str, Tensor]:
        spec = self._spec
        found = {"pre.weight": self._outward(entry)}
        for index, source in enumerate(_sources(spec, self._target.spec)):
            found |= self._layer(index, source)
        found["norm.weight"] = self._norm("norm.weight")
        head = self._head if tokens is None else self._head[list(tokens)]
        found["head.weight"] = head if self._basis is None else head @ self._basis
        if tokens is not None:
            found["head.tokens"] = torch.tensor(tokens, dtype=torch.float32)
        found["post.weight"] = (
            torch.eye(spec.hidden) if self._basis is None else self._basis.clone()
        )
        assert set(found) == {tensor.name for tensor in spec.tensors()}
        return found

    def _layer(self, index: int, source: int) -> dict[str, Tensor]:
        theirs = self._target.spec.layers[source]
        at, its = f"layers.{index}.", f"layers.{source}."
        scale = theirs.attention.scale
        q_norm = self._read(f"{its}attn.q_norm.weight") if theirs.attention.qk_norm else None
        gate, up, down = self._mlp(its, self._spec.layers[index].mlp.width)
        post = [f"{its}attn_post_norm.weight", f"{its}mlp_post_norm.weight"]
        quiet = torch.full((self._spec.hidden,), QUIET)
        norms = [self._norm(name) if theirs.post_norms else quiet.clone() for name in post]
        return {
            f"{at}attn_norm.weight": self._norm(f"{its}attn_norm.weight"),
            f"{at}attn.q.weight": self._inward(f"{its}attn.q.weight", f"{its}attn_norm.weight"),
            f"{at}attn.q_norm.weight": scale
            * (torch.ones(theirs.attention.head_dim) if q_norm is None else q_norm),
            f"{at}attn.o.weight": self._outward(self._read(f"{its}attn.o.weight")),
            f"{at}attn_post_norm.weight": norms[0],
            f"{at}mlp_norm.weight": self._norm(f"{its}mlp_norm.weight"),
            f"{at}mlp.gate.weight": gate,
            f"{at}mlp.up.weight": up,
            f"{at}mlp.down.weight": down,
            f"{at}mlp_post_norm.weight": norms[1],
            f"{at}scalar": self._read(f"{its}scalar") if theirs.scalar else torch.ones(1),
        }

    def _mlp(self, its: str, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and down, cut to the inner numbers that matter most, or filled with noise."""
        norm = f"{its}mlp_norm.weight"
        gate, up = (self._inward(f"{its}mlp.{part}.weight", norm) for part in ("gate", "up"))
        down = self._outward(self._read(f"{its}mlp.down.weight"))
        if width <= len(gate):
            most = (up.norm(dim=1) * down.norm(dim=0)).topk(width).indices.sort().values
            return gate[most], up[most], down[:, most]
        more = width - len(gate)
        noise = [
            torch.randn(more, self._spec.hidden, generator=self._chance) * gate.std()
            for _ in range(2)
        ]
        silent = torch.zeros(len(down), more)
        return (
            torch.cat((gate, noise[0])),
            torch.cat((up, noise[1])),
            torch.cat((down, silent), dim=1),
        )

    def _directions(self) -> Tensor:
        """[H, d]: the orthonormal directions in which the head's rows spread most."""
        values = torch.linalg.eigh(self._head.T @ self._head)
        return values.eigenvectors[:, -self._spec.hidden :].flip(1).contiguous()

    def _inward(self, name: str, norm: str) -> Tensor:
        """A weight that reads normed states; where they are projected its norm goes into it."""
        weight = self._read(name)
        return weight if self._basis is None else (weight * self._read(norm)) @ self._basis

    def _outward(self, weight: Tensor) -> Tensor:
        """A weight that writes states."""
        return weight if self._basis is None else self._basis.T @ weight

    def _norm(self, name: str) -> Tensor:
        weight = self._read(name)
        if self._basis is None:
            return weight
        plain = 1.0 if name.endswith(("attn_norm.weight", "mlp_norm.weight")) else None
        size = weight.square().mean().sqrt().item() if plain is None else plain
        return torch.full((self._spec.hidden,), size)

    def _read(self, name: str) -> Tensor:
        return decode(self._target.tensor(name)).clone()
