"""The context of a job's own call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grpc

from runtime.server.http.context import error_of


class JobContext:
    """The context of a job's own call: nobody is at the other end. See `runtime.server.call.Context`."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self.error: dict[str, Any] | None = None

    def peer(self) -> str:
        """Returns the address of the client."""
        return self._peer

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        """Returns no headers."""
        return ()

    def auth_context(self) -> Mapping[str, Sequence[bytes]]:
        """Returns no certificate."""
        return {}

    def time_remaining(self) -> float | None:
        """Returns None: it has all the time."""
        return None

    async def read(self) -> bytes:
        """Returns an empty message."""
        return b""

    async def write(self, message: bytes) -> None:
        """Drops it: nobody reads it."""

    def set_trailing_metadata(self, metadata: Any) -> None:
        """Drops it: nobody reads it."""

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Any) -> None:
        """Keeps the error."""
        _, self.error = error_of(code, details, dict(trailing_metadata))
