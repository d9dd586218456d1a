"""Draws the picture of docs/edits.md: a scene, and each edit of it.

    python examples/edits.py docs/edits.png

Also an example of the programming interface.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from runtime import Compositor, Placement, Sampling
from runtime.edits import Editor
from runtime.request import Action, Move, Remove, Reshape, Swap, SwapPlaces, TryOn, Where

EXAMPLES = Path(__file__).parent
BOTTLE = [
    *[(51, 38), (84, 38), (84, 60), (88, 74), (108, 92), (113, 168), (100, 180), (76, 184), (52, 180)],
    *[(41, 168), (40, 94), (50, 80), (55, 70)],
]
MUG = [
    *[(288, 72), (330, 65), (374, 74), (378, 98), (372, 124), (362, 150), (358, 172), (324, 180), (290, 174)],
    *[(284, 162)],
]
"""Outlines in the scene, drawn by hand."""
SHORTER = [(x, 184 - (184 - y) * 0.6) for x, y in BOTTLE]
GAP = 8


def outlined(points: Sequence[tuple[float, float]], size: tuple[int, int]) -> Where:
    """The place of an outline in a picture of `size` (width, height)."""
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).polygon(list(points), fill=255)
    return Where(mask=mask)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw a scene and each edit of it.")
    parser.add_argument("output", type=Path, metavar="FILE.png")
    parser.add_argument("--bundle", type=Path, default=EXAMPLES / "anydoor-small", metavar="DIR")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()

    scene, other = Image.open(EXAMPLES / "scene.png").convert("RGB"), Placement(EXAMPLES / "object.png")
    bottle, mug, shorter = (outlined(points, scene.size) for points in (BOTTLE, MUG, SHORTER))
    assert shorter.mask is not None
    editor, sampling = Editor(Compositor.load(options.bundle)), Sampling(steps=options.steps)

    def edited(where: Where, action: Action) -> Image.Image:
        given = Sampling() if isinstance(action, Remove) else sampling
        return editor.edit(scene, where, action, seed=options.seed, sampling=given)

    panels = {
        "scene": scene,
        "remove": edited(bottle, Remove()),
        "move": edited(bottle, Move((160, 100, 250, 290))),
        "reshape": edited(bottle, Reshape(shorter.mask)),
        "swap for another object": edited(mug, Swap(other)),
        "swap places": edited(bottle, SwapPlaces(mug)),
        "try on: fill an outline": edited(mug, TryOn(other)),
    }
    sheet(panels).save(options.output)
    print(options.output)


def sheet(panels: dict[str, Image.Image], columns: int = 4) -> Image.Image:
    """Pictures of one size with their titles."""
    width, height = panels["scene"].size
    rows = -(-len(panels) // columns)
    step = height + 3 * GAP
    result = Image.new("RGB", (columns * (width + GAP) - GAP, rows * step), "white")
    for index, (title, panel) in enumerate(panels.items()):
        x, y = index % columns * (width + GAP), index // columns * step
        ImageDraw.Draw(result).text((x + 2, y + GAP), title, fill="black")
        result.paste(panel, (x, y + 3 * GAP))
    return result.resize((result.width // 2, result.height // 2), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    main()
