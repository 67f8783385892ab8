"""Triton's interpreter, for tests of the kernels on a CPU; conftest.py turns it on.

Where there is a CUDA device the kernels are compiled instead, and the same tests run on it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

COLUMNS = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _scalars_are_numbers() -> None:
    """Lets a loaded scalar bound a loop: numpy 2.4 makes no int of an array of one any more."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _patched_once() -> None:
    """Patches the language once for each module, not at every call: half of the time otherwise."""
    patch, done = interpreter._patch_lang, set[frozenset[int]]()

    def patched(fn: Any) -> Any:
        names = (interpreter.tl, interpreter.tl.core)
        key = frozenset(
            id(it) for it in names if any(it is value for value in fn.__globals__.values())
        )
        if key not in done:
            done.add(key)
            patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patched


def _no_idle_checks() -> None:
    """Leaves out checks of overflow, which cost most of an operation; without `debug` what they
    find is dropped."""
    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.interpreter_builder.options = options


def _types_once() -> None:
    """Makes each type of block, shape and number once: much of the time otherwise."""
    language = interpreter.tl.core
    blocks: dict[Any, dict[str, Any]] = {}
    shapes: dict[Any, Any] = {}
    new_block, new_tensor = language.block_type.__init__, language.tensor.__init__

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(int(side) for side in shape))
        if key not in blocks:
            new_block(self, element_ty, shape)
            blocks[key] = dict(self.__dict__)
        self.__dict__.update(blocks[key])

    def tensor(self: Any, handle: Any, kind: Any) -> None:
        sides = tuple(kind.shape.values) if kind.is_block() else ()
        if sides not in shapes:
            new_tensor(self, handle, kind)
            shapes[sides] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.shape, self.numel = shapes[sides]

    numbers: dict[str, Any] = {}
    new_number = interpreter._get_np_dtype

    def number(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in numbers:
            numbers[name] = new_number(kind)
        return numbers[name]

    language.block_type.__init__, language.tensor.__init__ = block, tensor
    interpreter._get_np_dtype = number


def _columns_alike() -> None:
    """Products go by 16 columns at a time: a library orders its sums by the shape, and the matrix
    instructions that it stands for treat columns alike."""
    builder = interpreter.InterpreterBuilder

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        left, right = a.data, b.data
        missing = -right.shape[-1] % COLUMNS
        padded = np.pad(right, ((0, 0), (0, missing)))
        parts = [
            np.matmul(left, padded[:, start : start + COLUMNS], dtype=d.data.dtype)
            for start in range(0, padded.shape[-1], COLUMNS)
        ]
        total = np.concatenate(parts, -1)[:, : right.shape[-1]] + d.data
        return interpreter.TensorHandle(total, d.dtype.scalar)

    builder.create_dot = create_dot


_scalars_are_numbers()
_patched_once()
_no_idle_checks()
_types_once()
_columns_alike()
