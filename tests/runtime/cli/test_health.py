"""`anydoor health`: what a container's health check learns of a server, over gRPC and HTTP."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.cli import main
from tests.support.serving import ServerThread

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[ServerThread]:
    with ServerThread(tiny_bundle, http="127.0.0.1:0", metrics="127.0.0.1:0") as server:
        yield server


@pytest.fixture(params=["grpc", "http", "metrics"])
def address(request: pytest.FixtureRequest, server: ServerThread) -> str:
    metrics = f"http://127.0.0.1:{server.server.metrics_port}"
    return {"grpc": server.address, "http": f"http://{server.server.http_address}", "metrics": metrics}[
        request.param
    ]


def test_the_exit_code_tells_whether_a_server_is_ready(
    server: ServerThread, address: str, capsys: Capture
) -> None:
    health = server.server.health
    assert main(["health", address]) == main(["health", address, "--live"]) == 0
    assert f"the server at {address} is ready\n" in capsys.readouterr().out
    try:
        server.run(health.set(ready=False))
        assert main(["health", address]) == 1
        assert capsys.readouterr().err == f"anydoor: the server at {address} is not ready\n"
        assert main(["health", address, "--live"]) == 0
        server.run(health.set(ready=False, alive=False))
        assert main(["health", address, "--live"]) == 1
        assert capsys.readouterr().err == f"anydoor: the server at {address} is not alive\n"
    finally:
        server.run(health.set(ready=True))


@pytest.mark.parametrize("scheme", ["", "http://", "https://"])
def test_a_server_that_is_not_there_is_not_ready(scheme: str, capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"{scheme}127.0.0.1:{probe.getsockname()[1]}"
    assert main(["health", address]) == 1
    assert f"anydoor: the server at {address} does not answer: " in capsys.readouterr().err


def test_what_is_no_server_of_ours_is_not_ready(server: ServerThread, capsys: Capture) -> None:
    address = f"http://{server.server.http_address}/v1"
    assert main(["health", address]) == 1
    assert f"answers 404 to {address}/readyz" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-1", "nan"])
def test_a_time_that_is_none_is_refused(seconds: str, capsys: Capture) -> None:
    assert main(["health", "--timeout", seconds]) == 2
    assert "--timeout must be above 0" in capsys.readouterr().err
