"""The routes over a real socket: what clients send, what they get, and that it is one engine.

Token by token: what `halfbyte run` says for a seed, the server says for it, alone and among others,
drafted or not, with a beginning that the cache still had.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from adapter_files import PLAIN, tensors_of, write_adapter
from served import WAIT_S, Reply, Served, serving

from halfbyte.formats.checkpoint import read
from halfbyte.formats.reference import demo_path
from halfbyte.llm import LLM
from halfbyte.specs import LoadOptions

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 8},
                    "unit": {"enum": ["C", "F"]},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "time",
            "parameters": {"type": "object", "properties": {"zone": {"type": "integer"}}},
        },
    },
]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", LoadOptions(context=512, threads=1, parallel=4, spare=1))


@pytest.fixture(scope="module")
def served(llm: LLM) -> Iterator[Served]:
    with serving(llm) as it:
        yield it


@pytest.fixture(scope="module")
def with_tools() -> Iterator[Served]:
    """The same model with a template that has a place for tools."""
    template = (Path(__file__).parent / "templates" / "gemma4.jinja").read_text()
    llm = LLM("demo", LoadOptions(context=512, threads=1), template=template)
    with serving(llm) as it:
        yield it


def said(reply: Reply) -> tuple[str, str]:
    choice = reply.json["choices"][0]
    return choice["message"]["content"], choice["finish_reason"]


def streamed(reply: Reply, index: int = 0) -> tuple[str, str]:
    """Text and finish reason of a choice in a stream."""
    choices = [it for frame in reply.frames[:-1] for it in frame["choices"] if it["index"] == index]
    text = "".join(it["delta"].get("content") or "" for it in choices)
    (reason,) = [it["finish_reason"] for it in choices if it["finish_reason"]]
    return text, reason


def test_the_shape_of_a_chat_completion(served: Served):
    reply = served.chat("Who are you?", max_tokens=5, seed=1)
    assert reply.status == 200
    assert reply.json["object"] == "chat.completion"
    assert reply.json["model"] == "demo" and reply.json["id"].startswith("chatcmpl-")
    usage = reply.json["usage"]
    assert usage["completion_tokens"] == 5
    assert usage["total_tokens"] == usage["prompt_tokens"] + 5
    choice = reply.json["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["role"] == "assistant"
    assert "reasoning" not in choice["message"] and "tool_calls" not in choice["message"]
    assert reply.headers["x-request-id"] and reply.headers["x-content-type-options"] == "nosniff"


def test_the_bytes_of_a_stream(served: Served):
    options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 6, **ON}
    reply = served.chat("Who are you?", seed=1, temperature=0, **options)
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    blocks = reply.body.split(b"\n\n")
    assert blocks.pop() == b"" and blocks[-1] == b"data: [DONE]"
    assert all(block.startswith(b"data: ") and b"\n" not in block for block in blocks)
    assert b"\r" not in reply.body and b"event:" not in reply.body
    frames = reply.frames[:-1]
    assert {(it["id"], it["created"], it["model"], it["object"]) for it in frames} == {
        (frames[0]["id"], frames[0]["created"], "demo", "chat.completion.chunk")
    }
    assert frames[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert frames[-1]["choices"] == [] and frames[-1]["usage"]["completion_tokens"] == 6
    assert all("usage" not in it for it in frames[:-1])
    assert [it["choices"][0]["finish_reason"] for it in frames[:-1]].count(None) == len(frames) - 2
    whole = served.chat("Who are you?", seed=1, temperature=0, max_tokens=6, **ON)
    assert streamed(reply) == said(whole)


def test_without_being_asked_a_stream_has_no_usage(served: Served):
    reply = served.chat("Hello", stream=True, max_tokens=2)
    assert reply.frames[-1] == "[DONE]"
    assert all(frame["choices"] for frame in reply.frames[:-1])


QUESTION = (
    "What is the sea? Say something of its colour, of its depth, of the ships that sail on it, "
    "of the fish that live in it and of the people who stand on its shore in the evening."
)
# The answer goes on where the model would end it.
ON = {"ignore_eos": True}


def alone(llm: LLM, question: str, seed: int, max_tokens: int) -> str:
    """What the Python face says, from an engine without drafts, cache or company."""
    reply = llm.reply(
        llm.chat_ids([{"role": "user", "content": question}]),
        sampling=llm.sampling(seed=seed),
        max_tokens=max_tokens,
    )
    reply.finish()
    return reply.answer.text


def test_over_http_a_seed_says_what_it_says_to_run(served: Served, halfbyte):
    """Alone, among seven others, drafted or not, and with a beginning that was kept."""
    document = halfbyte(
        "run", "demo", QUESTION, "--seed", 5, "--max-tokens", 60, "--json", "--threads", 1,
        "--context", 512, "--draft", "off", "--ignore-eos",
    ).document  # fmt: skip
    expected = document["text"]
    assert len(document["token_ids"]) == 60
    asked = {"seed": 5, "max_tokens": 60, **ON}
    first = served.chat(QUESTION, **asked)
    assert said(first)[0] == expected
    again = served.chat(QUESTION, **asked)
    assert said(again)[0] == expected
    assert again.json["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    plain = LLM("demo", LoadOptions(context=512, threads=1, draft="off"))
    others = [f"Tell me about the number {n}" for n in range(7)]
    with ThreadPoolExecutor(8) as pool:
        beside = [
            pool.submit(served.chat, it, seed=n, max_tokens=40) for n, it in enumerate(others)
        ]
        among = pool.submit(served.chat, QUESTION, **asked)
    assert said(among.result())[0] == expected
    for n, (question, reply) in enumerate(zip(others, beside, strict=True)):
        assert said(reply.result())[0] == alone(plain, question, n, 40)


def test_several_choices_differ_and_stream_side_by_side(served: Served):
    whole = served.chat("Hello there", n=3, seed=4, max_tokens=12)
    texts = [choice["message"]["content"] for choice in whole.json["choices"]]
    assert len(set(texts)) == 3
    usage = whole.json["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    stream = served.chat("Hello there", n=3, seed=4, max_tokens=12, stream=True)
    assert [streamed(stream, index)[0] for index in range(3)] == texts


def test_stop_strings_end_an_answer_and_are_not_told(served: Served):
    whole, _ = said(served.chat(QUESTION, seed=5, max_tokens=60))
    stop = whole[len(whole) // 2 :][:4]
    expected = whole[: whole.index(stop)]
    for form in (stop, [stop, "zzz"]):
        reply = served.chat(QUESTION, seed=5, max_tokens=60, stop=form)
        assert said(reply) == (expected, "stop")
        assert reply.json["timings"]["cache_n"] >= 0  # its end has been told
        stream = served.chat(QUESTION, seed=5, max_tokens=60, stop=form, stream=True)
        assert streamed(stream) == (expected, "stop")


def test_probabilities(served: Served):
    asked = {"temperature": 0, "max_tokens": 4, "logprobs": True, "top_logprobs": 3, **ON}
    reply = served.chat(QUESTION, **asked)
    content = reply.json["choices"][0]["logprobs"]["content"]
    assert len(content) == 4
    for entry in content:
        best = entry["top_logprobs"]
        assert entry["logprob"] == best[0]["logprob"] <= 0  # greedy: the likeliest
        assert [it["logprob"] for it in best] == sorted(
            (it["logprob"] for it in best), reverse=True
        )
        assert bytes(entry["bytes"]).decode() == entry["token"]
    stream = served.chat(QUESTION, stream=True, **asked)
    parts = [it["choices"][0]["logprobs"] for it in stream.frames[:-1]]
    assert [entry for part in parts if part for entry in part["content"]] == content


def test_penalties_and_bias_change_the_answer(served: Served):
    asked = {"seed": 5, "temperature": 0, "max_tokens": 40}
    plain = said(served.chat(QUESTION, **asked, **ON))[0]
    ids = served.post("/tokenize", content=plain).json["tokens"]
    barred = said(served.chat(QUESTION, **asked, logit_bias={str(ids[0]): -100}))[0]
    assert served.post("/tokenize", content=barred).json["tokens"][0] != ids[0]
    often = said(served.chat(QUESTION, **asked, **ON, frequency_penalty=2, presence_penalty=2))[0]
    assert often != plain
    repeats = [len(it.split()) - len(set(it.split())) for it in (plain, often)]
    assert repeats[1] <= repeats[0]


def test_of_two_limits_the_newer_one_counts(served: Served):
    reply = served.chat("Hi", max_tokens=9, max_completion_tokens=3, seed=2)
    assert reply.json["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "messages", "required"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "user"),
        ({"messages": "hello"}, "messages", "list"),
        ({"max_tokens": 0}, "max_tokens", "greater"),
        ({"max_tokens": "5"}, "max_tokens", "integer"),
        ({"stream": "true"}, "stream", "boolean"),
        ({"temperature": -1}, "temperature", "greater"),
        ({"top_p": 1.5}, "top_p", "less"),
        ({"n": 9}, "n", "less"),
        ({"seed": 2**70}, "seed", "less"),
        ({"top_logprobs": 21}, "top_logprobs", "less"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "no token id"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "no token id"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "no token id"),
        ({"tools": [{"type": "function"}]}, "tools.0", "name"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": [], "name": "f"}, {"id": {}}]},
                       {"role": "assistant", "tool_calls": [{"arguments": 5}]}]},
         "messages", "no object"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages.0.content.0", "text only, not 'image_url'"),
        ({"modalities": ["audio"]}, "modalities", "text only"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(served: Served, body, param, words):
    good = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    reply = served.post("/v1/chat/completions", **({**good, **body} if body else {}))
    error = reply.json["error"]
    assert reply.status == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param and words in error["message"], error


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "no JSON object"),
        (b'{"messages": NaN}', "NaN"),
        (b'{"a": Infinity}', "Infinity"),
        (b"\xff\xfe", "not JSON"),
        (b'{"a": "\\ud800"}', "half a character"),
        (b'{"\\ud800": "a"}', "half a character"),
        (b'{"a": [1e999]}', "too large"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "64 deep"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_what_is_no_json_is_refused(served: Served, body, words):
    reply = served.send("POST", "/v1/chat/completions", body)
    assert reply.status == 400 and reply.json["error"]["code"] == "invalid_json"
    assert words in reply.json["error"]["message"]


def test_what_nobody_knows_is_ignored(served: Served):
    unknown = {
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "zzz": [1],
        "user": "u",
    }
    assert served.chat("hi", max_tokens=1, **unknown).status == 200


def test_contents_in_all_their_forms(served: Served):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "reasoning_content": "hm"},
        {"role": "user", "content": ""},
    ]
    reply = served.post("/v1/chat/completions", messages=messages, max_tokens=1)
    assert reply.status == 200


def test_a_prompt_that_is_too_long_is_told_the_maximum(served: Served):
    reply = served.chat("word " * 2000, max_tokens=5)
    error = reply.json["error"]
    assert reply.status == 400 and error["code"] == "context_length_exceeded"
    assert "maximum context length is 512 tokens" in error["message"]
    # What does not fit behind a prompt is not generated.
    reply = served.chat("word " * 400, max_tokens=5000, **ON)
    assert reply.status == 200


def test_models_by_any_name_but_strictly_if_asked(served: Served, llm: LLM):
    reply = served.post("/v1/chat/completions", model="gpt-4o", messages=[
        {"role": "user", "content": "hi"}], max_tokens=1)  # fmt: skip
    assert reply.json["model"] == "demo"
    assert served.get("/v1/models").json["data"][0]["id"] == "demo"
    assert served.get("/v1/models/demo").json["max_model_len"] == 512
    missing = served.get("/v1/models/org/name")
    assert missing.status == 404 and "there is demo" in missing.json["error"]["message"]


def test_text_completions(served: Served):
    body = {"max_tokens": 6, "seed": 3}
    text = "My dear Jane, I"
    one = served.post("/v1/completions", prompt=text, **body).json
    assert one["object"] == "text_completion"
    ids = served.post("/tokenize", content=text, add_special=True).json["tokens"]
    assert served.post("/v1/completions", prompt=ids, **body).json["choices"] == one["choices"]
    two = served.post("/v1/completions", prompt=[text, "The sea"], n=2, **body).json
    assert [it["index"] for it in two["choices"]] == [0, 1, 2, 3]
    assert two["choices"][0]["text"] == one["choices"][0]["text"]
    echo = served.post("/v1/completions", prompt=text, echo=True, logprobs=2, **body).json
    choice = echo["choices"][0]
    assert choice["text"] == text + one["choices"][0]["text"]
    stream = served.post("/v1/completions", prompt=text, stream=True, **body)
    told = "".join(it["choices"][0]["text"] for it in stream.frames[:-1])
    assert told == one["choices"][0]["text"]
    assert len(served.post("/v1/completions", prompt=text, temperature=0).json["choices"]) == 1
    for prompt, words in (([], "empty"), ([[]], "empty"), ([999999], "id 999999")):
        refused = served.post("/v1/completions", prompt=prompt)
        assert refused.status == 400 and words in refused.json["error"]["message"]
    middle = served.post("/v1/completions", prompt="a", suffix="b")
    assert middle.status == 400 and middle.json["error"]["param"] == "suffix"


def told_by(reply: Reply) -> list[tuple[str, float | None, dict[str, float] | None, int]]:
    """Token, probability, likeliest tokens and offset of all there is of the first choice."""
    streams = reply.headers["content-type"].startswith("text/event-stream")
    documents = reply.frames[:-1] if streams else [reply.json]
    found = [it["choices"][0]["logprobs"] for it in documents]
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    columns = [[value for it in found for value in it[name]] for name in names]
    return [*zip(*columns, strict=True)]


def test_what_was_said_is_as_likely_when_it_is_read(served: Served):
    """`echo` with `logprobs`: of the prompt, too, as harnesses that score texts want it."""
    prompt = served.post("/tokenize", content="My dear Jane, I", add_special=True).json["tokens"]
    body = {"temperature": 0, "max_tokens": 12, "logprobs": 2}
    said = served.post("/v1/completions", prompt=prompt, **body)
    text = served.post("/tokenize", content=said.json["choices"][0]["text"]).json["tokens"]
    whole = [*prompt, *text]
    read = served.post("/v1/completions", prompt=whole, echo=True, **body | {"max_tokens": 0})
    (choice,) = read.json["choices"]
    assert choice["finish_reason"] == "length" and read.json["usage"]["completion_tokens"] == 0
    tokens = told_by(read)
    assert len(tokens) == len(whole) and tokens[0][1:] == (None, None, 0)
    for spoken, heard in zip(told_by(said), tokens[len(prompt) :], strict=False):
        assert spoken[0] == heard[0] and spoken[1] == pytest.approx(heard[1], abs=1e-3)
        assert spoken[0] == max(heard[2], key=heard[2].get)  # greedy is the likeliest
    for token, _, _, at in tokens[1:]:
        assert choice["text"][at:].startswith(token)
    again = {"prompt": whole, "echo": True, **body}
    plain, stream = (served.post("/v1/completions", **again, stream=it) for it in (False, True))
    assert [it[0::3] for it in told_by(plain)] == [it[0::3] for it in told_by(stream)]
    assert [it[0] for it in told_by(plain)[: len(whole)]] == [it[0] for it in tokens]
    pieces = "".join(it["choices"][0]["text"] for it in stream.frames[:-1])
    assert pieces == plain.json["choices"][0]["text"]
    mute = served.post("/v1/completions", prompt=whole, max_tokens=0)
    assert mute.status == 400 and mute.json["error"]["param"] == "max_tokens"


def test_generate(served: Served):
    assert isinstance(served.post("/generate", prompt="hi", max_new_tokens=4).json["response"], str)
    assert served.post("/generate").status == 400


def test_texts_and_tokens_go_round(served: Served):
    text = "The sea, the sea!"
    found = served.post("/tokenize", content=text, with_pieces=True).json
    assert "".join(it["piece"] for it in found["tokens"]).strip() == text
    ids = [it["id"] for it in found["tokens"]]
    assert served.post("/detokenize", tokens=ids).json["content"] == text
    prompt = served.post("/apply-template", messages=[{"role": "user", "content": "hi"}]).json
    assert "<|turn>user\nhi" in prompt["prompt"]
    assert served.post("/detokenize", tokens=[10**6]).status == 400
    assert served.post("/tokenize").status == 400


def test_a_schema_is_kept_drafted_or_not(served: Served):
    spellings = [
        {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
        {"type": "json_schema", "json_schema": SCHEMA},
        {"type": "json_schema", "json_schema": json.dumps(SCHEMA)},
        {"type": "json_schema", "schema": SCHEMA},
        {"type": "json_object", "schema": SCHEMA},
    ]
    texts = set()
    for spelling in spellings:
        reply = served.chat("A person.", seed=7, max_tokens=300, response_format=spelling)
        text, reason = said(reply)
        value = json.loads(text)
        assert reason == "stop" and isinstance(value["age"], int), text
        assert value.keys() == {"name", "age"} and len(value["name"]) <= 8
        texts.add(text)
    assert len(texts) == 1
    plain = LLM("demo", LoadOptions(context=512, threads=1, draft="off"))
    request = plain.request(
        plain.chat_ids([{"role": "user", "content": "A person."}]),
        sampling=plain.sampling(seed=7),
        max_tokens=300,
        structure=plain.turns.structures.of_schema(SCHEMA),
    )
    (done,) = plain.engine.generate([request])
    assert {plain.turns.split(done.token_ids).text} == texts


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"not": {"type": "string"}}, '"not"'),
        ({"type": "array", "uniqueItems": True}, '"uniqueItems"'),
        ({"type": "string", "pattern": "(a"}, "unclosed group"),
        ({"type": "strin"}, "strin"),
        ({"$ref": "http://127.0.0.1/x"}, "not present"),
        ({"a": {"b": "c" * 300_000}}, "longer than"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused_by_name(served: Served, schema, words):
    reply = served.chat("x", response_format={"type": "json_schema", "schema": schema})
    assert reply.status == 400 and reply.json["error"]["code"] == "invalid_schema"
    assert words in reply.json["error"]["message"]


def test_json_objects(served: Served):
    reply = served.chat("x", response_format={"type": "json_object"}, max_tokens=200, seed=3)
    text, reason = said(reply)
    assert text.lstrip().startswith("{") and (reason == "length" or json.loads(text) is not None)


def test_a_tool_that_must_be_called_is_called(with_tools: Served):
    named = {"type": "function", "function": {"name": "weather"}}
    for choice, names in ((named, {"weather"}), ("required", {"weather", "time"})):
        reply = with_tools.chat("x", tools=TOOLS, tool_choice=choice, seed=1, max_tokens=300,
                                parallel_tool_calls=False)  # fmt: skip
        message = reply.json["choices"][0]["message"]
        assert "tool_calls" in message, message
        (call,) = message["tool_calls"]
        assert reply.json["choices"][0]["finish_reason"] == "tool_calls"
        assert call["function"]["name"] in names and call["type"] == "function"
        assert isinstance(json.loads(call["function"]["arguments"]), dict)
        stream = with_tools.chat("x", tools=TOOLS, tool_choice=choice, seed=1, max_tokens=300,
                                 parallel_tool_calls=False, stream=True)  # fmt: skip
        deltas = [it["choices"][0]["delta"] for it in stream.frames[:-1]]
        (told,) = [it["tool_calls"] for it in deltas if "tool_calls" in it]
        assert told[0]["index"] == 0 and told[0]["function"] == call["function"]
        assert stream.frames[-2]["choices"][0]["finish_reason"] == "tool_calls"


def test_results_of_tools_go_back(with_tools: Served):
    call = {"id": "call_1", "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}  # fmt: skip
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "31"}]},
    ]
    body = {"messages": messages, "tools": TOOLS, "tool_choice": "auto", "max_tokens": 3}
    assert with_tools.post("/v1/chat/completions", **body).status == 200
    messages[1]["tool_calls"][0]["function"]["arguments"] = "{"
    assert with_tools.post("/v1/chat/completions", **body).status == 400
    wrong = with_tools.chat("x", tools=TOOLS, tool_choice={"function": {"name": "king"}})
    assert wrong.status == 400 and wrong.json["error"]["param"] == "tool_choice"
    assert with_tools.chat("x", tools=TOOLS, tool_choice="none", max_tokens=2).status == 200


def test_a_template_without_a_place_for_tools_says_so(served: Served):
    reply = served.chat("x", tools=TOOLS)
    assert reply.status == 400 and "no place for tools" in reply.json["error"]["message"]


def test_an_answer_that_was_begun_is_continued(served: Served):
    whole, _ = said(served.chat(QUESTION, seed=5, temperature=0, max_tokens=20))
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": whole[:10]},
    ]
    reply = served.post("/v1/chat/completions", messages=messages, continue_final_message=True,
                        temperature=0, max_tokens=10)  # fmt: skip
    assert reply.status == 200
    wrong = served.post("/v1/chat/completions", messages=messages[:1], continue_final_message=True)
    assert wrong.status == 400


def until(condition, seconds: float = WAIT_S) -> bool:
    """Whether it becomes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("streams", [True, False])
