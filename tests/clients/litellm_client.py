"""LiteLLM by both of its providers for such servers, as it comes. Prints ok, or fails."""

import sys
from importlib.metadata import version

import litellm

base, model = sys.argv[1], sys.argv[2]
litellm.suppress_debug_info = True
question = [{"role": "user", "content": "Who are you?"}]

for provider in ("openai", "hosted_vllm"):
    shared = {"model": f"{provider}/{model}", "api_base": f"{base}/v1", "api_key": "none"}
    whole = litellm.completion(messages=question, max_tokens=20, seed=3, **shared)
    text, usage = "", None
    for chunk in litellm.completion(
        messages=question, max_tokens=20, seed=3, stream=True,
        stream_options={"include_usage": True}, **shared,
    ):  # fmt: skip
        usage = getattr(chunk, "usage", None) or usage
        text += chunk.choices[0].delta.content or "" if chunk.choices else ""
    assert text == whole.choices[0].message.content
    assert usage.completion_tokens == whole.usage.completion_tokens
    try:
        litellm.completion(messages=[{"role": "user", "content": "x " * 9000}], **shared)
        raise AssertionError("a prompt beyond the context was taken")
    except litellm.ContextWindowExceededError:
        pass

print("ok", version("litellm"))
