"""Between stored bytes and f32 weights: `decode`, `encode`, `convert`. The one rounding we have.

PTQ, QAT, the run time and export all come through here, so what is measured is what ships. Blocks
know nothing of each other: work goes tile by tile of about a million weights, which bounds the
memory beside the result and stays in a CPU's cache. Works on any torch device; stored bytes are
always in main memory.

What it is not: a kernel (those multiply without decoding), nor a calibrated quantizer (those choose
the integers themselves); `importance` is the one hint it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from halfbyte.errors import IntegrityError, InvalidInputError, UnsupportedError
from halfbyte.numerics import blocks, int8, nf4, plain, superblocks
from halfbyte.numerics.affine import AFFINE, int4_of_q4_0
from halfbyte.numerics.grids import GRIDS, grid_of
from halfbyte.numerics.qtensor import QTensor
from halfbyte.numerics.scales import Scales, joined, nearest_on
from halfbyte.specs import SCHEMES, Method, Scheme

TILE = 1 << 20  # weights handled at once; a few f32 temporaries of this size exist at a time
CONVERT_CHUNK = 1 << 23  # weights decoded at once by `convert`: 32 MiB of f32


class Codec(NamedTuple):
    """`decode`: bytes [n, block_bytes] -> f32 [n, block].

    `encode`: f32 [n, block] -> bytes, rounded to nearest; None for a scheme that we read but do not
    write. A search goes by the scheme's grid (`halfbyte.numerics.grids`), where it has one.
    """

    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor] | None


CODECS: dict[str, Codec] = {
    "f32": Codec(plain.decode_f32, plain.encode_f32),
    "f16": Codec(plain.decode_f16, plain.encode_f16),
    "bf16": Codec(plain.decode_bf16, plain.encode_bf16),
    "q8_0": Codec(blocks.decode_q8_0, blocks.encode_q8_0),
    "q4_0": Codec(blocks.decode_q4_0, blocks.encode_q4_0),
    "q4_1": Codec(blocks.decode_q4_1, None),
    "q5_0": Codec(blocks.decode_q5_0, None),
    "q5_1": Codec(blocks.decode_q5_1, None),
    "iq4_nl": Codec(blocks.decode_iq4_nl, None),
    "q2_k": Codec(superblocks.decode_q2_k, None),
    "q3_k": Codec(superblocks.decode_q3_k, None),
    "q4_k": Codec(superblocks.decode_q4_k, None),
    "q5_k": Codec(superblocks.decode_q5_k, None),
    "q6_k": Codec(superblocks.decode_q6_k, superblocks.encode_q6_k),
    "iq4_xs": Codec(superblocks.decode_iq4_xs, None),
} | {name: Codec(layout.decode, layout.encode) for name, layout in AFFINE.items()}


class RowCodec(NamedTuple):
    """A scheme whose rows are more than blocks.

    `decode`: (bytes [n, row bytes], width) -> f32 [n, width]. `encode`: (f32 [N, K], importance of
    the columns [K] or None) -> bytes [N, row bytes], of a whole tensor.
    """

    decode: Callable[[Tensor, int], Tensor]
    encode: Callable[[Tensor, Tensor | None], Tensor]


ROW_CODECS: dict[str, RowCodec] = {
    "nf4": RowCodec(nf4.decode_nf4, nf4.encode_nf4),
    "int8": RowCodec(int8.decode_int8, int8.encode_int8),
}


def _to_q8_0(integers: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Blocks of 32 integers under an fp16 scale are q8_0's with the same scale."""
    return lambda stored: torch.cat([stored[:, :2], integers(stored).view(torch.uint8)], dim=1)


def _q3_k_to_q6_k(stored: Tensor) -> Tensor:
    return superblocks.q6_k_of(stored[:, 108:], *superblocks.parts_q3_k(stored))


# (from, to) -> bytes to bytes, without a rounding; the pairs of `specs.scheme.HOLDERS`.
REPACKS: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {
    **{(name, "q8_0"): layout.to_q8_0 for name, layout in AFFINE.items()},
    **{(name, "q4_0"): layout.to_q4_0 for name, layout in AFFINE.items() if not layout.zero},
    ("q4_0", "q8_0"): _to_q8_0(blocks.integers_q4_0),
    ("q4_0", "int4-g32-f16"): int4_of_q4_0,
    ("q5_0", "q8_0"): _to_q8_0(blocks.integers_q5_0),
    ("iq4_nl", "q8_0"): _to_q8_0(blocks.integers_iq4_nl),
    ("q3_k", "q6_k"): _q3_k_to_q6_k,
}


