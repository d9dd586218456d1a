"""Answers over HTTP to what is odd, but within the documents: forms, nulls, verbs, paths, broken requests."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from runtime.errors import InputError
from runtime.server.http.body import read_fields
from runtime.server.http.messages import kind_of
from runtime.server.settings import settings_from
from tests.runtime.server.test_http import fields, form, http_address, in_base64
from tests.support.http import get, multipart, post, post_form, request
from tests.support.serving import BOX, PATIENCE, SCENE, ServerThread, wait_until


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[ServerThread]:
    with ServerThread(tiny_bundle, http="127.0.0.1:0", studio=True) as server:
        yield server


@pytest.fixture(scope="module")
def address(server: ServerThread) -> str:
    return http_address(server)


def test_no_client_chooses_how_the_texts_of_a_form_are_decoded() -> None:
    """Some of Python's decoders take time by the square of the length: this one would take minutes."""
    text = b"a-" + b"b" * 1_000_000
    body = b'--X\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + text + b"\r\n--X--\r\n"
    found = read_fields(body, "multipart/form-data; boundary=X; charset=punycode")
    assert found == {"prompt": text.decode()}
    with pytest.raises(InputError, match="not a valid form"):
        read_fields(body, "multipart/form-data")


def test_what_is_null_is_not_set(address: str) -> None:
    assert post(address, "/v1/composite", fields(placements=None, output_format=None)).status == 200
    asked = {"picture": in_base64(SCENE), "where": None, "box": list(BOX), "clicks": None}
    # it is understood, and this server has no segmenter for it
    assert post(address, "/v1/segment", asked).error["param"] == "where.box"
    assert kind_of({"scene": "x", "remove": None}) is kind_of({"scene": "x"})
    assert kind_of({"scene": None, "prompt": "x"}) is kind_of({"prompt": "x"})


def test_a_job_may_say_that_it_is_no_stream(address: str) -> None:
    assert post_form(address, "/v1/jobs", form(("stream", "false"))).status == 202
    assert post(address, "/v1/jobs", fields(stream="perhaps")).error["param"] == "stream"


def test_a_job_is_counted_apart_from_the_call_that_creates_it(server: ServerThread, address: str) -> None:
    job = post(address, "/v1/jobs", fields()).json["id"]
    wait_until(lambda: get(address, f"/v1/jobs/{job}").json["status"] == "succeeded")
    ends = [sample for metric in server.server.metrics.requests.collect() for sample in metric.samples]
    methods = {sample.labels["method"] for sample in ends}
    assert {"job", "POST /v1/jobs"} <= methods


@pytest.mark.parametrize(
    ("path", "verbs"),
    [("/v1/jobs/x", "DELETE, GET, HEAD"), ("/v1/composite", "POST"), ("/v1/model", "GET, HEAD")],
)
def test_all_verbs_of_a_path_are_named(address: str, path: str, verbs: str) -> None:
    answer = request(address, "PUT", path)
    assert answer.status == 405
    assert answer.headers["allow"] == verbs


def test_a_path_with_a_slash_too_many_is_not_there(address: str) -> None:
    answer = post(address, "/v1/composite/", fields())
    assert (answer.status, answer.error["code"]) == (404, "unimplemented")
    assert answer.headers["x-request-id"]
    assert get(address, "/studio").status == 307


