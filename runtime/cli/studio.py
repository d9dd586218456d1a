"""Implements `anydoor studio`: serves the studio page on this machine and opens it."""

from __future__ import annotations

import argparse
import http.client
import socket
import threading
import time
import urllib.request
import webbrowser
from contextlib import suppress
from dataclasses import replace

from runtime.cli import serve as server
from runtime.errors import InputError

NAME = "studio"
HELP = "Try a bundle in the browser: serve a page on this machine and open it"
EXAMPLES = """
anydoor studio --bundle examples/anydoor-small
anydoor studio --http 127.0.0.1:9000 --no-browser
"""

ADDRESS = "127.0.0.1:8000"
_ANY_PORT = "127.0.0.1:0"
_SECONDS_BETWEEN = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `anydoor serve`, and --no-browser."""
    server.add_arguments(parser)
    parser.add_argument("--no-browser", action="store_true", help="do not open the browser")


def run(options: argparse.Namespace) -> int:
    """Serves until Ctrl-C; returns the exit code.

    Raises:
        AnyDoorError: a setting or a package cannot be used.
    """
    options.studio = True
    # its own gRPC takes any port, so that a server beside it may have the usual one
    defaults = {"http": ADDRESS, "listen": (_ANY_PORT,), "log_level": "warning"}
    settings = server.settings_of(options, defaults)
    scheme = "https" if settings.tls_certificate else "http"
    host, _, port = settings.http.rpartition(":")
    if port == "0":
        with suppress(OSError), socket.create_server((host, 0)) as free:
            settings = replace(settings, http=f"{host}:{free.getsockname()[1]}")
    url = f"{scheme}://{settings.http}/studio/"
    if _answers(url):
        raise InputError(f"there is a server at {settings.http} already: choose another address by --http")
    threading.Thread(target=_announce, args=(url, not options.no_browser), daemon=True).start()
    return server.serve_with(settings, logs_refusal=False)


def _announce(url: str, is_opened: bool) -> None:
    """Prints the address of the page when it is ready, and opens it."""
    while not _answers(url):
        time.sleep(_SECONDS_BETWEEN)
    print(f"The studio is at {url}   (Ctrl-C ends it)", flush=True)
    if is_opened:
        webbrowser.open(url)


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5):
            return True
    except http.client.HTTPException:
        return False  # no address, which the server refuses in a sentence
    except OSError as error:
        return "CERTIFICATE" in str(error)  # it is there, under a name that this machine does not trust
