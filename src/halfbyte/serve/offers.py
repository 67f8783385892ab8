"""The tools that a request offers, and which of them it demands. Pure.

The older `functions` and `function_call` mean the same as `tools` and `tool_choice`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from halfbyte.serve.failure import refused
from halfbyte.serve.wire import ChatRequest, Object

NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


def offered(asked: ChatRequest) -> list[Object]:
    """The tools, in OpenAI's form; none where they may not be called. Raises `Failure`."""
    given = asked.tools or [{"type": "function", "function": it} for it in asked.functions or ()]
    if (asked.tool_choice or asked.function_call) == "none":
        return []
    tools: list[Object] = []
    for index, tool in enumerate(given):
        function = tool.get("function", tool)
        name = cast(Object, function).get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise refused(f"tools.{index} has no function with a name", f"tools.{index}")
        whole = {"description": "", "parameters": NO_PARAMETERS, **cast(Object, function)}
        tools.append({"type": "function", "function": whole})
    return tools


def demanded(asked: ChatRequest, tools: Sequence[Object]) -> list[Object]:
    """The functions of which one must be called; none where that is not said. Raises `Failure`."""
    choice = asked.tool_choice or asked.function_call
    functions: list[Object] = [tool["function"] for tool in tools]
    if choice == "required":
        return functions
    if not isinstance(choice, dict):
        return []
    named = choice.get("function", choice)
    name = cast(Object, named).get("name") if isinstance(named, dict) else None
    found = [function for function in functions if function["name"] == name]
    if not found:
        raise refused(f"tool_choice names {name!r}, which is none of the tools", "tool_choice")
    return found
