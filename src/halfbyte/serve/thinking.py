"""The switches for thinking: nine names for one thing, and four for how long. Pure.

Dify alone sends five of them at once, so they must agree on something: of several, one that says
off wins. Nothing of them reaches a template but the one truth value made here.
"""

from __future__ import annotations

from halfbyte.serve.wire import ChatRequest, Thinking


def thinks(asked: ChatRequest) -> bool | None:
    """On, off, or as the template has it. Of several switches one that says off wins."""
    kwargs = asked.chat_template_kwargs or {}
    efforts = [asked.reasoning_effort, asked.reasoning and asked.reasoning.effort]
    said: list[object] = [
        asked.enable_thinking,
        kwargs.get("enable_thinking"),
        kwargs.get("thinking"),
        asked.reasoning and asked.reasoning.enabled,
        *(None if effort is None else effort != "none" for effort in efforts),
        None if thought_budget(asked) is None else thought_budget(asked) != 0,
    ]
    switch = asked.thinking
    if isinstance(switch, Thinking):
        kinds = {"enabled": True, "disabled": False}
        said.append(kinds.get(switch.type))
    else:
        said.append(switch)
    known = [it for it in said if isinstance(it, bool)]
    return all(known) if known else None


def thought_budget(asked: ChatRequest) -> int | None:
    """How many ids a thought may take; None where that was not said."""
    switch = asked.thinking if isinstance(asked.thinking, Thinking) else None
    budgets = [
        asked.thinking_budget,
        asked.thinking_token_budget,
        switch and switch.budget_tokens,
        asked.reasoning and asked.reasoning.max_tokens,
    ]
    return next((it for it in budgets if it is not None and it >= 0), None)
