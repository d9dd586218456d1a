"""How like the object? DINO-score and CLIP-score over the paper's protocol, with baselines.

Generated is what lies in the scene's box afterwards; real are the pictures of the object, on white and cut to
its extent.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.baselines import copy_paste, empty_box, fitted, on_white
from benchmarks.embeddings import Embedder, pairwise_score
from benchmarks.protocol import ProtocolObject, ProtocolScene
from runtime.imaging.boxes import Box

Picture = NDArray[np.uint8]
Compose = Callable[[ProtocolObject, Picture, Box, int], Picture]

OURS, PASTE, UNTOUCHED, EMPTY = "AnyDoor", "copy-paste", "scene as it is", "empty box"
SHOWN = 8
"""Rows of the contact sheet."""


@dataclass(frozen=True)
class ProtocolRow:
    """One line of the table."""

    method: str
    scores: Mapping[str, float]
    """By embedder: mean over the objects of the mean cosine over all pairs."""

    def line(self) -> str:
        """The line as it is printed."""
        return f"{self.method:<32} " + " ".join(f"{score:>12.4f}" for score in self.scores.values())


@dataclass(frozen=True, eq=False)
class ProtocolReport:
    """All that was measured."""

    rows: Sequence[ProtocolRow]
    by_object: Mapping[str, Mapping[str, Mapping[str, float]]]
    """Method -> embedder -> object -> score."""
    sheet: Mapping[str, list[Picture]]

    def table(self) -> str:
        """For people."""
        names = " ".join(f"{name + '-score':>12}" for name in self.rows[0].scores)
        return "\n".join([f"{'method':<32} {names}", *(row.line() for row in self.rows)])

    def content(self) -> dict[str, Any]:
        """For a JSON file."""
        return {"rows": [asdict(row) for row in self.rows], "objects": self.by_object}

    def columns(self) -> Mapping[str, list[Picture]]:
        """The contact sheet: pictures of one size under their headings, one row per pair."""
        return self.sheet


def measure(
    compose: Compose,
    objects: Sequence[ProtocolObject],
    scenes: Sequence[ProtocolScene],
    embedders: Sequence[Embedder],
    side: int = 160,
) -> ProtocolReport:
    """Puts every object into every scene and scores what is then in the box.

    Args:
        compose: draws an object into a scene at a box; also gets the number of the pair.
        objects, scenes: see `read_protocol`.
        embedders: DINO, CLIP, or both.
        side: of the pictures in the contact sheet.
    """
    scores: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    sheet: dict[str, list[Picture]] = defaultdict(list)
    with tqdm(total=len(objects) * len(scenes), unit="picture", leave=False) as bar:
        for row, each in enumerate(objects):
            crops: dict[str, list[Picture]] = defaultdict(list)
            for column, place in enumerate(scenes):
                scene, box = place.read()
                number = row * len(scenes) + column
                pictures = {
                    UNTOUCHED: scene,
                    EMPTY: empty_box(scene, box),
                    PASTE: copy_paste(*each.reference, scene, box),
                    OURS: compose(each, scene, box, number),
                }
                for method, picture in pictures.items():
                    crops[method].append(picture[box.slices])
                if row == column % len(objects) and len(sheet[OURS]) < SHOWN:
                    sheet["object"].append(fitted(on_white(*each.reference), side))
                    for method in (EMPTY, PASTE, OURS):
                        sheet[method].append(fitted(pictures[method], side))
                bar.update()
            for embedder in embedders:
                real = embedder(each.real_pictures())
                for method, found in crops.items():
                    scores[method][embedder.name][each.name] = pairwise_score(embedder(found), real)
    rows = [
        ProtocolRow(method, {name: statistics.fmean(values.values()) for name, values in each.items()})
        for method, each in scores.items()
    ]
    return ProtocolReport(rows, scores, sheet)
