"""What operators see of strangers, and what they can set: logs, metrics, addresses, tokens, certificates."""

from __future__ import annotations

import json
import logging
import os
import select
import socket
import urllib.error
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from runtime.cli import main
from runtime.client import Client
from runtime.errors import InputError
from runtime.request import Placement, Sampling
from runtime.rpc import compositor_pb2 as pb
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub
from runtime.server import metrics_page
from runtime.server.logs import LogWriter
from runtime.server.settings import Settings
from runtime.systems.anydoor import CONTROL, ID_ENCODER
from tests.support.serving import (
    BOX,
    OBJECT,
    PATIENCE,
    SCENE,
    ServerThread,
    message,
    refusal,
    trailing,
    wait_until,
)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text("open-sesame\nshazam\n")
    path.chmod(0o600)
    return path


def test_every_refusal_is_seen(tiny_bundle: Path, token_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"tokens": str(token_file), "max_message_bytes": 1 << 16}
    with (
        caplog.at_level("INFO"),
        ServerThread(tiny_bundle, **settings) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub: Any = CompositorServiceStub(channel)
        ours = (("authorization", "Bearer shazam"),)
        wrong = refusal(stub.Composite, message(), metadata=(("authorization", "Bearer x"),))
        unknown = refusal(channel.unary_unary("/anydoor.v1.CompositorService/Paint"), b"", metadata=ours)
        strange = refusal(channel.unary_unary("/admin/Shell"), b"", metadata=ours)
        large = refusal(stub.Composite, message(scene=bytes(1 << 17)), metadata=ours)
        wait_until(lambda: len(ended(caplog)) == 4)
        errors = [wrong, unknown, strange]
        codes = ["UNAUTHENTICATED", "UNIMPLEMENTED", "UNIMPLEMENTED"]
        assert [error.code().name for error in errors] == codes
        assert large.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for error, fields in zip(errors, ended(caplog)):
            assert trailing(error)["request-id"] == fields["request_id"]
            assert error.code().name == fields["code"]
        count = server.server.metrics.registry.get_sample_value
        for method, code in (("Composite", "UNAUTHENTICATED"), ("other", "UNIMPLEMENTED")):
            assert count("anydoor_requests_total", {"method": method, "code": code, "model": ""})


def ended(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.fields for record in caplog.records if record.message == "request ended"]  # type: ignore[attr-defined]


def test_an_answer_that_cannot_be_made_is_a_failure_of_the_server(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*arguments: object) -> bytes:
        raise MemoryError

    with (
        caplog.at_level("INFO"),
        ServerThread(tiny_bundle) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub: Any = CompositorServiceStub(channel)
        with monkeypatch.context() as patch:
            patch.setattr("runtime.server.service.answer", answer)
            error = refusal(stub.Composite, message(steps=1))
        assert error.code() is grpc.StatusCode.INTERNAL
        assert trailing(error)["request-id"] == ended(caplog)[0]["request_id"]
        assert ended(caplog)[0]["code"] == "INTERNAL"
        assert server.server.ledger.taken == 0
        assert stub.Composite(message(steps=1), timeout=PATIENCE).images


def test_a_token_file_that_others_can_read_is_told(
    tiny_bundle: Path, token_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token_file.chmod(0o644)
    with ServerThread(tiny_bundle, tokens=str(token_file)):
        assert "token file is open to others" in caplog.messages


def test_a_log_that_nobody_reads_stops_nothing() -> None:
    reading, writing = os.pipe()
    writer = LogWriter(writing, lines=100)
    logger = logging.Logger("test")
    logger.addHandler(writer)
    for number in range(3000):
        logger.info("line %d %s", number, "x" * 2000)
    assert writer.dropped > 1000
    with os.fdopen(reading) as lines:
        logger.info("next")
        os.set_blocking(reading, True)
        first = json.loads(next(lines))
        assert first["event"].startswith("line 0 ")
        events = (json.loads(line) for line in lines)
        dropped = next(event for event in events if event["event"] == "log lines dropped")
        assert dropped["in_all"] > 1000


def test_metrics_are_for_few_connections_and_known_callers(
    tiny_bundle: Path, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.server.metrics_page._SECONDS", 3600.0)
    settings = {"tokens": str(token_file), "metrics": "127.0.0.1:0", "metrics_token": True}
    with ServerThread(tiny_bundle, **settings) as server, ExitStack() as attack:
        address = ("127.0.0.1", server.server.metrics_port)
        halves = [attack.enter_context(socket.create_connection(address, PATIENCE)) for _ in range(40)]
        for half in halves:
            with suppress(OSError):
                half.sendall(b"GET /metrics HTTP/1.1\r\n")
        # the newest have places; the others are closed
        wait_until(lambda: len(select.select(halves, [], [], 0)[0]) == 40 - metrics_page._CONNECTIONS)

        def get(path: str, **headers: str) -> int:
            request = urllib.request.Request(f"http://127.0.0.1:{address[1]}{path}", headers=headers)
            try:
                with urllib.request.urlopen(request, timeout=PATIENCE) as page:
                    assert b"anydoor_requests_total" in page.read()
                    return 200
            except urllib.error.HTTPError as error:
                return error.code

        assert get("/metrics", Authorization="Bearer shazam") == 200
        assert get("/metrics") == get("/metrics", Authorization="Bearer x") == 401
        assert get("/", Authorization="Bearer shazam") == 404
        # probes send no token
        health = f"http://127.0.0.1:{address[1]}"
        assert main(["health", health]) == main(["health", health, "--live"]) == 0


def test_tokens_are_read_again(tiny_bundle: Path, token_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ServerThread(tiny_bundle, tokens=str(token_file)) as server:

        def code(token: str) -> grpc.StatusCode:
            metadata = (("authorization", f"Bearer {token}"),)
            with grpc.insecure_channel(server.address) as channel:
                stub: Any = CompositorServiceStub(channel)
                try:
                    stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=PATIENCE, metadata=metadata)
                except grpc.RpcError as error:
                    found: grpc.StatusCode = error.code()  # type: ignore[attr-defined]
                    return found
                return grpc.StatusCode.OK

        assert code("shazam") is grpc.StatusCode.OK
        token_file.write_text("abracadabra\n")
        server.loop.call_soon_threadsafe(server.server.reload)
        wait_until(lambda: code("shazam") is grpc.StatusCode.UNAUTHENTICATED)
        assert code("abracadabra") is grpc.StatusCode.OK
        token_file.write_text("")
        server.loop.call_soon_threadsafe(server.server.reload)
        wait_until(lambda: any(record.message == "not reloaded" for record in caplog.records))
        assert code("abracadabra") is grpc.StatusCode.OK


@pytest.mark.parametrize("share_caches", [False, True])
def test_what_others_asked_for_does_not_show(tiny_bundle: Path, token_file: Path, share_caches: bool) -> None:
    with ServerThread(tiny_bundle, tokens=str(token_file), share_caches=share_caches) as server:
        placement, sampling = Placement(OBJECT, box=BOX), Sampling(steps=2)
        for token in ("open-sesame", "shazam", "shazam"):
            with server.client(token=token) as client:
                client.composite(SCENE, placement, seed=1, sampling=sampling)
        of_one = 1 if share_caches else 2
        assert server.engine.count(ID_ENCODER) == of_one
        assert server.engine.count(CONTROL) == 2 * of_one


def test_previews_are_counted_over_all_placements(tiny_bundle: Path) -> None:
    with ServerThread(tiny_bundle) as server, grpc.insecure_channel(server.address) as channel:
        stub: Any = CompositorServiceStub(channel)
        request = message(steps=9)
        request.placements.extend(list(request.placements) * 3)
        streamed = pb.CompositeStreamRequest(request=request, preview_every=2)
        error = refusal(stub.CompositeStream, streamed)
        assert error.details().startswith("request.preview_every: 16 previews per picture; at most 4")


def test_alive_is_not_ready(tiny_bundle: Path) -> None:
    with ServerThread(tiny_bundle) as server, grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        def status(service: str) -> int:
            request = health_pb2.HealthCheckRequest(service=service)
            return health.Check(request, timeout=PATIENCE).status

        assert status("liveness") == status("") == 1
        server.run(server.server.health.set(ready=False))
        assert (status("liveness"), status("")) == (1, 2)
        error = refusal(health.Check, health_pb2.HealthCheckRequest(service="nobody"))
        assert error.code() is grpc.StatusCode.NOT_FOUND


def test_a_unix_socket_that_is_in_use_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/anydoor.sock"
    with ServerThread(tiny_bundle, listen=(address,)) as first:
        with (
            pytest.raises(InputError, match="another process does"),
            ServerThread(tiny_bundle, listen=(address,)),
        ):
            pass
        with Client(first.address, timeout=PATIENCE) as client:
            assert client.model_info()
    with ServerThread(tiny_bundle, listen=(address,)):
        pass  # what a server leaves behind is no server


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"listen": ("0.0.0.0:50051",)}, "can be reached from other machines"),
        ({"listen": ("[::]:50051",), "tokens": "t"}, "can be reached from other machines"),
        ({"listen": ("studio.example:50051",)}, "can be reached from other machines"),
        ({"metrics": "0.0.0.0:9090"}, "metrics: '0.0.0.0:9090' can be reached"),
        ({"metrics_token": True}, "metrics_token needs tokens"),
        ({"max_message_bytes": 4 << 30}, "max_message_bytes must be .* at most 2147483647"),
        ({"drain_seconds": float("nan")}, "drain_seconds must be"),
        ({"drain_seconds": float("inf")}, "drain_seconds must be"),
        ({"request_memory": 1000}, "request_memory must be at least three times max_message_bytes"),
        ({"workers": 100_000}, "workers must be"),
        ({"queue": 10**9}, "queue must be"),
        ({"max_pixels": 10**11}, "max_pixels must be"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Settings(**settings).check()


@pytest.mark.parametrize(
    "settings",
    [
        {"listen": ("127.0.0.1:1", "[::1]:1", "localhost:1", "unix:/a", "127.8.0.1:1")},
        {"listen": ("0.0.0.0:1",), "insecure": True, "metrics": "0.0.0.0:2"},
        {"listen": ("0.0.0.0:1",), "tls_certificate": "c", "tls_key": "k", "tokens": "t"},
        {"listen": ("0.0.0.0:1",), "tls_certificate": "c", "tls_key": "k", "tls_client_ca": "a"},
    ],
)
def test_addresses_that_are_guarded(settings: dict[str, Any]) -> None:
    Settings(**settings).check()


def test_settings_that_do_not_fit_the_bundle_or_the_files(tiny_bundle: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="max_batch is 64; the bundle has 4"),
        ServerThread(tiny_bundle, max_batch=64),
    ):
        pass
    for name in ("key", "certificate"):
        (tmp_path / name).write_text("garbage")
    files = {"tls_key": str(tmp_path / "key"), "tls_certificate": str(tmp_path / "certificate")}
    with pytest.raises(InputError, match="not a certificate and its key"), ServerThread(tiny_bundle, **files):
        pass
