"""Runs the commands that draw pictures on a server."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.cli import missing_package
from runtime.cli.progress import Progress
from runtime.errors import InputError

if TYPE_CHECKING:
    from runtime.client import Client, Tls
    from runtime.result import Composite

SERVER_FLAGS = ("model", "timeout", "token_file", "tls", "tls_ca", "tls_certificate", "tls_key")
"""Flags that only have an effect with --server."""


def add_server_flags(parser: argparse._ActionsContainer, with_model: bool = True) -> None:
    """Adds --server, and `SERVER_FLAGS`, which are None if not given; --model only where a model draws."""
    parser.add_argument(
        "--server", metavar="ADDRESS", help="address of 'anydoor serve', host:port or unix:/path"
    )
    if with_model:
        parser.add_argument("--model", metavar="NAME", help="model of the server to use (default: its first)")
    else:
        parser.set_defaults(model=None)
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="fail after this time")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="file with the bearer token to send")
    add_tls_flags(parser)


def add_tls_flags(parser: argparse._ActionsContainer) -> None:
    """Adds the flags of a connection with TLS, which are None if not given."""
    parser.add_argument(
        "--tls", action="store_true", default=None, help="connect with TLS; implied by the files below"
    )
    parser.add_argument("--tls-ca", type=Path, metavar="FILE", help="CA certificates to trust (PEM)")
    parser.add_argument("--tls-certificate", type=Path, metavar="FILE", help="client certificate (PEM)")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="private key of the certificate (PEM)")


def connect(options: argparse.Namespace) -> Client:
    """Makes the client for the server that the flags name.

    Raises:
        InputError: a file cannot be read, or a certificate is given without its key.
        BackendError: gRPC is not installed.
    """
    tls = tls_of(options)
    from runtime.client import Client

    token = _read_token(options.token_file) if options.token_file else None
    return Client(options.server, model=options.model or "", token=token, tls=tls, timeout=options.timeout)


def tls_of(options: argparse.Namespace) -> Tls | None:
    """Returns what the flags say about TLS; None for a connection without it.

    Raises:
        InputError: a certificate is given without its key.
        BackendError: gRPC is not installed.
    """
    if bool(options.tls_certificate) != bool(options.tls_key):
        raise InputError("--tls-certificate and --tls-key must be given together")
    try:
        from runtime.client import Tls
    except ModuleNotFoundError as error:
        raise missing_package(error, "client") from error
    files = (options.tls_ca, options.tls_certificate, options.tls_key)
    return Tls(*files) if options.tls or any(files) else None


def follow(events: Iterable[Any], progress: Progress) -> list[Composite]:
    """Shows what a server reports, and returns the pictures, which come last.

    Args:
        events: of `Client.stream`.
        progress: where to show them.

    Raises:
        ServerError: the server ended the call without pictures.
    """
    from runtime.client import ServerError
    from runtime.server.events import Queued, StepDone

    for event in events:
        if isinstance(event, Queued):
            progress.describe(f"{event.position} before us" if event.position else "next")
        elif isinstance(event, StepDone) and progress.on_step:
            progress.on_step(event.done, event.total)
        elif isinstance(event, list):
            return event
    raise ServerError("the server ended the call without a picture", "OK")


def _read_token(path: Path) -> str:
    try:
        token = path.read_text("ascii").strip()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read a token from '{path}'") from error
    if not token:
        raise InputError(f"there is no token in '{path}'")
    return token
