"""Strangers at the HTTP door: what they send, do not take, and leave behind."""

from __future__ import annotations

import asyncio
import http.client
import json
import select
import socket
import stat
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from runtime.server.events import BusyError
from tests.runtime.server.test_http import fields, http_address, in_base64
from tests.runtime.server.test_http_jobs import ended
from tests.support.http import get, post, request
from tests.support.serving import PATIENCE, ServerThread, png, scene_array, wait_until

LARGE = {"scene": in_base64(png(scene_array(0, 1000, 1000))), "sampling": {"steps": 1}, "num_images": 3}
"""The answer takes 12 MB, which is more than the system buffers of a connection."""


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[ServerThread]:
    with ServerThread(tiny_bundle, http="127.0.0.1:0", transfer_seconds=0.5) as server:
        yield server


@pytest.fixture
def address(server: ServerThread) -> Iterator[str]:
    yield http_address(server)
    server.engine.release()


@pytest.fixture
def no_time_for_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large answers, too, must be taken within half a second."""
    monkeypatch.setattr("runtime.server.call.BYTES_PER_SECOND", 1 << 40)


@pytest.fixture
def tokens(tmp_path: Path) -> str:
    path = tmp_path / "tokens"
    path.write_text("first\nsecond\n")
    path.chmod(0o600)
    return str(path)


def connect(address: str) -> socket.socket:
    """A connection that takes little at a time."""
    host, _, port = address.rpartition(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(PATIENCE)
    connection.connect((host, int(port)))
    return connection


def send_for_ever(connection: socket.socket, content: bytes = b" " * 4096) -> None:
    while True:
        connection.sendall(content)


def calls(server: ServerThread) -> int:
    """How many are open."""
    return sum(server.server.gate._of_client.values())


def logged(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.fields for record in caplog.records if record.message == "request ended"]  # type: ignore[attr-defined]


def test_a_body_of_many_small_chunks_is_refused(tiny_bundle: Path, tokens: str) -> None:
    """Before the token is looked at: each chunk takes the event loop as long as a large one."""
    head = b"POST /v1/composite HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with ServerThread(tiny_bundle, http="127.0.0.1:0", tokens=tokens) as server:
        with closing(connect(http_address(server))) as connection:
            connection.sendall(head + b"1\r\na\r\n" * 600)
            answer = connection.recv(10_000)
        assert b"401" not in answer
        assert answer.startswith(b"HTTP/1.1 400")


def test_small_chunks_are_counted_anew_for_each_request(address: str) -> None:
    head = b"POST /v1/composite HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with closing(connect(address)) as connection:
        for _ in range(3):
            connection.sendall(head + 300 * b"1\r\n \r\n" + b"0\r\n\r\n")
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert json.loads(answer.read())["error"]["message"] == "the body is not JSON"


def test_who_sends_too_much_reads_why(address: str) -> None:
    """All of it can be sent, though it was refused before its end: a reset would take the answer along."""
    body = b" " * (8 << 20)
    head = "POST /v1/composite HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n"
    with closing(connect(address)) as connection:
        connection.sendall(head.format(1 << 40).encode() + body)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.status == 413
        assert "bytes" in json.loads(answer.read())["error"]["message"]


def test_a_body_of_unknown_length_is_read_up_to_the_limit(tiny_bundle: Path) -> None:
    """What follows is not read, so the connection ends; one whose body was read may be used again."""
    with ServerThread(tiny_bundle, http="127.0.0.1:0", max_message_bytes=1000) as server:
        for length, status in ((1000, 400), (1001, 413)):
            connection = http.client.HTTPConnection(http_address(server), timeout=PATIENCE)
            with closing(connection):
                connection.request("POST", "/v1/composite", iter([b" " * length]))
                answer = connection.getresponse()
                assert answer.status == status
                assert answer.getheader("connection") == ("close" if status == 413 else None)


def test_who_goes_on_sending_is_cut_off(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.server.http.door._LINGER_SECONDS", 0.2)
    with closing(connect(address)) as connection:
        connection.sendall(
            b"POST /v1/composite HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999999\r\n\r\n"
        )
        with pytest.raises(ConnectionError):
            send_for_ever(connection)


@pytest.fixture
def short_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of a request must be there in a fifth of a second."""
    monkeypatch.setattr("runtime.server.http.door._HEAD_SECONDS", 0.2)


@pytest.mark.usefixtures("short_heads")
def test_an_answer_may_take_longer_than_a_head(server: ServerThread, address: str) -> None:
    """Whoever came later and said nothing is gone when the answer is made."""
    begun = len(server.engine.steps)
    server.engine.hold()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(post, address, "/v1/composite", fields())
        server.engine.wait_for_steps(begun + 1)
        with closing(connect(address)) as silent:
            assert silent.recv(1) == b""
        server.engine.release()
        assert asked.result().status == 200


