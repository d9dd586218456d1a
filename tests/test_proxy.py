"""The proxy's configuration in docker/, with the proxy itself where it is installed."""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import trustme

from runtime.client import Client, Tls
from runtime.request import Placement, Sampling
from tests.support.serving import BOX, OBJECT, PATIENCE, SCENE, ServerThread, wait_until

CONFIGURATION = Path(__file__).parents[1] / "docker" / "haproxy.cfg"
CONNECTIONS_OF_A_HOST = 20

pytestmark = pytest.mark.skipif(not shutil.which("haproxy"), reason="needs HAProxy: apt install haproxy")


@pytest.fixture
def proxy(tiny_bundle: Path, tmp_path: Path) -> Iterator[tuple[str, Tls]]:
    """Its address, and the authority of its certificate; a server stands behind it."""
    authority, ca = trustme.CA(), tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca)
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with ServerThread(tiny_bundle) as server:
        environment = {
            **os.environ,
            "ANYDOOR_BIND": address,
            "ANYDOOR_CERTIFICATE": str(tmp_path / "server.pem"),
            "ANYDOOR_SERVER": server.address,
        }
        process = subprocess.Popen(["haproxy", "-f", str(CONFIGURATION)], env=environment)
        try:
            wait_until(lambda: process.poll() is not None or reaches(address))
            yield address, Tls(ca)
        finally:
            process.terminate()
            process.wait(PATIENCE)


def test_the_proxy_understands_its_configuration(tmp_path: Path) -> None:
    trustme.CA().issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    environment = {
        **os.environ,
        "ANYDOOR_BIND": "127.0.0.1:443",
        "ANYDOOR_CERTIFICATE": str(tmp_path / "server.pem"),
        "ANYDOOR_SERVER": "127.0.0.1:50051",
    }
    command = ["haproxy", "-c", "-dW", "-f", str(CONFIGURATION)]  # a warning is an error
    checked = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def reaches(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), PATIENCE).close()
    except OSError:
        return False
    return True


def test_requests_pass(proxy: tuple[str, Tls]) -> None:
    address, tls = proxy
    with Client(address, tls=tls, timeout=PATIENCE) as client:
        assert client.composite(SCENE, Placement(OBJECT, box=BOX), seed=7, sampling=Sampling(steps=1))


def test_connections_of_a_host_are_limited(proxy: tuple[str, Tls]) -> None:
    address, _ = proxy
    host, _, port = address.rpartition(":")
    with ExitStack() as attack, suppress(ConnectionResetError):  # one may be ended while it connects
        connections = [
            attack.enter_context(socket.create_connection((host, int(port)), PATIENCE))
            for _ in range(CONNECTIONS_OF_A_HOST + 5)
        ]
        # of a connection that is ended, there is an end to read
        ended, _, _ = select.select(connections, [], [], PATIENCE)
        assert ended
