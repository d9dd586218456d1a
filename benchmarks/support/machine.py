"""Describes the machine, and measures the memory of a part of a program."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PROCESSOR_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
"""Instruction sets that decide how fast a network runs; the last two are those of ARM."""

_CPUINFO = Path("/proc/cpuinfo")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_STATUS = Path("/proc/self/status")
_PACKAGES = (
    *("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt_rtx"),
    *("torch", "onnx", "diffusers", "transformers"),
)
_CLEAR_REFS = Path("/proc/self/clear_refs")


def describe() -> dict[str, object]:
    """Return processor, card, memory, versions and load, for the head of a results file.

    Nothing in it identifies the machine: no host name, no paths.
    """
    packages = {}
    for package in _PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        **_card(),
        "processor": _processor(),
        "processor_flags": processor_flags(_read(_CPUINFO)),
        "cores": cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "huge_pages": huge_page_mode(_read(_HUGE_PAGES)),
        # runnable processes, mean of the last minute
        "load": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": packages,
    }


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_flags(cpuinfo: str) -> list[str]:
    """Return those of `PROCESSOR_FLAGS` in a /proc/cpuinfo, where x86 has flags and ARM has Features."""
    lines = [line.split(":", 1) for line in cpuinfo.splitlines() if line.startswith(("flags", "Features"))]
    found = set(lines[0][1].split()) if lines else set()
    return [flag for flag in PROCESSOR_FLAGS if flag in found]


def huge_page_mode(enabled: str) -> str:
    """Return the word in brackets of `always [madvise] never`; unknown if there is none."""
    return enabled.partition("[")[2].partition("]")[0] or "unknown"


def reset_peak_memory() -> None:
    """Reset the peak of this process's resident memory (Linux)."""
    _CLEAR_REFS.write_text("5")


def peak_memory_gb() -> float:
    """Return the largest resident memory since the last reset, in GB (Linux).

    Mapped files count while they are resident, although the system may take their pages back.
    """
    line = next(line for line in _STATUS.read_text("ascii").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def _card() -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader", "--id=0"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"card": found.stdout.strip()}


def _processor() -> str:
    names = (line for line in _read(_CPUINFO).splitlines() if line.startswith("model name"))
    name = next(names, "")
    return name.partition(":")[2].strip() or platform.processor() or "unknown"


def _read(path: Path) -> str:
    """Read a file of the kernel; empty if there is none."""
    try:
        return path.read_text("utf-8")
    except OSError:
        return ""
