"""How well is the main object found? Masks of held-out rendered pictures, compared with the exact ones.

    python benchmarks/segmentation.py examples/segmenter-small
    python benchmarks/segmentation.py build/engines/u2net --count 20

In rooms, which the rule for plain backgrounds refuses, and before a backdrop of one colour. Prints the mean
intersection over union of each, of the segmenter and of that rule, with the share of pictures in which it is
below a half: another thing was found, or nothing. Writes segmentation.json and a contact sheet.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.fidelity import labelled_sheet
from benchmarks.support.machine import describe
from benchmarks.support.results import require_writable, write_results
from engines.errors import AnyDoorError
from runtime.cli.flags import add_engine_flags, engine_options
from runtime.errors import InputError
from runtime.imaging.masks import MASK_THRESHOLD
from runtime.progress_bar import ProgressBar
from runtime.segmentation import Segmenter
from training.data.cut_outs import CutOutRules, before_backdrop
from training.data.synthetic.views import HELD_OUT, View, reference_view, scene_view
from training.sheets import write_sheet

Mask = NDArray[np.bool_]

LIMIT = 0.9
"""Least mean intersection over union in rooms of a segmenter that is shipped."""

SHOWN = 12
"""Pictures of each kind on the contact sheet."""

_MISSED, _SIDE = 0.5, 128


def in_a_room(seed: int) -> View:
    """Return a held-out object in a room that no training has seen."""
    return scene_view(HELD_OUT + seed, 0)


def before_one_colour(seed: int) -> View:
    """Return a held-out object before a backdrop of one colour."""
    rng = np.random.default_rng([seed, 7])
    return before_backdrop(reference_view(HELD_OUT + seed, 0), CutOutRules(plain=1.0), rng)


PICTURES: Mapping[str, Callable[[int], View]] = {"room": in_a_room, "backdrop": before_one_colour}


def overlap(mask: Mask, truth: Mask) -> float:
    """Compute the intersection over union."""
    return int(np.count_nonzero(mask & truth)) / max(int(np.count_nonzero(mask | truth)), 1)


def found(segmenter: Segmenter, view: View) -> Mask:
    """Return what a segmenter finds; nothing where it refuses."""
    try:
        return segmenter.mask(view.image)
    except InputError:
        return np.zeros(view.mask.shape, np.bool_)


def rows(
    segmenters: Mapping[str, Segmenter], views: Mapping[str, Sequence[View]]
) -> Iterator[dict[str, Any]]:
    """Measure each segmenter on each kind of pictures."""
    for name, segmenter in segmenters.items():
        for kind, shown in views.items():
            overlaps = [overlap(found(segmenter, view), view.mask > MASK_THRESHOLD) for view in shown]
            yield {
                "segmenter": name,
                "pictures": kind,
                "overlap": statistics.fmean(overlaps),
                "error": statistics.stdev(overlaps) / len(overlaps) ** 0.5 if len(overlaps) > 1 else 0.0,
                "missed": statistics.fmean(value < _MISSED for value in overlaps),
            }


def sheet(segmenter: Segmenter, views: Mapping[str, Sequence[View]]) -> NDArray[np.uint8]:
    """Lay some pictures out, each beside what is found in it, on white."""
    columns = {}
    for kind, shown in views.items():
        pictures = [view.image for view in shown[:SHOWN]]
        masks = [found(segmenter, view)[..., None] for view in shown[:SHOWN]]
        cut = [np.where(mask, picture, 255).astype(np.uint8) for mask, picture in zip(masks, pictures)]
        for title, column in ((kind, pictures), (f"{kind}: found", cut)):
            squares = [Image.fromarray(each).resize((_SIDE, _SIDE)) for each in column]
            columns[title] = [np.asarray(square) for square in squares]
    return labelled_sheet(columns, SHOWN)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 if the segmenter finds too little, 2 if something cannot be used."""
    parser = argparse.ArgumentParser(
        prog="segmentation.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="of a segmenter that finds the main object")
    parser.add_argument("--count", type=int, default=100, help="pictures of each kind (default: 100)")
    parser.add_argument("--output", type=Path, default=Path("build/segmentation.json"), metavar="FILE")
    add_engine_flags(parser)
    options = parser.parse_args(arguments)
    try:
        require_writable(options.output)
        if options.count < 1:
            raise InputError(f"--count is {options.count}; expected at least 1")
        segmenter = Segmenter.load(options.bundle, options=engine_options(options))
        views = {
            kind: [draw(seed) for seed in ProgressBar(range(options.count), kind, leave=False)]
            for kind, draw in PICTURES.items()
        }
        measured = list(rows({options.bundle.name: segmenter, "the rule": Segmenter()}, views))
        write_results(options.output, {"machine": describe(), "count": options.count, "rows": measured})
        write_sheet([sheet(segmenter, views)], options.output.with_suffix(".png"))
    except (AnyDoorError, OSError) as error:
        print(f"segmentation.py: {error}", file=sys.stderr)
        return 2
    print(f"{'segmenter':<20} {'pictures':<10} {'IoU':>16} {'missed':>7}")
    for row in measured:
        value = f"{row['overlap']:.3f} +- {row['error']:.3f}"
        print(f"{row['segmenter']:<20} {row['pictures']:<10} {value:>16} {row['missed']:>7.0%}")
    return int(measured[0]["overlap"] < LIMIT)


if __name__ == "__main__":
    sys.exit(main())
