"""Draws the picture of the mask levels in docs/systems.md: what of a scene is drawn, from mask to box.

    python examples/mask_levels.py docs/mask-levels.png

Needs no bundle. The mask is the outline of the example's object, turned, at its place in the example's scene.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from runtime.imaging.geometry import Ratios
from runtime.imaging.mask_levels import MASK_LEVELS, MaskLevel
from runtime.imaging.masked_scene import mask_scene

EXAMPLES = Path(__file__).parent
SIDE, GAP, HEADING = 256, 12, 28


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw the four mask levels side by side.")
    parser.add_argument("output", type=Path, metavar="FILE.png")
    options = parser.parse_args()

    scene, mask = example_place()
    sheet = Image.new("RGB", (len(MASK_LEVELS) * (SIDE + GAP) - GAP, HEADING + SIDE), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=18)
    for number, level in enumerate(MASK_LEVELS):
        left = number * (SIDE + GAP)
        pen.text((left + SIDE // 2, 0), f"{number} {level}", fill="black", font=font, anchor="ma")
        sheet.paste(Image.fromarray(panel(scene, mask, level)), (left, HEADING))
    sheet.save(options.output, optimize=True)
    print(options.output)


def example_place() -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The example's scene, (H, W, 3) RGB, and the object's outline at its place, (H, W)."""
    x0, y0, x1, y1 = (int(v) for v in (EXAMPLES / "scene_box.txt").read_text("utf-8").split(","))
    scene = Image.open(EXAMPLES / "scene.png").convert("RGB")
    outline = Image.open(EXAMPLES / "object.png").getchannel("A")
    outline = outline.rotate(-50, expand=True)
    outline = outline.crop(outline.getbbox())
    side = (y1 - y0) * 4 // 5
    outline.thumbnail((side, side))
    x0, y0 = (x0 + x1 - outline.width) // 2, y1 - outline.height
    canvas = Image.new("L", scene.size)
    canvas.paste(outline, (x0, y0))
    return np.asarray(scene), np.asarray(canvas) > 127


def panel(scene: NDArray[np.uint8], mask: NDArray[np.bool_], level: MaskLevel) -> NDArray[np.uint8]:
    """What the network sees of the scene at a level, (S, S, 3) RGB: grey where it draws."""
    seen = mask_scene(
        scene, mask, Ratios(crop=1.4), "keep_background", (SIDE, SIDE), (SIDE // 8, SIDE // 8), level
    ).masked_picture
    return np.rint(seen.transpose(1, 2, 0) * 127.5 + 127.5).astype(np.uint8)


if __name__ == "__main__":
    main()
