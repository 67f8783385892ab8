"""Checkpoints that other packages quantized: GPTQ, AutoAWQ, bitsandbytes and compressed-tensors.

They hold a matrix `X.weight` as several tensors (`X.qweight`, `X.scales`, ...), and say how in
config.json's `quantization_config`. `unpacked` puts the matrix back under its own name, in the
scheme of ours that holds its very integers and scales, so that a checkpoint is read on as any
other. Nothing is rounded anew. What no scheme of ours can hold (groups that columns were sorted
into, f32 scales) is decoded to f32, exactly; `decoded` tells of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from halfbyte.errors import IntegrityError, UnsupportedError
from halfbyte.families.fields import Fields
from halfbyte.formats.packed import awq, bitsandbytes, compressed_tensors, gptq
from halfbyte.formats.packed.matrix import PackedFile, PackedMatrix, Packing, Parts, TensorFile
from halfbyte.formats.packed.settings import FIELD, settings_of
from halfbyte.formats.safetensors import SafetensorsFile

PACKINGS: dict[str, Callable[[Fields], Packing]] = {
    "gptq": gptq.packing_of,
    "awq": awq.packing_of,
    "bitsandbytes": bitsandbytes.packing_of,
    "compressed-tensors": compressed_tensors.packing_of,
}

# How the names of parts end that no plain checkpoint has.
ENDINGS = ("qweight", "SCB", bitsandbytes.STATE, "weight_packed")

__all__ = ["decoded", "packed_parts", "unpacked"]


def packed_parts(names: Iterable[str]) -> list[str]:
    """Those of the stored names that are parts of packed matrices, one for each matrix."""
    return [name for name in names if name.endswith(tuple(f".{ending}" for ending in ENDINGS))]


def unpacked(
    config: Mapping[str, Any], files: Mapping[str, SafetensorsFile]
) -> Mapping[str, TensorFile]:
    """Tensor name -> its file, with every packed matrix under the name of its weight.

    `config`: config.json. Without a `quantization_config` that names a method, the files
    themselves: some makers leave one in weights that were trained to be quantized later.

    Raises `UnsupportedError` for a method or a setting that we do not read, `IntegrityError` for
    settings that contradict the tensors.
    """
    settings = settings_of(config)
    if settings is None or settings.get("quant_method") is None:
        return files
    method = str(settings.get("quant_method"))
    if method not in PACKINGS:
        raise UnsupportedError(
            f"{FIELD}.quant_method is '{method[:40]}'", hint=f"readable: {', '.join(PACKINGS)}"
        )
    packing = PACKINGS[method](settings)
    ending = f".{packing.mark}"
    modules = [name.removesuffix(ending) for name in files if name.endswith(ending)]
    matrices = {f"{module}.weight": Parts(module, packing.parts, files) for module in modules}
    packed = PackedFile(packing, matrices)
    taken = {name for parts in matrices.values() for name in parts.names()}
    plain = {name: file for name, file in files.items() if name not in taken}
    for name in plain.keys() & packed.infos.keys():
        raise IntegrityError("is stored packed and plain", where=name)
    return plain | dict.fromkeys(packed.infos, packed)


def decoded(files: Mapping[str, TensorFile], located: Mapping[str, str]) -> dict[str, str]:
    """Our name -> why a matrix is not in the bits that it is stored in. `located`: our names, and
    those in the files."""
    infos = {ours: files[stored].infos[stored] for ours, stored in located.items()}
    return {
        ours: info.description.decoded
        for ours, info in infos.items()
        if isinstance(info, PackedMatrix) and info.description.decoded is not None
    }