@pytest.mark.parametrize(
    "head", ["Content-Length: abc", "Content-Length: 1\r\nContent-Length: 2", "no colon"]
)
def test_a_request_that_is_no_http_is_answered_with_json(address: str, head: str) -> None:
    host, _, port = address.rpartition(":")
    with closing(socket.create_connection((host, int(port)), timeout=PATIENCE)) as connection:
        connection.sendall(f"POST /v1/draw HTTP/1.1\r\nHost: localhost\r\n{head}\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    status, _, body = answer.partition(b"\r\n\r\n")
    assert status.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "invalid_argument"


def test_a_connection_that_never_shakes_hands_is_closed(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trustme

    monkeypatch.setattr("runtime.server.http.door._HEAD_SECONDS", 0.5)
    certificate = trustme.CA().issue_cert("localhost")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "certificate.pem")
    settings = {
        "http": "127.0.0.1:0",
        "tls_certificate": str(tmp_path / "certificate.pem"),
        "tls_key": str(tmp_path / "key.pem"),
    }
    with ServerThread(tiny_bundle, **settings) as server:
        host, _, port = http_address(server).rpartition(":")
        with closing(socket.create_connection((host, int(port)), timeout=PATIENCE)) as connection:
            started = time.monotonic()
            assert connection.recv(1) == b""
            assert time.monotonic() - started < PATIENCE


@pytest.mark.parametrize(
    "given",
    [
        {"cors": ["example.org"]},
        {"cors": ["https://example.org/"]},
        {"host": ["https://studio.example.com"]},
        {"host": ["studio.example.com:8443"]},
        {"host": [""]},
    ],
)
def test_origins_and_hosts_that_never_match_are_refused(
    tiny_bundle: Path, given: dict[str, list[str]]
) -> None:
    with pytest.raises(InputError, match=f"{next(iter(given))}: "):
        settings_from(given, None, {"bundle": str(tiny_bundle), "http": "127.0.0.1:0"})


def test_origins_and_hosts_that_match(tiny_bundle: Path) -> None:
    given = {
        "cors": ["*", "http://localhost:3000"],
        "host": ["studio.example.com", "10.0.0.7", "::1", "[::1]"],
    }
    settings_from(given, None, {"bundle": str(tiny_bundle), "http": "127.0.0.1:0"})


def test_the_page_of_paths_has_what_images_and_jobs_take_and_answer(address: str) -> None:
    page = get(address, "/openapi.json").json
    schemas = page["components"]["schemas"]
    edit, generation = (schemas[name]["properties"].keys() for name in ("ImageEdit", "ImageGeneration"))
    assert {"image", "mask", "reference_mask", "mode", "steps", "user"} <= edit
    assert {"prompt", "negative_prompt", "guidance_scale", "background"} <= generation
    job = post(address, "/v1/jobs", fields()).json
    assert job.keys() <= schemas["Job"]["properties"].keys()
    assert "error" in schemas["Job"]["properties"]
    answers = page["paths"]["/v1/jobs/{id}/events"]["get"]["responses"]
    assert list(answers["200"]["content"]) == ["text/event-stream"]


def tasks_of_calls(server: ServerThread) -> list[str]:
    """What goes on in the server beside the answers of calls."""

    async def names() -> list[str]:
        found = (task.get_coro().__qualname__ for task in asyncio.all_tasks())  # type: ignore[union-attr]
        return [name for name in found if name.startswith("HttpContext.")]

    result: list[str] = server.run(names())
    return result


@pytest.mark.parametrize("path", ["/v1/composite", "/v1/jobs"])
def test_a_stream_is_never_silent_for_long(
    path: str, server: ServerThread, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proxies end a connection on which nothing comes for a minute: a comment is sent meanwhile."""
    monkeypatch.setattr("runtime.server.http.context.SILENCE_SECONDS", 0.02)
    server.engine.hold()
    connection = http.client.HTTPConnection(address, timeout=PATIENCE)
    if path == "/v1/jobs":
        job = post(address, path, fields()).json["id"]
        connection.request("GET", f"/v1/jobs/{job}/events")
    else:
        body, kind = multipart(form(("stream", "true")))
        connection.request("POST", path, body, {"content-type": kind})
    with closing(connection), connection.getresponse() as answer:
        assert answer.headers["x-accel-buffering"] == "no"
        lines = iter(answer.readline, b"")
        assert next(lines).startswith(b"event: ")
        for _ in range(3):
            assert next(line for line in lines if line.startswith(b":")) == b":\n"
        server.engine.release()
        rest = [line for line in lines if line.startswith(b"event:")]
        assert rest[-1] in (b"event: result\n", b"event: succeeded\n")
    wait_until(lambda: not tasks_of_calls(server))


def test_who_leaves_a_silent_stream_leaves_nothing(server: ServerThread, address: str) -> None:
    server.engine.hold()
    body, kind = multipart(form(("stream", "true")))
    connection = http.client.HTTPConnection(address, timeout=PATIENCE)
    connection.request("POST", "/v1/composite", body, {"content-type": kind})
    assert connection.getresponse().readline() == b"event: queued\n"
    connection.close()
    server.engine.release()
    wait_until(lambda: not tasks_of_calls(server))


def test_a_stream_that_cannot_begin_has_the_status_of_its_error(address: str) -> None:
    answer = post_form(address, "/v1/composite", form(("stream", "true"), ("sampling.steps", "0")))
    assert (answer.status, answer.error["param"]) == (400, "sampling.steps")
