"""Who is let in: TLS, client certificates, bearer tokens; each accepted and refused."""

from __future__ import annotations

import http.client
import socket
import ssl
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from runtime.cli import main
from runtime.client import Client, ServerError, Tls, connection
from runtime.errors import InputError
from runtime.request import Placement, Sampling
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub
from runtime.server.access import read_tokens
from tests.support.serving import BOX, OBJECT, PATIENCE, SCENE, ServerThread, message


class Certificates:
    """Files of an authority, a server and a client."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        authority = trustme.CA()
        self.ca = folder / "ca.pem"
        authority.cert_pem.write_to_path(self.ca)
        self.server = self._issue(authority, folder / "server", "localhost", "127.0.0.1")
        self.client = self._issue(authority, folder / "client", "studio.example")
        self.other = self._issue(authority, folder / "other", "other.example")

    def _issue(self, authority: trustme.CA, path: Path, *names: str) -> tuple[Path, Path]:
        issued = authority.issue_cert(*names)
        certificate, key = path.with_suffix(".pem"), path.with_suffix(".key")
        issued.private_key_pem.write_to_path(key)
        certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        return certificate, key


@pytest.fixture(autouse=True)
def _no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that lets nobody in is asked only once: to ask five times takes seconds."""
    monkeypatch.setattr(connection, "_OPTIONS", [*connection._OPTIONS, ("grpc.enable_retries", 0)])


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls") / "strangers")


def composite(caller: Client) -> Any:
    with caller:
        return caller.composite(SCENE, Placement(OBJECT, box=BOX), seed=7, sampling=Sampling(steps=1))


def test_tls(tiny_bundle: Path, ours: Certificates, strangers: Certificates) -> None:
    certificate, key = map(str, ours.server)
    tls = {"tls_certificate": certificate, "tls_key": key}
    with ServerThread(tiny_bundle, http="127.0.0.1:0", **tls) as server:
        assert composite(server.client(tls=Tls(ours.ca)))
        with pytest.raises(ServerError, match="cannot be reached"):
            composite(server.client(tls=Tls(strangers.ca)))
        with pytest.raises(ServerError, match="cannot be reached"):
            composite(server.client())
        for address in (server.address, f"https://{server.server.http_address}"):
            assert main(["health", address, "--tls-ca", str(ours.ca)]) == 0
            assert main(["health", address, "--tls-ca", str(strangers.ca)]) == 1


def test_mutual_tls(tiny_bundle: Path, ours: Certificates, strangers: Certificates) -> None:
    certificate, key = map(str, ours.server)
    settings = {"tls_certificate": certificate, "tls_key": key, "tls_client_ca": str(ours.ca)}
    with ServerThread(tiny_bundle, **settings) as server:
        assert composite(server.client(tls=Tls(ours.ca, *ours.client)))
        with pytest.raises(ServerError, match="cannot be reached"):
            composite(server.client(tls=Tls(ours.ca, *strangers.client)))
        with pytest.raises(ServerError, match="cannot be reached"):
            composite(server.client(tls=Tls(ours.ca)))


def test_certificates_are_read_again(
    tiny_bundle: Path, tmp_path: Path, ours: Certificates, strangers: Certificates
) -> None:
    certificate, key = tmp_path / "server.pem", tmp_path / "server.key"

    def place(files: tuple[Path, Path]) -> None:
        for source, target in zip(files, (certificate, key)):
            target.write_bytes(source.read_bytes())

    place(ours.server)
    settings = {"tls_certificate": str(certificate), "tls_key": str(key)}
    with ServerThread(tiny_bundle, **settings) as server, server.client(tls=Tls(ours.ca)) as connected:
        assert connected.model_info()
        place(strangers.server)
        server.server.reload()
        assert composite(server.client(tls=Tls(strangers.ca)))
        assert connected.model_info()  # a connection that is there goes on


