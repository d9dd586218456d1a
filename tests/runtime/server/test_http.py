"""The HTTP door over a real socket: pictures in the runtime's own form, limits, and what is refused."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme
from PIL import Image

from runtime import Compositor, Placement, Sampling
from tests.support.http import get, post, post_form, request
from tests.support.serving import BOX, OBJECT, PATIENCE, SCENE, ServerThread, held_compositor, wait_until

TWO_STEPS = {"steps": 2}


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[ServerThread]:
    with ServerThread(tiny_bundle, http="127.0.0.1:0", max_message_bytes=1 << 20, max_images=3) as server:
        yield server


@pytest.fixture(scope="module")
def address(server: ServerThread) -> str:
    return http_address(server)


@pytest.fixture(scope="module")
def alone(tiny_bundle: Path) -> Compositor:
    return held_compositor(tiny_bundle)[0]


def http_address(server: ServerThread) -> str:
    found = server.server.http_address
    assert found
    return found


def in_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def fields(**more: Any) -> dict[str, Any]:
    """A request that any server accepts."""
    given = {"scene": in_base64(SCENE), "reference": in_base64(OBJECT), "box": list(BOX)}
    return {**given, "sampling": TWO_STEPS, "seed": 7, **more}


def form(*more: tuple[str, str | bytes]) -> list[tuple[str, str | bytes]]:
    box = ",".join(map(str, BOX))
    return [
        ("scene", SCENE),
        ("reference", OBJECT),
        ("box", box),
        ("sampling.steps", "2"),
        ("seed", "7"),
        *more,
    ]


def pixels(content: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(content)))


@pytest.fixture(scope="module")
def expected(alone: Compositor) -> Any:
    place = Placement(reference=OBJECT, box=BOX)
    return np.asarray(alone.composite(SCENE, place, seed=7, sampling=Sampling(steps=2)))


# --- pictures ---------------------------------------------------------------------------------------------


def test_a_picture_is_the_compositors(address: str, expected: Any) -> None:
    answer = post(address, "/v1/composite", fields())
    assert answer.status == 200
    (image,) = answer.json["images"]
    assert (pixels(base64.b64decode(image["image"])) == expected).all()
    assert image["seed"] == 7
    assert answer.json["request_id"] == answer.headers["x-request-id"]
    assert answer.json["seconds"]["sample"] > 0


def test_a_form_with_files_asks_for_the_same(address: str, expected: Any) -> None:
    answer = post_form(address, "/v1/composite", form(), accept="image/png")
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-seed"] == "7"
    assert (pixels(answer.content) == expected).all()


def test_placements_may_be_listed(address: str, expected: Any) -> None:
    place = {
        "reference": "data:image/png;base64," + in_base64(OBJECT),
        "box": dict(zip(("x0", "y0", "x1", "y1"), BOX)),
    }
    given = {"scene": in_base64(SCENE), "placements": [place], "sampling": TWO_STEPS, "seed": 7}
    answer = post(address, "/v1/composite", given, accept="image/png")
    assert (pixels(answer.content) == expected).all()
    in_form = [("scene", SCENE), ("placements[0].reference", OBJECT), ("seed", "7"), ("sampling[steps]", "2")]
    corners = [("placements[0].box[]", str(value)) for value in BOX]
    answer = post_form(address, "/v1/composite", [*in_form, *corners], accept="image/png")
    assert (pixels(answer.content) == expected).all()


def test_a_mask_is_read_by_the_usual_rules(address: str) -> None:
    mask = np.zeros((64, 80), np.uint8)
    mask[8:50, 10:60] = 255
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    given = fields(mask=in_base64(buffer.getvalue()), mode="shape")
    del given["box"]
    assert post(address, "/v1/composite", given).status == 200


def test_events_on_the_way(address: str, expected: Any) -> None:
    given = fields(sampling={"steps": 3}, preview_every=1, num_images=2, output_format="webp")
    answer = post(address, "/v1/composite", given, accept="text/event-stream")
    assert answer.headers["content-type"] == "text/event-stream"
    names = [name for name, _ in answer.events]
    assert names[0] == "queued"
    assert names.count("preview") == 4
    assert names[-1] == "result"
    assert ("step_done", {"done": 6, "total": 6}) in answer.events
    images = answer.events[-1][1]["images"]
    assert [image["seed"] for image in images] == [7, 8]
    assert Image.open(io.BytesIO(base64.b64decode(images[0]["image"]))).format == "WEBP"


def test_the_model_describes_itself(address: str, server: ServerThread) -> None:
    answer = get(address, "/v1/model").json
    assert answer["system"] == "anydoor"
    assert answer["condition"] == "reference"
    assert answer["qualities"] == ["exact", "balanced", "fast"]
    assert answer["limits"]["images"] == 3
    (model,) = get(address, "/v1/models").json["data"]
    assert model["id"] == Path(server.settings.bundle).name
    assert get(address, f"/v1/models/{model['id']}").json == model


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "param", "text"),
    [
        ({"box": [1, 2, 3]}, "placements[0].box", "4 numbers are expected, not 3"),
        ({"box": [1, 2, 1, 4]}, "placements[0].box", "has no area"),
        ({"box": "here"}, "placements[0].box", "4 numbers are expected"),
        ({"mode": "magic"}, "placements[0].mode", "there is no 'magic': choose one of crop, shape"),
        ({"mask": in_base64(SCENE)}, "placements[0]", "give either box or mask, not both"),
        ({"prompt": "a cat"}, "placements[0].prompt", "takes no prompt"),
        ({"scene": "not base64!"}, "scene", "this is not base64"),
        ({"scene": in_base64(b"text")}, "scene", "the scene is not a picture"),
        ({"seed": -1}, "seed", "a whole number from 0"),
        ({"seed": True}, "seed", "a whole number from 0"),
        ({"seed": 1.5}, "seed", "a whole number from 0"),
        ({"num_images": 4}, "num_images", "from 1 to 3"),
        ({"sampling": {"steps": 10**6}}, "sampling.steps", "from 1 to 100"),
        ({"sampling": {"guidance_scale": "much"}}, "sampling.guidance_scale", "a number is expected"),
        ({"sampling": []}, "sampling", "an object with fields is expected"),
        ({"output_format": "gif"}, "output_format", "there is no 'gif'"),
        ({"colour": "red"}, "colour", "there is no field 'colour'"),
        ({"placements": [], "reference": "AAAA"}, "reference", "there is no field 'reference'"),
    ],
)
def test_what_cannot_be_used_is_named(address: str, more: Any, param: str | None, text: str) -> None:
    answer = post(address, "/v1/composite", fields(**more))
    assert answer.status == 400
    assert text in answer.error["message"]
    assert answer.error["param"] == param
    assert answer.error["type"] == "invalid_request_error"
    assert answer.error["code"] == "invalid_argument"


def test_placements_are_a_list(address: str) -> None:
    for placements, text in (({}, "a list is expected"), ([], "nothing to place")):
        answer = post(address, "/v1/composite", {"scene": in_base64(SCENE), "placements": placements})
        assert answer.status == 400
        assert text in answer.error["message"]
        assert answer.error["param"] == "placements"


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        (b"{", "application/json", "the body is not JSON"),
        (b"[1]", "application/json", "must be a JSON object"),
        (b"[" * 900, "application/json", "the body is not JSON"),
        (b"[" + b"0," * 5000 + b"0]", "application/json", "more than 2,000 values"),
        (b"a=b", "application/x-www-form-urlencoded", "JSON or multipart/form-data is expected"),
        (b"--x", "multipart/form-data", "the body is not a valid form"),
        (b"--x\r\nnonsense", "multipart/form-data; boundary=x", "the body is not a valid form"),
        (b"{}", "", "give a scene"),
    ],
)
def test_bodies_that_cannot_be_read(address: str, body: bytes, kind: str, text: str) -> None:
    answer = request(address, "POST", "/v1/composite", body, {"content-type": kind} if kind else {})
    assert answer.status == 400
    assert text in answer.error["message"]


def test_names_of_a_form_that_do_not_fit(address: str) -> None:
    for name in ("[]", "placements[3].box", "scene.x", "seed[0]"):
        answer = post_form(address, "/v1/composite", form((name, "1")))
        assert answer.status == 400, name
        assert answer.error["message"]


def test_a_body_that_is_too_large(address: str) -> None:
    # what is announced is enough: a client that sends it all may not get to read the answer
    head = {"content-type": "application/json", "content-length": str(2 << 20)}
    answer = request(address, "POST", "/v1/composite", b"{", head)
    assert answer.status == 413
    assert "the most that are accepted" in answer.error["message"]


def test_there_is_nothing_at_other_paths(address: str) -> None:
    assert get(address, "/v2").error["message"] == "there is nothing here: see /openapi.json"
    answer = get(address, "/v1/composite")
    assert answer.status == 405
    assert answer.headers["allow"] == "POST"
    assert answer.error["type"] == "invalid_request_error"


def test_several_pictures_are_no_file(address: str) -> None:
    answer = post(address, "/v1/composite", fields(num_images=2), accept="image/png")
    assert answer.error["param"] == "num_images"


def test_a_drawing_needs_another_model(address: str) -> None:
    answer = post(address, "/v1/draw", {"prompt": "a cat"})
    assert "does not draw from prompts" in answer.error["message"]
    assert post(address, "/v1/draw", fields()).error["param"] == "scene"
    assert post(address, "/v1/composite", {"prompt": "a cat"}).error["param"] == "scene"


# --- the same gate as gRPC's ------------------------------------------------------------------------------


def test_tokens_are_required_where_they_are(tiny_bundle: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("secret\n")
    tokens.chmod(0o600)
    with ServerThread(tiny_bundle, http="127.0.0.1:0", tokens=str(tokens)) as server:
        address = http_address(server)
        for given in ({}, {"authorization": "Bearer wrong"}):
            answer = request(address, "POST", "/v1/composite", b"{}", given)
            assert answer.status == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.error["type"] == "authentication_error"
        assert post(address, "/v1/composite", fields(), authorization="Bearer secret").status == 200
        assert get(address, "/v1/model").status == 401
        assert get(address, "/healthz").status == 200


def test_a_full_queue_says_when_to_come_again(tiny_bundle: Path) -> None:
    with ServerThread(tiny_bundle, http="127.0.0.1:0", max_batch=1, queue=0) as server:
        address = http_address(server)
        server.engine.hold()
        job = post(address, "/v1/jobs", fields()).json
        server.engine.wait_for_steps(1)
        answer = post(address, "/v1/composite", fields())
        assert answer.status == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.error["type"] == "rate_limit_error"
        server.engine.release()
        wait_until(lambda: get(address, f"/v1/jobs/{job['id']}").json["status"] == "succeeded")


def test_whoever_goes_away_ends_the_work(server: ServerThread, address: str) -> None:
    cancelled = server.server.metrics.requests.labels(
        "POST /v1/composite", "CANCELLED", server.compositor.bundle.path.name
    )
    before = cancelled._value.get()
    server.engine.hold()
    connection = http.client.HTTPConnection(address, timeout=PATIENCE)
    body = json.dumps(fields(sampling={"steps": 50}))
    connection.request("POST", "/v1/composite", body, {"content-type": "application/json"})
    server.engine.wait_for_steps(len(server.engine.steps) + 1)
    connection.close()
    wait_until(lambda: cancelled._value.get() == before + 1)
    assert not server.batcher.tickets
    server.engine.release()
    assert get(address, "/readyz").status == 200


def test_requests_count_among_all_others(server: ServerThread, address: str) -> None:
    count = server.server.metrics.requests.labels(
        "POST /v1/composite", "OK", server.compositor.bundle.path.name
    )
    before = count._value.get()
    post(address, "/v1/composite", fields())
    assert count._value.get() == before + 1
    wait_until(lambda: server.server.ledger.taken == 0)


def test_while_the_model_is_loaded_and_when_the_server_stops(tiny_bundle: Path) -> None:
    with ServerThread(tiny_bundle, http="127.0.0.1:0") as server:
        address = http_address(server)
        server.run(server.server.health.set(ready=False))
        answer = post(address, "/v1/composite", fields())
        assert answer.status == 503
        assert answer.headers["retry-after"] == "1"
        assert get(address, "/readyz").status == 503
        assert get(address, "/healthz").status == 200


def test_over_tls(tiny_bundle: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    (tmp_path / "chain.pem").write_bytes(b"".join(pem.bytes() for pem in certificate.cert_chain_pems))
    tls = {"tls_certificate": str(tmp_path / "chain.pem"), "tls_key": str(tmp_path / "key.pem")}
    with ServerThread(tiny_bundle, http="127.0.0.1:0", **tls) as server:
        context = ssl.create_default_context()
        authority.configure_trust(context)
        port = int(http_address(server).rpartition(":")[2])
        connection = http.client.HTTPSConnection("localhost", port, timeout=PATIENCE, context=context)
        connection.request("GET", "/v1/model")
        assert json.loads(connection.getresponse().read())["system"] == "anydoor"
        connection.close()


def test_other_pages_may_call_where_they_are_named(tiny_bundle: Path) -> None:
    with ServerThread(tiny_bundle, http="127.0.0.1:0", cors=("https://example.org",)) as server:
        address = http_address(server)
        asked = {"origin": "https://example.org", "access-control-request-method": "POST"}
        answer = request(address, "OPTIONS", "/v1/composite", headers=asked)
        assert answer.headers["access-control-allow-origin"] == "https://example.org"
        answer = request(address, "GET", "/healthz", headers={"origin": "https://example.com"})
        assert "access-control-allow-origin" not in answer.headers


def test_other_pages_may_not_call(address: str) -> None:
    answer = request(address, "GET", "/healthz", headers={"origin": "https://example.org"})
    assert "access-control-allow-origin" not in answer.headers


def test_heads_that_do_not_come_are_not_waited_for(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.server.http.door._HEAD_SECONDS", 0.2)
    host, _, port = address.rpartition(":")
    for begun in (b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n"):
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
            connection.sendall(begun)
            assert connection.recv(100) == b""


# --- documentation ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_commands_of_the_documentation_run(tmp_path: Path, segmenter_bundles: tuple[Path, Path]) -> None:
    root = Path(__file__).parents[3]
    text = (root / "docs" / "http.md").read_text("utf-8")
    commands = re.findall(r"^ {4}(curl (?:.*\\\n)*.*)", text, re.MULTILINE)
    assert len(commands) == 5
    segmenter, model = tuple(map(str, segmenter_bundles)), root / "examples" / "anydoor-small"
    with ServerThread(model, http="127.0.0.1:0", segmenter=segmenter) as server:
        for command in commands:
            there = command.replace("127.0.0.1:8000", http_address(server))
            there = re.sub(r"\b(?=\w+\.png\b)(?<!/)", f"{tmp_path}/", there)
            quietly = ["bash", "-c", f"{there} --fail-with-body --silent --show-error"]
            done = subprocess.run(quietly, check=False, capture_output=True, text=True, cwd=root)
            assert done.returncode == 0, done.stderr + done.stdout
    for name in ("out", "mask", "removed"):
        assert Image.open(tmp_path / f"{name}.png").size == (400, 300)


def test_the_studio_is_there_where_it_is_asked_for(tiny_bundle: Path, address: str) -> None:
    assert get(address, "/studio/").status == 404
    with ServerThread(tiny_bundle, http="127.0.0.1:0", studio=True) as server:
        page = get(http_address(server), "/studio/")
        assert b"<title>AnyDoor Studio</title>" in page.content
        assert page.headers["content-security-policy"].startswith("default-src 'self'")
        for name in re.findall(r'(?:src|href)="([\w.]+)"', page.content.decode()):
            assert get(http_address(server), f"/studio/{name}").status == 200, name
        assert get(http_address(server), "/").status == 307


def test_the_description_has_every_path(address: str, server: ServerThread) -> None:
    described = get(address, "/openapi.json").json
    for path, methods in described["paths"].items():
        for method in methods:
            there = path.replace("{id}", "job-0").replace("{name}", "nothing")
            answer = request(address, method.upper(), there, b"{}", {"content-type": "application/json"})
            assert str(answer.status) in described["paths"][path][method]["responses"], path
