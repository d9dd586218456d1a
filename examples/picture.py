"""Draws the picture of the README: object, scene with the place for it, and the composite.

    python examples/picture.py docs/demo.png

Also an example of the programming interface.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from runtime import Compositor, Placement, Sampling

EXAMPLES = Path(__file__).parent
HEIGHT, GAP = 300, 12


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw object, scene and composite side by side.")
    parser.add_argument("output", type=Path, metavar="FILE.png")
    parser.add_argument("--bundle", type=Path, default=EXAMPLES / "anydoor-small", metavar="DIR")
    parser.add_argument("--mode", default="keep_background")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    x0, y0, x1, y1 = (int(v) for v in (EXAMPLES / "scene_box.txt").read_text("utf-8").split(","))
    scene, reference = Image.open(EXAMPLES / "scene.png").convert("RGB"), Image.open(EXAMPLES / "object.png")
    compositor = Compositor.load(options.bundle)
    composite = compositor.composite(
        scene,
        Placement(reference, box=(x0, y0, x1, y1), mode=options.mode),
        seed=options.seed,
        sampling=Sampling(steps=options.steps),
    )

    cutout = Image.new("RGB", reference.size, "white")
    cutout.paste(reference, mask=reference.getchannel("A"))
    place = scene.copy()
    ImageDraw.Draw(place).rectangle((x0, y0, x1 - 1, y1 - 1), outline="red", width=2)
    panels = [p.resize((p.width * HEIGHT // p.height, HEIGHT)) for p in (cutout, place, composite)]
    sheet = Image.new("RGB", (sum(p.width for p in panels) + GAP * 2, HEIGHT), "white")
    left = 0
    for panel in panels:
        sheet.paste(panel, (left, 0))
        left += panel.width + GAP
    sheet.save(options.output)
    print(options.output)


if __name__ == "__main__":
    main()
