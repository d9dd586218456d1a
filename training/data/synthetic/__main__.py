"""Draws the example pictures, or a sheet of what the renderer can do.

python -m training.data.synthetic --examples examples/
python -m training.data.synthetic --sheet sheet.png --first 0
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from training.data.synthetic.rendering import Pose, make_object, render_all, render_cutout
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
    columns, rows = np.flatnonzero((masks[0] > 128).any(0)), np.flatnonzero((masks[0] > 128).any(1))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    (folder / "scene_box.txt").write_text(",".join(str(end) for end in box) + "\n")


def draw_sheet(path: Path, first: int, rows: int = 8, side: int = 160) -> None:
    """Writes a sheet with three views in scenes and two alone of each of `rows` objects."""
    sheet = Image.new("RGB", (5 * side, rows * side), "white")
    for row in range(rows):
        for number in range(3):
            view = scene_view(first + row, number, side)
            sheet.paste(Image.fromarray(view.image), (number * side, row * side))
        for number in range(2):
            view = reference_view(first + row, number, side)
            place = ((3 + number) * side, row * side)
            sheet.paste(Image.fromarray(view.image), place, Image.fromarray(view.mask))
    sheet.save(path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.data.synthetic", description=__doc__)
    parser.add_argument("--examples", type=Path, metavar="FOLDER")
    parser.add_argument("--sheet", type=Path, metavar="FILE")
    parser.add_argument("--first", type=int, default=0, help="seed of the sheet's first object")
    arguments = parser.parse_args()
    if arguments.examples:
        draw_examples(arguments.examples)
    if arguments.sheet:
        draw_sheet(arguments.sheet, arguments.first)


if __name__ == "__main__":
    main()
