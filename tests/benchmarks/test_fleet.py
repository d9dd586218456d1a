"""The simulated fleet against queueing theory, and what affinity does in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.fleet import main
from benchmarks.support.fleet_model import Fleet, FleetResult, Load, ServiceTimes, _Placement

ALONE = ServiceTimes(step=[0.01], steps=50, maps=0.3, rest=0.2)
"""A second for each picture, one after the other."""


def run(servers: int, load: Load, affinity: bool, times: ServiceTimes = ALONE, kept: int = 10) -> FleetResult:
    return Fleet(servers, times, load, affinity, kept, seed=1).run(warm_up=200, seconds=20_000 / servers)


@pytest.mark.parametrize("busy", [0.3, 0.6, 0.8])
def test_one_server_waits_as_theory_says(busy: float) -> None:
    """Poisson arrivals, one server, all of one length (M/D/1): the mean wait is busy / (2 (1 - busy)) times
    that length (Pollaczek and Khinchine)."""
    result = run(1, Load(per_server=busy, rerolls=0, pause=1), affinity=False)
    assert result.busy == pytest.approx(busy, rel=0.05)
    assert result.mean == pytest.approx(1 + busy / (2 * (1 - busy)), rel=0.1)
    assert result.with_maps == 0


def test_two_samples_share_their_calls() -> None:
    """A load that one at a time could not bear."""
    load = Load(per_server=1.2, rerolls=0, pause=1)
    together = ServiceTimes(step=[0.01, 0.012], steps=50, maps=0.1, rest=0.1)
    assert run(1, load, False, together).busy < 0.9
    assert run(1, load, False, ServiceTimes([0.01], 50, 0.3, 0.2)).busy == 1


def test_affinity_finds_the_maps() -> None:
    """With a mean of three re-rolls, three pictures of four can have theirs."""
    load = Load(per_server=0.4, rerolls=3, pause=5)
    times = ServiceTimes([0.01, 0.015, 0.02, 0.025], steps=50, maps=0.3, rest=0.2)
    without, with_it = run(20, load, False, times), run(20, load, True, times)
    assert without.with_maps < 0.15
    assert with_it.with_maps == pytest.approx(0.75, abs=0.05)
    assert with_it.busy < without.busy
    assert with_it.mean < without.mean
    assert run(20, load, True, times, kept=1).with_maps < with_it.with_maps - 0.1


class RecordedFleet(Fleet):
    """Notes when placements arrive."""

    def __init__(self, affinity: bool, kept: int, seed: int) -> None:
        load = Load(per_server=0.8, rerolls=3, pause=15)
        super().__init__(10, ServiceTimes([0.01], 50, 0.3, 0.2), load, affinity, kept, seed)
        self.arrivals: list[tuple[float, int]] = []
        self.run(warm_up=30, seconds=60)

    def _arrive(self, placement: _Placement, now: float) -> None:
        if placement.home is None:
            self.arrivals.append((now, placement.pictures))
        super()._arrive(placement, now)


def test_the_same_placements_arrive_whatever_servers_do_with_them() -> None:
    fleets = [RecordedFleet(*how, seed=1) for how in ((False, 3), (True, 3), (True, 30))]
    assert len(fleets[0].arrivals) > 100
    assert all(fleet.arrivals == fleets[0].arrivals for fleet in fleets)
    assert RecordedFleet(True, 3, seed=2).arrivals != fleets[0].arrivals


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "fleet.json"
    given = ["--servers", "2", "--kept", "3", "--loads", "0.5", "--seconds", "10", f"--output={output}"]
    assert main(given) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["affinity"] for row in rows] == [False, True]
    assert f"{rows[0]['p95']:.2f}" in capsys.readouterr().out
    assert main(["--reroll", "0.1"]) == 2
    assert (
        "a picture must take as long as a re-roll, and that as long as its steps" in capsys.readouterr().err
    )
