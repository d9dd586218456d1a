"""Reports a run: curves and samples for TensorBoard, and a table."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from engines.files import replacing

_MEMORY = 0.98
"""How much of the running mean of a loss stays in a step."""

_SECONDS_BETWEEN_LOOKS = 0.5
"""Between two times that the losses are fetched to be shown."""

_STEP, _SECONDS = "step", "seconds"


class Curves:
    """Writes `folder`/events and `folder`/log.csv; a process that does not write keeps the numbers only."""

    def __init__(self, folder: Path, start: int, samples_per_step: int, write: bool) -> None:
        """Goes on at step `start`: what a killed run wrote after its last checkpoint is taken back."""
        self.shown: dict[str, float] = {}
        """Running means of the losses, as far as they were fetched."""
        self._names: tuple[str, ...] = ()
        self._waiting: list[Tensor] = []
        self._values: dict[str, float] = {}
        self._fetched = -math.inf
        self._table = folder / "log.csv"
        self._events = SummaryWriter(folder / "events", purge_step=start + 1) if write else None
        self._samples, self._plotted = samples_per_step, start
        self._last = time.monotonic()
        self._rows = [row for row in _read_table(self._table) if int(row[_STEP]) <= start]
        # earlier runs took time as well
        self._began = self._last - (float(self._rows[-1][_SECONDS]) if self._rows else 0.0)

    def add(self, losses: Mapping[str, Tensor]) -> dict[str, str]:
        """Takes the losses of a step; returns their running means as they are shown.

        They are fetched from their device now and then only, because fetching waits for the step to end.
        """
        self._names = tuple(losses)
        self._waiting.append(torch.stack([loss.detach() for loss in losses.values()]))
        if time.monotonic() - self._fetched >= _SECONDS_BETWEEN_LOOKS:
            self._fetch()
        return {name: f"{value:.4f}" for name, value in self.shown.items()}

    def _fetch(self) -> None:
        for values in torch.stack(self._waiting).tolist() if self._waiting else ():
            self._values = dict(zip(self._names, values, strict=True))
            for name, value in self._values.items():
                self.shown[name] = _MEMORY * self.shown.get(name, value) + (1 - _MEMORY) * value
        self._waiting.clear()
        self._fetched = time.monotonic()

    def plot(self, step: int, rates: Mapping[str, float]) -> None:
        """Points of the curves: losses of the last step, learning rates of the parts ("" for all that have
        none of their own), samples per second since the last ones.
        """
        self._fetch()
        if not self._events:
            return
        now = time.monotonic()
        speed = (step - self._plotted) * self._samples / max(now - self._last, 1e-9)
        self._plotted, self._last = step, now
        points = {f"loss/{name}": value for name, value in self._values.items()}
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
        self._fetch()
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
    """Returns the rows of a table; values that its header has no name for are dropped."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file, restkey="", restval=""))
    return [{name: value for name, value in row.items() if name} for row in rows]
