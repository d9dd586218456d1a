"""Jobs over HTTP: answered at once, fetched later."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.server.http.door import Door
from runtime.server.http.jobs import Job, _next_to_go
from tests.runtime.server.test_http import fields, form, http_address
from tests.support.http import get, post, post_form, request
from tests.support.serving import ServerThread, wait_until


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[ServerThread]:
    with ServerThread(tiny_bundle, http="127.0.0.1:0", max_batch=1, queue=2) as server:
        yield server


@pytest.fixture
def address(server: ServerThread) -> Iterator[str]:
    yield http_address(server)
    server.engine.release()


def ended(address: str, job: Any) -> Any:
    wait_until(lambda: get(address, f"/v1/jobs/{job['id']}").json["status"] not in ("queued", "running"))
    return get(address, f"/v1/jobs/{job['id']}").json


def test_a_job_is_fetched_when_it_is_done(server: ServerThread, address: str) -> None:
    picture = base64.b64decode(post(address, "/v1/composite", fields()).json["images"][0]["image"])
    server.engine.hold()
    answer = post_form(address, "/v1/jobs", form())
    assert answer.status == 202
    path = answer.headers["location"]
    assert path == f"/v1/jobs/{answer.json['id']}"
    assert get(address, path).json["status"] in ("queued", "running")
    too_early = get(address, f"{path}/result")
    assert too_early.status == 409
    assert "its result is there when it has succeeded" in too_early.error["message"]
    server.engine.release()
    done = ended(address, answer.json)
    assert done["status"] == "succeeded"
    assert (done["done"], done["total"]) == (2, 2)
    assert done["result"] == f"{path}/result"
    assert base64.b64decode(get(address, done["result"]).json["images"][0]["image"]) == picture
    as_file = get(address, done["result"], accept="image/png")
    assert as_file.content == picture
    assert as_file.headers["x-seed"] == "7"


def test_what_happens_is_followed(server: ServerThread, address: str) -> None:
    server.engine.hold()
    job = post(address, "/v1/jobs", fields(sampling={"steps": 3}, preview_every=1)).json
    server.engine.release()
    answer = get(address, f"/v1/jobs/{job['id']}/events")
    names = [name for name, _ in answer.events]
    assert names[-1] == "succeeded"
    assert answer.events[-1][1]["result"] == f"/v1/jobs/{job['id']}/result"


def test_a_job_that_fails_says_why(address: str) -> None:
    job = post(address, "/v1/jobs", fields(scene=base64.b64encode(b"text").decode())).json
    failed = ended(address, job)
    assert failed["status"] == "failed"
    assert failed["error"]["param"] == "scene"
    assert get(address, f"/v1/jobs/{job['id']}/result").status == 404


def test_what_can_be_refused_at_once_is(address: str) -> None:
    answer = post(address, "/v1/jobs", fields(seed=-1))
    assert (answer.status, answer.error["param"]) == (400, "seed")
    answer = post(address, "/v1/jobs", fields(num_images=1000))
    assert (answer.status, answer.error["param"]) == (400, "num_images")


def test_a_job_is_cancelled(server: ServerThread, address: str) -> None:
    server.engine.hold()
    job = post(address, "/v1/jobs", fields()).json
    answer = request(address, "DELETE", f"/v1/jobs/{job['id']}")
    assert answer.json == {"id": job["id"], "object": "job", "deleted": True}
    wait_until(lambda: not server.batcher.tickets)
    assert get(address, f"/v1/jobs/{job['id']}").status == 404


def test_a_full_queue_refuses_jobs_too(server: ServerThread, address: str) -> None:
    server.engine.hold()
    jobs = [post(address, "/v1/jobs", fields()) for _ in range(4)]
    assert [answer.status for answer in jobs] == [202, 202, 202, 429]
    server.engine.release()
    for answer in jobs[:3]:
        assert ended(address, answer.json)["status"] == "succeeded"


def test_jobs_of_others_do_not_exist(tiny_bundle: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("first\nsecond\n")
    tokens.chmod(0o600)
    with ServerThread(tiny_bundle, http="127.0.0.1:0", tokens=str(tokens)) as server:
        address = http_address(server)
        job = post(address, "/v1/jobs", fields(), authorization="Bearer first").json
        path = f"/v1/jobs/{job['id']}"
        assert get(address, path, authorization="Bearer second").status == 404
        assert request(address, "DELETE", path, headers={"authorization": "Bearer second"}).status == 404
        assert get(address, path, authorization="Bearer first").status == 200


def test_results_go_to_a_folder(tiny_bundle: Path, tmp_path: Path) -> None:
    with ServerThread(tiny_bundle, http="127.0.0.1:0", job_folder=str(tmp_path)) as server:
        address = http_address(server)
        job = post(address, "/v1/jobs", fields()).json
        done = ended(address, job)
        (file,) = tmp_path.iterdir()
        assert get(address, done["result"]).content == file.read_bytes()
        assert server.server.ledger.taken == 0
        request(address, "DELETE", f"/v1/jobs/{job['id']}")
        assert not list(tmp_path.iterdir())


def test_files_of_an_earlier_server_are_bounded_and_end(tiny_bundle: Path, tmp_path: Path) -> None:
    """They count as results, the oldest go first, and after an hour all are gone."""
    now, (oldest, old, newer) = time.time(), (f"job-{letter * 32}" for letter in "abc")
    for name, hours in ((oldest, 2.0), (old, 0.9), (newer, 0.5), ("job-of-others", 2.0)):
        file = tmp_path / f"{name}.json"
        file.write_bytes(bytes(1000))
        os.utime(file, (now - 3600 * hours,) * 2)

    def kept() -> set[str]:
        return {file.stem for file in tmp_path.iterdir()}

    settings = {"job_folder": str(tmp_path), "job_folder_bytes": 2500}
    with ServerThread(tiny_bundle, http="127.0.0.1:0", **settings) as server:
        address, jobs = http_address(server), server.server._jobs
        assert jobs
        get(address, "/v1/jobs/none")
        assert kept() == {old, newer, "job-of-others"}
        jobs._room = 10**9
        done = ended(address, post(address, "/v1/jobs", fields()).json)
        assert kept() == {old, newer, "job-of-others", done["id"]}
        jobs._room = (tmp_path / f"{done['id']}.json").stat().st_size + 1500
        assert get(address, done["result"]).status == 200
        assert kept() == {newer, "job-of-others", done["id"]}


def test_a_result_that_is_kept_can_be_fetched(tiny_bundle: Path) -> None:
    """Up to the quarter of the memory for requests that results may have; as a file, up to a sixth."""
    with ServerThread(tiny_bundle, http="127.0.0.1:0") as server:
        address, ledger = http_address(server), server.server.ledger
        done = ended(address, post(address, "/v1/jobs", fields()).json)
        ledger.capacity = 4 * ledger.taken
        answer = get(address, done["result"])
        assert answer.status == 200
        assert len(answer.content) == ledger.taken
        ledger.capacity = 6 * ledger.taken
        assert get(address, done["result"], accept="image/png").status == 200


def test_several_pictures_are_no_file(address: str) -> None:
    done = ended(address, post(address, "/v1/jobs", fields(num_images=2)).json)
    answer = get(address, done["result"], accept="image/png")
    assert answer.status == 400
    assert "only a single picture can be returned as a file" in answer.error["message"]


def test_a_file_comes_with_what_is_to_be_known(address: str) -> None:
    done = ended(address, post(address, "/v1/jobs", fields()).json)
    warnings = get(address, done["result"]).json["warnings"]
    assert warnings
    assert json.loads(get(address, done["result"], accept="image/png").headers["x-warnings"]) == warnings


def test_results_are_bounded_and_end(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ServerThread(tiny_bundle, http="127.0.0.1:0") as server:
        address, jobs = http_address(server), server.server._jobs
        assert jobs
        first = ended(address, post(address, "/v1/jobs", fields()).json)
        kept = server.server.ledger.taken
        assert kept > 0
        jobs._room = 1.5 * kept
        second = post(address, "/v1/jobs", fields()).json
        wait_until(lambda: not jobs._jobs[first["id"]].nbytes)  # also while nobody asks for one
        second = ended(address, second)
        gone = get(address, first["result"])
        assert gone.status == 404
        assert "its result made room for newer ones" in gone.error["message"]
        assert get(address, second["result"]).status == 200
        monkeypatch.setattr("runtime.server.http.jobs.KEPT_SECONDS", -1.0)
        assert get(address, f"/v1/jobs/{second['id']}").status == 404
        assert server.server.ledger.taken == 0


def test_so_many_jobs_are_known(server: ServerThread, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more, the oldest that have ended are forgotten, and none that runs."""
    monkeypatch.setattr("runtime.server.http.jobs._MOST_JOBS", 2)

    def statuses(jobs: list[Any]) -> list[int]:
        return [get(address, f"/v1/jobs/{job['id']}").status for job in jobs]

    done = [ended(address, post(address, "/v1/jobs", fields()).json) for _ in range(3)]
    assert statuses(done) == [404, 200, 200]
    server.engine.hold()
    running = [post(address, "/v1/jobs", fields()).json for _ in range(3)]
    assert statuses(running) == [200, 200, 200]
    assert statuses(done) == [404, 404, 404]


