"""How far a part is: a bar on a terminal, elsewhere a line now and then. Needs no package."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

_TICK_SECONDS = {True: 0.5, False: 30.0}
"""On a terminal, and elsewhere."""
_WIDTH = 30


class Progress:
    """Shows the seconds of a part on standard error, beside those it may take; a context manager."""

    def __init__(self, part: str, seconds: float) -> None:
        self._part, self._seconds = part, seconds
        self._started = time.monotonic()
        self._on_terminal = sys.stderr.isatty()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Progress:
        self._show()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        self._clear()

    def print(self, text: str) -> None:
        """Print a line that stays."""
        self._clear()
        print(text, flush=True)

    def _tick(self) -> None:
        while not self._end.wait(_TICK_SECONDS[self._on_terminal]):
            self._show()

    def _show(self) -> None:
        elapsed = time.monotonic() - self._started
        text = f"{self._part}: {elapsed:.0f} of about {self._seconds:.0f} s"
        if self._on_terminal:
            done = min(int(_WIDTH * elapsed / self._seconds), _WIDTH)
            text = f"\r[{'#' * done:<{_WIDTH}}] {text} "
        print(text, end="" if self._on_terminal else "\n", file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self._on_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
