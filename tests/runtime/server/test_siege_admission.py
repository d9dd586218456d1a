"""Strangers who try to take all places: others are served while the attack lasts."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from benchmarks.support.attacker import CHECK, COMPOSITE, WATCH, Attacker
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub
from runtime.server.connections import host_of, most_connections
from runtime.server.gate import CHANNEL_OPTIONS, _Lately
from runtime.server.settings import Settings
from tests.support.serving import PATIENCE, ServerThread, message, trailing, wait_until

HEALTH = health_pb2.HealthCheckRequest()
OURS = (("authorization", "Bearer open-sesame"),)
THEIRS = (("authorization", "Bearer shazam"),)


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text("open-sesame\nshazam\n")
    return path


@contextmanager
def channel_to(server: ServerThread) -> Iterator[grpc.Channel]:
    """A connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    with grpc.insecure_channel(server.address, options) as channel:
        yield channel


def assert_others_are_served(server: ServerThread, metadata: Any = OURS) -> None:
    with channel_to(server) as channel:
        assert health_pb2_grpc.HealthStub(channel).Check(HEALTH, timeout=PATIENCE).status == 1
        stub: Any = CompositorServiceStub(channel)
        assert stub.Composite(message(steps=1), timeout=PATIENCE, metadata=metadata).images


def test_calls_without_a_token_take_no_place(tiny_bundle: Path, token_file: Path) -> None:
    with ServerThread(tiny_bundle, tokens=str(token_file)) as server, Attacker(server.address) as attacker:
        for _ in range(60):
            attacker.open(COMPOSITE)
        assert_others_are_served(server)


def test_calls_without_a_token_are_refused_before_their_message_is_there(
    tiny_bundle: Path, token_file: Path
) -> None:
    with ServerThread(tiny_bundle, tokens=str(token_file)) as server, Attacker(server.address) as attacker:
        attacker.open(COMPOSITE)
        wait_until(lambda: b"a valid bearer token is required" in attacker.received)
        assert server.server.ledger.most == 0


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer shazam"}])
def test_half_sent_messages_block_nobody_else(
    tiny_bundle: Path, token_file: Path, headers: dict[str, str]
) -> None:
    """With tokens from somebody who has one; without from somebody at the same host."""
    settings = {"tokens": str(token_file)} if headers else {}
    with ServerThread(tiny_bundle, **settings) as server, ExitStack() as attack:
        for _ in range(3):
            attacker = attack.enter_context(Attacker(server.address))
            for _ in range(60):
                attacker.message(attacker.open(COMPOSITE, **headers), bytes(1000), missing=1000)
        wait_until(lambda: server.server.ledger.taken)
        assert_others_are_served(server, OURS if headers else ())


def test_half_sent_messages_have_a_deadline(tiny_bundle: Path) -> None:
    limits = {"transfer_seconds": 0.2, "max_message_bytes": 1 << 16}
    with ServerThread(tiny_bundle, **limits) as server, Attacker(server.address) as attacker:
        attacker.open(COMPOSITE)
        wait_until(lambda: b"the message did not come within" in attacker.received)
        assert server.server.ledger.taken == 0


@pytest.mark.parametrize("path", [CHECK, WATCH])
def test_half_sent_probes_block_nobody(tiny_bundle: Path, path: str) -> None:
    with ServerThread(tiny_bundle) as server, Attacker(server.address) as attacker:
        for _ in range(60):
            attacker.open(path)
        assert_others_are_served(server)


def test_watching_health_blocks_nobody(tiny_bundle: Path) -> None:
    with ServerThread(tiny_bundle) as server, ExitStack() as attack:
        for _ in range(10):
            health = health_pb2_grpc.HealthStub(attack.enter_context(channel_to(server)))
            watches = [health.Watch(HEALTH, timeout=PATIENCE) for _ in range(6)]
            wait_until(lambda watches=watches: sum(watch.done() for watch in watches) == 2)
            refused = next(watch for watch in watches if watch.done())
            assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert_others_are_served(server)


