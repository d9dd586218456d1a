"""card.py's part about memory: its phases on a simulated card."""

from __future__ import annotations

from pathlib import Path

from benchmarks.support.card.memory import phases
from benchmarks.support.card.page import page
from benchmarks.support.card.runner import Runner
from benchmarks.support.card.task import Task
from benchmarks.support.power import PowerMeter
from engines.bundle import Bundle
from engines.options import EngineOptions
from tests.support.simulated_engine import ProviderSimulation


def test_every_phase_says_what_is_in_use_and_what_is_planned(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    simulation = ProviderSimulation(bundle)

    def used() -> float:
        return simulation.device.allocated / 1e9

    def scratch() -> tuple[int, int]:
        heap = simulation.sessions.memory.scratch
        return heap.nbytes, heap.most_used

    rows = {
        row["phase"]: row
        for row in phases(bundle, EngineOptions(), 2, lambda *_: simulation.engine, used, scratch)  # type: ignore[arg-type,return-value]
    }
    assert list(rows) == [
        "before",
        "opened",
        *(f"weights of {graph}" for graph in bundle.manifest.specs),
        "first picture",
        "re-roll",
        "another picture",
        "4 samples",
        "4 samples again",
        "one more picture",
    ]
    assert rows["before"]["planned_gb"] is None
    assert rows["opened"]["planned_gb"] == simulation.plan.total / 1e9
    # nothing is allocated after the weights, and all of it is planned
    last = f"weights of {list(bundle.manifest.specs)[-1]}"
    assert rows[last]["gb"] == rows["one more picture"]["gb"] > simulation.plan.arena / 1e9
    assert rows["one more picture"]["scratch_gb"] == simulation.plan.library / 1e9
    assert rows["opened"]["most_scratch_gb"] == 0 < rows["first picture"]["most_scratch_gb"]


def test_a_part_that_is_stopped_leaves_the_rows_that_it_had(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny").symlink_to(tiny_bundle)
    found = Runner(PowerMeter(), None, {}).run(Task("memory", "cpu", str(tmp_path), 10.0))
    part = next(found)
    found.close()
    assert [row["phase"] for row in part["rows"]] == ["before"]
    assert part["failure"] == "it was stopped before its end"


def test_the_page_has_what_is_in_use_beside_what_was_planned() -> None:
    rows = [
        {"phase": "before", "gb": 0.0, "planned_gb": None, "scratch_gb": 0.0, "most_scratch_gb": 0.0},
        {"phase": "first", "gb": 7.5, "planned_gb": 8.0, "scratch_gb": 0.5, "most_scratch_gb": 0.434},
    ]
    results = {
        "command": "card.py",
        "date": "2026-11-27",
        "card": "a card",
        "machine": {"packages": {}, "cores": 1, "processor": "", "system": "", "python": ""},
        "network": {"size": "full", "precision": "fp16", "target": "cuda", "resolution": 512, "max_batch": 4},
        "peak": None,
        "no_limit": "",
        "seconds": 1.0,
        "parts": [{"name": "memory", "failure": "", "rows": rows}],
    }
    assert "| first | 7.50 | 8.00 | 0.50 | 0.43 |" in page(results)
