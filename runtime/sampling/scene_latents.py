"""Scenes as latents: what a step blends with, and what a network with scene channels sees."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from engines.engine import Array, Engine
from runtime.imaging.masked_scene import MaskedScene
from runtime.result import Stopwatch
from runtime.sampling.conditions import BankRows
from runtime.sampling.remembered import Remembered, digest

BACKGROUND, BLEND, SCENE = "background", "blend", "scene"
"""Inputs of the step graph: latents of the scene; share of the latent that is drawn; mask, and latents of the
scene whose drawn part is grey. The last one is there if the network has scene channels."""

_KEPT = 32
"""Pictures whose latents are remembered; 64 KiB each at 512 px."""


class SceneLatents:
    """Makes rows of the bank of scenes; remembers the latents of pictures."""

    def __init__(
        self, engine: Engine, encoder: str, tensors: Collection[str], latent_shape: tuple[int, int, int]
    ) -> None:
        """Starts empty.

        Args:
            engine: runs the graphs.
            encoder: graph that makes a latent of a picture.
            tensors: of the bank.
            latent_shape: (C, h, w).
        """
        self._engine = engine
        self._encoder = encoder
        self._has_scene_channels = SCENE in tensors
        self._nothing = np.zeros((1, *latent_shape), np.float32)
        self.latents = Remembered[bytes, NDArray[np.float32]](_KEPT)

    def rows(self, scene: MaskedScene, watch: Stopwatch) -> BankRows:
        """Returns the row of a scene. Runs the encoder, unless it was given the same pixels before.

        Args:
            scene: what is drawn of it, and how it blends.
            watch: counts the stage condition.
        """
        # where all of the latent is drawn, the step multiplies the background by 0
        background = self._encode(scene.picture, watch) if scene.blend.min() < 1 else self._nothing
        tensors: dict[str, Array] = {BACKGROUND: background, BLEND: scene.blend[None]}
        if self._has_scene_channels:
            masked = self._encode(scene.masked_picture, watch)
            tensors[SCENE] = np.concatenate([scene.latent_mask[None], masked], axis=1)
        return BankRows(tensors, 0, 0, on_host=True)

    def _encode(self, picture: NDArray[np.float32], watch: Stopwatch) -> NDArray[np.float32]:
        def compute() -> NDArray[np.float32]:
            with watch.measure("condition"):
                outputs = self._engine.run(self._encoder, {"picture": picture[None]})
                return self._engine.to_host(outputs["latent"])

        return self.latents.get(digest(picture), compute)