def decode(q: QTensor, *, device: str | torch.device = "cpu") -> Tensor:
    """The weights as f32 of `q.shape` on `device`, bit-exact with the `gguf` package."""
    result = torch.empty(q.shape, dtype=torch.float32, device=device)
    if q.scheme.name in ROW_CODECS:
        return _decode_rows(q, result)
    flat = result.view(-1, q.scheme.block)
    for start, stop in _tiles(len(flat), q.scheme):
        # A copy, because the stored bytes may be a read-only map.
        flat[start:stop] = CODECS[q.scheme.name].decode(
            torch.tensor(q.blocks[start:stop], device=device)
        )
    return result


def encode(
    weight: Tensor, scheme: Scheme, *, method: Method = "rtn", importance: Tensor | None = None
) -> QTensor:
    """Store `weight` [..., K] (any float type and device) in `scheme`.

    `rtn` rounds to nearest as ggml's reference does, byte for byte for q4_0 and q8_0; `search`
    chooses the scales of least squared error, weighted by `importance` [K] if given (not negative:
    the mean square of each input channel, say). The plain schemes have no scale to search. A
    weight that is not contiguous is copied first.

    Raises `UnsupportedError` for a scheme without an encoder or a magnitude it cannot hold,
    `IntegrityError` for weights that are not numbers, `InvalidInputError` for a bad argument.
    """
    _check_arguments(weight, method, importance)
    if scheme.name in ROW_CODECS:
        return _encode_rows(weight, scheme, importance)
    encode_blocks = _encoder(scheme)
    grid = GRIDS.get(scheme.name) if method == "search" else None
    data = np.empty((weight.shape[:-1].numel(), scheme.row_bytes(weight.shape[-1])), dtype=np.uint8)
    stored = torch.from_numpy(data).view(-1, scheme.block_bytes)
    for (start, stop), tile in _finite_tiles(weight, scheme):
        if grid is None:
            stored[start:stop] = encode_blocks(tile)
        else:
            scales = grid.choose(tile, _weights_of(tile, start, importance))
            stored[start:stop] = grid.write(nearest_on(tile, scales), scales)
    return QTensor(scheme, tuple(weight.shape), data)


