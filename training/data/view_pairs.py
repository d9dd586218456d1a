"""Pairs of rendered views: what is encoded before a small model's diffusion stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from training import seeds
from training.data.encoded import pack_hint
from training.data.pairs import Kind, Pair, PairRules, UnfitPairError, make_pair
from training.data.view_store import REFERENCES, SCENES, ViewStore, as_shot


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
        """Gives packed hint, picture (3, R, R) float32, -1..1, reference (3, 224, 224) uint8, and whether
        both are one picture."""
        pair = pair_of_views(self.store, number, self.seed, self.rules, single=self.single)
        return {
            "hint": pack_hint(pair.hint),
            "picture": pair.picture,
            "reference": np.ascontiguousarray(pair.reference.transpose(2, 0, 1)),
            "single": pair.kind == "image",
        }
