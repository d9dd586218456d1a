"""Checks which web pages may call a server without tokens: its own, and those of `cors`.

Browsers let any page send a form to this machine, with its own address in `Origin` (Fetch standard, section
3.2), and any page whose name is then changed to mean this machine read the answers too (DNS rebinding): what
gives that away is the name in `Host`. Who is no browser sends no `Origin`.
"""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from runtime.server.settings import Settings, is_local

_READING = ("GET", "HEAD", "OPTIONS")
"""Verbs that change nothing; what they answer is shown to no page of another origin."""


class OriginCheck:
    """Middleware that refuses requests of other pages."""

    def __init__(self, app: ASGIApp, settings: Settings, refusal: Callable[[str], ASGIApp]) -> None:
        """Keeps what is allowed.

        Args:
            app: answers what is let in.
            settings: of the server.
            refusal: answers with 403, and a sentence.
        """
        self._app = app
        self._refusal = refusal
        self._origins = settings.cors
        self._names = {name.lower() for name in settings.host}
        self._checks_host = bool(settings.host) or is_local(settings.http)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        headers = Headers(scope=scope)
        reason = self._wrong_host(headers) or self._wrong_origin(scope["method"], headers)
        await (self._refusal(reason) if reason else self._app)(scope, receive, send)

    def _wrong_host(self, headers: Headers) -> str:
        name = _name_of(headers.get("host", "localhost"))
        if not self._checks_host or name in self._names or is_local(f"[{name}]:0"):
            return ""
        return f"this server is not known as '{name[:100]}': call it localhost, or start it with --host NAME"

    def _wrong_origin(self, method: str, headers: Headers) -> str:
        origin = headers.get("origin")
        if method in _READING or origin is None or {origin, "*"} & set(self._origins):
            return ""
        # a proxy may have changed Host, but no page can write Sec-Fetch-Site
        is_own = headers.get("sec-fetch-site") == "same-origin"
        if is_own or origin.lower().partition("://")[2] == headers.get("host", "").lower():
            return ""
        return f"pages of '{origin[:100]}' may not call this server: start it with --cors ORIGIN to let them"


def _name_of(host: str) -> str:
    """Returns the name or address in a `Host` header, in lower case, without brackets and port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").removesuffix(".")
    except ValueError:
        return ""
