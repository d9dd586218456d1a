"""How near to the truth? Composites on the synthetic set, where the true picture is known, with baselines.

The true scene is emptied in the object's box, enlarged by 1.1, in two ways: black, or with a guess of the
background from the colours around. The empty box and copy-paste are measured on both. The runtime is given
the guess, which its networks do not see: the hint covers that whole box with the high-frequency map. The
guess stays where nothing is pasted, at most 3 pixels at the border of the scene. All are compared with the
truth in the object's exact box.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.baselines import copy_paste, exact_box, fitted, on_white
from benchmarks.identity import PARTS, Identity, Lineup, identity_of
from benchmarks.similarity import region_psnr, region_ssim
from benchmarks.truth_set import TruthPair, other_views, truth_pairs
from training.data.synthetic.views import View

Picture = NDArray[np.uint8]
Method = Callable[[TruthPair], Picture]

TRUTH, WRONG, OURS = "true picture", "another object", "AnyDoor"
EMPTY, GUESS = "empty box", "empty box, background guessed"
PASTE, PASTE_ON_GUESS = "copy-paste", "copy-paste, background guessed"

BASELINES: Mapping[str, Method] = {
    TRUTH: lambda pair: pair.truth,
    EMPTY: lambda pair: pair.emptied,
    GUESS: lambda pair: pair.guessed,
    PASTE: lambda pair: _pasted(pair, pair.emptied),
    PASTE_ON_GUESS: lambda pair: _pasted(pair, pair.guessed),
}

HEADER = f"{'method':<32} {'SSIM':>16} {'PSNR':>9} " + " ".join(f"{part:>9}" for part in PARTS)


def _pasted(pair: TruthPair, scene: Picture) -> Picture:
    return copy_paste(pair.reference.image, pair.reference.mask, scene, pair.box)


@dataclass(frozen=True)
class Score:
    """One method on one pair."""

    ssim: float | None
    """In the box; None for the object of another pair, which is never drawn into the scene."""
    psnr: float | None
    """dB in the box; None also where the pictures are equal."""
    recognised: dict[str, bool]
    """By each part of the descriptor."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    method: str
    ssim: float | None
    """Mean over the pairs."""
    ssim_error: float | None
    """Standard error of that mean."""
    psnr: float | None
    retrieval: dict[str, float]
    """Share of pairs whose object is recognised."""

    def line(self) -> str:
        """The line as it is printed."""
        ssim = "" if self.ssim is None else f"{self.ssim:.3f} +- {self.ssim_error:.3f}"
        psnr = "" if self.psnr is None else f"{self.psnr:.1f} dB"
        shares = " ".join(f"{self.retrieval[part]:>9.0%}" for part in PARTS)
        return f"{self.method:<32} {ssim:>16} {psnr:>9} {shares}"


@dataclass(frozen=True, eq=False)
class TruthReport:
    """All that was measured."""

    pairs: Sequence[TruthPair]
    ours: Sequence[Picture]
    among: int
    """Objects that one is recognised among."""
    scores: Mapping[str, Sequence[Score]]

    def rows(self) -> list[Row]:
        """One per method."""
        return [_row(method, scores) for method, scores in self.scores.items()]

    def wins(self, method: str) -> float:
        """Share of pairs in which ours has the higher SSIM."""
        pairs = zip(self.scores[OURS], self.scores[method], strict=True)
        return statistics.fmean((ours.ssim or 0) > (other.ssim or 0) for ours, other in pairs)

    def table(self) -> str:
        """For people."""
        lines = [HEADER, *(row.line() for row in self.rows()), ""]
        lines.append(f"{len(self.pairs)} pairs; each object is to be recognised among {self.among}")
        for method in (EMPTY, GUESS, PASTE, PASTE_ON_GUESS):
            lines.append(f"SSIM of {OURS} is above '{method}' in {self.wins(method):.0%} of the pairs")
        return "\n".join(lines)

    def content(self) -> dict[str, Any]:
        """For a JSON file."""
        scores = {method: [asdict(score) for score in each] for method, each in self.scores.items()}
        return {
            "among": self.among,
            "rows": [asdict(row) for row in self.rows()],
            "objects": [pair.seed for pair in self.pairs],
            "scores": scores,
        }

    def columns(self) -> dict[str, list[Picture]]:
        """The contact sheet: pictures of one size under their headings, one row per pair."""
        side = self.pairs[0].truth.shape[0] if self.pairs else 0
        return {
            "object": [fitted(on_white(p.reference.image, p.reference.mask), side) for p in self.pairs],
            "scene": [pair.emptied for pair in self.pairs],
            "copy-paste": [_pasted(pair, pair.guessed) for pair in self.pairs],
            OURS: list(self.ours),
            "truth": [pair.truth for pair in self.pairs],
        }


