"""What a results file says of the machine: enough to compare two of them, nothing that names one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.support.machine import (
    PROCESSOR_FLAGS,
    describe,
    huge_page_mode,
    peak_memory_gb,
    processor_flags,
    reset_peak_memory,
)

X86 = """processor\t: 0
model name\t: Some Processor
flags\t\t: fpu sse2 avx avx2 bmi1 avx512f avx512_bf16 amx_bf16 amx_tile
vmx flags\t: vnmi avx2
bugs\t\t: none

processor\t: 1
flags\t\t: fpu
"""
ARM = """processor\t: 0
BogoMIPS\t: 62.50
Features\t: fp asimd aes sha2 bf16 i8mm
CPU implementer\t: 0x41
"""


@pytest.mark.parametrize(
    ("cpuinfo", "flags"),
    [
        (X86, ["avx2", "avx512f", "avx512_bf16", "amx_bf16"]),
        (ARM, ["asimd", "bf16"]),
        (X86.replace("avx2 bmi1 avx512f", "bmi1"), ["avx512_bf16", "amx_bf16"]),
        ("processor : 0\n", []),
        ("", []),
    ],
)
def test_flags_of_a_processor(cpuinfo: str, flags: list[str]) -> None:
    assert processor_flags(cpuinfo) == flags


def test_mode_of_huge_pages() -> None:
    assert huge_page_mode("always [madvise] never\n") == "madvise"
    assert huge_page_mode("[always] madvise never\n") == "always"
    assert huge_page_mode("") == "unknown"


def test_a_machine_is_described_and_not_named() -> None:
    found = describe()
    assert set(found) - {"card"} == {
        *("processor", "processor_flags", "cores", "memory_gb", "huge_pages"),
        *("load", "system", "python", "packages"),
    }
    assert set(found["processor_flags"]) <= set(PROCESSOR_FLAGS)  # type: ignore[call-overload]
    assert found["huge_pages"] in ("always", "madvise", "never", "unknown")
    text = json.dumps(found)
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes may use all cores")
def test_cores_are_those_that_the_process_may_use() -> None:
    code = (
        "import os; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1]);"
        "from benchmarks.support.machine import describe; print(describe()['cores'])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "1\n"


def test_the_peak_counts_from_the_last_reset() -> None:
    reset_peak_memory()
    before = peak_memory_gb()
    size = 100_000_000
    array = np.ones(size, np.uint8)
    assert peak_memory_gb() >= before + 0.9 * size / 1e9
    del array
    reset_peak_memory()
    assert peak_memory_gb() < before + 0.5 * size / 1e9
