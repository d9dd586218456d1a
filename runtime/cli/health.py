"""Implements `anydoor health`: asks a server whether it is ready, for health checks of containers."""

from __future__ import annotations

import argparse
import ssl
import sys
import urllib.error
import urllib.request
from typing import Any

from runtime.cli import missing_package
from runtime.cli.remote import add_tls_flags, tls_of
from runtime.errors import InputError
from runtime.proxy import is_local

NAME = "health"
HELP = "Ask a server whether it is ready; the exit code is 0 if it is, else 1"
EXAMPLES = """
anydoor health localhost:50051
anydoor health unix:/run/anydoor.sock --live
anydoor health gpu.example.com:50051 --tls-ca ca.pem
anydoor health http://127.0.0.1:9090
"""

_LOCAL = "localhost:50051"
_SECONDS = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument(
        "address",
        nargs="?",
        default=_LOCAL,
        metavar="ADDRESS",
        help="address of 'anydoor serve': host:port or unix:/path for gRPC; http://host:port or "
        f"https://host:port for that of --http, or of --metrics, which needs no TLS (default: {_LOCAL})",
    )
    parser.add_argument(
        "--live",
        action="store_true",
        help="ask whether the server need not be restarted, instead of whether it is ready",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=_SECONDS,
        metavar="SECONDS",
        help=f"time to answer (default: {_SECONDS:g})",
    )
    add_tls_flags(parser)


def run(options: argparse.Namespace) -> int:
    """Prints the state; returns 0 if it is the wanted one, else 1.

    Raises:
        AnyDoorError: a flag or a package cannot be used.
    """
    if not options.timeout > 0:
        raise InputError(f"--timeout must be above 0, not {options.timeout:g}")
    is_http = options.address.startswith(("http://", "https://"))
    problem = _ask_http(options) if is_http else _ask_grpc(options)
    wanted = "alive" if options.live else "ready"
    if problem is None:
        print(f"the server at {options.address} is {wanted}")
        return 0
    print(f"anydoor: the server at {options.address} {problem or f'is not {wanted}'}", file=sys.stderr)
    return 1


def _ask_grpc(options: argparse.Namespace) -> str | None:
    """Returns None if the state is the wanted one, "" if it is not, and what else is wrong."""
    tls = tls_of(options)
    try:
        import grpc
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        from runtime.client.connection import open_channel
    except ModuleNotFoundError as error:
        raise missing_package(error, "serve") from error
    channel = open_channel(grpc, options.address, tls)
    request = health_pb2.HealthCheckRequest(service="liveness" if options.live else "")
    stub: Any = health_pb2_grpc.HealthStub(channel)
    with channel:
        try:
            answer = stub.Check(request, timeout=options.timeout)
        except grpc.RpcError as error:
            return f"does not answer: {error.details()}"
    return None if answer.status == health_pb2.HealthCheckResponse.SERVING else ""


def _ask_http(options: argparse.Namespace) -> str | None:
    """Asks over HTTP; returns as `_ask_grpc`."""
    url = f"{options.address.rstrip('/')}/{'healthz' if options.live else 'readyz'}"
    try:
        context = ssl.create_default_context(cafile=options.tls_ca)
    except OSError as error:
        raise InputError(f"'{options.tls_ca}' has no certificate in PEM") from error
    handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=context)]
    if is_local(url.split("/")[2]):
        handlers.append(urllib.request.ProxyHandler({}))
    try:
        with urllib.request.build_opener(*handlers).open(url, timeout=options.timeout):
            return None
    except urllib.error.HTTPError as error:
        return "" if error.code == 503 else f"answers {error.code} to {url}"
    except (OSError, ValueError) as error:
        return f"does not answer: {getattr(error, 'reason', error)}"
