"""Reads how much memory this process may take: the machine's, or less in a container (Linux control groups;
kernel documentation, admin-guide/cgroup-v2 and cgroup-v1/memory)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
OWN_GROUPS = Path("/proc/self/cgroup")
"""The file in which Linux names the control groups of this process."""
GROUPS = Path("/sys/fs/cgroup")
"""Where they are mounted."""

UNKNOWN = 1 << 50


def free_host_memory() -> int:
    """Returns bytes that this process can still take, as Linux estimates it; a great many where the system
    does not say."""
    return min([_available(), *(limit - used for limit, used in _limits())])


def usable_memory() -> int | None:
    """Returns bytes of memory that there are for this process and all others of its container; None where
    the system does not say."""
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    return min([machine, *(limit for limit, _ in _limits())])


def _available() -> int:
    try:
        lines = MEMINFO.read_text("ascii").splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return UNKNOWN


def _limits() -> Iterator[tuple[int, int]]:
    """Yields limit and used bytes of every control group with a limit that this process is in.

    What the kernel would give back at once is not counted as used: pages of files that nobody has used for a
    while.
    """
    for folder, names in _groups():
        try:
            limit = int((folder / names[0]).read_text("ascii"))  # or "max"
            used = int((folder / names[1]).read_text("ascii"))
            entries = dict(line.split() for line in (folder / "memory.stat").read_text("ascii").splitlines())
            yield limit, max(used - int(entries.get(names[2], 0)), 0)
        except (OSError, ValueError):
            continue


def _groups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Yields the folders of this process's groups and of those that they are in, with the names of limit and
    use, and of the entry for unused pages of files."""
    try:
        lines = OWN_GROUPS.read_text("utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if not controllers:
            root, names = GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = GROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / own.lstrip("/")
        # a container may see its own group as the root, under the name that it has outside
        for each in (folder, *folder.parents) if folder.is_relative_to(root) else (root,):
            yield each, names
            if each == root:
                break
