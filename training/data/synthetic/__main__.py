"""Draws the example pictures, or a sheet of what the renderer can do: views of objects in rooms and alone.

examples:
    python -m training.data.synthetic --sheet build/sheet.png
    python -m training.data.synthetic --sheet build/others.png --first 1000
    python -m training.data.synthetic --examples examples/
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from runtime.imaging.masks import MASK_THRESHOLD
from runtime.progress_bar import ProgressBar
from training.data.synthetic.bodies import Pose
from training.data.synthetic.objects import make_object
from training.data.synthetic.rendering import render_all, render_cutout
from training.data.synthetic.scenes import make_light, make_scene
from training.data.synthetic.views import HELD_OUT, reference_view, scene_view

OBJECT_SEED = HELD_OUT + 2_000_003  # a bear in a dotted shirt
SCENE_SEED = HELD_OUT + 2_000_010  # boards before a pale wall
BYSTANDERS = (  # what stands in the scene already
    (HELD_OUT + 2_000_022, Pose(-1.5, -0.7, 0.2, 0.95)),
    (HELD_OUT + 2_000_016, Pose(1.6, -0.9, 0.5, 0.9)),
)
PLACE = Pose(0.05, 0.25, 0.1, 1.15)
SCENE_SIZE, OBJECT_SIZE = (400, 300), 300


def draw_examples(folder: Path) -> None:
    """Writes object.png (RGBA), scene.png and scene_box.txt, the place for the object as x0,y0,x1,y1."""
    folder.mkdir(parents=True, exist_ok=True)
    spec, scene = make_object(OBJECT_SEED), make_scene(SCENE_SEED)
    cutout = render_cutout(spec, 0.2, 0.3, make_light(np.random.default_rng(7)), OBJECT_SIZE)
    Image.fromarray(cutout).save(folder / "object.png", optimize=True)
    others = [(make_object(seed), pose) for seed, pose in BYSTANDERS]
    picture, _ = render_all(scene, others, SCENE_SIZE)
    Image.fromarray(picture).save(folder / "scene.png", optimize=True)
    _, masks = render_all(scene, [(spec, PLACE), *others], SCENE_SIZE)
    covered = masks[0] > MASK_THRESHOLD
    columns, rows = np.flatnonzero(covered.any(0)), np.flatnonzero(covered.any(1))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    (folder / "scene_box.txt").write_text(",".join(str(end) for end in box) + "\n")


def draw_sheet(path: Path, first: int, rows: int = 8, side: int = 160) -> None:
    """Writes a sheet with three views in scenes and two alone of each of `rows` objects."""
    sheet = Image.new("RGB", (5 * side, rows * side), "white")
    for row in ProgressBar(range(rows), "drawing objects", leave=False):
        for number in range(3):
            view = scene_view(first + row, number, side)
            sheet.paste(Image.fromarray(view.image), (number * side, row * side))
        for number in range(2):
            view = reference_view(first + row, number, side)
            place = ((3 + number) * side, row * side)
            sheet.paste(Image.fromarray(view.image), place, Image.fromarray(view.mask))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 if there is nothing to draw or it cannot be written."""
    parser = argparse.ArgumentParser(
        prog="python -m training.data.synthetic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--examples", type=Path, metavar="FOLDER", help="write the demo's pictures and box")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="write eight objects as one PNG")
    parser.add_argument("--first", type=int, default=0, help="seed of the sheet's first object; default: 0")
    options = parser.parse_args(arguments)
    if options.first < 0:
        parser.error(f"--first is {options.first}; seeds start at 0")
    if not options.examples and not options.sheet:
        parser.print_help(sys.stderr)
        return 2
    try:
        if options.examples:
            draw_examples(options.examples)
        if options.sheet:
            draw_sheet(options.sheet, options.first)
    except OSError as error:
        print(f"synthetic: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
