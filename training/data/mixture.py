"""Pairs from several data sets at once, made as they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.data.pairs import Kind, Pair, PairRules, UnfitPairError, as_sample, make_pair
from training.data.sources import Source, SourceError

ATTEMPTS = 100
"""Unfit pairs in a row after which the data sets, not chance, are to blame."""


@dataclass(frozen=True)
class Mixture:
    """The endless dataset of diffusion training over the sets of table 1."""

    sources: Sequence[tuple[Source, float]]
    """Data sets, and how often each is drawn from in relation to the others."""
    rules: PairRules
    latent_shape: tuple[int, int, int]
    seed: int = 0
    drop: float = 0.0
    """Probability that the reference is replaced by a black one, for classifier-free guidance."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Gives a pair as `as_sample` does, and the noises of its latents and of its posterior (C, h, w)."""
        rng = np.random.default_rng([self.seed, number])
        sample = as_sample(self.draw(rng))
        if rng.random() < self.drop:
            sample["reference"] = np.zeros_like(sample["reference"])
        for name in ("noise", "posterior_noise"):
            sample[name] = rng.standard_normal(self.latent_shape, np.float32)
        return sample

    def draw(self, rng: np.random.Generator) -> Pair:
        """Draws pairs until one is fit; damaged files and bad masks are passed over.

        Raises:
            SourceError: none of many was fit; says what was wrong with the last.
        """
        weights = np.array([weight for _, weight in self.sources])
        problem: Exception | None = None
        for _ in range(ATTEMPTS):
            source, _weight = self.sources[int(rng.choice(len(weights), p=weights / weights.sum()))]
            try:
                reference, target = source.pair(int(rng.integers(len(source))), rng)
                return make_pair(reference, target, self.kind_of(source), self.rules, rng, source.either_side)
            except (UnfitPairError, SourceError, OSError) as error:
                problem = error
        raise SourceError(f"no fit pair in {ATTEMPTS} attempts; the last one: {problem}") from problem

    def kind_of(self, source: Source) -> Kind:
        """Says what a data set counts as: the paper's type, or the released code's where that is followed."""
        released = source.released_kind if self.rules.timesteps == "code" else None
        return released or source.kind
