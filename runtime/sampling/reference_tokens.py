"""ID tokens of references."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from engines.engine import Engine
from engines.spec import GraphSpec
from runtime.result import Stopwatch
from runtime.sampling.remembered import Remembered, digest

_KEPT = 32
"""References whose tokens are remembered; 1 MB each at full size."""


class ReferenceTokens:
    """Runs the ID encoder; remembers the tokens of pictures."""

    def __init__(self, engine: Engine, spec: GraphSpec, sizes: Mapping[str, int]) -> None:
        """Starts empty.

        Args:
            engine: runs the graphs.
            spec: of the ID encoder.
            sizes: variable dimension -> its size for one sample.
        """
        self._engine = engine
        self._graph = spec.name
        self.side = spec.tensor("reference").resolve(sizes)[-1]
        """Of the picture that the encoder takes, in pixels."""
        self.shape = spec.tensor("tokens").resolve(sizes)
        """Of the tokens of a reference, (1, T, D)."""
        self.kept = Remembered[bytes, NDArray[np.float32]](_KEPT)

    def of(self, image: NDArray[np.uint8], watch: Stopwatch) -> NDArray[np.float32]:
        """Tokens (1, T, D) of a reference (S, S, 3) RGB on white; `watch` counts the stage condition."""

        def encode() -> NDArray[np.float32]:
            with watch.measure("condition"):
                picture = (image.astype(np.float32) / 255).transpose(2, 0, 1)[None]
                return self._engine.to_host(self._engine.run(self._graph, {"reference": picture})["tokens"])

        return self.kept.get(digest(image), encode)
