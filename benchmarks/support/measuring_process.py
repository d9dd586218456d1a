"""Measures in a process of its own: one that crashes or hangs takes no other measurement along."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from benchmarks.support.fingerprint import ROOT
from engines.errors import AnyDoorError


class ProcessFailedError(AnyDoorError):
    """A process ended before it had measured everything; the text says why."""


def measured(
    module: str,
    *arguments: str,
    variables: Mapping[str, str] = os.environ,
    folder: Path | None = None,
    patience: float = threading.TIMEOUT_MAX,
) -> Iterator[dict[str, Any]]:
    """Run a module of this clone and yield what it prints, one object per line of JSON.

    When the iteration ends or is closed, the process and all that it started are gone.

    Args:
        module: its name, as after `python -m`.
        arguments: of its command line.
        variables: its environment.
        folder: where it runs; None stays where this process is.
        patience: seconds after which it is ended.

    Raises:
        ProcessFailedError: it failed or was ended; the last line of its stderr says why.
    """
    # ahead of the clone's folder, an installed package of the same name would be imported
    path = os.pathsep.join([str(ROOT), *filter(None, [variables.get("PYTHONPATH")])])
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=folder,
            env={**variables, "PYTHONPATH": path},
            start_new_session=True,
        )
        with _ended(process, patience) as is_late:
            assert process.stdout is not None
            for line in process.stdout:
                # a library may print there, too
                if line.startswith("{"):
                    yield json.loads(line)
        if process.returncode:
            late = f"it was ended after {patience:.0f} s" if is_late.is_set() else ""
            raise ProcessFailedError(late or _failure(process.returncode, errors))


@contextmanager
def _ended(process: subprocess.Popen[str], patience: float) -> Iterator[threading.Event]:
    """Yields what says whether a process took too long; ends it and all that it started."""
    is_late = threading.Event()

    def end() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def end_late() -> None:
        is_late.set()
        end()

    timer = threading.Timer(patience, end_late)
    timer.daemon = True
    timer.start()
    try:
        yield is_late
        process.wait()
    finally:
        timer.cancel()
        end()
        with process:  # closes its pipe, and waits for it
            pass


def _failure(code: int, errors: IO[str]) -> str:
    """Returns why a process failed."""
    errors.seek(0)
    lines = errors.read().strip().splitlines()
    if code == -signal.SIGKILL:
        return "it was killed, most likely because memory ran out"
    if code < 0:
        return ": ".join([f"it was ended by {signal.Signals(-code).name}", *lines[-1:]])
    return lines[-1] if lines else f"exit code {code}"
