"""Which path leads where."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from runtime.server.call import Call
from runtime.server.gate import Gate
from runtime.server.health import Health
from runtime.server.http.composites import Composites
from runtime.server.http.context import HttpContext
from runtime.server.http.images import Images
from runtime.server.http.jobs import Jobs
from runtime.server.http.openapi import document
from runtime.server.settings import Settings

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


class Endpoint:
    """A method at a path: an ASGI application whose calls go through the gate."""

    def __init__(self, gate: Gate, name: str, method: Method, max_bytes: int) -> None:
        self._gate = gate
        self._name = name
        self._method = method
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        context = HttpContext(scope, receive, send, self._max_bytes)
        has_message = scope["method"] == "POST"
        task = asyncio.ensure_future(
            self._gate.answer(context, self._name, self._method, has_message=has_message)
        )
        context.task = task
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await context.finish()


def new_app(
    gate: Gate,
    health: Health,
    composites: Composites,
    jobs: Jobs | None,
    settings: Settings,
) -> Starlette:
    """The ASGI application.

    Args:
        gate: lets calls in.
        health: what /healthz and /readyz say.
        composites: answers the runtime's own form.
        jobs: answers what is fetched later, if anything is.
        settings: of the server.
    """
    images, origins = Images(composites), settings.cors

    def endpoint(verb: str, path: str, method: Method) -> Route:
        return Route(
            path, Endpoint(gate, f"{verb} {path}", method, settings.max_message_bytes), methods=[verb]
        )

    routes: list[BaseRoute] = [
        *_health_routes(health),
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
    if settings.studio:
        routes.append(Mount(STUDIO, _Page(directory=Path(__file__).with_name("studio"), html=True)))
        routes.append(Route("/", lambda request: RedirectResponse(f"{STUDIO}/")))
    cross_origin = Middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "x-seed", "x-warnings", "retry-after", "location"],
    )
    handlers: dict[Any, Any] = dict.fromkeys((404, 405), _refuse)
    return Starlette(routes=routes, middleware=[cross_origin] if origins else [], exception_handlers=handlers)


def _health_routes(health: Health) -> list[BaseRoute]:
    """Paths that need no token, and the description."""

    async def alive(request: Request) -> Response:
        return _health(health.is_alive)

    async def ready(request: Request) -> Response:
        return _health(health.is_ready)

    async def described(request: Request) -> Response:
        return JSONResponse(document())

    return [Route("/healthz", alive), Route("/readyz", ready), Route("/openapi.json", described)]


def _health(is_well: bool) -> Response:
    status = HTTPStatus.OK if is_well else HTTPStatus.SERVICE_UNAVAILABLE
    return JSONResponse({"status": "ok" if is_well else "not ready"}, int(status))


async def _refuse(request: Request, error: Any) -> Response:
    """404 and 405, in the shape of all other errors."""
    what = "there is nothing here: see /openapi.json"
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        what = f"{request.method[:20]} is not offered here: see /openapi.json"
    fields = {"message": what, "type": "invalid_request_error", "param": None, "code": "unimplemented"}
    return Response(
        json.dumps({"error": fields}), error.status_code, error.headers, media_type="application/json"
    )
