"""Makes pairs of rendered views, stored ones or ones that are drawn for them, ready to be encoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch.utils.data import Dataset

from training import seeds
from training.data.encoded import pack_hint, pack_picture
from training.data.pairs import Kind, Pair, PairRules, UnfitPairError, make_pair
from training.data.synthetic.rendering import CPU
from training.data.synthetic.views import as_views, draw_frames, reference_frame, scene_frame
from training.data.view_store import REFERENCES, SCENES, ViewStore, as_shot

OBJECTS, VIEWS = 400_000, 100
"""How many objects pairs are drawn of, none of them held out, and how many views of each in scenes and
alone."""


def pair_of_views(
    store: ViewStore, number: int, seed: int, rules: PairRules, kind: Kind = "multi-view", single: float = 0.0
) -> Pair:
    """Makes pair `number`: a row of the store, one of its references, one of its scenes; skips unfit ones.

    With the probability `single` the reference is the scene itself, as in the sets of still images.
    """
    rng = np.random.default_rng([seed, number])
    while True:
        row = int(rng.integers(len(store)))
        reference = store.reference(row, int(rng.integers(REFERENCES)))
        target = store.scene(row, int(rng.integers(SCENES)))
        alone = rng.random() < single
        try:
            shots = [as_shot(view) for view in (target if alone else reference, target)]
            return make_pair(shots[0], shots[1], "image" if alone else kind, rules, rng)
        except UnfitPairError:
            continue


@dataclass(frozen=True)
class ViewPairs(Dataset[dict[str, Any]]):
    """The pairs of a store of views by their numbers, ready to be encoded; see `pair_of_views`."""

    store: ViewStore
    rules: PairRules
    seed: int = seeds.ENCODED_PAIRS
    single: float = 0.0

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Gives packed hint and picture, reference (3, 224, 224) uint8, and whether both are one picture."""
        return to_encode(pair_of_views(self.store, number, self.seed, self.rules, single=self.single))


@dataclass(frozen=True)
class DrawnPairs(Dataset[dict[str, Any]]):
    """The same of views that are drawn for them, where pair n follows from n: of an object in two pictures.

    Views are drawn with whatever pairs are asked for at once; on a card, their last bits may depend on those.
    """

    rules: PairRules
    seed: int = seeds.ENCODED_PAIRS
    single: float = 0.0
    device: torch.device = CPU
    """Where views are drawn."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Gives what `ViewPairs` does."""
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Gives several, drawn together; PyTorch's loader asks for a batch this way."""
        return [to_encode(pair) for pair in self.draw(numbers)]

    def draw(self, numbers: Sequence[int]) -> list[Pair]:
        """Draws pairs. Those that are unfit are drawn anew, of other objects."""
        sources = {number: np.random.default_rng([self.seed, number]) for number in numbers}
        pairs: dict[int, Pair] = {}
        while missing := [number for number in numbers if number not in pairs]:
            drawn = zip(missing, self._try([sources[number] for number in missing]), strict=True)
            pairs |= {number: pair for number, pair in drawn if pair}
        return [pairs[number] for number in numbers]

    def _try(self, sources: Sequence[Generator]) -> Iterator[Pair | None]:
        """Draws a pair from each source of randomness; none where it is unfit."""
        chosen = [
            (int(rng.integers(OBJECTS)), rng.integers(VIEWS, size=2).tolist(), rng.random() < self.single)
            for rng in sources
        ]
        frames = [scene_frame(seed, view) for seed, (view, _), _ in chosen]
        frames += [reference_frame(seed, view) for seed, (_, view), is_single in chosen if not is_single]
        shots = [as_shot(view) for view in as_views(draw_frames(frames, device=self.device))]
        targets, alone = shots[: len(chosen)], iter(shots[len(chosen) :])
        for rng, (_, _, is_single), target in zip(sources, chosen, targets, strict=True):
            reference = target if is_single else next(alone)
            try:
                yield make_pair(reference, target, "image" if is_single else "multi-view", self.rules, rng)
            except UnfitPairError:
                yield None


def to_encode(pair: Pair) -> dict[str, Any]:
    """Gives of a pair what is encoded, see `ViewPairs`."""
    return {
        "hint": pack_hint(pair.hint),
        "picture": pack_picture(pair.picture),
        "reference": np.ascontiguousarray(pair.reference.transpose(2, 0, 1)),
        "single": pair.kind == "image",
    }
