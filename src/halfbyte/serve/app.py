"""The routes: a body in, a job made in a thread, frames or a document out.

What a route reads is its type in `wire`, what it answers a form; nothing else is decided here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar, cast

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from halfbyte import __version__
from halfbyte.serve import anthropic, inside, responses, wire
from halfbyte.serve.answering import Form
from halfbyte.serve.failure import Failure, failure_of
from halfbyte.serve.guard import Guard, respond
from halfbyte.serve.job import Job
from halfbyte.serve.metrics import CONTENT_TYPE
from halfbyte.serve.openai import ChatForm, TextForm
from halfbyte.serve.openapi import document_of
from halfbyte.serve.page import files
from halfbyte.serve.service import Service
from halfbyte.serve.sse import EventStream, departure
from halfbyte.serve.wire import read, refusing

Asked = TypeVar("Asked", bound=wire.Wire)
Endpoint = Callable[[Request], Awaitable[Response | EventStream]]
MakeJob = Callable[[Any, str], Job]
MakeForm = Callable[[Job, Any], Form]


def application(service: Service) -> ASGIApp:
    """The whole server as an ASGI app."""
    app = Starlette(
        routes=_routes(service),
        exception_handlers={
            HTTPException: _of_starlette,
            Failure: _of_failure,
            ClientDisconnect: _of_departure,
            Exception: _of_failure,
        },
    )
    return Guard(app, service.settings, _counted(service))


def _routes(service: Service) -> list[Route]:
    def chat(job: Job, _: Any) -> Form:
        return ChatForm(job)

    def text(job: Job, _: Any) -> Form:
        return TextForm(job)

    post: dict[str, tuple[type[wire.Wire], Callable[[], MakeJob], MakeForm]] = {
        "/v1/chat/completions": (wire.ChatRequest, lambda: service.asker.chat, chat),
        "/v1/completions": (wire.CompletionRequest, lambda: service.asker.completion, text),
        "/v1/messages": (
            wire.MessagesRequest,
            lambda: anthropic.asked_by(service.asker),
            lambda job, _: anthropic.MessagesForm(job),
        ),
        "/v1/responses": (
            wire.ResponsesRequest,
            lambda: responses.asked_by(service.asker),
            responses.ResponsesForm,
        ),
    }
    looks: dict[str, tuple[type[wire.Wire], Callable[[Service, Any], Any]]] = {
        "/v1/messages/count_tokens": (wire.CountRequest, anthropic.count),
        "/tokenize": (wire.TokenizeRequest, inside.tokenize),
        "/detokenize": (wire.DetokenizeRequest, inside.detokenize),
        "/apply-template": (wire.TemplateRequest, inside.apply_template),
        "/api/plan": (wire.PlanRequest, inside.plan),
    }
    get: dict[str, Callable[[Service], Any]] = {
        "/v1/models": inside.models,
        "/props": inside.props,
        "/api/info": inside.info,
    }
    return [
        *(Route(path, _generating(service, *it), methods=["POST"]) for path, it in post.items()),
        *(Route(path, _looking(service, *it), methods=["POST"]) for path, it in looks.items()),
        *(Route(path, _telling(service, it), methods=["GET"]) for path, it in get.items()),
        Route("/generate", _generate(service), methods=["POST"]),
        Route("/v1/models/{name:path}", _model(service), methods=["GET"]),
        *(
            Route(path, _health(service), methods=["GET"])
            for path in ("/health", "/v1/health", "/livez")
        ),
        Route("/readyz", _ready(service), methods=["GET"]),
        Route("/metrics", _metrics(service), methods=["GET"]),
        Route("/api/events", _events(service), methods=["GET"]),
        Route("/openapi.json", _openapi(), methods=["GET"]),
        *(files.routes() if service.settings.page else ()),
    ]


def _generating(
    service: Service, form: type[wire.Wire], make: Callable[[], MakeJob], shape: MakeForm
) -> Endpoint:
    """A route that generates: a stream of frames, or one document."""

    async def endpoint(request: Request) -> Response | EventStream:
        job, asked = await _job(request, form, make())
        visit = service.desk.admit(job.requests)
        if job.streams:
            frames = service.clerk.frames(job, visit, shape(job, asked))
            return EventStream(frames, ping_s=service.settings.ping_s, left=visit.leave)
        return _Whole(service.clerk.document(job, visit, shape(job, asked)), left=visit.leave)

    return endpoint


def _generate(service: Service) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        job, _ = await _job(request, wire.GenerateRequest, service.asker.generate)
        visit = service.desk.admit(job.requests)

        async def answer() -> dict[str, Any]:
            found = await service.clerk.document(job, visit, TextForm(job))
            return {"response": found["choices"][0]["text"]}

        return _Whole(answer(), left=visit.leave)

    return endpoint


async def _job(request: Request, form: type[Asked], make: MakeJob) -> tuple[Job, Asked]:
    """The job of a body. Parsing, templates, tokens and grammars take a thread, not the loop."""
    body = await request.body()

    def work() -> tuple[Job, Asked]:
        asked = read(form, body)
        with refusing():
            return make(asked, _client(request)), asked

    return await run_in_threadpool(work)


def _looking(
    service: Service, form: type[wire.Wire], look: Callable[[Service, Any], Any]
) -> Endpoint:
    """A route that computes something small from a body."""

    async def endpoint(request: Request) -> Response:
        body = await request.body()

        def work() -> Any:
            with refusing():
                return look(service, read(form, body))

        return JSONResponse(await run_in_threadpool(work))

    return endpoint


def _telling(service: Service, tell: Callable[[Service], Any]) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(tell, service))

    return endpoint


def _model(service: Service) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        name = request.path_params["name"]
        known = inside.models(service)["data"]
        found = [model for model in known if model["id"] == name]
        if not found:
            names = ", ".join(model["id"] for model in known)
            raise Failure(404, f"no model '{name[:100]}'; there is {names}", "model_not_found")
        return JSONResponse(found[0])

    return endpoint


def _health(service: Service) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        service.healthy()
        return JSONResponse({"status": "ok"})

    return endpoint


def _ready(service: Service) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        service.healthy()
        service.desk.require_open()
        return JSONResponse({"status": "ready"})

    return endpoint


def _metrics(service: Service) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        text = service.metrics.text(service.desk.worker.usage)
        return Response(text, media_type=CONTENT_TYPE)

    return endpoint


def _events(service: Service) -> Endpoint:
    async def endpoint(request: Request) -> EventStream:
        return EventStream(inside.events(service), ping_s=service.settings.ping_s)

    return endpoint


def _openapi() -> Endpoint:
    document = document_of(__version__)

    async def endpoint(request: Request) -> Response:
        return JSONResponse(document)

    return endpoint


class _Whole(Response):
    """A document that is being made; given up, and `left` called, when the client leaves."""

    def __init__(
        self, making: Coroutine[Any, Any, dict[str, Any]], *, left: Callable[[], None]
    ) -> None:
        self._making = making
        self._left = left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        making = asyncio.ensure_future(self._making)
        left = asyncio.ensure_future(departure(receive))
        try:
            await asyncio.wait({making, left}, return_when=asyncio.FIRST_COMPLETED)
            if making.done():
                await JSONResponse(making.result())(scope, receive, send)
        finally:
            left.cancel()
            making.cancel()
            self._left()


def _client(request: Request) -> str:
    """Whom a request comes from, as far as taking turns goes: a key, or an address."""
    key = request.headers.get("authorization") or request.headers.get("x-api-key")
    return key or (request.client.host if request.client else "")


def _counted(service: Service) -> Callable[[str, int], None]:
    def count(route: str, status: int) -> None:
        service.metrics.requests.labels(route, str(status)).inc()

    return count


async def _of_failure(request: Request, error: Exception) -> Response:
    return respond(failure_of(error), request.scope)


async def _of_departure(request: Request, error: Exception) -> Response:
    """Who left before the body was there: nobody reads this, and it is no fault of ours."""
    return Response(status_code=499)


async def _of_starlette(request: Request, error: Exception) -> Response:
    found = cast(HTTPException, error)
    what = {404: f"there is nothing at {request.url.path[:200]}", 405: "not with this method"}
    message = what.get(found.status_code, str(found.detail))
    failure = Failure(found.status_code, message, headers=dict(found.headers or {}))
    return respond(failure, request.scope)
