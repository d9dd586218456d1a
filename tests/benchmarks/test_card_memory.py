"""card.py's part about memory: its phases on a simulated card, and what the provider's arena is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.support.card.memory import phases
from benchmarks.support.card.page import page
from benchmarks.support.card.runner import Runner
from benchmarks.support.card.task import Task
from benchmarks.support.power import PowerMeter
from engines.backends.onnxruntime.engine import OnnxRuntimeEngine
from engines.bundle import Bundle
from engines.options import EngineOptions
from tests.support.simulated_engine import ProviderSimulation


def test_every_phase_says_what_is_in_use_and_what_is_planned(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    simulation = ProviderSimulation(bundle)

    def used() -> float:
        return simulation.device.allocated / 1e9

    rows = {
        row["phase"]: row
        for row in phases(bundle, EngineOptions(), 2, lambda *_: simulation.engine, used)  # type: ignore[arg-type,return-value]
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
    # what the simulation keeps of the weights is on the host
    assert rows["opened"]["gb"] == rows["one more picture"]["gb"] > simulation.plan.arena / 1e9


def test_every_piece_that_the_librarys_arena_takes_is_found_in_its_log(
    tiny_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = Bundle.open(tiny_bundle)
    engine = OnnxRuntimeEngine(bundle)
    # on a CPU it has the same arena, which is switched off
    engine._options.enable_cpu_mem_arena = True
    rows = list(phases(bundle, EngineOptions(), 2, lambda *_: engine))  # type: ignore[arg-type,return-value]
    grown = [piece for row in rows for piece in row["grown"]]
    assert grown
    assert all(0 < asked <= taken for asked, taken in grown)
    assert "BFCArena" not in capfd.readouterr().err


def test_a_part_that_is_stopped_leaves_the_rows_that_it_had(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny").symlink_to(tiny_bundle)
    found = Runner(PowerMeter(), None, {}).run(Task("memory", "cpu", str(tmp_path), 10.0))
    part = next(found)
    found.close()
    assert [row["phase"] for row in part["rows"]] == ["before"]
    assert part["failure"] == "it was stopped before its end"


def test_the_page_has_what_was_asked_for_beside_what_was_taken() -> None:
    rows = [
        {"phase": "before", "gb": 0.0, "planned_gb": None, "grown": []},
        {"phase": "first", "gb": 7.5, "planned_gb": 8.0, "grown": [[540 << 20, 1 << 30], [256, 1 << 26]]},
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
    assert "| first | 7.50 | 8.00 | 1074 for 566.2, 67 for 0.0 |" in page(results)
