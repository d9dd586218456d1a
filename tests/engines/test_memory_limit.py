"""The memory that a process may take: the machine's, or less in a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines import memory_limit
from engines.memory_limit import free_host_memory, usable_memory

GB = 10**9


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 20 GB of free memory; its files are a test's to write."""
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {20 * GB // 1024} kB\n")
    monkeypatch.setattr(memory_limit, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory_limit, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory_limit, "GROUPS", tmp_path / "cgroup")
    return tmp_path


def group(folder: Path, names: tuple[str, str], limit: str, used: int, unused_files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{unused_files}\n")


V2 = ("memory.max", "memory.current")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def test_without_control_groups_it_is_the_machines(system: Path) -> None:
    assert free_host_memory() == pytest.approx(20 * GB, abs=1024)
    assert (usable_memory() or 0) > GB


def test_a_container_may_take_what_its_group_leaves(system: Path) -> None:
    (system / "own").write_text("0::/\n")
    group(system / "cgroup", V2, str(8 * GB), 3 * GB, f"inactive_file {1 * GB}")
    assert free_host_memory() == 6 * GB
    assert usable_memory() == 8 * GB


def test_the_tightest_of_nested_groups_counts(system: Path) -> None:
    (system / "own").write_text("0::/pod/server\n")
    group(system / "cgroup" / "pod", V2, str(4 * GB), 1 * GB, "inactive_file 0")
    group(system / "cgroup" / "pod" / "server", V2, "max", 1 * GB, "inactive_file 0")
    assert free_host_memory() == 3 * GB
    assert usable_memory() == 4 * GB


@pytest.mark.parametrize("own", ["/docker/f00", "/"])
def test_control_groups_of_version_1(system: Path, own: str) -> None:
    """A container sees its own group as the root of what is mounted, under the name that it has outside."""
    (system / "own").write_text(f"3:cpu:/x\n5:memory,hugetlb:{own}\n1:name=systemd:/y\n")
    group(system / "cgroup" / "memory", V1, str(2 * GB), 1 * GB, f"total_inactive_file {GB // 2}")
    assert free_host_memory() == 2 * GB - GB // 2
    assert usable_memory() == 2 * GB


def test_what_cannot_be_read_limits_nothing(system: Path) -> None:
    (system / "own").write_text("0::/\n")
    group(system / "cgroup", V2, "a great deal", 3 * GB, "inactive_file")
    assert free_host_memory() == pytest.approx(20 * GB, abs=1024)
    (system / "meminfo").unlink()
    assert free_host_memory() == memory_limit.UNKNOWN
