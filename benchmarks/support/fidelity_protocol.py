"""Measures DINO-score and CLIP-score over the paper's protocol, for composites and baselines.

Generated pictures are the crops of the scene's box afterwards; real ones are the pictures of the object, on
white and cropped to the object.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.support.baselines import copy_paste, empty_box, fitted, on_white
from benchmarks.support.embeddings import Embedder, pairwise_score
from benchmarks.support.protocol import ProtocolObject, ProtocolScene
from runtime.imaging.boxes import Box
from runtime.progress_bar import ProgressBar

Picture = NDArray[np.uint8]
Compose = Callable[[ProtocolObject, Picture, Box, int], Picture]

PASTE, UNTOUCHED, EMPTY = "copy-paste", "scene as it is", "empty box"
SHOWN = 8
"""Rows of the contact sheet."""


@dataclass(frozen=True)
class MethodScores:
    """One line of the table: a method on all objects and scenes."""

    method: str
    scores: Mapping[str, float]
    """By embedder: mean over the objects of the mean cosine over all pairs."""

    def line(self) -> str:
        """Format the line as it is printed."""
        return f"{self.method:<32} " + " ".join(f"{score:>12.4f}" for score in self.scores.values())


@dataclass(frozen=True, eq=False)
class ProtocolReport:
    """All that was measured."""

    rows: Sequence[MethodScores]
    by_object: Mapping[str, Mapping[str, Mapping[str, float]]]
    """Method -> embedder -> object -> score."""
    sheet: Mapping[str, list[Picture]]

    def table(self) -> str:
        """Format the table."""
        names = " ".join(f"{name + '-score':>12}" for name in self.rows[0].scores)
        return "\n".join([f"{'method':<32} {names}", *(row.line() for row in self.rows)])

    def content(self) -> dict[str, Any]:
        """Return the content of the results file."""
        return {"rows": [asdict(row) for row in self.rows], "objects": self.by_object}

    def columns(self) -> Mapping[str, list[Picture]]:
        """Return the columns of the contact sheet: heading -> pictures of one size, one per pair."""
        return self.sheet


def measure(
    model: str,
    compose: Compose,
    objects: Sequence[ProtocolObject],
    scenes: Sequence[ProtocolScene],
    embedders: Sequence[Embedder],
    side: int = 160,
) -> ProtocolReport:
    """Put every object into every scene and score the crop of the box.

    Args:
        model: what to call the composites.
        compose: draws an object into a scene at a box; also gets the number of the pair.
        objects, scenes: see `read_protocol`.
        embedders: DINO, CLIP, or both.
        side: of the pictures in the contact sheet.
    """
    scores: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    sheet: dict[str, list[Picture]] = defaultdict(list)
    with ProgressBar(total=len(objects) * len(scenes), unit="picture", leave=False) as bar:
        for row, each in enumerate(objects):
            crops: dict[str, list[Picture]] = defaultdict(list)
            for column, place in enumerate(scenes):
                scene, box = place.read()
                number = row * len(scenes) + column
                pictures = {
                    UNTOUCHED: scene,
                    EMPTY: empty_box(scene, box),
                    PASTE: copy_paste(*each.reference, scene, box),
                    model: compose(each, scene, box, number),
                }
                for method, picture in pictures.items():
                    crops[method].append(picture[box.slices])
                if row == column % len(objects) and len(sheet[model]) < SHOWN:
                    sheet["object"].append(fitted(on_white(*each.reference), side))
                    for method in (EMPTY, PASTE, model):
                        sheet[method].append(fitted(pictures[method], side))
                bar.update()
            for embedder in embedders:
                real = embedder(each.real_pictures())
                for method, found in crops.items():
                    scores[method][embedder.name][each.name] = pairwise_score(embedder(found), real)
    rows = [
        MethodScores(method, {name: statistics.fmean(values.values()) for name, values in each.items()})
        for method, each in scores.items()
    ]
    return ProtocolReport(rows, scores, sheet)
