"""OpenAI's wire formats: chat completions and text completions.

Frames are exactly `data: {json}\\n\\n`, for Dify reads no others. Every chunk of a stream has the
same id, time and model; the first of a choice carries its role, exactly one its finish reason; the
usage comes last, without choices. A call is one delta that holds all of it: of the shapes that were
tried with real clients, one of two that none of them breaks. Thoughts come under both names that
clients look for.

Source: OpenAI's API reference; llama.cpp's `timings`.
"""

from __future__ import annotations

import json
import secrets
from codecs import getincrementaldecoder
from collections.abc import Iterable, Sequence
from time import time
from typing import Any

from halfbyte import __version__
from halfbyte.serve.answering import Object, frame
from halfbyte.serve.failure import Failure
from halfbyte.serve.job import Job
from halfbyte.serve.stream import Delta, TokenLogprob, Told
from halfbyte.text.tools import ToolCall

DONE = b"data: [DONE]\n\n"


class _Completions:
    """What chat and text completions share."""

    kind = ""
    prefix = ""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._head: Object = {
            "id": self.prefix + secrets.token_hex(12),
            "object": self.kind,
            "created": int(time()),
            "model": job.model,
            "system_fingerprint": f"halfbyte-{__version__}",
        }

    def close(self, told: list[Told]) -> Iterable[bytes]:
        if self._job.usage:
            yield self._frame([], usage=usage(self._job, told), timings=timings(told))
        yield DONE

    def fail(self, failure: Failure) -> Iterable[bytes]:
        yield frame(failure.document())
        yield DONE

    def _frame(self, choices: Sequence[Object], **more: Any) -> bytes:
        return frame({**self._head, "choices": [*choices], **more})

    def _piece(self, choice: Object, delta: Delta, told: Told) -> bytes:
        more: Object = {}
        if self._job.continuous_usage:
            more["usage"] = usage(self._job, [told])
        if self._job.details:
            more["drafted"] = list(delta.drafted)
        return self._frame([choice], **more)

    def _document(self, choices: Sequence[Object], told: list[Told]) -> Object:
        return {
            **self._head,
            "choices": [*choices],
            "usage": usage(self._job, told),
            "timings": timings(told),
        }


class ChatForm(_Completions):
    """POST /v1/chat/completions"""

    kind = "chat.completion"
    prefix = "chatcmpl-"

    def begin(self) -> Iterable[bytes]:
        self._head["object"] = "chat.completion.chunk"
        for index in range(len(self._job.requests)):
            yield self._frame([self._choice(index, {"role": "assistant", "content": ""})])

    def tell(self, index: int, delta: Delta, told: Told) -> Iterable[bytes]:
        part: Object = {}
        if delta.call is not None:
            place = len(told.calls) - 1
            part["tool_calls"] = [{"index": place, **call_of(delta.call)}]
        elif delta.thought:
            part |= {"reasoning_content": delta.thought, "reasoning": delta.thought}
        else:
            part["content"] = delta.text
        choice = self._choice(index, part)
        if self._job.logprobs:
            choice["logprobs"] = {"content": [_logprob(it) for it in delta.logprobs]}
        yield self._piece(choice, delta, told)

    def end(self, index: int, told: Told) -> Iterable[bytes]:
        yield self._frame([self._choice(index, {}, told.reason)])

    def whole(self, told: list[Told]) -> Object:
        return self._document([self._message(index, it) for index, it in enumerate(told)], told)

    def _choice(self, index: int, delta: Object, reason: str | None = None) -> Object:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}

    def _message(self, index: int, told: Told) -> Object:
        message: Object = {"role": "assistant", "content": told.text}
        if told.thought:
            message |= {"reasoning_content": told.thought, "reasoning": told.thought}
        if told.calls:
            message["tool_calls"] = [call_of(call) for call in told.calls]
        logprobs = {"content": [_logprob(it) for it in told.logprobs]}
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs if self._job.logprobs else None,
            "finish_reason": told.reason,
        }


