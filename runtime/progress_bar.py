"""Shows progress: as a bar on a terminal, elsewhere as occasional lines."""

from __future__ import annotations

import io
import sys
import time
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class _Nowhere(io.TextIOBase):
    """Takes the control characters that move a terminal's cursor."""

    def write(self, text: str, /) -> int:
        return len(text)


class _ProgressBar(tqdm):  # type: ignore[type-arg]
    """tqdm on standard error, which in a log writes no bar but lines: when what it describes changes, every
    ten seconds, and at the end."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._lines = not sys.stderr.isatty()
        self._described = ""
        self._is_done = False
        self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        if self._lines:
            options.setdefault("bar_format", "{n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}{postfix}]")
            options["file"] = _Nowhere()
        super().__init__(*arguments, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Shows the bar, or writes a line if it is time for one."""
        if not self._lines:
            super().display(msg, pos)
            return
        described = (self.desc or "").removesuffix(": ").strip()
        is_done = self.total is not None and self.n >= self.total
        is_time = time.monotonic() >= self._next_line
        if described == self._described and is_done == self._is_done and not is_time:
            return
        self._described, self._is_done = described, is_done
        self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        count = "" if self.bar_format == "{desc}" else str(self)
        print(": ".join(filter(None, (described, count))), file=sys.stderr, flush=True)


if TYPE_CHECKING:
    ProgressBar = tqdm  # for its types of iterables
else:
    ProgressBar = _ProgressBar
