"""langchain-openai, as it comes. Prints ok, or fails."""

import sys
from importlib.metadata import version

from langchain_openai import ChatOpenAI

base, model, tools = sys.argv[1], sys.argv[2], sys.argv[3] == "tools"
chat = ChatOpenAI(model=model, base_url=f"{base}/v1", api_key="none", max_retries=0, seed=3,
                  max_tokens=20, stream_usage=True)  # fmt: skip
whole = chat.invoke("Who are you?")
assert whole.usage_metadata["total_tokens"] > 0
parts = list(chat.stream("Who are you?"))
joined = parts[0]
for part in parts[1:]:
    joined = joined + part
assert joined.content == whole.content and joined.usage_metadata == whole.usage_metadata
if tools:
    tool = {"name": "weather", "description": "", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 6}},
        "required": ["city"]}}  # fmt: skip
    bound = ChatOpenAI(
        model=model, base_url=f"{base}/v1", api_key="none", max_tokens=300
    ).bind_tools([tool], tool_choice="weather", parallel_tool_calls=False)
    joined = None
    for part in bound.stream("Rome?"):
        joined = part if joined is None else joined + part
    (call,) = joined.tool_calls
    assert call["name"] == "weather" and call["args"].keys() == {"city"}, joined
print("ok", version("langchain-openai"))
