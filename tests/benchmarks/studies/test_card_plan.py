"""The study of a card's memory plan, where ONNX Runtime's CUDA provider is not installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks.studies.card_plan import main
from benchmarks.support.card.page import memory_table
from benchmarks.support.empty_card import HostDevice

Capture = pytest.CaptureFixture[str]


def test_without_the_provider_there_is_one_sentence(tiny_bundle: Path, capsys: Capture) -> None:
    assert main([str(tiny_bundle)]) == 2
    assert re.fullmatch(r"card_plan\.py: .* (is|are) missing: .*\n", capsys.readouterr().err)


def test_a_folder_without_a_bundle(tmp_path: Path, capsys: Capture) -> None:
    assert main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_the_page_has_what_was_allocated_beside_the_plan() -> None:
    row = {"phase": "opened", "gb": 3.0819, "planned_gb": 8.0, "scratch_gb": 0.5012, "most_scratch_gb": 0.0}
    assert "| opened | 3.082 | 8.000 | 0.501 | 0.000 |" in memory_table([row], digits=3)


def test_memory_of_the_empty_card_is_counted() -> None:
    before, device = HostDevice.allocated, HostDevice()
    source, destination = device.allocate(1000), device.allocate(1000)
    assert HostDevice.allocated - before == 2000
    address, pinned = device.allocate_pinned(10)
    pinned[:] = np.arange(10)
    device.copy(source, address, 10)
    device.copy(destination, source, 10)
    pinned[:] = 0
    device.copy(address, destination, 10)
    np.testing.assert_array_equal(pinned, np.arange(10))
    device.free(source)
    assert HostDevice.allocated - before == 1000
    device.free_all()
    assert HostDevice.allocated == before


@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")
def test_the_libraries_below_the_provider_compile(tmp_path: Path) -> None:
    source = Path(__file__).parents[3] / "benchmarks" / "support" / "empty_card.c"
    command = ["cc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", str(tmp_path / "empty.so"), str(source)]
    subprocess.run(command, check=True)
