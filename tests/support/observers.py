"""Observers of an engine: what it was asked to do."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from tests.support.anydoor import CONTROL, DENOISE

_ROWS = {CONTROL: "timestep", DENOISE: "row_sample"}
"""Graph -> the input that has one value per row of work."""


class RunCounter:
    """Counts what an engine does: `engine.observer = RunCounter()`."""

    def __init__(self) -> None:
        self.loads: Counter[str] = Counter()
        """Graph -> how often it was loaded."""
        self.runs: Counter[str] = Counter()
        """Graph -> how often it was run."""
        self.rows: defaultdict[str, list[int]] = defaultdict(list)
        """Graph -> rows of work of every run, for AnyDoor's control and denoise graphs."""
        self.samples: list[int] = []
        """Samples of every run of AnyDoor's denoise graph."""

    def __call__(
        self, action: Literal["load", "run"], graph: str, inputs: Mapping[str, Any]
    ) -> AbstractContextManager[object]:
        if action == "load":
            self.loads[graph] += 1
        else:
            self.runs[graph] += 1
            if graph in _ROWS:
                self.rows[graph].append(len(inputs[_ROWS[graph]]))
            if graph == DENOISE:
                self.samples.append(len(inputs["timestep"]))
        return nullcontext()

    def clear(self) -> None:
        """Counts from zero again."""
        self.loads.clear()
        self.runs.clear()
        self.rows.clear()
        self.samples.clear()
