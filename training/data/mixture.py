"""Pairs from several data sets at once, made as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from training.data.pairs import Kind, Pair, PairRules, Shot, UnfitPairError, as_sample, make_pair
from training.data.sources import Source, SourceError

_Made = TypeVar("_Made")

ATTEMPTS = 100
"""Unfit pairs in a row after which the data sets, not chance, are to blame."""


def draw_fit(
    sources: Sequence[tuple[Source, float]],
    make: Callable[[Source, Shot, Shot], _Made],
    rng: np.random.Generator,
) -> _Made:
    """Draws pairs of pictures until something can be made of one; damaged files are passed over.

    Args:
        sources: data sets, and how often each is drawn from in relation to the others.
        make: makes it of a data set's reference and target; raises UnfitPairError where it cannot.
        rng: source of randomness.

    Raises:
        SourceError: none of many was fit; says what was wrong with the last.
    """
    weights = np.array([weight for _, weight in sources])
    problem: Exception | None = None
    for _ in range(ATTEMPTS):
        source, _weight = sources[int(rng.choice(len(weights), p=weights / weights.sum()))]
        try:
            return make(source, *source.pair(int(rng.integers(len(source))), rng))
        except (UnfitPairError, SourceError, OSError) as error:
            problem = error
    raise SourceError(f"no fit pair in {ATTEMPTS} attempts; the last one: {problem}") from problem


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

        def make(source: Source, reference: Shot, target: Shot) -> Pair:
            return make_pair(reference, target, self.kind_of(source), self.rules, rng, source.either_side)

        return draw_fit(self.sources, make, rng)

    def kind_of(self, source: Source) -> Kind:
        """Says what a data set counts as: the paper's type, or the released code's where that is followed."""
        released = source.released_kind if self.rules.timesteps == "code" else None
        return released or source.kind
