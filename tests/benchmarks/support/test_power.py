"""Energy and device memory from what nvidia-smi, tegrastats and RAPL say."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest

from benchmarks.support import power
from benchmarks.support.power import (
    PowerMeter,
    RaplCounters,
    Reading,
    device_mb,
    joules,
    parse_nvidia_smi,
    parse_tegrastats,
)


def test_a_line_of_nvidia_smi() -> None:
    """It gives MiB."""
    assert parse_nvidia_smi("72.31, 1024\n", at=5.0) == Reading(5.0, 72.31, pytest.approx(1073.741824))
    assert parse_nvidia_smi("[N/A], 1024\n", at=5.0) is None


def test_a_line_of_tegrastats_with_the_input_of_the_module() -> None:
    """As on Orin NX and Nano: the input has the rails in it."""
    line = "RAM 2448/7772MB (lfb 4x4MB) CPU [4%@729] VDD_IN 5040mW/4800mW VDD_CPU_GPU_CV 960mW/900mW"
    assert parse_tegrastats(line, at=1.0) == Reading(1.0, pytest.approx(5.04))


def test_a_line_of_tegrastats_with_rails_only() -> None:
    """As on AGX Orin."""
    line = "RAM 3162/30536MB VDD_GPU_SOC 4000mW/4000mW VDD_CPU_CV 800mW/800mW VIN_SYS_5V0 4040mW/4040mW"
    assert parse_tegrastats(line, at=1.0) == Reading(1.0, pytest.approx(8.84))
    assert parse_tegrastats("RAM 3162/30536MB", at=1.0) is None


def counters(root: Path, **microjoules: int) -> None:
    for name, value in microjoules.items():
        folder = root / name.replace("_", ":")
        folder.mkdir(exist_ok=True)
        (folder / "energy_uj").write_text(f"{value}\n")
        (folder / "max_energy_range_uj").write_text("10000000\n")


def rapl_name(*numbers: int) -> str:
    return "_".join(["intel-rapl", *map(str, numbers)])


def test_rapl_adds_packages_up_and_leaves_their_parts_out(tmp_path: Path) -> None:
    first, second, core = rapl_name(0), rapl_name(1), rapl_name(0, 0)
    counters(tmp_path, **{first: 1_000_000, second: 0, core: 0})
    meter = RaplCounters(tmp_path)
    assert meter.read(at=10.0) is None
    counters(tmp_path, **{first: 4_000_000, second: 1_000_000, core: 2_000_000})
    assert meter.read(at=12.0) == Reading(12.0, pytest.approx(2.0))


def test_rapl_counters_start_again_from_zero(tmp_path: Path) -> None:
    counters(tmp_path, **{rapl_name(0): 9_000_000})
    meter = RaplCounters(tmp_path)
    meter.read(at=1.0)
    counters(tmp_path, **{rapl_name(0): 1_000_000})
    assert meter.read(at=2.0) == Reading(2.0, pytest.approx(2.0))


def test_a_machine_without_counters(tmp_path: Path) -> None:
    assert not RaplCounters(tmp_path)


READINGS = [Reading(0.0, 50, 300), Reading(1.0, 100, 900), Reading(2.0, 200, 1500), Reading(3.0, 60, 400)]


def test_energy_is_mean_power_times_time() -> None:
    assert joules(READINGS, started=0.9, seconds=1.5) == pytest.approx(150 * 1.5)
    assert joules(READINGS, started=5.0, seconds=1.0) is None


def test_device_memory_is_what_was_added() -> None:
    assert device_mb(READINGS, 0.5, 2.5) == 1200
    assert device_mb([Reading(0.0, 50)], 0.0, 1.0) is None
    assert device_mb(READINGS, -1.0, 2.5) is None  # nothing says what others had


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvidia-smi, yet to be written, that is found before any other."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    path = tmp_path / "nvidia-smi"
    path.touch(0o755)
    return path


def test_what_others_hold_on_the_card_does_not_count(nvidia_smi: Path) -> None:
    """Although the first reading comes late."""
    nvidia_smi.write_text("#!/bin/sh\nsleep 1\nwhile echo 50, 300; do sleep 0.05; done\n")
    with PowerMeter() as meter:
        meter.settle()
        started = time.monotonic()
        meter.settle()
        assert meter.device_mb(started, math.inf) == 0


def test_a_card_that_says_nothing_is_waited_for_once(
    nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi.write_text("#!/bin/sh\nexec sleep 600\n")
    monkeypatch.setattr(power, "_PATIENCE_SECONDS", 0.5)
    pauses: list[float] = []
    monkeypatch.setattr(power.time, "sleep", pauses.append)
    with PowerMeter() as meter:
        meter.settle()
        assert pauses
        pauses.clear()
        meter.settle()
        assert not pauses
        assert meter.device_mb(0.0, math.inf) is None
