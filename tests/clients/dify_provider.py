"""Dify's provider SDK, as it comes: the credential check and a stream, in both modes.

Its plugin for OpenAI-like servers asks for the usage of streams, and so does this: without it the
SDK counts with a tokenizer that it fetches from the internet.
"""

import sys
from importlib.metadata import version

from dify_plugin.entities.model.message import UserPromptMessage
from dify_plugin.interfaces.model.openai_compatible.llm import OAICompatLargeLanguageModel

base, model = sys.argv[1], sys.argv[2]
provider = OAICompatLargeLanguageModel(model_schemas=[])
for mode, prompt in (("chat", "Who are you?"), ("completion", "My dear Jane, I")):
    credentials = {"endpoint_url": f"{base}/v1", "mode": mode, "context_size": "1024",
                   "max_tokens_to_sample": "64", "function_calling_type": "no_call"}  # fmt: skip
    for stream_mode in ("not_use", "use"):
        provider.validate_credentials(model, {**credentials, "stream_mode_auth": stream_mode})

    def ask(stream: bool, credentials=credentials, prompt=prompt):
        asking = {"stream_options": {"include_usage": True}} if stream else {}
        return provider._invoke(
            model=model, credentials=dict(credentials), stream=stream,
            prompt_messages=[UserPromptMessage(content=prompt)],
            model_parameters={"max_tokens": 20, "seed": 3, "temperature": 0.7, **asking},
            user="somebody",
        )  # fmt: skip

    whole = ask(False)
    chunks = list(ask(True))
    text = "".join(chunk.delta.message.content for chunk in chunks)
    assert text == whole.message.content and text, (mode, text, whole.message.content)
    assert chunks[-1].delta.finish_reason in ("stop", "length"), chunks[-1]
    assert chunks[-1].delta.usage.completion_tokens == whole.usage.completion_tokens
print("ok", version("dify_plugin"))
