"""Authenticates callers by TLS, client certificates and bearer tokens. Their files can be reloaded while
calls run."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import ssl
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from runtime.errors import InputError
from runtime.server.connections import host_of
from runtime.server.events import UnauthenticatedError
from runtime.server.logs import FIELDS
from runtime.server.settings import Settings

if TYPE_CHECKING:
    from runtime.server.call import Context

logger = logging.getLogger(__name__)


class _NewestContext(ssl.SSLContext):
    """Gives every connection of asyncio what was read last.

    Authorities can be added to a context, but not removed, and a client resumes the session of a context
    without showing its certificate again.
    """

    newest: ssl.SSLContext

    def wrap_bio(self, *arguments: Any, **options: Any) -> ssl.SSLObject:
        return self.newest.wrap_bio(*arguments, **options)


class Access:
    """The tokens and certificates of a server."""

    def __init__(self, settings: Settings) -> None:
        """Reads the files of the settings.

        Raises:
            InputError: a file cannot be read, or is not what it should be.
        """
        self._settings = settings
        self._tokens: list[bytes] = []
        self._tls: grpc.ServerCertificateConfiguration | None = None
        self._context = _NewestContext(ssl.PROTOCOL_TLS_SERVER) if settings.tls_certificate else None
        self.reload()

    def reload(self) -> None:
        """Reads them again; calls and connections that are there go on.

        Raises:
            InputError: one cannot be used; then all is as it was.
        """
        tokens: list[bytes] = []
        tls = context = None
        if self._settings.tokens:
            tokens = read_tokens(self._settings.tokens)
            if os.stat(self._settings.tokens).st_mode & (stat.S_IWOTH | stat.S_IROTH):
                logger.warning(
                    "token file is open to others", extra={FIELDS: {"file": self._settings.tokens}}
                )
        if self._settings.tls_certificate:
            tls, context = self._read_tls()
        self._tokens, self._tls = tokens, tls
        if self._context and context:
            self._context.newest = context

    def credentials(self) -> grpc.ServerCredentials | None:
        """TLS as the settings ask for it; None without. Each handshake takes what was read last."""
        tls = self._tls
        if tls is None:
            return None
        return grpc.dynamic_ssl_server_credentials(
            tls,
            lambda: self._tls or tls,
            require_client_authentication=bool(self._settings.tls_client_ca),
        )

    def tls_context(self) -> ssl.SSLContext | None:
        """Returns the same for what is not gRPC; `reload` changes it, too."""
        return self._context

    def client_of(self, context: Context) -> str:
        """Returns a name for the caller that it cannot choose freely: its token, its certificate, or its
        host.

        Raises:
            UnauthenticatedError: tokens are required, and it has none of them.
        """
        if self._settings.tokens:
            metadata = context.invocation_metadata() or ()
            return self.holder_of([value for key, value in metadata if key == "authorization"])
        certificate = context.auth_context()
        for key in ("x509_common_name", "x509_subject_alternative_name"):
            for name in filter(None, certificate.get(key, ())):  # the common name may be empty
                return f"certificate:{name.decode('utf-8', 'replace')}"
        return host_of(context.peer())

    def holder_of(self, given: Sequence[str | bytes]) -> str:
        """Returns a name for who has a token, however its header is written.

        Args:
            given: the values of the header "authorization".

        Raises:
            UnauthenticatedError: it is none of the tokens.
        """
        if len(given) == 1:
            scheme, _, token = _to_bytes(given[0]).partition(b" ")
            # all tokens are compared, each in constant time: how long it takes says nothing about them
            found = [known for known in self._tokens if hmac.compare_digest(token.strip(), known)]
            if scheme.lower() == b"bearer" and found:
                return "token:" + hashlib.sha256(found[0]).hexdigest()[:12]
        raise UnauthenticatedError()

    def _read_tls(self) -> tuple[grpc.ServerCertificateConfiguration, ssl.SSLContext]:
        settings = self._settings
        key, chain = _read(settings.tls_key), _read(settings.tls_certificate)
        client_ca = _read(settings.tls_client_ca) if settings.tls_client_ca else None
        try:
            context = self._new_context()
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise InputError(
                f"'{settings.tls_certificate}' and '{settings.tls_key}' are not a certificate and its key, "
                "both as PEM"
            ) from error
        return grpc.ssl_server_certificate_configuration([(key, chain)], root_certificates=client_ca), context

    def _new_context(self) -> ssl.SSLContext:
        settings, context = self._settings, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # a password is asked for on the terminal otherwise
        context.load_cert_chain(settings.tls_certificate, settings.tls_key, password=lambda: "")
        if settings.tls_client_ca:
            context.load_verify_locations(settings.tls_client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def read_tokens(path: str) -> list[bytes]:
    """Bearer tokens, one per line; empty lines and lines that begin with # do not count.

    Raises:
        InputError: the file cannot be read or holds no token.
    """
    lines = [line.strip() for line in _read(path).splitlines()]
    tokens = [line for line in lines if line and not line.startswith(b"#")]
    if not tokens:
        raise InputError(f"there is no token in '{path}': expected one per line")
    return tokens


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read '{path}': {error.strerror}") from error


def _to_bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()
