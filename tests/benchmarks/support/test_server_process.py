"""A server in a process of its own, beside whoever measures it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.support.measuring_process import ProcessFailedError, measured
from benchmarks.support.server_process import ServerProcess, resident_bytes

PART = """
import os, signal, sys
from pathlib import Path
from benchmarks.support.server_process import ServerProcess

with ServerProcess(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nobody_waits_for_a_server_whose_measurement_was_killed(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "part.py").write_text(PART)
    with pytest.raises(ProcessFailedError, match="it was killed"):
        list(measured("part", str(tiny_bundle), folder=tmp_path, patience=120))


def test_memory_is_that_of_the_server_and_its_processes(tiny_bundle: Path) -> None:
    with ServerProcess(tiny_bundle) as server:
        alone = int(Path(f"/proc/{server.process.pid}/statm").read_text("ascii").split()[1])
        assert resident_bytes(server.process.pid) >= alone * os.sysconf("SC_PAGE_SIZE")
    assert resident_bytes(server.process.pid) == 0
