"""Compares composites of one or several models, and baselines, with the truth, on the synthetic set.

The true scene is emptied in the object's box, enlarged by 1.1, in two ways: black, or with a guess of the
background from the colours around. The empty box and copy-paste are measured on both. The runtime is given
the guess, but its networks do not see it: AnyDoor's hint covers that whole box with the high-frequency map,
and for IMPRINT it is grey. The guess remains where nothing is pasted, at most 3 pixels at the border of the
scene. All are compared with the truth in the object's exact box.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.support.baselines import copy_paste, exact_box, fitted, on_white
from benchmarks.support.identity import PARTS, Gallery, Identity, identity_of
from benchmarks.support.patch_similarity import PatchSimilarity
from benchmarks.support.similarity import gradient_similarity, region_psnr, region_ssim
from benchmarks.support.truth_set import TruthPair, other_views, truth_pairs
from runtime.imaging.masks import MASK_THRESHOLD
from runtime.progress_bar import ProgressBar
from training.data.synthetic.views import VIEW_SIZE, View

Picture = NDArray[np.uint8]
Method = Callable[[TruthPair], Picture]

TRUTH, WRONG = "true picture", "another object"
EMPTY, GUESS = "empty box", "empty box, background guessed"
PASTE, PASTE_ON_GUESS = "copy-paste", "copy-paste, background guessed"

BASELINES: Mapping[str, Method] = {
    TRUTH: lambda pair: pair.truth,
    EMPTY: lambda pair: pair.emptied,
    GUESS: lambda pair: pair.guessed,
    PASTE: lambda pair: _pasted(pair, pair.emptied),
    PASTE_ON_GUESS: lambda pair: _pasted(pair, pair.guessed),
}

HEADER = f"{'method':<32} {'SSIM':>16} {'PSNR':>9} {'gradients':>9} {'patches':>8} " + " ".join(
    f"{p:>9}" for p in PARTS
)


def _pasted(pair: TruthPair, scene: Picture) -> Picture:
    return copy_paste(pair.reference.image, pair.reference.mask, scene, pair.box)


@dataclass(frozen=True)
class Score:
    """One method on one pair."""

    ssim: float | None
    """In the box; None for the object of another pair, which is not in the scene."""
    psnr: float | None
    """dB in the box; None also if the pictures are equal."""
    gradients: float | None
    """Gradient similarity to the truth inside the object's mask; None likewise."""
    patches: float | None
    """Masked patch similarity to the reference, see `patch_similarity`; None likewise."""
    recognised: dict[str, bool]
    """By each part of the descriptor."""


@dataclass(frozen=True)
class MethodSummary:
    """One line of the table: a method on all pairs."""

    method: str
    ssim: float | None
    """Mean over the pairs."""
    ssim_error: float | None
    """Standard error of that mean."""
    psnr: float | None
    gradients: float | None
    """Mean of the gradient similarity."""
    patches: float | None
    """Mean of the masked patch similarity."""
    retrieval: dict[str, float]
    """Share of pairs whose object is recognised."""

    def line(self) -> str:
        """Format the line as it is printed."""
        ssim = "" if self.ssim is None else f"{self.ssim:.3f} +- {self.ssim_error:.3f}"
        psnr = "" if self.psnr is None else f"{self.psnr:.1f} dB"
        patches = "" if self.patches is None else f"{self.patches:.3f}"
        gradients = "" if self.gradients is None else f"{self.gradients:.3f}"
        shares = " ".join(f"{self.retrieval[part]:>9.0%}" for part in PARTS)
        return f"{self.method:<32} {ssim:>16} {psnr:>9} {gradients:>9} {patches:>8} {shares}"


@dataclass(frozen=True, eq=False)
class TruthReport:
    """All that was measured."""

    pairs: Sequence[TruthPair]
    drawn: Mapping[str, Sequence[Picture]]
    """Model -> its composites, one per pair."""
    among: int
    """Objects that one is recognised among."""
    patches_of: str
    """What describes the patches."""
    scores: Mapping[str, Sequence[Score]]

    def rows(self) -> list[MethodSummary]:
        """Summarise every method."""
        return [_summary(method, scores) for method, scores in self.scores.items()]

    def wins(self, model: str, method: str) -> float:
        """Return the share of pairs in which a model has the higher SSIM."""
        pairs = zip(self.scores[model], self.scores[method], strict=True)
        return statistics.fmean((ours.ssim or 0) > (other.ssim or 0) for ours, other in pairs)

    def table(self) -> str:
        """Format the table."""
        lines = [HEADER, *(row.line() for row in self.rows()), ""]
        lines.append(f"{len(self.pairs)} pairs; each object is recognised among {self.among}")
        lines.append(f"patches are described by {self.patches_of}")
        for model, method in product(self.drawn, (EMPTY, GUESS, PASTE, PASTE_ON_GUESS)):
            share = self.wins(model, method)
            lines.append(f"SSIM of {model} is above '{method}' in {share:.0%} of the pairs")
        return "\n".join(lines)

    def content(self) -> dict[str, Any]:
        """Return the content of the results file."""
        scores = {method: [asdict(score) for score in each] for method, each in self.scores.items()}
        return {
            "among": self.among,
            "patches_of": self.patches_of,
            "rows": [asdict(row) for row in self.rows()],
            "objects": [pair.seed for pair in self.pairs],
            "scores": scores,
        }

    def columns(self) -> dict[str, list[Picture]]:
        """Return the columns of the contact sheet: heading -> pictures of one size, one per pair."""
        side = self.pairs[0].truth.shape[0] if self.pairs else 0
        return {
            "object": [fitted(on_white(p.reference.image, p.reference.mask), side) for p in self.pairs],
            "scene": [pair.emptied for pair in self.pairs],
            "copy-paste": [_pasted(pair, pair.guessed) for pair in self.pairs],
            **{model: list(pictures) for model, pictures in self.drawn.items()},
            "truth": [pair.truth for pair in self.pairs],
        }


