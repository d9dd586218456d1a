"""Progress: a bar on a terminal, a line now and then elsewhere, nothing if it is not wanted."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from contextlib import suppress

import pytest

from runtime.cli.progress import Progress


def test_a_bar_on_a_terminal() -> None:
    pty, fcntl, termios = map(pytest.importorskip, ("pty", "fcntl", "termios"))
    code = (
        "from runtime.cli.progress import Progress\n"
        "with Progress() as progress:\n"
        "    progress.describe('2 before us')\n"
        "    progress.on_step(1, 2)\n"
        "    progress.on_step(2, 2)\n"
    )
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    subprocess.run([sys.executable, "-c", code], stderr=stderr, check=True)
    os.close(stderr)
    shown = ""
    # a pseudo-terminal that nobody writes to any more ends with an error
    with open(terminal, "rb", buffering=0) as file, suppress(OSError):
        while part := file.read(4096):
            shown += part.decode()
    assert "2 before us" in shown
    assert "finishing: 100%" in shown
    assert "2/2" in shown


def test_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        progress.describe("next")
        assert progress.on_step is not None
        for done in range(1, 1001):
            progress.on_step(done, 1000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "anydoor: next"
    assert lines[-1] == "anydoor: step 1000 of 1000"
    assert len(lines) < 100


def test_nothing_if_it_is_not_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(quiet=True) as progress:
        progress.describe("next")
        assert progress.on_step is None
    assert not capsys.readouterr().err
