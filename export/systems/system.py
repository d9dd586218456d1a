"""What the exporter needs from a compositing system: its graphs, with roles and signatures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from engines.engine import Array, Engine
from engines.spec import GraphSpec

Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]
"""Makes an example input: (random numbers, shape) -> array."""


@dataclass(frozen=True)
class GraphExport:
    """A graph to be exported."""

    spec: GraphSpec
    load: Callable[[torch.dtype], nn.Module]
    """Builds the module and loads its weights as numbers of a dtype; arguments in the order of the inputs."""
    examples: Mapping[str, Draw] = field(default_factory=dict)
    """Input -> how to draw it, where normal random numbers make no sense."""


class ExportSource(Protocol):
    """A checkpoint of one system. `export.systems.open_source` finds the system."""

    system: str
    """Name of the system, as in the manifest."""
    path: Path
    """The checkpoint."""

    @property
    def description(self) -> str:
        """What the checkpoint is, in one sentence."""

    dtype: torch.dtype
    """Of the stored weights."""
    defaults: Mapping[str, Any]
    """Parameters that the model was trained for."""
    architecture: Mapping[str, Any]
    """Sizes of the network, for information."""
    dimensions: Mapping[str, int]
    """Variable dimension -> its size for one sample with guidance."""

    def check_resolution(self, resolution: int) -> None:
        """Refuses a picture size that the network cannot make.

        Raises:
            AnyDoorError: says which sizes it can make.
        """

    def graphs(self, resolution: int, precision: str) -> Sequence[GraphExport]:
        """The graphs, in the order in which they are built. Loads nothing yet: one is in memory at a time."""

    def constants(self, engine: Engine) -> dict[str, NDArray[np.float32]]:
        """Name -> array: what belongs into constants.npz, `alphas_cumprod` (1000,) among it.

        Args:
            engine: runs the built graphs.
        """
