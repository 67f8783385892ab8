"""Asks Triton's compiler for every kernel of a model's steps, for cards that are not here.

    python bench/compile_kernels.py gemma4-12b --recipe q4_0 --capability 8.6 --rows 1,8,512

prints registers, spills and shared memory of each. No device is needed: Triton brings ptxas.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.families import spec_of
from halfbyte.kernels.triton import Recorded, TritonKV, TritonOps
from halfbyte.kernels.triton.layout import Packed
from halfbyte.kernels.triton.program import Apart, Buffer, Launch, Program, Shape, Table, bucket
from halfbyte.models.cache import shape_for
from halfbyte.models.load import outline
from halfbyte.planner.solve import schemes_of
from halfbyte.specs import KVType, ModelSpec

CONFIGS = Path(__file__).parent / "configs"
# Bytes of shared memory that a program may have.
SHARED = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
POINTERS: dict[str, str] = {
    "i64": "*i64",
    "f64": "*fp64",
    "f32": "*fp32",
    "f16": "*fp16",
    "bf16": "*bf16",
    "i32": "*i32",
    "operand": "*bf16",
}
OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Compiled:
    """One kernel for one capability: what it needs of a card."""

    kernel: str
    shape: Shape
    registers: int
    spills: int
    shared_bytes: int
    binary: bytes


def program_of(
    spec: ModelSpec,
    recipe: str,
    *,
    context: int = 4096,
    kv: KVType = "bf16",
    capability: int = 86,
) -> Program:
    """The program of a model's steps on such a card, over weights that are not there."""
    ops = TritonOps(capability=divmod(capability, 10))
    decoder = outline(spec, schemes_of(spec, recipe), ops)
    step = decoder.new_cache(shape_for(context=context, sequences=1, rows=512, kind=kv)).step
    assert isinstance(step, Recorded)
    return step.program


def compiled(
    program: Program, rows: int, capability: int, only: Collection[str] = ()
) -> Iterator[Compiled]:
    """Every different kernel of a step of so many rows (capability 86 is 8.6), or some by name."""
    shape = bucket(rows, min(rows, 8), 1, program.cells)
    seen: set[str] = set()
    for launch in (*program.launches, *program.tail):
        if only and launch.kernel not in only:
            continue
        source, options = _source(launch, shape)
        key = repr((launch.kernel, source, options))
        if key not in seen:
            seen.add(key)
            yield _compile(launch.kernel, shape, source, options, capability)


def _compile(
    kernel: str,
    shape: Shape,
    source: Mapping[str, Any],
    options: Mapping[str, Any],
    capability: int,
) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from halfbyte.kernels.triton.step import KERNELS

    built = triton.compile(
        ASTSource(fn=KERNELS[kernel], **source),
        target=GPUTarget("cuda", capability, 32),
        options={**options, "enable_fp_fusion": False},
    )
    registers, spills = _resources(built.asm["cubin"])
    return Compiled(kernel, shape, registers, spills, built.metadata.shared, built.asm["cubin"])


def _source(launch: Launch, shape: Shape) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the just-in-time compiler would make of a launch's arguments, and its options."""
    from halfbyte.kernels.triton.step import KERNELS

    found = {**launch.arguments, **launch.settings(shape)}
    options = {name: found.pop(name) for name in OPTIONS if name in found}
    kernel = KERNELS[launch.kernel]
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for index, parameter in enumerate(kernel.params):
        value = found[parameter.name]
        kind = "constexpr" if parameter.is_constexpr else _kind(value, parameter)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(index,)] = value
        elif kind.startswith("*") or isinstance(value, Apart) or _whole(value):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return {"signature": signature, "constexprs": constants, "attrs": attributes}, options


def _whole(value: Any) -> bool:
    """Whether the compiler may count on whole words."""
    return isinstance(value, int) and value % 16 == 0


def _kind(value: Any, parameter: Any) -> str:
    """The type of an argument."""
    annotation = parameter.annotation
    special = not annotation and not parameter.do_not_specialize
    if value is None or (isinstance(value, int) and value == 1 and special):
        return "constexpr"
    if isinstance(value, Buffer):
        return POINTERS[value.number]
    if isinstance(value, Packed):
        return "*fp32" if len(value.shape) == 1 else "*u8"
    if isinstance(value, TritonKV):
        return "*u8"
    if isinstance(value, Table):
        return {"states": "*fp32", "most_pages": "i32", "states_width": "i32"}.get(
            value.name, "*i32"
        )
    if isinstance(value, Apart):
        return "i64"
    return "fp32" if isinstance(value, float) else "i64" if "int64" in annotation else "i32"


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a kernel, as its binary says."""
    import re
    import subprocess
    import tempfile

    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a config in bench/configs, or a config.json")
    parser.add_argument("--recipe", default="q4_0")
    parser.add_argument("--capability", default="8.6")
    parser.add_argument("--rows", default="1,8,512")
    parser.add_argument("--kv", default="bf16")
    parser.add_argument("--only", default="", help="names of kernels")
    given = parser.parse_args()
    path = Path(given.model)
    path = path if path.exists() else CONFIGS / f"{given.model}.json"
    capability = int(float(given.capability) * 10)
    spec = spec_of(json.loads(path.read_text()))
    program = program_of(spec, given.recipe, kv=given.kv, capability=capability)
    print(f"{'kernel':14} {'rows':>5} {'registers':>9} {'stack':>6} {'shared':>8}")
    for rows in map(int, given.rows.split(",")):
        only = [name for name in given.only.split(",") if name]
        for it in compiled(program, rows, capability, only):
            print(
                f"{it.kernel:14} {it.shape.rows:5} {it.registers:9} {it.spills:6} "
                f"{it.shared_bytes:8}",
                flush=True,
            )


if __name__ == "__main__":
    main()