@pytest.mark.parametrize("limit", ["_WATCHES_OF_HOST", "_WATCHES"])
def test_who_stops_watching_makes_room_for_another(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """Three in all may watch, on whatever connections."""
    monkeypatch.setattr(f"runtime.server.health.{limit}", 3)
    with ServerThread(tiny_bundle) as server, channel_to(server) as one, channel_to(server) as other:
        counted, watches = server.server.health._watches, list[Any]()

        def watch(channel: grpc.Channel) -> int:
            watches.append(health_pb2_grpc.HealthStub(channel).Watch(HEALTH, timeout=PATIENCE))
            return int(next(watches[-1]).status)

        assert [watch(channel) for channel in (one, one, other)] == [1, 1, 1]
        with pytest.raises(grpc.RpcError, match="too many clients watch health"):
            watch(other)
        watches[0].cancel()
        wait_until(lambda: counted[""] == 2)
        assert watch(other) == 1
        for each in watches:
            each.cancel()
        wait_until(lambda: not counted)  # nothing is kept of who is gone


def test_one_client_cannot_fill_the_queue(tiny_bundle: Path, token_file: Path) -> None:
    with (
        ServerThread(tiny_bundle, tokens=str(token_file), max_batch=1, queue=4) as server,
        channel_to(server) as channel,
    ):
        server.engine.hold()
        stub: Any = CompositorServiceStub(channel)
        options = {"timeout": PATIENCE, "metadata": THEIRS}
        greedy = [stub.Composite.future(message(seed=seed), **options) for seed in range(12)]
        server.engine.wait_for_steps(1)
        wait_until(lambda: sum(call.done() for call in greedy) == 7)
        modest = stub.Composite.future(message(), timeout=PATIENCE, metadata=OURS)
        wait_until(lambda: sum(call.done() for call in greedy) == 8)
        displaced = next(call for call in greedy if call.done()).exception()
        assert displaced.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(trailing(displaced)["grpc-retry-pushback-ms"]) > 0
        server.engine.release()
        assert modest.result().images
        assert sum(not call.exception() for call in greedy) == 4


def test_a_token_is_one_client_however_it_is_written(
    tiny_bundle: Path, token_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level("INFO"),
        ServerThread(tiny_bundle, tokens=str(token_file)) as server,
        channel_to(server) as channel,
    ):
        stub: Any = CompositorServiceStub(channel)
        for value in ("Bearer shazam", "bearer shazam", "BEARER  shazam", "Bearer shazam "):
            stub.Composite(message(steps=1), metadata=(("authorization", value),), timeout=PATIENCE)
    ended = [record for record in caplog.records if record.message == "request ended"]
    assert len(ended) == 4
    assert len({record.fields["client"] for record in ended}) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.0.0.1:4711", "ipv4:10.0.0.1"),
        ("ipv6:%5B::ffff:10.0.0.1%5D:4711", "ipv4:10.0.0.1"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:4711", "ipv6:2001:db8:1:2::/64"),
        ("ipv6:[fe80::1%25eth0]:4711", "ipv6:fe80::/64"),
        ("unix:", "unix:"),
    ],
)
def test_a_host_is_one_client(peer: str, host: str) -> None:
    assert host_of(peer) == host


def test_resets_hurt_nobody_else(tiny_bundle: Path, token_file: Path) -> None:
    with ServerThread(tiny_bundle, tokens=str(token_file)) as server, Attacker(server.address) as attacker:
        flood = threading.Thread(target=attacker.flood, args=(COMPOSITE, 20_000))
        flood.start()
        assert_others_are_served(server)
        flood.join(PATIENCE)


