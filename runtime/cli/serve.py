"""Implements `anydoor serve`: serves composites over gRPC and HTTP."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from runtime.cli import missing_package
from runtime.cli.flags import add_flags, default_bundle, field_names, given
from runtime.server.settings import Settings, settings_from

NAME = "serve"
HELP = "Serve composites over gRPC and HTTP"
EXAMPLES = """
anydoor serve --bundle build/engines/anydoor
anydoor serve --listen 0.0.0.0:50051 --tls-certificate server.pem --tls-key server.key --tokens tokens.txt
anydoor serve --http 127.0.0.1:8000
anydoor serve --listen unix:/run/anydoor.sock --metrics 127.0.0.1:9090
anydoor serve --listen 0.0.0.0:50051 --insecure
anydoor serve --config anydoor.toml --memory-budget 6G
anydoor serve --bundle cup=build/engines/cup --bundle bear=build/engines/bear --memory-budget 6G
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --config, and one flag per setting."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE.toml",
        help="TOML file with settings by name; flags take precedence",
    )
    add_flags(parser, Settings)


def run(options: argparse.Namespace) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code.

    Raises:
        AnyDoorError: a setting or a package cannot be used.
    """
    return serve_with(settings_of(options))


def settings_of(options: argparse.Namespace, defaults: Mapping[str, Any] | None = None) -> Settings:
    """Makes the settings of flags and --config; `defaults` are those that differ from a server's.

    Raises:
        AnyDoorError: one cannot be used.
    """
    defaults = {"bundle": str(default_bundle()), **(defaults or {})}
    return settings_from(given(options, field_names(Settings)), options.config, defaults)


def serve_with(settings: Settings, logs_refusal: bool = True) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code.

    Args:
        settings: of the server.
        logs_refusal: whether the log says why the server cannot start, instead of an exception.

    Raises:
        AnyDoorError: a package is missing, or the bundle cannot be used.
    """
    # until the server has its own handlers: the first process of a container gets no signal without one
    before = {number: signal.signal(number, _exit) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        from runtime.server.process import serve

        if settings.http:
            import_module("runtime.server.http.door")
            import_module("runtime.server.http.app")
        return serve(settings, logs_refusal)
    except ModuleNotFoundError as error:
        raise missing_package(error, "http" if settings.http else "serve") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit(number: int, frame: object) -> NoReturn:
    os._exit(0)
