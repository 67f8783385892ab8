"""The bytes of all tensors that are there at a time, exactly: what a plan's arithmetic is held to.

Every storage that an operation makes, forward or backward, is counted until it is freed. What
kernels take inside an operation is not seen, nor what an allocator keeps.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """`peak` and `now` are bytes; what was there before is not counted unless it is touched."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        at = storage.data_ptr()
        if not at or at in self._known or (at in self._seen and self._seen[at]() is storage):
            return
        size = storage.nbytes()

        def freed(_: Any) -> None:
            self.now -= size

        self._seen[at] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)
