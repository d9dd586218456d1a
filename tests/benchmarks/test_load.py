"""The load test: no request comes twice, one request alone is one of the load, and no failure is hidden."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.load import main
from benchmarks.support import open_load
from benchmarks.support.open_load import BATCHING, Arrival, LoadResult, LoadTest, Outcome, summarize
from engines.errors import AnyDoorError

STEPS = (10, 20, 30)


class RecordedServer:
    """Stands for a server; every picture takes it a tenth of a second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alone: list[list[int]] = []
        """Steps of each series of requests that are alone."""
        self.offered: list[list[bytes]] = []
        """Requests of each row."""
        monkeypatch.setattr(open_load, "ServerProcess", self)
        monkeypatch.setattr(open_load, "one_by_one", self.one_by_one)
        monkeypatch.setattr(open_load, "offer", self.offer)

    def __call__(self, *flags: object) -> RecordedServer:
        return self

    def __enter__(self) -> SimpleNamespace:
        return SimpleNamespace(address="")

    def __exit__(self, *error: object) -> None:
        pass

    async def one_by_one(self, address: str, steps: Iterable[int], seed: int) -> float:
        self.alone.append(list(steps))
        return 0.1

    async def offer(self, address: str, load: Sequence[Arrival], deadline: float) -> list[Outcome]:
        self.offered.append([each.message.SerializeToString() for each in load])
        return [Outcome("OK", 0.1) for _ in load]


def test_no_request_of_a_rate_comes_again_at_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a server would have the maps of those before."""
    server = RecordedServer(monkeypatch)
    assert len(list(LoadTest(Path(), (0.5, 1.0), STEPS, requests=20).rows())) == 6
    slow, fast = server.offered[:2]
    assert not set(slow) & set(fast)
    # all ways of batching get the same
    assert server.offered == [slow, fast] * len(BATCHING)


def test_one_request_alone_has_the_mean_steps_of_the_load_and_is_warm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = RecordedServer(monkeypatch)
    test = LoadTest(Path(), (1.0,), STEPS, requests=1)
    list(test.rows())
    warm_up, timed, *others = server.alone
    assert set(warm_up) == set(STEPS)
    assert all(timed.count(steps) == timed.count(STEPS[0]) > 0 for steps in STEPS)
    assert others == [warm_up] * 2
    assert test.alone == 0.1


def test_what_is_neither_answered_nor_refused_nor_late_has_failed() -> None:
    codes = ("OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNAVAILABLE", "INTERNAL", "OK")
    row = summarize("static", 1.0, 1.0, 6.0, 1.0, [Outcome(code, 0.5) for code in codes])
    assert (row.refused, row.late, row.failed, row.requests) == (1, 1, 2, 6)


def row(failed: int) -> LoadResult:
    return LoadResult("static", 1.0, 2.0, 1.5, 0.1, 0.2, 0.3, refused=0, late=0, failed=failed, requests=9)


def with_rows(monkeypatch: pytest.MonkeyPatch, *rows: LoadResult, error: str = "") -> None:
    def measured(self: LoadTest) -> Iterator[LoadResult]:
        yield from rows
        if error:
            raise AnyDoorError(error)

    monkeypatch.setattr(LoadTest, "rows", measured)


@pytest.mark.parametrize(("failed", "code"), [(0, 0), (3, 1)])
def test_a_request_that_failed_is_told_by_the_exit_code(
    failed: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_rows(monkeypatch, row(0), row(failed))
    assert main(["--quiet", "--seed", "7", "--output", str(tmp_path / "load.png")]) == code
    results = json.loads((tmp_path / "load.json").read_text("utf-8"))
    assert [each["failed"] for each in results["rows"]] == [0, failed]
    output = tmp_path / "load.png"
    assert results["command"] == f"python benchmarks/load.py --quiet --seed 7 --output {output}"


def test_a_server_that_does_not_start_takes_no_row_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_rows(monkeypatch, row(0), error="the server did not start")
    assert main(["--quiet", "--output", str(tmp_path / "load.png")]) == 2
    assert len(json.loads((tmp_path / "load.json").read_text("utf-8"))["rows"]) == 1
    assert capsys.readouterr().err == "load.py: the server did not start\n"


@pytest.mark.slow
def test_a_server_bears_a_load(tiny_bundle: Path, tmp_path: Path) -> None:
    few = ["--loads", "0.5", "--requests", "3", "--steps", "2", "3", "--deadline", "1000", "--quiet"]
    assert main(["--bundle", str(tiny_bundle), *few, "--output", str(tmp_path / "load.png")]) == 0
    results = json.loads((tmp_path / "load.json").read_text("utf-8"))
    assert [each["mode"] for each in results["rows"]] == list(BATCHING)
    assert results["alone"] > 0
