"""The OpenAPI document: the very types that bodies are checked with, and the routes there are."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from halfbyte.serve import wire

Object = dict[str, Any]
REFERENCE = "#/components/schemas/{model}"
ANY: Object = {"type": "object"}
ERROR: Object = {
    "type": "object",
    "properties": {"error": {"type": "object"}, "type": {"type": "string"}},
    "required": ["error"],
}
POST: dict[str, tuple[type[wire.Wire], str]] = {
    "/v1/chat/completions": (wire.ChatRequest, "The answer to a conversation."),
    "/v1/completions": (wire.CompletionRequest, "How texts go on."),
    "/v1/messages": (wire.MessagesRequest, "The answer to a conversation, in Anthropic's form."),
    "/v1/messages/count_tokens": (wire.CountRequest, "How many tokens a prompt has."),
    "/v1/responses": (wire.ResponsesRequest, "The answer to a conversation; nothing is stored."),
    "/generate": (wire.GenerateRequest, "The answer to one question."),
    "/tokenize": (wire.TokenizeRequest, "The ids of a text."),
    "/detokenize": (wire.DetokenizeRequest, "The text of ids."),
    "/apply-template": (wire.TemplateRequest, "A conversation as the model's prompt."),
    "/api/plan": (wire.PlanRequest, "What another context or cache would take."),
}
GET = {
    "/v1/models": "The model, and its adapters.",
    "/v1/models/{name}": "One of them.",
    "/props": "What llama.cpp's clients ask for.",
    "/health": "Whether the server works.",
    "/v1/health": "The same.",
    "/livez": "The same.",
    "/readyz": "Whether it takes requests.",
    "/metrics": "Counters, as Prometheus reads them.",
    "/api/info": "The model, how it runs, its plan.",
    "/api/events": "What happens, once a second.",
}
STREAMS = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/responses",
    "/api/events",
}
OTHERS = {"/metrics": "text/plain"}
ALWAYS_OPEN = {"/health", "/v1/health", "/livez", "/readyz"}


def document_of(version: str) -> Object:
    """OpenAPI 3.1."""
    models = [(form, "validation") for form, _ in POST.values()]
    _, schemas = models_json_schema(models, ref_template=REFERENCE)  # type: ignore[arg-type]
    paths: dict[str, Object] = {}
    for path, (form, summary) in POST.items():
        body = {"$ref": REFERENCE.format(model=form.__name__)}
        paths[path] = {"post": {**_operation(path, summary), "requestBody": _content(body)}}
        paths[path]["post"]["requestBody"]["required"] = True
    for path, summary in GET.items():
        paths[path] = {"get": _operation(path, summary)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "halfbyte", "version": version},
        "paths": paths,
        "components": {
            "schemas": {**schemas.get("$defs", {}), "Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(path: str, summary: str) -> Object:
    kinds = ["application/json"]
    if path in STREAMS:
        kinds.append("text/event-stream")
    if path == "/api/events":
        kinds = ["text/event-stream"]
    if path in OTHERS:
        kinds = [OTHERS[path]]
    answer = {kind: {"schema": ANY if "json" in kind else {"type": "string"}} for kind in kinds}
    operation: Object = {
        "summary": summary,
        "operationId": path.strip("/").replace("/", "_").replace("{", "").replace("}", ""),
        "responses": {
            "200": {"description": "It worked.", "content": answer},
            **{
                status: {"description": what, **_content({"$ref": "#/components/schemas/Error"})}
                for status, what in _failures(path).items()
            },
        },
    }
    if "{name}" in path:
        name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        operation["parameters"] = [name]
    if path in ALWAYS_OPEN:
        operation["security"] = [{}]
    return operation


def _failures(path: str) -> dict[str, str]:
    failures = {
        "400": "Something in the request is wrong; `param` says what.",
        "401": "A key is needed.",
        "403": "Not from this host or origin.",
        "404": "There is no such model.",
        "408": "The body did not arrive in time.",
        "413": "The body is too large.",
        "415": "The body is encoded.",
        "429": "Too many wait already.",
        "503": "The model is loading, or the server shuts down.",
    }
    if path in POST:
        return failures
    return {key: failures[key] for key in ("401", "403", "404", "503")}


def _content(schema: Object) -> Object:
    return {"content": {"application/json": {"schema": schema}}}
