"""Computes the ID tokens of references, of one or several pictures of an object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, islice

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

    def __init__(self, engine: Engine, spec: GraphSpec, step: GraphSpec, sizes: Mapping[str, int]) -> None:
        """Starts empty.

        Args:
            engine: runs the graphs.
            spec: of the ID encoder.
            step: takes the tokens.
            sizes: variable dimension -> its size for one sample.
        """
        self._engine = engine
        self._graph = spec.name
        self.side = spec.tensor("reference").resolve(sizes)[-1]
        """Side of the encoder's input, in pixels."""
        self.shape = spec.tensor("tokens").resolve(sizes)
        """Shape of a picture's tokens, (1, T, D)."""
        self.views = step.tensor("tokens").resolve(sizes)[1] // self.shape[1]
        """N, how many pictures of an object the step graph takes."""
        self.kept = Remembered[bytes, NDArray[np.float32]](_KEPT)

    def of_views(self, images: Sequence[NDArray[np.uint8]], watch: Stopwatch) -> NDArray[np.float32]:
        """Returns tokens (1, N T, D) of 1 to N pictures of an object; see `of`.

        Fewer than N are repeated. Attention over tokens that are all there equally often is attention over
        them once, but for rounding. Where N is no multiple, those that come first in the order of their
        digests count once more: in whichever order they are given, the result is the same to the bit.
        """
        ordered = sorted(images, key=digest)
        return np.concatenate([self.of(image, watch) for image in islice(cycle(ordered), self.views)], axis=1)

    def repeated(self, tokens: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns tokens (1, T, D) of what is no picture, for the step graph: (1, N T, D)."""
        return np.tile(tokens, (1, self.views, 1))

    def of(self, image: NDArray[np.uint8], watch: Stopwatch) -> NDArray[np.float32]:
        """Returns tokens (1, T, D) of a reference (S, S, 3) RGB on white; `watch` counts the stage
        condition."""

        def encode() -> NDArray[np.float32]:
            with watch.measure("condition"):
                picture = (image.astype(np.float32) / 255).transpose(2, 0, 1)[None]
                return self._engine.to_host(self._engine.run(self._graph, {"reference": picture})["tokens"])

        return self.kept.get(digest(image), encode)