def measure(
    models: Mapping[str, Callable[[TruthPair, int], Picture]],
    count: int,
    patches: PatchSimilarity,
    among: int = 20,
    size: int = VIEW_SIZE,
) -> TruthReport:
    """Score models and the baselines on `count` pairs.

    Args:
        models: name -> draws the object of a pair into its scene; also gets the number of the pair.
        count: at least 1.
        patches: compares drawn objects with their references.
        among: how many objects one is recognised among.
        size: side of the scenes and references, in pixels.
    """
    # recognition needs its distractors, and one object more, however few pairs are asked for
    needed = max(count, among + 1)
    candidates = list(ProgressBar(truth_pairs(needed, size), "drawing pairs", needed, leave=False))
    views = {
        pair.seed: _identities(pair.seed)
        for pair in ProgressBar(candidates, "drawing other views", leave=False)
    }
    gallery = Gallery(views, among)
    pairs = candidates[:count]
    drawn = {
        name: [draw(pair, number) for number, pair in enumerate(ProgressBar(pairs, name, leave=False))]
        for name, draw in models.items()
    }
    pictures = {name: [draw(pair) for pair in pairs] for name, draw in BASELINES.items()} | drawn
    references = [patches.patches(pair.reference.image, pair.reference.mask) for pair in pairs]
    scores: dict[str, list[Score]] = {name: [] for name in pictures}
    with ProgressBar(None, "scoring", len(pictures) * len(pairs), leave=False) as bar:
        for name, each in pictures.items():
            for picture, pair, reference in zip(each, pairs, references, strict=True):
                similarity = patches.to_patches(picture, pair.target.mask, reference)
                scores[name].append(_score(picture, pair, gallery, similarity))
                bar.update()
    scores[WRONG] = list(islice(_wrong_objects(candidates, gallery), count))
    order = (*BASELINES, WRONG, *drawn)
    return TruthReport(pairs, drawn, among, patches.name, {name: scores[name] for name in order})


def _score(picture: Picture, pair: TruthPair, gallery: Gallery, patches: float) -> Score:
    psnr = region_psnr(picture, pair.truth, pair.box)
    return Score(
        region_ssim(picture, pair.truth, pair.box),
        psnr if np.isfinite(psnr) else None,
        gradient_similarity(picture, pair.truth, pair.target.mask >= MASK_THRESHOLD),
        patches,
        gallery.recognised(identity_of(picture[pair.box.slices]), pair.seed),
    )


def _wrong_objects(pairs: Sequence[TruthPair], gallery: Gallery) -> Iterator[Score]:
    """Yields what chance recognises: for each pair the true picture of an object that is not in its
    gallery."""
    for number, pair in enumerate(pairs):
        shown = {pair.seed, *gallery.distractors(pair.seed)}
        wrong = next(p for p in (*pairs[number + 1 :], *pairs) if p.seed not in shown)
        yield Score(
            None, None, None, None, gallery.recognised(identity_of(wrong.truth[wrong.box.slices]), pair.seed)
        )


def _identities(seed: int) -> list[Identity]:
    return [identity_of(_cut(view)) for view in other_views(seed)]


def _cut(view: View) -> Picture:
    cut: Picture = view.image[exact_box(view.mask).slices]
    return cut


def _summary(method: str, scores: Sequence[Score]) -> MethodSummary:
    ssim = [score.ssim for score in scores if score.ssim is not None]
    psnr = [score.psnr for score in scores if score.psnr is not None]
    gradients = [score.gradients for score in scores if score.gradients is not None]
    patches = [score.patches for score in scores if score.patches is not None]
    spread = statistics.stdev(ssim) if len(ssim) > 1 else 0.0
    return MethodSummary(
        method,
        statistics.fmean(ssim) if ssim else None,
        spread / len(ssim) ** 0.5 if ssim else None,
        statistics.fmean(psnr) if psnr else None,
        statistics.fmean(gradients) if gradients else None,
        statistics.fmean(patches) if patches else None,
        {part: statistics.fmean(score.recognised[part] for score in scores) for part in PARTS},
    )
