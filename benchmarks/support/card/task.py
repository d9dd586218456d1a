"""What a part of card.py is asked for, and the rows that it gives."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.bundle import Bundle
from engines.options import EngineOptions

Row = dict[str, Any]
"""What a part found. `seconds` of a call and `rows` (graph -> rows that its network evaluated) are compared
with the limit of the card."""

NETWORKS = {"cuda": "full", "cpu": "tiny"}
"""Device -> the network that is measured there."""

BACKEND = "onnxruntime"


@dataclass(frozen=True)
class Task:
    """A part to be measured."""

    part: str
    device: str
    """cuda or cpu."""
    folder: str
    """Where the bundles are."""
    seconds: float
    """What it may take. When they are over nothing is repeated, but everything is measured once."""
    started: float = 0.0
    """When its process was started, on the monotonic clock, which all processes share."""

    @property
    def bundle(self) -> Path:
        """The network that is measured."""
        return Path(self.folder) / NETWORKS[self.device]

    @property
    def deadline(self) -> float:
        """When `seconds` are over."""
        return self.started + self.seconds

    def open_bundle(self) -> Bundle:
        """Open the network that is measured.

        Raises:
            BundleError: it is not there.
        """
        return Bundle.open(self.bundle)

    @property
    def engine_options(self) -> EngineOptions:
        """How its graphs run: as the product runs them by default."""
        return EngineOptions(backend=BACKEND, device=self.device)

    def to_json(self) -> str:
        """Return the argument of the process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        """Read what `to_json` returned."""
        return cls(**json.loads(text))


def reason(error: Exception) -> str:
    """Return the first line of an error's text."""
    return (str(error) or type(error).__name__).splitlines()[0]


def repetitions(until: float, most: int) -> Iterator[int]:
    """Count from 0 until a time on the monotonic clock, at most so far, and at least once."""
    for number in range(most):
        if number and time.monotonic() >= until:
            return
        yield number
