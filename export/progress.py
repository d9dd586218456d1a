"""Shows a progress bar whose clock runs on during steps of unknown length."""

from __future__ import annotations

import sys
import threading
from types import TracebackType

from tqdm import tqdm

_TICK_SECONDS = 1.0


class Progress:
    """A bar over a known number of steps; most of them are calls that report nothing until they are done."""

    def __init__(self, steps: int = 0, quiet: bool = False) -> None:
        """Starts the bar.

        Args:
            steps: how often `step` will be called, as far as it is known yet.
            quiet: show nothing.
        """
        self._steps = steps
        self._quiet = quiet
        self._count = 0
        self._description = ""
        # in a log file a moving bar is noise: a line per step tells as much
        self._lines = not quiet and not sys.stderr.isatty()
        self._bar = tqdm(
            total=steps,
            disable=quiet or self._lines,
            bar_format="{desc:<34} {bar} {n_fmt}/{total_fmt} [{elapsed}]",
            dynamic_ncols=True,
        )
        self._done = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        self._ticker.start()

    @property
    def steps(self) -> int:
        """How often `step` will be called."""
        return self._steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self._steps = self._bar.total = steps

    def step(self, description: str) -> None:
        """Ends the step before, if any, and names the one that starts now."""
        if self._count:
            self._bar.update()
        self._count += 1
        if self._lines:
            print(f"[{self._count}/{self._steps}] {description}", file=sys.stderr, flush=True)
        self._description = description
        self._bar.set_description_str(description)

    def note(self, text: str) -> None:
        """Prints lines that stay, above the bar."""
        if not self._quiet:
            tqdm.write(text, file=sys.stderr)

    def percent(self, done: float) -> None:
        """Says how much of the step that runs is done, 0..1, where that is known."""
        self._bar.set_description_str(f"{self._description}, {done:.0%}", refresh=False)

    def _tick(self) -> None:
        while not self._done.wait(_TICK_SECONDS):
            self._bar.refresh()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._ticker.join()
        if error is None:
            self._bar.update()
        self._bar.close()
