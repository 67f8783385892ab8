"""llama.cpp as a peer: the logits, the tokens and the stops that it finds in a GGUF of ours.

Through the C interface of llama-cpp-python, on the CPU. `plain` is an f32 cache and attention
without fusion, so that what differs from us is the arithmetic of its products and its tables.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import llama_cpp.llama_cpp as c
import numpy as np

CONTEXT = 512


@c.llama_log_callback
def _silent(level: int, text: bytes, data: object) -> None:
    pass


class LlamaCpp:
    """A GGUF in llama.cpp, for sequences of up to 512 tokens. Close it when done."""

    def __init__(self, path: Path, *, plain: bool = True) -> None:
        c.llama_log_set(_silent, ctypes.c_void_p(0))
        self._model = c.llama_model_load_from_file(
            str(path).encode(), c.llama_model_default_params()
        )
        assert self._model, f"llama.cpp cannot load {path}"
        self._vocab = c.llama_model_get_vocab(self._model)
        self.vocab_size = c.llama_vocab_n_tokens(self._vocab)
        self._context = c.llama_init_from_model(self._model, _parameters(plain))
        assert self._context, f"llama.cpp cannot run {path}"

    def close(self) -> None:
        c.llama_free(self._context)
        c.llama_model_free(self._model)

    def logits(self, token_ids: Sequence[int], first: int) -> np.ndarray:
        """Logits [len - first, V] f32 of the rows from `first` on."""
        c.llama_memory_clear(c.llama_get_memory(self._context), True)
        count = len(token_ids)
        batch = c.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for i, token_id in enumerate(token_ids):
            batch.token[i], batch.pos[i] = token_id, i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i >= first
        assert c.llama_decode(self._context, batch) == 0
        c.llama_batch_free(batch)
        shape = (count - first, self.vocab_size)
        return np.ctypeslib.as_array(c.llama_get_logits(self._context), shape).copy()

    def encode(self, text: str, *, special: bool) -> list[int]:
        """The ids of a text, without BOS."""
        data = text.encode()
        room = len(data) + 16
        ids = (c.llama_token * room)()
        count = c.llama_tokenize(self._vocab, data, len(data), ids, room, False, special)
        assert count >= 0
        return list(ids[:count])

    @property
    def leading(self) -> list[int]:
        """What it puts in front of a text: [BOS], or nothing."""
        return [c.llama_vocab_bos(self._vocab)] if c.llama_vocab_get_add_bos(self._vocab) else []

    @property
    def stop_ids(self) -> set[int]:
        """The ids at which it ends a generation."""
        return {i for i in range(self.vocab_size) if c.llama_vocab_is_eog(self._vocab, i)}

    def is_control(self, token_id: int) -> bool:
        return c.llama_vocab_is_control(self._vocab, token_id)


def _parameters(plain: bool) -> c.llama_context_params:
    parameters = c.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = CONTEXT
    parameters.n_threads = parameters.n_threads_batch = 1
    if plain:
        parameters.type_k = parameters.type_v = c.GGML_TYPE_F32
        parameters.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return parameters
