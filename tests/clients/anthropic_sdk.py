"""The anthropic package, as it comes. Prints ok, or fails."""

import sys

import anthropic

base, model, tools = sys.argv[1], sys.argv[2], sys.argv[3] == "tools"
client = anthropic.Anthropic(base_url=base, api_key="none", max_retries=0)
question = [{"role": "user", "content": "Who are you?"}]

whole = client.messages.create(model=model, max_tokens=20, messages=question, system="Be brief.")
assert whole.type == "message" and whole.usage.output_tokens > 0
with client.messages.stream(model=model, max_tokens=20, messages=question) as stream:
    text = "".join(stream.text_stream)
    final = stream.get_final_message()
assert final.content[0].text == text and final.stop_reason in ("end_turn", "max_tokens")
assert client.messages.count_tokens(model=model, messages=question).input_tokens > 0
try:
    client.messages.create(model=model, max_tokens=0, messages=question)
    raise AssertionError("max_tokens 0 was taken")
except anthropic.BadRequestError as error:
    assert "max_tokens" in str(error)

if tools:
    offered = [{"name": "weather", "input_schema": {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 6}},
        "required": ["city"]}}]  # fmt: skip
    with client.messages.stream(
        model=model, max_tokens=300, messages=question, tools=offered,
        tool_choice={"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
    ) as stream:  # fmt: skip
        final = stream.get_final_message()
    (use,) = [block for block in final.content if block.type == "tool_use"]
    assert use.input.keys() == {"city"} and final.stop_reason == "tool_use"

print("ok", anthropic.__version__)