def test_an_authority_that_is_taken_away_admits_nobody(
    tiny_bundle: Path, tmp_path: Path, ours: Certificates, strangers: Certificates
) -> None:
    """Neither over gRPC nor over HTTP."""
    certificate, key = map(str, ours.server)
    authority = tmp_path / "ca.pem"
    authority.write_bytes(ours.ca.read_bytes())
    settings = {"tls_certificate": certificate, "tls_key": key, "tls_client_ca": str(authority)}
    with ServerThread(tiny_bundle, http="127.0.0.1:0", **settings) as server:

        def is_admitted(client: Certificates) -> bool:
            context = ssl.create_default_context(cafile=ours.ca)
            context.load_cert_chain(*client.client)
            assert server.server.http_address
            host, _, port = server.server.http_address.rpartition(":")
            connection = http.client.HTTPSConnection(host, int(port), timeout=PATIENCE, context=context)
            with closing(connection), suppress(OSError, http.client.HTTPException):
                connection.request("GET", "/readyz")
                return connection.getresponse().status == 200
            return False

        assert is_admitted(ours)
        assert not is_admitted(strangers)
        authority.write_bytes(strangers.ca.read_bytes())
        server.server.reload()
        assert is_admitted(strangers)
        assert not is_admitted(ours)
        assert composite(server.client(tls=Tls(ours.ca, *strangers.client)))
        with pytest.raises(ServerError, match="cannot be reached"):
            composite(server.client(tls=Tls(ours.ca, *ours.client)))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_does_not_outlive_its_authority(
    tiny_bundle: Path, tmp_path: Path, ours: Certificates, strangers: Certificates, version: ssl.TLSVersion
) -> None:
    """Who resumes one does not show a certificate."""
    certificate, key = map(str, ours.server)
    authority = tmp_path / "ca.pem"
    authority.write_bytes(ours.ca.read_bytes())
    settings = {"tls_certificate": certificate, "tls_key": key, "tls_client_ca": str(authority)}
    context = ssl.create_default_context(cafile=ours.ca)
    context.maximum_version = version
    context.load_cert_chain(*ours.client)
    with ServerThread(tiny_bundle, http="127.0.0.1:0", **settings) as server:
        assert server.server.http_address
        host, _, port = server.server.http_address.rpartition(":")

        def ask(session: ssl.SSLSession | None) -> tuple[bytes, ssl.SSLSession | None]:
            plain = socket.create_connection((host, int(port)), PATIENCE)
            with (
                suppress(OSError),
                context.wrap_socket(plain, server_hostname=host, session=session) as tls,
            ):
                tls.sendall(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                return tls.recv(1000), tls.session
            return b"", None

        answer, session = ask(None)
        assert b" 200 " in answer
        assert b" 200 " in ask(session)[0]
        authority.write_bytes(strangers.ca.read_bytes())
        server.server.reload()
        assert ask(session)[0] == b""


def test_a_certificate_is_a_client(
    tiny_bundle: Path, ours: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    certificate, key = map(str, ours.server)
    settings = {"tls_certificate": certificate, "tls_key": key, "tls_client_ca": str(ours.ca)}
    with caplog.at_level("INFO"), ServerThread(tiny_bundle, **settings) as server:
        for files in (ours.client, ours.other):
            composite(server.client(tls=Tls(ours.ca, *files)))
    ended: list[Any] = [record for record in caplog.records if record.message == "request ended"]
    names = ["certificate:studio.example", "certificate:other.example"]
    assert [record.fields["client"] for record in ended] == names


def test_a_file_that_cannot_be_used_changes_nothing(
    tiny_bundle: Path, tmp_path: Path, ours: Certificates
) -> None:
    certificate, key, tokens = (tmp_path / name for name in ("server.pem", "server.key", "tokens"))
    for source, target in zip(ours.server, (certificate, key)):
        target.write_bytes(source.read_bytes())
    tokens.write_text("first\n")
    files = {"tls_certificate": str(certificate), "tls_key": str(key), "tokens": str(tokens)}
    with ServerThread(tiny_bundle, **files) as server:
        tokens.write_text("second\n")
        certificate.write_text("garbage")
        server.server.reload()
        assert composite(server.client(tls=Tls(ours.ca), token="first"))
        with pytest.raises(ServerError, match="does not let you in"):
            composite(server.client(tls=Tls(ours.ca), token="second"))


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text("# the studio\nopen-sesame\n\nshazam\n")
    return path


def test_bearer_tokens(tiny_bundle: Path, token_file: Path) -> None:
    with ServerThread(tiny_bundle, tokens=str(token_file)) as server:
        for token in ("open-sesame", "shazam"):
            assert composite(server.client(token=token))
        for token in (None, "", "open", "open-sesame2", "# the studio"):
            with pytest.raises(ServerError, match="does not let you in") as refusal:
                composite(server.client(token=token))
            assert refusal.value.code == "UNAUTHENTICATED"


def test_tokens_guard_every_method_but_health(tiny_bundle: Path, token_file: Path) -> None:
    with ServerThread(tiny_bundle, tokens=str(token_file)) as server:
        with server.client() as guest, pytest.raises(ServerError, match="does not let you in"):
            guest.model_info()
        with grpc.insecure_channel(server.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            assert health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE).status == 1
            stub: Any = CompositorServiceStub(channel)
            for value in ("Basic open-sesame", "open-sesame", "Bearer", "bearer  "):
                with pytest.raises(grpc.RpcError) as refusal:
                    stub.Composite(message(), timeout=PATIENCE, metadata=(("authorization", value),))
                error: Any = refusal.value
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED


def test_token_file_without_tokens(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("# nothing yet\n\n")
    with pytest.raises(InputError, match="no token"):
        read_tokens(str(tmp_path / "tokens"))
    with pytest.raises(InputError, match="cannot read"):
        read_tokens(str(tmp_path / "none"))