def choose_scales(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> Scales:
    """The scales [N, groups] that a search stores for `weight` [N, K]. Raises as `encode` does."""
    grid = grid_of(scheme)
    _check_arguments(weight, "search", importance)
    scheme.row_bytes(weight.shape[-1])
    groups = weight.shape[1] // grid.group
    chosen = [
        grid.choose(tile, _weights_of(tile, start, importance)).each(Tensor.flatten)
        for (start, _), tile in _finite_tiles(weight, scheme)
    ]
    return joined(chosen).each(lambda field: field.view(-1, groups))


def store(integers: Tensor, scales: Scales, scheme: Scheme) -> QTensor:
    """Integers [N, K] and scales [N, groups] as the bytes of `scheme`: a pure packing."""
    grid, shape = grid_of(scheme), tuple(integers.shape)
    data = np.empty((shape[0], scheme.row_bytes(shape[1])), dtype=np.uint8)
    for start, stop in _row_tiles(*shape):
        rows = slice(start, stop)
        parts = scales.each(lambda f, rows=rows: f[rows].reshape(-1, scheme.block // grid.group))
        written = grid.write(integers[rows].reshape(-1, scheme.block), parts)
        data[rows] = written.view(-1, data.shape[1]).numpy(force=True)
    return QTensor(scheme, shape, data)


def integers_of(q: QTensor, *, device: str | torch.device = "cpu") -> tuple[Tensor, Scales]:
    """The inverse of `store`: integers int8 [rows, K] and scales [rows, groups] on `device`.

    Raises `UnsupportedError` for a scheme that has none.
    """
    grid = grid_of(q.scheme)
    integers = torch.empty((q.num_rows, q.width), dtype=torch.int8, device=device)
    flat, found = integers.view(-1, q.scheme.block), list[Scales]()
    for start, stop in _tiles(len(flat), q.scheme):
        flat[start:stop], scales = grid.read(torch.tensor(q.blocks[start:stop], device=device))
        found.append(scales.each(Tensor.flatten))
    return integers, joined(found).each(lambda field: field.view(q.num_rows, -1))


def convert(q: QTensor, scheme: Scheme, *, method: Method = "rtn") -> QTensor:
    """The same tensor in another scheme; the same scheme returns `q` itself.

    Exact, whatever the method, where `scheme` holds all that `q.scheme` does (`lossless_target`).
    Goes by chunks of rows: the peak is the result and one chunk of about 32 MiB. Raises as
    `encode` does. Never use it to move quantized weights between two files of one scheme.
    """
    if scheme == q.scheme:
        return q
    repack = REPACKS.get((q.scheme.name, scheme.name))
    if repack is not None:
        return _repacked(q, scheme, repack)
    if scheme.name in ROW_CODECS:
        return encode(decode(q), scheme, method=method)
    _encoder(scheme)
    data = np.empty((q.num_rows, scheme.row_bytes(q.width)), dtype=np.uint8)
    step = max(1, CONVERT_CHUNK // q.width)
    for start in range(0, q.num_rows, step):
        stop = min(start + step, q.num_rows)
        data[start:stop] = encode(decode(q.rows(start, stop)), scheme, method=method).data
    return QTensor(scheme, q.shape, data)


def convert_exactly(q: QTensor, scheme: Scheme) -> QTensor:
    """`q` in its `lossless_target`; in f32 where that lacks one of its scales, a tiny bf16 one."""
    try:
        return convert(q, scheme)
    except UnsupportedError:
        return convert(q, SCHEMES["f32"])


def _decode_rows(q: QTensor, result: Tensor) -> Tensor:
    flat = result.view(-1, q.width)
    for start, stop in _row_tiles(q.num_rows, q.width):
        rows = torch.tensor(q.data[start:stop], device=result.device)
        flat[start:stop] = ROW_CODECS[q.scheme.name].decode(rows, q.width)
    return result


def _encode_rows(weight: Tensor, scheme: Scheme, importance: Tensor | None) -> QTensor:
    scheme.row_bytes(weight.shape[-1])
    rows = weight.detach().reshape(-1, weight.shape[-1]).float()
    if rows.numel() and not _finite(rows):
        raise _not_numbers(rows, scheme)
    data = ROW_CODECS[scheme.name].encode(rows, importance)
    return QTensor(scheme, tuple(weight.shape), data.numpy(force=True))


def _repacked(q: QTensor, scheme: Scheme, repack: Callable[[Tensor], Tensor]) -> QTensor:
    data = np.empty((q.num_rows, scheme.row_bytes(q.width)), dtype=np.uint8)
    stored = torch.from_numpy(data).view(len(q.blocks), -1)
    for start, stop in _tiles(len(stored), q.scheme):
        written = repack(torch.tensor(q.blocks[start:stop]))
        stored[start:stop] = written.view(stop - start, -1)
    return QTensor(scheme, q.shape, data)


def _encoder(scheme: Scheme) -> Callable[[Tensor], Tensor]:
    encode_blocks = CODECS[scheme.name].encode
    if encode_blocks is None:
        able = ", ".join([*(name for name, codec in CODECS.items() if codec.encode), *ROW_CODECS])
        raise UnsupportedError(f"{scheme.name} can be read but not written", hint=f"one of {able}")
    return encode_blocks


def _tiles(num_blocks: int, scheme: Scheme) -> Iterator[tuple[int, int]]:
    step = TILE // scheme.block
    for start in range(0, num_blocks, step):
        yield start, min(start + step, num_blocks)


def _row_tiles(num_rows: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, TILE // width)
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def _check_arguments(weight: Tensor, method: Method, importance: Tensor | None) -> None:
    if weight.ndim == 0:
        raise InvalidInputError("a single number has no rows to store; give it the shape [1]")
    if method not in ("rtn", "search"):
        raise InvalidInputError(f"unknown method '{method}'", hint="rtn or search")
    if importance is None:
        return
    if method == "rtn":
        raise InvalidInputError("importance weighs a search; rtn has none", hint='method="search"')
    known = importance.isfinite() & (importance >= 0)
    if importance.shape != weight.shape[-1:] or not bool(known.all()):
        raise InvalidInputError(
            f"importance is one finite number >= 0 for each of the {weight.shape[-1]} channels"
        )


def _finite_tiles(weight: Tensor, scheme: Scheme) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Each range of blocks with its weights, f32 [n, block]."""
    flat = weight.detach().reshape(-1, scheme.block)
    for start, stop in _tiles(len(flat), scheme):
        tile = flat[start:stop].float()
        if not _finite(tile):
            raise _not_numbers(flat, scheme)
        yield (start, stop), tile


def _weights_of(tile: Tensor, start: int, importance: Tensor | None) -> Tensor | None:
    """The importance of every weight of a tile that begins at block `start`; the largest is 1."""
    if importance is None:
        return None
    values = importance.detach().to(tile.device, torch.float32)
    table = (values / values.max().clamp(min=1e-30)).view(-1, tile.shape[1])
    blocks = torch.arange(start, start + len(tile), device=tile.device)
    return table[blocks.remainder_(len(table))]


def _finite(tile: Tensor) -> bool:
    """One pass: a NaN or an infinity shows in the extremes."""
    return bool(torch.stack(torch.aminmax(tile)).isfinite().all())


def _not_numbers(flat: Tensor, scheme: Scheme) -> IntegrityError:
    count = sum(
        int((~flat[start:stop].isfinite()).sum()) for start, stop in _tiles(len(flat), scheme)
    )
    return IntegrityError(f"{count} of {flat.numel()} weights are NaN or infinite")