def test_who_leaves_is_cancelled(served: Served, streams: bool):
    """Nobody waits for the end of an answer that nobody reads."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "stream": streams, **ON}
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}"
    desk = served.service.desk
    for _ in range(8):
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + data)
            assert until(lambda: desk.live > 0)
            if streams:
                connection.recv(100)
    assert until(lambda: desk.live == 0)


def test_no_more_are_let_in_than_said(llm: LLM):
    """However many come at once, streamed or not, with several answers each."""
    with serving(llm, waiting=2) as served:
        most, desk = 0, served.service.desk

        def ask(number: int) -> int:
            nonlocal most
            reply = served.chat("go on", max_tokens=30, n=1 + number % 3, stream=number % 2 == 0)
            most = max(most, desk.live)
            return reply.status

        with ThreadPoolExecutor(24) as pool:
            asked = [pool.submit(ask, number) for number in range(48)]
            while not all(it.done() for it in asked):
                most = max(most, desk.live)
                time.sleep(0.0005)
        assert {it.result() for it in asked} == {200, 429} and 0 < most <= 6
        wide = served.chat("all at once", n=7)
        assert wide.status == 400 and "at most 6" in wide.json["error"]["message"]
        assert until(lambda: desk.live == 0)


def test_what_could_never_run_is_no_stream(served: Served):
    """It is refused before the first byte, with a status of its own."""
    reply = served.post("/v1/completions", prompt=[999999], stream=True)
    assert reply.status == 400 and "id 999999" in reply.json["error"]["message"]
    wide = served.chat("hi", stream=True, logit_bias={"999999": 1})
    assert wide.status == 400


def test_a_full_queue_says_when_to_come_back(llm: LLM):
    with serving(llm, waiting=0) as served:
        with ThreadPoolExecutor(12) as pool:
            asked = [pool.submit(served.chat, "go on", max_tokens=60, **ON) for _ in range(12)]
            replies = [it.result() for it in asked]
        statuses = {reply.status for reply in replies}
        assert statuses == {200, 429}
        full = next(reply for reply in replies if reply.status == 429)
        assert full.json["error"]["code"] == "queue_full"
        assert 1 <= int(full.headers["retry-after"]) <= 60
        assert served.chat("and now?", max_tokens=1).status == 200


def test_health_and_metrics(served: Served):
    assert served.get("/health").json == {"status": "ok"}
    assert served.get("/readyz").status == 200
    served.chat("count me", max_tokens=2)
    text = served.get("/metrics").body.decode()
    assert 'halfbyte_requests_total{route="/v1/chat/completions",status="200"}' in text
    for name in ("requests_running", "generation_tokens_total", "prefix_cache_hits_total",
                 "time_to_first_token_seconds_bucket", "memory_bytes"):  # fmt: skip
        assert f"halfbyte_{name}" in text
    assert served.get("/props").json["total_slots"] == 4


def test_what_the_page_asks(served: Served):
    info = served.get("/api/info").json
    assert info["model"] == "demo" and info["context"] == 512 and info["plan"]["fits"]
    small, large = (served.post("/api/plan", context=n).json for n in (512, 4096))
    assert 0 < small["total_bytes"] < large["total_bytes"]
    assert served.post("/api/plan", context=5000).status == 400
    connection = served.connect()
    connection.request("GET", "/api/events")
    line = connection.getresponse().readline()
    connection.close()
    event = json.loads(line.removeprefix(b"data: "))
    assert event["state"] == "ready" and event["engine"]["pages"] > 0
    assert event["memory"]["weights"] > 10**6


def test_a_door_that_is_open_before_the_model_is_there(llm: LLM):
    import asyncio

    from halfbyte.serve.running import Server, configured
    from halfbyte.serve.service import Service
    from halfbyte.serve.settings import Settings

    wait = threading.Event()
    service = Service("demo", Settings(port=0), parallel=4)
    server = Server(configured(service), service, lambda _: (wait.wait(WAIT_S), llm)[1], print)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        assert until(lambda: server.started)
        served = Served(service, server)
        for reply in (served.get("/health"), served.chat("hi"), served.get("/readyz")):
            assert reply.status == 503 and reply.json["error"]["code"] == "model_loading"
            assert reply.headers["retry-after"]
        assert served.get("/api/info").json["state"] == "loading"
        wait.set()
        assert until(lambda: served.get("/health").status == 200)
    finally:
        wait.set()
        service.close()
        server.should_exit = True
        thread.join()


def test_who_is_in_may_finish(llm: LLM):
    """Draining: new ones are refused, running ones end, and then the server does."""
    with serving(llm, drain_s=WAIT_S) as served:
        desk, loop = served.service.desk, served.server._loop
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(served.chat, "go on", stream=True, max_tokens=300,
                                  **ON)  # fmt: skip
            assert until(lambda: desk.live == 1)
            loop.call_soon_threadsafe(served.server.handle_exit, 15, None)
            assert until(lambda: desk.closing)
            late = served.chat("too late?")
            assert late.status == 503 and late.json["error"]["code"] == "shutting_down"
            assert served.get("/readyz").status == 503
            assert streamed(running.result())[1] == "length"
        assert until(lambda: served.server.should_exit)


def test_who_takes_too_long_is_told_so(llm: LLM):
    with serving(llm, drain_s=0.05) as served:
        desk, loop = served.service.desk, served.server._loop
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(served.chat, "go on", stream=True,
                                  **ON)  # fmt: skip
            assert until(lambda: desk.live == 1)
            loop.call_soon_threadsafe(served.server.handle_exit, 15, None)
            frames = running.result().frames
        ended = frames[-2].get("error", {}).get("code")
        assert ended == "shutting_down" or frames[-2]["choices"][0]["finish_reason"] == "length"
        assert frames[-1] == "[DONE]"


def test_the_python_face_is_the_same_engine(llm: LLM, served: Served):
    asked = replace(llm.sampling(seed=5))
    other = LLM("demo", LoadOptions(context=512, threads=1, parallel=2))
    answer = other.chat(QUESTION, sampling=asked, max_tokens=30)
    assert answer.text == said(served.chat(QUESTION, seed=5, max_tokens=30))[0]
    pieces = other.stream([{"role": "user", "content": QUESTION}], sampling=asked, max_tokens=30)
    assert "".join(piece.text for piece in pieces) == answer.text
    texts = ["My dear Jane, I", "The sea"]
    found = other.generate(texts, sampling=asked, max_tokens=8)
    body = served.post("/v1/completions", prompt=texts, seed=5, max_tokens=8).json
    assert found == [choice["text"] for choice in body["choices"]]


def test_adapters_by_name_side_by_side(tmp_path: Path):
    """As a model's name or as a field; beside each other, each says what it says alone."""
    spec = read(demo_path()).spec
    shapes = {
        f"model.layers.{index}.self_attn.q_proj": (layer.attention.query_width, spec.hidden)
        for index, layer in enumerate(spec.layers)
    }
    config = {**PLAIN, "target_modules": ["q_proj"]}
    paths = {
        name: str(write_adapter(tmp_path / name, tensors_of(shapes, seed=seed), config))
        for seed, name in enumerate(("poet", "law"))
    }
    llm = LLM("demo", LoadOptions(context=512, threads=1, parallel=3), adapters=paths)
    asked = {"seed": 5, "max_tokens": 20, **ON}
    alone = {}
    for name in (None, *paths):
        prompt = llm.chat_ids([{"role": "user", "content": QUESTION}])
        sampling = llm.sampling(seed=5)
        reply = llm.reply(prompt, sampling=sampling, max_tokens=20, ignore_eos=True, adapter=name)
        reply.finish()
        alone[name] = reply.answer.text
    assert len(set(alone.values())) == 3
    with serving(llm) as served:
        assert [it["id"] for it in served.get("/v1/models").json["data"]] == ["demo", "poet", "law"]
        with ThreadPoolExecutor(3) as pool:
            found = {
                None: pool.submit(served.chat, QUESTION, **asked),
                "poet": pool.submit(served.chat, QUESTION, model="poet", **asked),
                "law": pool.submit(served.chat, QUESTION, adapter="law", **asked),
            }
        assert {name: said(it.result())[0] for name, it in found.items()} == alone
        assert found["poet"].result().json["model"] == "poet"
        missing = served.chat(QUESTION, adapter="king")
        assert missing.status == 404 and "poet, law" in missing.json["error"]["message"]


def test_a_thought_is_told_apart_and_bounded(with_tools: Served):
    """A budget closes the thought, and the model answers; without thinking there are no keys."""
    asked = {"seed": 2, "max_tokens": 60, "enable_thinking": True}
    reply = with_tools.chat("x", thinking_budget=8, **asked)
    message = reply.json["choices"][0]["message"]
    details = reply.json["usage"]["completion_tokens_details"]
    assert details["reasoning_tokens"] <= 8 + 2
    if "reasoning" in message:
        assert message["reasoning"] == message["reasoning_content"]
    quiet = with_tools.chat("x", seed=2, max_tokens=20, enable_thinking=False)
    assert quiet.status == 200


def test_the_plan_counts_every_sequence_and_the_spare_ring(llm: LLM):
    assert llm.plan.setup.sequences == 4 and llm.plan.setup.spare == 1
    assert llm.plan.part("kv.") == llm.engine.cache_bytes
