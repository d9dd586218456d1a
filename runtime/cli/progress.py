"""Shows the progress of sampling: as a bar on a terminal, elsewhere as occasional lines."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

SECONDS_BETWEEN_LINES = 10.0
"""Between two lines of a command that takes long."""


class Progress:
    """Shows steps on standard error.

    with Progress() as progress:
        compositor.run(request, progress.on_step)
    """

    def __init__(self, quiet: bool = False) -> None:
        """Starts.

        Args:
            quiet: show nothing; `on_step` is None then, and nobody watches the steps.
        """
        self._bar: Any = None
        self._next_line = 0.0
        self._quiet = quiet
        self.on_step = None if quiet else self._show_step
        """See `runtime.compositor.StepCallback`."""
        if not quiet and sys.stderr.isatty():
            # not imported where no bar is shown
            from tqdm import tqdm

            self._bar = tqdm(unit="step", desc="loading", dynamic_ncols=True)

    def describe(self, text: str) -> None:
        """Says what goes on before the first step."""
        if self._bar is not None:
            self._bar.set_description(text)
        elif not self._quiet:
            self._print_line(text)

    def _show_step(self, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.total = total
            self._bar.set_description("sampling" if done < total else "finishing", refresh=False)
            self._bar.update(done - self._bar.n)
        elif done == total or time.monotonic() >= self._next_line:
            self._print_line(f"step {done} of {total}")

    def _print_line(self, text: str) -> None:
        print(f"anydoor: {text}", file=sys.stderr, flush=True)
        self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
