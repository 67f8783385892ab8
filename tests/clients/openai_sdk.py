"""The openai package, as it comes: what an application does with it. Prints ok, or fails."""

import json
import sys

import openai
from openai import OpenAI

base, model, tools = sys.argv[1], sys.argv[2], sys.argv[3] == "tools"
client = OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)
question = [{"role": "user", "content": "Who are you?"}]

assert [it.id for it in client.models.list()] == [model]
assert client.models.retrieve(model).id == model

whole = client.chat.completions.create(
    model=model, messages=question, max_tokens=20, seed=3, logprobs=True, top_logprobs=2
)
assert whole.object == "chat.completion" and whole.usage.total_tokens > 0
assert whole.choices[0].logprobs.content[0].top_logprobs

text, usage, reasons = "", None, []
for chunk in client.chat.completions.create(
    model=model, messages=question, max_tokens=20, seed=3, stream=True,
    stream_options={"include_usage": True},
):  # fmt: skip
    usage = chunk.usage or usage
    for choice in chunk.choices:
        text += choice.delta.content or ""
        reasons.append(choice.finish_reason)
assert text == whole.choices[0].message.content, (text, whole.choices[0].message.content)
assert usage.completion_tokens == whole.usage.completion_tokens
assert [it for it in reasons if it] == [whole.choices[0].finish_reason]

with client.chat.completions.stream(
    model=model, messages=question, max_tokens=20, seed=3
) as stream:
    try:
        final = stream.get_final_completion()
    except openai.LengthFinishReasonError as error:  # what it makes of an answer that was cut
        final = error.completion
assert final.choices[0].message.content == text

completion = client.completions.create(model=model, prompt="My dear Jane, I", max_tokens=5, seed=1)
assert completion.choices[0].text

schema = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
structured = client.chat.completions.create(
    model=model, messages=question, max_tokens=300, seed=3,
    response_format={"type": "json_schema",
                     "json_schema": {"name": "person", "schema": schema, "strict": True}},
)  # fmt: skip
assert json.loads(structured.choices[0].message.content).keys() == {"name", "age"}

response = client.responses.create(model=model, input="Who are you?", max_output_tokens=20)
assert response.status in ("completed", "incomplete") and response.usage.total_tokens
kinds = [event.type for event in client.responses.create(
    model=model, input="Who are you?", max_output_tokens=20, stream=True)]  # fmt: skip
assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")

try:
    client.chat.completions.create(model=model, messages=[{"role": "user", "content": "x " * 9000}])
    raise AssertionError("a prompt beyond the context was taken")
except openai.BadRequestError as error:
    assert error.code == "context_length_exceeded", error

if tools:
    parameters = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 6}},
                  "required": ["city"]}  # fmt: skip
    offered = [{"type": "function", "function": {"name": name, "parameters": parameters}}
               for name in ("weather", "time")]  # fmt: skip
    with client.chat.completions.stream(
        model=model, messages=question, tools=offered, tool_choice="required", max_tokens=300,
        parallel_tool_calls=False, seed=3,
    ) as stream:  # fmt: skip
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls
    assert call.function.name in ("weather", "time"), call
    assert json.loads(call.function.arguments).keys() == {"city"}
    assert final.choices[0].finish_reason == "tool_calls"

print("ok", openai.__version__)
