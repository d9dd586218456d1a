"""Routes paths to handlers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.server.call import BYTES_PER_SECOND, Call
from runtime.server.connections import cut_off
from runtime.server.events import ForbiddenError, UnknownMethodError
from runtime.server.gate import Gate
from runtime.server.health import Health
from runtime.server.http.composites import Composites
from runtime.server.http.context import HttpContext, peer_of
from runtime.server.http.images import Images
from runtime.server.http.jobs import Jobs
from runtime.server.http.openapi import document
from runtime.server.http.origin import OriginCheck
from runtime.server.settings import Settings
from runtime.server.timeouts import within

STUDIO = "/studio"

Method = Callable[[bytes, Call], Awaitable[None]]


class _Page(StaticFiles):
    """The studio's files; the page asks nobody but this server."""

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers["content-security-policy"] = (
            "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; form-action 'none'"
        )
        response.headers["cache-control"] = "no-cache"
        response.headers["x-content-type-options"] = "nosniff"
        return response


class _TakenInTime:
    """Ends the connection of a client that does not take its answer, whoever answers: an ASGI middleware.

    Calls have their own limit, which comes first.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app = app
        self._seconds = seconds + 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""

        async def send_in_time(message: Message) -> None:
            seconds = self._seconds + len(message.get("body", b"")) / BYTES_PER_SECOND
            try:
                await within(seconds, send(message))
            except asyncio.TimeoutError:
                cut_off(peer_of(scope))

        await self._app(scope, receive, send_in_time)


class Endpoint:
    """A method at a path: an ASGI application whose calls go through the gate."""

    def __init__(
        self, gate: Gate, name: str, method: Method, max_bytes: int, has_message: bool = True
    ) -> None:
        self._gate = gate
        self._name = name
        self._method = method
        self._max_bytes = max_bytes
        self._has_message = has_message

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        context = HttpContext(scope, receive, send, self._max_bytes)
        task = asyncio.ensure_future(
            self._gate.answer(context, self._name, self._method, has_message=self._has_message)
        )
        context.task = task
        if not self._has_message:
            context.watch()
        try:
            await asyncio.wait({task})
            with suppress(asyncio.CancelledError):
                await task
            await context.finish()
        finally:
            task.cancel()
            context.stop()


def new_app(
    gate: Gate,
    health: Health,
    composites: Composites,
    jobs: Jobs | None,
    settings: Settings,
) -> Starlette:
    """Returns the ASGI application.

    Args:
        gate: lets calls in.
        health: what /healthz and /readyz say.
        composites: answers the runtime's own form.
        jobs: answers what is fetched later, if anything is.
        settings: of the server.
    """
    images, max_bytes = Images(composites), settings.max_message_bytes

    def endpoint(verb: str, path: str, method: Method) -> Route:
        answers = Endpoint(gate, f"{verb} {path}", method, max_bytes, has_message=verb == "POST")
        return Route(path, answers, methods=[verb])

    async def refuse(request: Request, error: Any) -> Any:
        """404 and 405 are refusals as all others: seen, and late where there are many."""
        return Endpoint(
            gate, "other", partial(_refuse, error, _verbs(routes, request)), max_bytes, has_message=False
        )

    routes: list[BaseRoute] = [
        *_health_routes(health, has_jobs=jobs is not None),
        endpoint("POST", "/v1/composite", composites.composite),
        endpoint("POST", "/v1/draw", composites.draw),
        endpoint("POST", "/v1/edit", composites.edit),
        endpoint("POST", "/v1/segment", composites.segment),
        endpoint("GET", "/v1/model", composites.model),
        endpoint("POST", "/v1/images/edits", images.edit),
        endpoint("POST", "/v1/images/generations", images.generate),
        endpoint("GET", "/v1/models", images.models),
        endpoint("GET", "/v1/models/{name}", images.models),
    ]
    if jobs:
        routes += [
            endpoint("POST", "/v1/jobs", jobs.create),
            endpoint("GET", "/v1/jobs/{id}", jobs.show),
            endpoint("DELETE", "/v1/jobs/{id}", jobs.cancel),
            endpoint("GET", "/v1/jobs/{id}/events", jobs.follow),
            endpoint("GET", "/v1/jobs/{id}/result", jobs.result),
        ]
    else:
        no_jobs = Endpoint(gate, "other", _refuse_job, max_bytes, has_message=False)
        routes.append(Route("/v1/jobs{rest:path}", no_jobs))
    if settings.studio:
        routes.append(Mount(STUDIO, _Page(directory=Path(__file__).with_name("studio"), html=True)))
        for path in ("/", STUDIO):
            routes.append(Route(path, lambda request: RedirectResponse(f"{STUDIO}/")))

    handlers: dict[Any, Any] = dict.fromkeys((404, 405), refuse)
    app = Starlette(routes=routes, middleware=_middleware(gate, settings), exception_handlers=handlers)
    app.router.redirect_slashes = False  # what is not offered is refused as JSON
    return app


def _middleware(gate: Gate, settings: Settings) -> list[Middleware]:
    """Returns the middleware for slow clients, and for web pages of other origins."""

    def refusal(reason: str) -> ASGIApp:
        answer = partial(_forbid, reason)
        return Endpoint(gate, "other", answer, settings.max_message_bytes, has_message=False)

    middleware = [Middleware(_TakenInTime, seconds=settings.transfer_seconds)]
    if settings.host or not settings.tokens:  # no page of others has a token
        middleware.append(Middleware(OriginCheck, settings=settings, refusal=refusal))
    if settings.cors:
        cross_origin = Middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-seed", "x-score", "x-warnings", "retry-after", "location"],
        )
        middleware.append(cross_origin)
    return middleware


def _health_routes(health: Health, has_jobs: bool) -> list[BaseRoute]:
    """Returns paths that need no token, and the description."""

    async def alive(request: Request) -> Response:
        return _health(health.is_alive)

    async def ready(request: Request) -> Response:
        return _health(health.is_ready)

    async def described(request: Request) -> Response:
        return JSONResponse(document(has_jobs))

    return [Route("/healthz", alive), Route("/readyz", ready), Route("/openapi.json", described)]


def _health(is_well: bool) -> Response:
    status = HTTPStatus.OK if is_well else HTTPStatus.SERVICE_UNAVAILABLE
    return JSONResponse({"status": "ok" if is_well else "not ready"}, int(status))


async def _forbid(reason: str, content: bytes, call: Call) -> None:
    raise ForbiddenError(reason)


async def _refuse_job(content: bytes, call: Call) -> None:
    raise UnknownMethodError(
        "jobs are not available here, because each of several servers would only know its own: request a "
        "picture with stream=true, and keep the connection open until it arrives"
    )


def _verbs(routes: Sequence[BaseRoute], request: Request) -> set[str]:
    """Returns the verbs that are offered where a request goes."""
    path = request.url.path
    here = [route for route in routes if isinstance(route, Route) and route.path_regex.match(path)]
    return {verb for route in here for verb in route.methods or ()}


async def _refuse(error: Any, verbs: set[str], content: bytes, call: Call) -> None:
    if error.status_code != HTTPStatus.METHOD_NOT_ALLOWED:
        raise UnknownMethodError("there is nothing here: see /openapi.json")
    context = cast(HttpContext, call.context)
    context.refuse_verb(", ".join(sorted(verbs)))
    raise UnknownMethodError(f"{context.scope['method'][:20]} is not offered here: see /openapi.json")
