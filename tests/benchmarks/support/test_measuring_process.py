"""Measuring in a process of its own: what it prints, why it fails, and that nothing of it goes on."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from benchmarks.support.measuring_process import ProcessFailedError, measured
from tests.support.serving import wait_until

PATIENCE = 60.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a module `part` that runs its argument."""
    (tmp_path / "part.py").write_text("import os, subprocess, sys, time\nexec(sys.argv[1])\n")
    return tmp_path


def goes_on(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_objects_are_rows_and_what_libraries_print_is_not(folder: Path) -> None:
    code = "print('loading'); print('{\"seconds\": 1}'); print(5)"
    assert list(measured("part", code, folder=folder)) == [{"seconds": 1}]


@pytest.mark.parametrize(
    ("code", "patience", "reason"),
    [
        ("print('first\\nlast', file=sys.stderr); sys.exit(1)", PATIENCE, "last"),
        ("sys.exit(3)", PATIENCE, "exit code 3"),
        ("os.kill(os.getpid(), 9)", PATIENCE, "it was killed, most likely because memory ran out"),
        ("print('no plan', file=sys.stderr); os.abort()", PATIENCE, "it was ended by SIGABRT: no plan"),
        ("time.sleep(600)", 1.0, "it was ended after 1 s"),
    ],
)
def test_a_failure_says_why_and_the_rows_before_it_stay(
    folder: Path, code: str, patience: float, reason: str
) -> None:
    rows = measured("part", f"print('{{}}', flush=True); {code}", folder=folder, patience=patience)
    assert next(rows) == {}
    with pytest.raises(ProcessFailedError) as failure:
        next(rows)
    assert str(failure.value) == reason


def test_when_it_is_closed_nothing_that_it_started_goes_on(folder: Path) -> None:
    code = (
        "child = subprocess.Popen(['sleep', '600']);"
        "print(f'{{\"pids\": [{os.getpid()}, {child.pid}]}}', flush=True); time.sleep(600)"
    )
    rows = measured("part", code, folder=folder)
    pids = next(rows)["pids"]
    assert all(goes_on(pid) for pid in pids)
    rows.close()  # type: ignore[attr-defined]
    wait_until(lambda: not any(goes_on(pid) for pid in pids))
