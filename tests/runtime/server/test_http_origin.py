"""Which web pages may call a server without tokens, over a real socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.runtime.server.test_http import fields, http_address
from tests.support.http import Answer, get, post, request
from tests.support.serving import PATIENCE, ServerThread

OTHER = "https://example.com"


@pytest.fixture(scope="module")
def address(tiny_bundle: Path) -> Iterator[str]:
    with ServerThread(tiny_bundle, http="127.0.0.1:0", cors=("https://example.org",)) as server:
        yield http_address(server)


def is_refused(answer: Answer, text: str) -> bool:
    return answer.status == 403 and text in answer.error["message"]


@pytest.mark.parametrize(
    "name", ["example.com", "example.com:8000", "localhost.example.com", "unix", "0.0.0.0", "["]
)
def test_a_name_that_is_made_to_mean_this_machine_is_refused(address: str, name: str) -> None:
    for answer in (
        get(address, "/v1/models", host=name),
        post(address, "/v1/composite", fields(), host=name),
    ):
        assert is_refused(answer, "call it localhost, or start it with --host NAME")


@pytest.mark.parametrize("name", ["localhost", "localhost.", "LocalHost:1", "127.0.0.2:8000", "[::1]:8000"])
def test_this_machine_has_several_names(address: str, name: str) -> None:
    assert get(address, "/v1/models", host=name).status == 200


def test_pages_of_others_change_nothing(address: str) -> None:
    for origin in (OTHER, "null", "http://localhost:1", "http://127.0.0.1"):
        answer = post(address, "/v1/composite", fields(), origin=origin)
        assert is_refused(answer, f"pages of '{origin}' may not call this server: start it with --cors")
    same_site = {"origin": OTHER, "sec-fetch-site": "same-site"}
    assert is_refused(post(address, "/v1/composite", fields(), **same_site), "may not call this server")
    answer = request(address, "DELETE", "/v1/jobs/job-0", headers={"origin": OTHER})
    assert is_refused(answer, "may not call this server")


def test_own_pages_and_those_that_are_named_may_call(address: str) -> None:
    for headers in (
        {"origin": f"http://{address}"},
        {"host": "LocalHost:1", "origin": "http://localhost:1"},
        {"host": "localhost:1", "origin": "http://LocalHost:1"},
        {"origin": "https://example.org"},
        {"origin": OTHER, "sec-fetch-site": "same-origin"},  # a proxy has changed Host
        {},
    ):
        assert post(address, "/v1/composite", fields(), **headers).status == 200


def test_all_pages_may_call_where_that_is_said(tiny_bundle: Path) -> None:
    with ServerThread(tiny_bundle, http="127.0.0.1:0", cors=("*",)) as server:
        assert post(http_address(server), "/v1/composite", fields(), origin=OTHER).status == 200


def test_who_says_no_name_is_no_browser(address: str) -> None:
    """HTTP 1.0 has none."""
    host, _, port = address.rpartition(":")
    with closing(socket.create_connection((host, int(port)), timeout=PATIENCE)) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.0\r\n\r\n")
        assert b" 200 " in connection.recv(100)


def test_a_name_of_a_proxy(tiny_bundle: Path) -> None:
    with ServerThread(tiny_bundle, http="127.0.0.1:0", host=("Studio.Example.com",)) as server:
        address = http_address(server)
        own = {"host": "studio.example.com", "origin": "https://studio.example.com"}
        assert post(address, "/v1/composite", fields(), **own).status == 200
        assert get(address, "/v1/models").status == 200
        assert is_refused(get(address, "/v1/models", host="example.com"), "not known as 'example.com'")


def test_a_token_is_enough(tiny_bundle: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("open-sesame\n")
    tokens.chmod(0o600)
    with ServerThread(tiny_bundle, http="127.0.0.1:0", tokens=str(tokens)) as server:
        headers = {"host": "example.com", "origin": OTHER, "authorization": "Bearer open-sesame"}
        assert post(http_address(server), "/v1/composite", fields(), **headers).status == 200


def test_an_address_of_other_machines_has_any_name(tiny_bundle: Path) -> None:
    with ServerThread(tiny_bundle, http="0.0.0.0:0", insecure=True) as server:
        address = http_address(server).replace("0.0.0.0", "127.0.0.1")
        assert get(address, "/v1/models", host="example.com").status == 200
        assert is_refused(post(address, "/v1/composite", fields(), origin=OTHER), "may not call this server")