def test_a_connection_that_is_refused_too_often_is_ended(
    tiny_bundle: Path, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.server.gate._FRUITLESS", (20, 0.0))
    with ServerThread(tiny_bundle, tokens=str(token_file)) as server, Attacker(server.address) as attacker:
        for _ in range(30):
            attacker.open(COMPOSITE)
        assert attacker.ended.wait(PATIENCE)
        assert_others_are_served(server)


def test_refusals_above_a_rate_come_late(
    tiny_bundle: Path, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who guesses tokens waits after each; others at the same host do not."""
    monkeypatch.setattr("runtime.server.gate._REFUSALS", (5, 0.0))
    monkeypatch.setattr("runtime.server.gate._LATE_SECONDS", 3600.0)
    with ServerThread(tiny_bundle, tokens=str(token_file)) as server, channel_to(server) as channel:
        stub: Any = CompositorServiceStub(channel)
        guess = {"metadata": (("authorization", "Bearer guess"),)}
        for _ in range(5):
            assert stub.Composite.future(message(), **guess).code() is grpc.StatusCode.UNAUTHENTICATED
        late = stub.Composite.future(message(), **guess)
        assert_others_are_served(server)
        assert not late.done()
        late.cancel()


def test_silent_connections_are_closed(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        *CHANNEL_OPTIONS,
        ("grpc.server_handshake_timeout_ms", 1000),
        ("grpc.http2.settings_timeout", 1000),
    ]
    monkeypatch.setattr("runtime.server.serve.CHANNEL_OPTIONS", options)
    with ServerThread(tiny_bundle, max_connections=10) as server, ExitStack() as attack:
        host, _, port = server.address.rpartition(":")
        for _ in range(40):
            attack.enter_context(socket.create_connection((host, int(port)), PATIENCE))
        with channel_to(server) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            assert health.Check(HEALTH, timeout=PATIENCE, wait_for_ready=True).status == 1


def test_who_asks_by_reflection_leaves_room_for_others(tiny_bundle: Path) -> None:
    """Idle streams on the same connection, as at a unix socket, where all come by one."""
    ends = threading.Event()

    def never() -> Iterator[Any]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        ends.wait(PATIENCE)

    with ServerThread(tiny_bundle) as server, grpc.insecure_channel(server.address) as channel:
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        streams = [reflection.ServerReflectionInfo(never(), timeout=PATIENCE) for _ in range(4)]
        try:
            for stream in streams:
                assert next(stream).list_services_response.service
            stub: Any = CompositorServiceStub(channel)
            assert stub.Composite(message(), timeout=20).images
        finally:
            ends.set()
            for stream in streams:
                stream.cancel()


def test_reflection_takes_small_questions_for_a_minute(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.server.gate._REFLECTION_SECONDS", 0.5)
    large = reflection_pb2.ServerReflectionRequest(file_by_filename=5000 * "a")
    with ServerThread(tiny_bundle) as server, grpc.insecure_channel(server.address) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.ServerReflectionInfo(iter([large]), timeout=PATIENCE))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
        ends = threading.Event()

        def never() -> Iterator[Any]:
            yield reflection_pb2.ServerReflectionRequest(list_services="")
            ends.wait(PATIENCE)

        try:
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.ServerReflectionInfo(never(), timeout=PATIENCE))
        finally:
            ends.set()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
        assert "questions are answered for" in caught.value.details()  # type: ignore[attr-defined]


def test_a_client_has_so_many_calls(
    tiny_bundle: Path, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.server.gate._MOST_CALLS", 5)
    with ServerThread(tiny_bundle, tokens=str(token_file)) as server, Attacker(server.address) as attacker:
        for _ in range(6):
            attacker.open(COMPOSITE, authorization="Bearer shazam")
        wait_until(lambda: b"5 of your calls are open" in attacker.received)
        assert_others_are_served(server)


def test_nothing_is_kept_of_a_client_whose_calls_are_over(tiny_bundle: Path) -> None:
    with ServerThread(tiny_bundle) as server:
        assert_others_are_served(server)
        wait_until(lambda: not server.server.gate._of_client)


def test_what_was_too_often_is_forgotten_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three at once may come, and two per second; how far it was above that does not matter later."""
    lately, now = _Lately(since=0.0), 0.0
    monkeypatch.setattr("runtime.server.gate.time", SimpleNamespace(monotonic=lambda: now))

    def is_too_often(times: int) -> list[bool]:
        return [lately.add(3, 2.0) for _ in range(times)]

    assert is_too_often(4) == [False, False, False, True]
    now = 1.0
    assert is_too_often(9) == [False, *8 * [True]]
    now = 2.0
    assert is_too_often(2) == [False, True]
    now = 60.0
    assert is_too_often(4) == [False, False, False, True]


def test_connections_leave_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.server.connections.resource.getrlimit", lambda _: (512, 512))
    assert most_connections(Settings()) == 384
    assert most_connections(Settings(http="127.0.0.1:0")) == 192
