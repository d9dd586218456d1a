"""Provides the renderer's objects as a data set for both stages of IMPRINT."""

from __future__ import annotations

from pathlib import Path

from numpy.random import Generator

from training.data.pairs import Shot
from training.data.sources import Source
from training.data.view_store import REFERENCES, SCENES, ViewStore, as_shot


class RenderedViews(Source):
    """Any two views of an object: there are few, and all from about the same side, as within a window."""

    kind = "multi-view"
    either_side = False

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.store = ViewStore(root)

    def __len__(self) -> int:
        return len(self.store)

    def pair(self, index: int, rng: Generator) -> tuple[Shot, Shot]:
        """Reads two views, in scenes or alone; the same one twice if the window is 0."""
        first, second = rng.choice(REFERENCES + SCENES, 2, replace=False)
        views = (first, first if self.window == 0 else second)
        one, other = (self._shot(index, int(view)) for view in views)
        return one, other

    def _shot(self, index: int, view: int) -> Shot:
        alone = view < REFERENCES
        return as_shot(
            self.store.reference(index, view) if alone else self.store.scene(index, view - REFERENCES)
        )


class RenderedScenes(RenderedViews):
    """An object alone and in a scene, or a scene twice, as of still images."""

    def __init__(self, root: Path, single: float = 0.0) -> None:
        super().__init__(root)
        self.single = single
        """Share of scenes twice."""

    def pair(self, index: int, rng: Generator) -> tuple[Shot, Shot]:
        """Reads a reference and a scene."""
        scene = self._shot(index, REFERENCES + int(rng.integers(SCENES)))
        reference = self._shot(index, int(rng.integers(REFERENCES)))
        return (scene if rng.random() < self.single else reference), scene
