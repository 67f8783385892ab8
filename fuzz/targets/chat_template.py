"""Chat templates: code of strangers, on a conversation with tools."""

from __future__ import annotations

from halfbyte.text.template import ChatTemplate

ALLOWANCE = 1 << 27  # what the sandbox lets a template build and print

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b>\u00e9</b>"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "sunny"},
]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def one_input(data: bytes) -> None:
    template = ChatTemplate(data.decode("utf-8", "ignore"))
    template.render(MESSAGES, bos="<s>", eos="</s>", tools=[TOOL], enable_thinking=True)