def test_the_oldest_job_goes_of_whoever_has_most() -> None:
    """Of those that have ended, by what counts: here bytes of results, or jobs."""

    def job(client: str, ended: float | None, nbytes: int) -> Job:
        return Job(client, "", "PNG", ended=ended, nbytes=nbytes)

    first, second = job("one", 3.0, 10), job("one", 4.0, 10)
    without, running, others = job("one", 1.0, 0), job("one", None, 50), job("other", 2.0, 19)
    jobs = {each.id: each for each in (second, first, without, running, others)}
    assert _next_to_go(jobs, lambda job: job.nbytes) is first
    assert _next_to_go(jobs, lambda job: 1) is without
    others.nbytes = 21
    assert _next_to_go(jobs, lambda job: job.nbytes) is others
    assert _next_to_go({running.id: running}, lambda job: 1) is None


def test_a_server_that_stops_finishes_them(tiny_bundle: Path, tmp_path: Path) -> None:
    with ServerThread(tiny_bundle, http="127.0.0.1:0", job_folder=str(tmp_path)) as server:
        post(http_address(server), "/v1/jobs", fields())
    assert len(list(tmp_path.iterdir())) == 1


def test_where_several_servers_answer_there_are_no_jobs(tiny_bundle: Path) -> None:
    with ServerThread(tiny_bundle) as server:
        door = Door("127.0.0.1:0", server.server.http_app(with_jobs=False), None, connections=8)

        async def open_and_ask() -> None:
            door.start()
            for path in ("/v1/jobs", "/v1/jobs/job-0/result"):
                answer = await asyncio.to_thread(post, door.address, path, fields())
                assert answer.status == 404
                assert "jobs are not available here, because" in answer.error["message"]
            described = (await asyncio.to_thread(get, door.address, "/openapi.json")).content
            assert b"/v1/edit" in described
            assert b"/v1/job" not in described
            assert b"Job" not in described
            await door.stop()

        server.run(open_and_ask())
