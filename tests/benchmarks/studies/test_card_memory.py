"""The study of a card's memory, rehearsed on a CPU with the smallest network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.studies.card_memory import WAYS, main, report
from engines.backends.onnxruntime.cuda import ALLOCATION, session_options, share_scratch
from engines.bundle import Bundle
from tests.support.simulated_card import SimulatedDevice
from tests.support.simulated_provider import SimulatedLibrary

Capture = pytest.CaptureFixture[str]


def test_ways_are_measured_one_after_the_other(tmp_path: Path, tiny_bundle: Path, capsys: Capture) -> None:
    (tmp_path / "tiny").symlink_to(tiny_bundle)
    output = tmp_path / "memory.json"
    ways = ["as it is", "reuse"]
    arguments = ["--device", "cpu", "--bundles", str(tmp_path), "--output", str(output), "--ways", *ways]
    assert main(arguments) == 0
    found = json.loads(output.read_text("utf-8"))["ways"]
    assert [each["way"] for each in found] == ways
    assert all(value > 0 for each in found for value in each["seconds"].values())
    printed = capsys.readouterr().out
    assert "| GB after | as it is | reuse |" in printed
    assert "one more picture" in printed


def test_a_way_that_fails_says_why_beside_the_others() -> None:
    rows = [{"phase": "first", "gb": 7.5, "grown": [[540 << 20, 1 << 30]]}]
    text = report(
        [
            {"way": "reuse", "failure": "out of memory"},
            {"way": "as it is", "phases": rows, "seconds": {"re-roll": 0.25}},
        ]
    )
    assert "| first | 7.50 |" in text
    assert "- reuse: out of memory" in text
    assert "- as it is: re-roll 0.250 s. Scratch memory in MB, by phase: first: 1074 for 566.2" in text


def test_without_a_card_there_is_one_sentence(tmp_path: Path, capsys: Capture) -> None:
    assert main(["--output", str(tmp_path / "memory.json")]) == 2
    assert "has no cuda provider" in capsys.readouterr().err


@pytest.mark.parametrize("way", WAYS)
def test_the_library_takes_every_way(way: str, tiny_bundle: Path) -> None:
    bundle, allocation = Bundle.open(tiny_bundle), WAYS[way]
    library = SimulatedLibrary(bundle, SimulatedDevice())
    share_scratch(library, 1 << 20, 1 << 30, allocation)
    (arena,) = library.arenas
    assert arena["max_dead_bytes_per_chunk"] == allocation.largest_rest
    options = session_options(library, bundle, allocation)
    assert options.enable_mem_reuse == allocation.reuse
    assert WAYS["as it is"] is ALLOCATION
