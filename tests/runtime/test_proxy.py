"""Proxies of the environment: unused for this machine, and named where one is in the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.client import Client, ServerError
from runtime.proxy import is_local, proxy_for
from tests.support.serving import ServerThread

NOBODY = "http://user:secret@127.0.0.1:9"
"""A proxy that nobody is."""


@pytest.fixture(params=["http_proxy", "https_proxy", "grpc_proxy"])
def proxy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    variable: str = request.param
    monkeypatch.setenv(variable, NOBODY)
    return variable


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("localhost:50051", True),
        ("127.0.0.1:50051", True),
        ("127.8.0.1:1", True),
        ("[::1]:50051", True),
        ("dns:///localhost:50051", True),
        ("ipv4:127.0.0.1:50051", True),
        ("ipv6:[::1]:50051", True),
        ("ipv6:%5B::1%5D:50051", True),
        ("unix:/run/anydoor.sock", True),
        ("unix:///run/anydoor.sock", True),
        ("unix-abstract:anydoor", True),
        ("gpu:50051", False),
        ("192.168.0.2:50051", False),
        ("localhost.example.com:50051", False),
        ("[2001:db8::1]:50051", False),
    ],
)
def test_which_addresses_are_on_this_machine(address: str, local: bool) -> None:
    assert is_local(address) == local


def test_this_machine_is_reached_without_the_proxy(proxy: str, tiny_bundle: Path) -> None:
    with ServerThread(tiny_bundle) as server:
        port = server.address.rpartition(":")[2]
        for address in (server.address, f"localhost:{port}"):
            with Client(address, timeout=60) as client:
                assert client.model_info().version


def test_a_proxy_in_the_way_is_named_without_its_password(proxy: str) -> None:
    with Client("gpu.example:50051", timeout=60) as client, pytest.raises(ServerError) as failure:
        client.model_info()
    assert f"through the proxy of {proxy} (127.0.0.1:9); name the server in no_proxy" in str(failure.value)
    assert "secret" not in str(failure.value)


@pytest.mark.parametrize("exceptions", ["gpu.example", ".example", "a.b, gpu.example", "*"])
def test_exceptions_are_kept(proxy: str, monkeypatch: pytest.MonkeyPatch, exceptions: str) -> None:
    assert proxy_for("gpu.example:50051")
    monkeypatch.setenv("no_proxy", exceptions)
    assert not proxy_for("gpu.example:50051")
