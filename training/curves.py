"""What a run reports while it goes on: curves and samples for TensorBoard, and a table."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from engines.files import replacing

_MEMORY = 0.98
"""How much of the running mean of a loss stays in a step."""

_STEP, _SECONDS = "step", "seconds"


class Curves:
    """Writes `folder`/events and `folder`/log.csv; a process that does not write keeps the numbers only."""

    def __init__(self, folder: Path, start: int, samples_per_step: int, write: bool) -> None:
        """Goes on at step `start`: what a killed run wrote after its last checkpoint is taken back."""
        self.shown: dict[str, float] = {}
        """Running means of the losses."""
        self._table = folder / "log.csv"
        self._events = SummaryWriter(folder / "events", purge_step=start + 1) if write else None
        self._samples, self._plotted = samples_per_step, start
        self._last = time.monotonic()
        self._rows = [row for row in _read_table(self._table) if int(row[_STEP]) <= start]
        # earlier runs took time as well
        self._began = self._last - (float(self._rows[-1][_SECONDS]) if self._rows else 0.0)

    def add(self, losses: Mapping[str, Tensor]) -> dict[str, str]:
        """Takes the losses of a step; returns their running means as they are shown."""
        for name, loss in losses.items():
            value = loss.item()
            self.shown[name] = _MEMORY * self.shown.get(name, value) + (1 - _MEMORY) * value
        return {name: f"{value:.4f}" for name, value in self.shown.items()}

    def plot(self, step: int, losses: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        """Points of the curves: losses of the step, learning rates of the parts ("" for all that have none of
        their own), samples per second since the last ones.
        """
        if not self._events:
            return
        now = time.monotonic()
        speed = (step - self._plotted) * self._samples / max(now - self._last, 1e-9)
        self._plotted, self._last = step, now
        points = {f"loss/{name}": loss.item() for name, loss in losses.items()}
        points |= {f"learning rate/{part}".rstrip("/"): rate for part, rate in rates.items()}
        for name, value in {**points, "samples per second": speed}.items():
            self._events.add_scalar(name, value, step)

    def picture(self, step: int, sheet: NDArray[np.uint8]) -> None:
        """Shows a sheet of samples, (H, W, 3) RGB."""
        if self._events:
            self._events.add_image("samples", sheet, step, dataformats="HWC")

    def row(self, step: int) -> None:
        """Adds a line of the table, one per checkpoint: step, seconds of training so far, running means.

        The table is written anew each time: other losses than before are other columns, empty where there
        were none.
        """
        if not self._events:
            return
        means = {name: f"{value:.5f}" for name, value in self.shown.items()}
        row = {_STEP: str(step), _SECONDS: f"{time.monotonic() - self._began:.0f}", **means}
        self._rows.append(row)
        columns = list(dict.fromkeys(name for each in self._rows for name in each))
        with replacing(self._table) as partial, partial.open("w", newline="") as file:
            table = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            table.writeheader()
            table.writerows(self._rows)

    def close(self) -> None:
        """Puts everything on disk."""
        if self._events:
            self._events.close()


def _read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a table; values that its header has no name for are dropped."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file, restkey="", restval=""))
    return [{name: value for name, value in row.items() if name} for row in rows]
