"""What may be asked about the server and its model: for tools, for people, and for the page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import asdict, replace
from time import monotonic
from typing import Any

from halfbyte import __version__
from halfbyte.errors import HalfbyteError
from halfbyte.planner.probe import this_machine
from halfbyte.planner.solve import Goal
from halfbyte.serve.answering import frame
from halfbyte.serve.failure import failure_of, refused
from halfbyte.serve.service import Service
from halfbyte.serve.wire import (
    ChatRequest,
    DetokenizeRequest,
    PlanRequest,
    TemplateRequest,
    TokenizeRequest,
)
from halfbyte.specs import Machine

Object = dict[str, Any]
EVENT_S = 1.0


def models(service: Service) -> Object:
    """The model, and each adapter as a model of its own."""
    llm = service.llm
    stored = llm.memory.weights_bytes
    shared: Object = {
        "object": "model",
        "created": service.created,
        "owned_by": "halfbyte",
        "root": service.name,
        "max_model_len": llm.context,
        "context_length": llm.context,
        "meta": {
            "n_ctx_train": llm.spec.context,
            "n_params": llm.spec.parameters,
            "n_vocab": llm.spec.vocab,
            "size": stored,
        },
        "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
    }
    adapters = [{"id": name, "parent": service.name, **shared} for name in llm.adapters]
    return {"object": "list", "data": [{"id": service.name, **shared}, *adapters]}


def props(service: Service) -> Object:
    """What llama.cpp's clients ask for."""
    llm = service.llm
    return {
        "default_generation_settings": {"n_ctx": llm.context},
        "total_slots": service.parallel,
        "model_alias": service.name,
        "modalities": {"vision": False, "audio": False},
        "chat_template": None if llm.assets is None else llm.assets.template,
        "build_info": f"halfbyte {__version__}",
    }


def info(service: Service) -> Object:
    """The model, how it runs, and what it takes, for the page."""
    if service.state == "loading":
        return {"state": "loading", "loaded": service.loaded, "model": service.name}
    llm, settings = service.llm, service.settings
    template = None if llm.assets is None else llm.assets.template
    return {
        "state": service.state,
        "version": __version__,
        "model": service.name,
        "adapters": [*llm.adapters],
        "family": llm.spec.family,
        "parameters": llm.spec.parameters,
        "layers": len(llm.spec.layers),
        "hidden": llm.spec.hidden,
        "vocabulary": llm.spec.vocab,
        "trained_context": llm.spec.context,
        "context": llm.context,
        "parallel": service.parallel,
        "schemes": llm.stored,
        "ops": llm.decoder.name,
        "template": template,
        "can_think": template is not None and llm.turns.can_think,
        "tools": template is not None and "tools" in template,
        "sampling": {
            knob: getattr(llm.sampling(), knob)
            for knob in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        },
        "plan": llm.plan.document(),
        "measured": service.memory(),
        "limits": {
            "waiting": settings.waiting,
            "body_bytes": settings.body_bytes,
            "request_s": settings.request_s,
        },
        "notes": llm.notes,
    }


def plan(service: Service, asked: PlanRequest) -> Object:
    """What another context, cache or number of sequences would take on this machine."""
    llm = service.llm
    setup = llm.plan.setup
    goal = Goal(
        context=asked.context or setup.context,
        kv=asked.kv or setup.kv,
        sequences=asked.parallel or setup.sequences,
        spare=setup.spare,
        draft=setup.draft,
        card_layers=setup.card_layers,
    )
    if goal.context is not None and goal.context > llm.spec.context:
        raise refused(f"the model's own context is {llm.spec.context}", "context")
    try:
        return llm.planned(_without_ours(service), goal).document()
    except HalfbyteError as error:
        raise failure_of(error) from error


def _without_ours(service: Service) -> Machine:
    """The machine as it would be if this process held nothing."""
    resident, machine = service.memory()["resident"], this_machine(service.llm.kind)
    if machine.host is None:
        return _less(machine, resident)
    host = _less(machine.host, resident)
    return replace(_less(machine, service.llm.memory.card_bytes), host=host)


def _less(machine: Machine, held: int) -> Machine:
    return replace(machine, used_bytes=max(0, machine.used_bytes - held))


def tokenize(service: Service, asked: TokenizeRequest) -> Object:
    """The ids of a text, or of a conversation's prompt."""
    text = asked.content if asked.content is not None else asked.prompt
    words = service.llm.tokenizer
    try:
        if asked.messages:
            ids = service.asker.prompt(ChatRequest(messages=asked.messages), [])
        elif text is None:
            raise refused("there is no content, prompt or messages", "content")
        elif asked.add_special or asked.add_special_tokens:
            ids = words.encode_raw(text)
        else:
            ids = words.encode(text, special=True)
    except HalfbyteError as error:
        raise failure_of(error) from error
    pieces = [{"id": it, "piece": words.decode([it], skip_special=False)} for it in ids]
    return {
        "tokens": pieces if asked.with_pieces else ids,
        "count": len(ids),
        "max_model_len": service.llm.context,
    }


def detokenize(service: Service, asked: DetokenizeRequest) -> Object:
    """The text of ids."""
    try:
        text = service.llm.tokenizer.decode(asked.tokens, skip_special=False)
    except HalfbyteError as error:
        raise failure_of(error) from error
    return {"content": text, "prompt": text}


def apply_template(service: Service, asked: TemplateRequest) -> Object:
    """The prompt of a conversation, as text."""
    ids = service.asker.prompt(ChatRequest(messages=asked.messages), [])
    return {"prompt": service.llm.tokenizer.decode(ids, skip_special=False)}


async def events(service: Service) -> AsyncGenerator[bytes]:
    """What happens, once a second: who runs and waits, the cache, tokens per second, memory."""
    before, since = service.metrics.generated, monotonic()
    while service.state != "closing":
        now, count = monotonic(), service.metrics.generated
        rate = (count - before) / max(now - since, 1e-9) if now > since else 0.0
        before, since = count, now
        happening: Object = {
            "state": service.state,
            "loaded": service.loaded,
            "tokens_per_second": rate,
            "memory": await asyncio.to_thread(service.memory),
            **service.metrics.summary(),
        }
        if service.state == "ready":
            happening["engine"] = asdict(service.desk.worker.usage)
        yield frame(happening)
        await asyncio.sleep(EVENT_S)
