"""What `anydoor serve --http` refuses before it starts."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runtime import InputError
from runtime.server.settings import settings_from
from tests.support.serving import ServerThread


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"http": "0.0.0.0:8000"}, "http: '0.0.0.0:8000' can be reached from other machines"),
        ({"cors": ["https://example.org"]}, "cors needs http"),
        ({"job_folder": "."}, "job_folder needs http"),
        ({"studio": True}, "studio needs http"),
        ({"host": ["example.org"]}, "host needs http"),
        ({"http": "127.0.0.1:0", "job_folder": "/nowhere/at/all"}, "there is no folder '/nowhere/at/all'"),
    ],
)
def test_settings_that_cannot_work(given: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        settings_from(given, None, {"bundle": "bundle"})


@pytest.mark.parametrize(
    "address", ["8000", "localhost:", "localhost:99999", "localhost:http", "localhost:²"]
)
def test_addresses_that_cannot_be_bound(tiny_bundle: Path, address: str) -> None:
    with pytest.raises(InputError, match=r"HTTP at|http must be host:port"):
        ServerThread(tiny_bundle, http=address).__enter__()


def test_a_port_that_is_taken_ends_the_server_before_its_engine_starts(tiny_bundle: Path) -> None:
    """A library that loads a graph would abort the process at its end, with another exit code."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = ["--bundle", str(tiny_bundle), "--listen", "127.0.0.1:0", "--http", f"127.0.0.1:{port}"]
        command = [sys.executable, "-m", "runtime", "serve", *flags]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"cannot serve HTTP at '127.0.0.1:{port}'" in done.stderr
