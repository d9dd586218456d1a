"""Who may call: TLS, client certificates, bearer tokens."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from runtime.errors import InputError
from runtime.server.settings import Settings

_OPEN_SERVICES = ("/grpc.health.v1.Health/",)
"""Probes carry no tokens."""


def credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """TLS as the settings ask for it; None without.

    Raises:
        InputError: a file cannot be read.
    """
    if not settings.tls_certificate:
        return None
    key, chain = _read(settings.tls_key), _read(settings.tls_certificate)
    client_ca = _read(settings.tls_client_ca) if settings.tls_client_ca else None
    return grpc.ssl_server_credentials(
        [(key, chain)], root_certificates=client_ca, require_client_auth=client_ca is not None
    )


def read_tokens(path: str) -> list[bytes]:
    """Bearer tokens, one per line; empty lines and lines that begin with # do not count.

    Raises:
        InputError: the file cannot be read or holds no token.
    """
    lines = [line.strip() for line in _read(path).splitlines()]
    tokens = [line for line in lines if line and not line.startswith(b"#")]
    if not tokens:
        raise InputError(f"there is no token in '{path}': one per line is expected")
    return tokens


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls that carry none of the tokens."""

    def __init__(self, tokens: list[bytes]) -> None:
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Called by gRPC for every call."""
        given = [value for key, value in details.invocation_metadata if key == "authorization"]
        if details.method.startswith(_OPEN_SERVICES) or self._is_known(given):
            return await continuation(details)
        return grpc.unary_unary_rpc_method_handler(_refuse)

    def _is_known(self, given: list[str | bytes]) -> bool:
        if len(given) != 1:
            return False
        scheme, _, token = _to_bytes(given[0]).partition(b" ")
        # all tokens are compared, each in constant time: how long it takes says nothing about them
        matches = [hmac.compare_digest(token.strip(), known) for known in self._tokens]
        return scheme.lower() == b"bearer" and any(matches)


async def _refuse(request: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a valid bearer token is required")


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read '{path}': {error.strerror}") from error


def _to_bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()