@pytest.mark.usefixtures("short_heads")
def test_the_second_head_of_a_connection_is_not_waited_for_either(address: str) -> None:
    question = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with closing(connect(address)) as connection:
        for _ in range(2):
            connection.sendall(question)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert (answer.status, answer.read()) == (200, b'{"status":"ok"}')
        connection.sendall(question[:-10])
        assert connection.recv(1) == b""


def test_silent_connections_above_the_limit_are_closed(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.server.http.door._HEAD_SECONDS", 3600.0)
    settings = {"http": "127.0.0.1:0", "max_connections": 10}
    with ServerThread(tiny_bundle, **settings) as server, ExitStack() as attack:
        address = http_address(server)
        silent = [attack.enter_context(connect(address)) for _ in range(40)]
        wait_until(lambda: len(select.select(silent, [], [], 0)[0]) == 30)
        assert calls(server) == 0
        attack.close()
        wait_until(lambda: is_ready(address))


def is_ready(address: str) -> bool:
    try:
        return get(address, "/readyz").status == 200
    except (OSError, http.client.HTTPException):
        return False


def test_a_body_of_chunks_is_read(address: str) -> None:
    body = json.dumps(fields()).encode()
    pieces = (body[place : place + 1000] for place in range(0, len(body), 1000))
    connection = http.client.HTTPConnection(address, timeout=PATIENCE)
    with closing(connection):
        connection.request("POST", "/v1/composite", pieces, {"content-type": "application/json"})
        assert connection.getresponse().status == 200


def test_forms_whose_parts_have_long_heads_are_refused(address: str) -> None:
    """Each of their lines, and each part of a name, takes as long as a field."""
    head = b'--b\r\nContent-Disposition: form-data; name="a%s"\r\n%s\r\nx\r\n--b--\r\n'
    kind = {"content-type": "multipart/form-data; boundary=b"}
    for body in (head % (b"", b"a: b\r\n" * 20_000), head % (b".a" * 20_000, b"")):
        assert request(address, "POST", "/v1/composite", body, kind).status == 400


@pytest.mark.usefixtures("no_time_for_bytes")
def test_who_does_not_take_an_answer_is_cut_off(
    server: ServerThread, address: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json.dumps(fields(**LARGE)).encode()
    head = f"POST /v1/composite HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with caplog.at_level("INFO"), closing(connect(address)) as connection:
        connection.sendall(head.encode() + body)
        wait_until(lambda: logged(caplog))
        assert logged(caplog)[0]["code"] == "DEADLINE_EXCEEDED"
        assert "was not taken" in logged(caplog)[0]["reason"]
        assert server.server.ledger.taken == 0
    monkeypatch.undo()
    assert post(address, "/v1/composite", fields()).status == 200


def test_a_result_that_is_fetched_counts(
    server: ServerThread, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once more than while it is kept; until it is given up, as nobody takes it."""
    job = ended(address, post(address, "/v1/jobs", fields(**LARGE)).json)
    ledger, jobs = server.server.ledger, server.server._jobs
    wait_until(lambda: not calls(server))
    assert jobs
    kept = ledger.most = ledger.taken
    # others may take as long as they like
    with monkeypatch.context() as patched, closing(connect(address)) as connection:
        patched.setattr("runtime.server.call.BYTES_PER_SECOND", 1 << 40)
        connection.sendall(f"GET {job['result']} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        wait_until(lambda: ledger.most > kept)
        wait_until(lambda: ledger.taken == kept)
    assert ledger.most == kept + jobs._jobs[job["id"]].nbytes
    assert len(get(address, job["result"]).json["images"]) == 3


def test_who_follows_a_job_and_leaves_is_gone(server: ServerThread, address: str) -> None:
    server.engine.hold()
    job = post(address, "/v1/jobs", fields()).json
    with closing(connect(address)) as connection:
        connection.sendall(f"GET /v1/jobs/{job['id']}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        wait_until(lambda: calls(server) == 2)
        assert connection.recv(1000)
    wait_until(lambda: calls(server) == 1)


def test_a_job_that_nobody_knows_of_is_ended(
    server: ServerThread, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asked for it left before it had a number."""

    @asynccontextmanager
    async def use(*arguments: object) -> AsyncIterator[None]:
        await asyncio.Event().wait()
        yield

    monkeypatch.setattr(server.server.models, "use", use)
    body = json.dumps(fields()).encode()
    with closing(connect(address)) as connection:
        connection.sendall(
            f"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        )
        connection.sendall(body)
        wait_until(lambda: calls(server) == 2)
    wait_until(lambda: not calls(server))


def test_results_of_others_do_not_make_room(tiny_bundle: Path, tokens: str, tmp_path: Path) -> None:
    """In a folder, which is bounded, and which nobody else reads."""
    (tmp_path / "results").mkdir()
    settings = {"http": "127.0.0.1:0", "tokens": tokens, "job_folder": str(tmp_path / "results")}
    with ServerThread(tiny_bundle, **settings, job_folder_bytes=1 << 20) as server:
        address, jobs = http_address(server), server.server._jobs
        assert jobs

        def make(token: str) -> str:
            authorization = {"authorization": f"Bearer {token}"}
            path = f"/v1/jobs/{post(address, '/v1/jobs', fields(), **authorization).json['id']}"
            wait_until(lambda: get(address, path, **authorization).json["status"] == "succeeded")
            return f"{path}/result"

        first = make("first")
        (file,) = (tmp_path / "results").iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        jobs._room = 3.5 * file.stat().st_size
        others = [make("second") for _ in range(4)]
        assert get(address, first, authorization="Bearer first").status == 200
        found = [get(address, path, authorization="Bearer second").status for path in others]
        assert found == [404, 404, 200, 200]
        assert len(list((tmp_path / "results").iterdir())) == 3


def test_a_folder_that_takes_nothing_more(
    tiny_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "results").mkdir()
    settings = {"http": "127.0.0.1:0", "job_folder": str(tmp_path / "results")}
    with ServerThread(tiny_bundle, **settings) as server:
        (tmp_path / "results").rmdir()
        failed = ended(http_address(server), post(http_address(server), "/v1/jobs", fields()).json)
    assert failed["error"]["code"] == "resource_exhausted"
    assert failed["error"]["message"].startswith("the result cannot be stored: No such file or directory")
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_result_that_is_stored_in_part_leaves_nothing(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def write_half(file: Path, content: bytes) -> None:
        file.write_bytes(content[: len(content) // 2])
        raise BusyError("the result cannot be stored: No space left on device")

    monkeypatch.setattr("runtime.server.http.jobs.write_result", write_half)
    with ServerThread(tiny_bundle, http="127.0.0.1:0", job_folder=str(tmp_path)) as server:
        failed = ended(http_address(server), post(http_address(server), "/v1/jobs", fields()).json)
        assert failed["error"]["code"] == "resource_exhausted"
        assert not list(tmp_path.iterdir())


def test_refusals_at_unknown_paths_are_seen(
    tiny_bundle: Path, tokens: str, caplog: pytest.LogCaptureFixture
) -> None:
    ours = {"authorization": "Bearer first"}
    with (
        caplog.at_level("INFO"),
        ServerThread(tiny_bundle, http="127.0.0.1:0", tokens=tokens) as server,
    ):
        address = http_address(server)
        answers = [get(address, "/admin"), get(address, "/admin", **ours)]
        answers.append(request(address, "DELETE", "/v1/composite", headers=ours))
        assert [answer.status for answer in answers] == [401, 404, 405]
        assert answers[2].headers["allow"] == "POST"
        assert [answer.headers["x-request-id"] for answer in answers] == [
            each["request_id"] for each in logged(caplog)
        ]
        count = server.server.metrics.registry.get_sample_value
        assert count("anydoor_requests_total", {"method": "other", "code": "UNIMPLEMENTED", "model": ""}) == 2


@pytest.mark.parametrize("path", ["/openapi.json", "/healthz"])
def test_who_asks_and_asks_and_reads_nothing_is_cut_off(address: str, path: str) -> None:
    """Whatever answers, also where no token is asked for."""
    questions = 1000 * f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with closing(connect(address)) as connection, pytest.raises(ConnectionError):
        send_for_ever(connection, questions)


@pytest.mark.parametrize("lost", [False, True])
def test_a_server_that_ends_does_not_say_that_it_loads(tiny_bundle: Path, lost: bool) -> None:
    with ServerThread(tiny_bundle, http="127.0.0.1:0") as server:
        address, models = http_address(server), server.server.models
        server.loop.call_soon_threadsafe(models.lost.set if lost else models.refuse)
        wait_until(lambda: post(address, "/v1/composite", fields()).status == 503)
        said = post(address, "/v1/composite", fields()).error["message"]
        assert said == ("the engine has failed for good" if lost else "the server is shutting down") + (
            "; the server must be started again" if lost else ""
        )