class TextForm(_Completions):
    """POST /v1/completions"""

    kind = "text_completion"
    prefix = "cmpl-"

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._echo = list(job.echo) or [""] * len(job.requests)
        self._echoed: set[int] = set()

    def begin(self) -> Iterable[bytes]:
        return ()

    def tell(self, index: int, delta: Delta, told: Told) -> Iterable[bytes]:
        yield from self._prompt(index, told)
        if delta.text or delta.logprobs:
            before = len(self._echo[index]) + len(told.text) - len(delta.text)
            choice = self._choice(index, delta.text, delta.logprobs, offset=before)
            yield self._piece(choice, delta, told)

    def end(self, index: int, told: Told) -> Iterable[bytes]:
        yield from self._prompt(index, told)
        yield self._frame([self._choice(index, "", [], told.reason)])

    def whole(self, told: list[Told]) -> Object:
        choices = [
            self._choice(index, begun + it.text, [*it.prompt, *it.logprobs], it.reason)
            for index, (begun, it) in enumerate(zip(self._echo, told, strict=True))
        ]
        return self._document(choices, told)

    def _prompt(self, index: int, told: Told) -> Iterable[bytes]:
        """The prompt before the answer: its probabilities come with the first token."""
        if self._job.echo and index not in self._echoed:
            self._echoed.add(index)
            yield self._frame([self._choice(index, self._echo[index], told.prompt)])

    def _choice(
        self,
        index: int,
        text: str,
        logprobs: Sequence[TokenLogprob],
        reason: str | None = None,
        offset: int = 0,
    ) -> Object:
        return {
            "index": index,
            "text": text,
            "logprobs": _text_logprobs(logprobs, offset) if self._job.logprobs else None,
            "finish_reason": reason,
        }


def usage(job: Job, told: Sequence[Told]) -> Object:
    """Tokens: of the prompts, of the answers, and of both."""
    answers = sum(it.tokens for it in told)
    done = [it.completion for it in told if it.completion is not None]
    cached = sum(it.cached_tokens for it in done[:1])
    return {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": answers,
        "total_tokens": job.prompt_tokens + answers,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": sum(it.thought_tokens for it in told)},
    }


def timings(told: Sequence[Told]) -> Object:
    """How fast the first choice came, in llama.cpp's words: milliseconds, tokens per second."""
    done, first_s = told[0].completion, told[0].first_s
    if done is None:
        return {}
    prompt, decoded = done.prompt_tokens - done.cached_tokens, done.decode_tokens
    found: Object = {
        "cache_n": done.cached_tokens,
        "prompt_n": prompt,
        "prompt_ms": 1e3 * done.prefill_s,
        "prompt_per_second": prompt / done.prefill_s if done.prefill_s else None,
        "predicted_n": len(done.token_ids),
        "predicted_ms": 1e3 * done.decode_s,
        "predicted_per_second": decoded / done.decode_s if done.decode_s else None,
        "first_ms": 1e3 * first_s,
    }
    draft = done.draft
    if draft is not None:
        found |= {
            "draft_n": draft.proposed,
            "draft_n_accepted": draft.accepted,
            "draft_rounds": draft.rounds,
            "tokens_per_round": draft.tokens_per_round,
            "speedup": draft.speedup,
        }
    return found


def call_of(call: ToolCall) -> Object:
    """A call, its arguments as a string of JSON."""
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    function = {"name": call.name, "arguments": arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _logprob(it: TokenLogprob) -> Object:
    top = [
        {"token": token, "logprob": logprob, "bytes": list(data)} for token, data, logprob in it.top
    ]
    return {
        "token": it.token,
        "logprob": it.logprob,
        "bytes": list(it.data),
        "top_logprobs": top,
    }


def _text_logprobs(given: Sequence[TokenLogprob], offset: int) -> Object:
    """The older form: a list for every property. A token that ends within a character counts as
    none; so does one that is no text."""
    decoder = getincrementaldecoder("utf-8")(errors="replace")
    offsets: list[int] = []
    for it in given:
        offsets.append(offset)
        offset += len(decoder.decode(it.data))
    return {
        "tokens": [it.token for it in given],
        "token_logprobs": [it.logprob for it in given],
        "top_logprobs": [
            None if it.logprob is None else {token: value for token, _, value in it.top}
            for it in given
        ],
        "text_offset": offsets,
    }