def measure(method: Callable[[TruthPair, int], Picture], count: int, among: int = 20) -> TruthReport:
    """Scores a method and the baselines on `count` pairs.

    Args:
        method: draws the object of a pair into its scene; also gets the number of the pair.
        count: at least 1.
        among: how many objects one is to be recognised among.
    """
    # a lineup needs its distractors, and one object more, however few pairs are asked for
    drawn = max(count, among + 1)
    known = list(tqdm(truth_pairs(drawn), "drawing pairs", drawn, leave=False))
    views = {pair.seed: _identities(pair.seed) for pair in tqdm(known, "drawing other views", leave=False)}
    lineup = Lineup(views, among)
    pairs = known[:count]
    ours = [method(pair, number) for number, pair in enumerate(tqdm(pairs, "compositing", leave=False))]
    scores = {name: [_score(draw(pair), pair, lineup) for pair in pairs] for name, draw in BASELINES.items()}
    scores[OURS] = [_score(picture, pair, lineup) for picture, pair in zip(ours, pairs, strict=True)]
    scores[WRONG] = list(islice(_wrong_objects(known, lineup), count))
    order = (TRUTH, *list(BASELINES)[1:], WRONG, OURS)
    return TruthReport(pairs, ours, among, {name: scores[name] for name in order})


def _score(picture: Picture, pair: TruthPair, lineup: Lineup) -> Score:
    psnr = region_psnr(picture, pair.truth, pair.box)
    return Score(
        region_ssim(picture, pair.truth, pair.box),
        psnr if np.isfinite(psnr) else None,
        lineup.recognised(identity_of(picture[pair.box.slices]), pair.seed),
    )


def _wrong_objects(pairs: Sequence[TruthPair], lineup: Lineup) -> Iterator[Score]:
    """What chance recognises: for each pair the true picture of an object that is not in its lineup."""
    for number, pair in enumerate(pairs):
        lined_up = {pair.seed, *lineup.others(pair.seed)}
        wrong = next(p for p in (*pairs[number + 1 :], *pairs) if p.seed not in lined_up)
        yield Score(None, None, lineup.recognised(identity_of(wrong.truth[wrong.box.slices]), pair.seed))


def _identities(seed: int) -> list[Identity]:
    return [identity_of(_cut(view)) for view in other_views(seed)]


def _cut(view: View) -> Picture:
    cut: Picture = view.image[exact_box(view.mask).slices]
    return cut


def _row(method: str, scores: Sequence[Score]) -> Row:
    ssim = [score.ssim for score in scores if score.ssim is not None]
    psnr = [score.psnr for score in scores if score.psnr is not None]
    spread = statistics.stdev(ssim) if len(ssim) > 1 else 0.0
    return Row(
        method,
        statistics.fmean(ssim) if ssim else None,
        spread / len(ssim) ** 0.5 if ssim else None,
        statistics.fmean(psnr) if psnr else None,
        {part: statistics.fmean(score.recognised[part] for score in scores) for part in PARTS},
    )
