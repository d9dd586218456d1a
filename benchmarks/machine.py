"""What the machine is, and how much memory a part of a program takes."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def describe() -> dict[str, object]:
    """Processor, cores, memory and versions, for the head of a results file."""
    packages = {}
    for package in ("numpy", "onnxruntime", "torch", "onnx", "diffusers", "transformers"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": packages,
    }


def reset_peak_memory() -> None:
    """Starts measuring the peak of this process's resident memory anew (Linux)."""
    _CLEAR_REFS.write_text("5")


def peak_memory_gb() -> float:
    """Largest resident memory since the last reset, GB.

    Mapped files count while they are resident, though the system may take that part back.
    """
    line = next(line for line in _STATUS.read_text("ascii").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
