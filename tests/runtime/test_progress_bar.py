"""The bar of long work: lines in a log, a bar on a terminal."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from contextlib import suppress

import pytest

from runtime import progress_bar
from runtime.progress_bar import ProgressBar

Capture = pytest.CaptureFixture[str]


def test_a_log_gets_the_last_line_of_quick_work(capsys: Capture) -> None:
    assert list(ProgressBar(range(1000), "drawing", leave=False)) == [*range(1000)]
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("drawing: 0/1000 it [")
    assert last.startswith("drawing: 1000/1000 it [")


def test_a_log_gets_a_line_now_and_then(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_bar, "SECONDS_BETWEEN_LINES", 0.0)
    for _ in ProgressBar(range(5), unit="step", mininterval=0):
        pass
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == [
        *("0/5", "1/5", "2/5", "3/5", "4/5", "5/5", "5/5")
    ]


def test_a_log_has_no_control_characters(capsys: Capture) -> None:
    with ProgressBar(total=3, unit="step", dynamic_ncols=True) as bar:
        for name in ("first", "second"):
            bar.set_description(name)
            bar.update()
            bar.write(f"row of {name}", file=sys.stderr)
    with ProgressBar(desc="reading", bar_format="{desc}", leave=False):
        pass
    lines = capsys.readouterr().err
    assert "\r" not in lines
    assert "\x1b" not in lines
    assert [line.split(":")[0] for line in lines.splitlines()] == [
        *("first", "row of first", "second", "row of second", "reading")
    ]


def test_what_is_not_wanted_is_not_shown(capsys: Capture) -> None:
    assert list(ProgressBar([1, 2], "drawing", disable=True)) == [1, 2]
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal() -> None:
    pty, fcntl, termios = map(pytest.importorskip, ("pty", "fcntl", "termios"))
    code = "from runtime.progress_bar import ProgressBar; list(ProgressBar(range(3), 'drawing'))"
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    subprocess.run([sys.executable, "-c", code], stderr=stderr, check=True)
    os.close(stderr)
    shown = ""
    # a pseudo-terminal that nobody writes to any more ends with an error
    with open(terminal, "rb", buffering=0) as file, suppress(OSError):
        while part := file.read(4096):
            shown += part.decode()
    assert "\rdrawing: 100%|" in shown
