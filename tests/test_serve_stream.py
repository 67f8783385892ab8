"""What is told of an answer: stop strings however they are cut, and frames to the byte."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.engine import Completion, Event, Logprobs
from halfbyte.llm import LLM
from halfbyte.serve.answering import frame
from halfbyte.serve.stream import Stops, Telling
from halfbyte.specs import LoadOptions
from halfbyte.text.answer import Piece

TEXT = st.text(alphabet="abST\n ", max_size=30)


@given(
    text=TEXT,
    stops=st.lists(st.text("abST\n", min_size=1, max_size=4), max_size=3),
    cuts=st.sets(st.integers(0, 30)),
)
def test_a_stop_string_is_found_however_it_is_cut(text, stops, cuts):
    marks = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    it, told, found = Stops(stops), "", None
    for start, end in pairwise(marks):
        more, found = it.push(text[start:end])
        told += more
        if found is not None:
            break
    else:
        told += it.rest()
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    # A shorter stop may be found before a longer one that begins earlier is complete.
    assert (found is None) == (not places)
    if found is None:
        assert told == text
    else:
        assert text.startswith(told + found)
        assert not any(stop in told for stop in stops)


class Speech:
    """An answer stream that turns every id into a piece prepared for it."""

    speaking = "said"

    def __init__(self, *pieces: Piece) -> None:
        self._pieces = pieces

    def push(self, token_id: int):
        yield self._pieces[token_id]

    def finish(self):
        yield from ()


class Words:
    """A tokenizer without words."""

    def token_bytes(self, token_id: int, *, skip_special: bool) -> bytes:
        return b"\xc3" if token_id == 1 else b"x"


def token(token_id: int, **more) -> Event:
    return Event(sequence=0, token_id=token_id, **more)


def end(reason: str = "stop") -> Event:
    completion = Completion(
        token_ids=(),
        finish_reason=reason,
        prompt_tokens=1,
        cached_tokens=0,
        decode_tokens=0,
        prefill_s=0.0,
        decode_s=0.0,
    )
    return Event(sequence=0, token_id=None, finish_reason=reason, completion=completion)


def tell(telling: Telling, *events: Event) -> list[str]:
    return [delta.text for event in events for delta in telling.push(event)]


def test_nothing_is_told_after_a_stop_string():
    pieces = [Piece("one S"), Piece("TOP two"), Piece("three")]
    telling = Telling(Speech(*pieces), Words(), stops=["STOP"])
    assert tell(telling, token(0), token(1)) == ["one "]
    assert telling.ended and telling.told.reason == "stop" and telling.told.stop == "STOP"
    assert tell(telling, token(2), end("abort")) == []
    assert telling.told.tokens == 2


def test_what_looked_like_a_stop_string_is_told_at_the_end():
    telling = Telling(Speech(Piece("one S"), Piece("TO")), Words(), stops=["STOP"])
    assert tell(telling, token(0), token(1), end()) == ["one ", "STO"]
    assert telling.told.reason == "stop"


def test_stop_strings_do_not_end_a_thought():
    telling = Telling(Speech(Piece("STOP", "thought"), Piece("x")), Words(), stops=["STOP"])
    tell(telling, token(0), token(1), end("length"))
    told = telling.told
    assert (told.thought, told.text, told.reason) == ("STOP", "x", "length")


def test_drafted_tokens_and_probabilities_come_with_the_next_piece():
    silent = Piece("", "said")
    telling = Telling(Speech(Piece("a"), silent, Piece("b")), Words())
    more = {"logprobs": Logprobs(-1.0, ((1, -0.5),))}
    deltas = [
        delta
        for event in (token(0, **more), token(1, drafted=True, **more), token(2, **more))
        for delta in telling.push(event)
    ]
    assert [delta.drafted for delta in deltas] == [(False,), (True, False)]
    assert [it.data for it in deltas[1].logprobs] == [b"\xc3", b"x"]
    assert deltas[1].logprobs[0].top == (("\ufffd", b"\xc3", -0.5),)
    assert deltas[1].logprobs[0].token == "\ufffd"


def test_frames_are_these_bytes():
    assert frame({"a": "ö\n"}) == 'data: {"a":"ö\\n"}\n\n'.encode()
    assert frame({"a": 1}, "ping") == b'event: ping\ndata: {"a":1}\n\n'


@given(st.text(max_size=40))
def test_no_text_breaks_a_frame(text):
    data = frame({"text": text}).decode("utf-8", errors="surrogatepass")
    head, body, rest = data.partition("\n\n")[0], data.partition("\n\n")[1], data.split("\n\n")[2:]
    assert body == "\n\n" and not rest and "\n" not in head and "\r" not in head
    assert json.loads(head.removeprefix("data: "))["text"] == text


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", LoadOptions(context=256, threads=1))


def test_an_emoji_in_several_tokens_comes_whole(llm: LLM):
    words, text = llm.tokenizer, "a 🙂 b"
    telling = Telling(llm.turns.stream(), words)
    deltas = [
        delta
        for token_id in words.encode(text, special=False)
        for delta in telling.push(token(token_id))
    ]
    assert "".join(delta.text for delta in deltas) == text
    assert all("\ufffd" not in delta.text for delta in deltas)
