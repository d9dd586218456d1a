"""Draws the picture of the README: object, scene with the place for it, hint, and composite.

    python examples/picture.py docs/demo.png

Also an example of the programming interface.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from runtime import Compositor, Placement, Sampling
from runtime.imaging.boxes import Box
from runtime.imaging.collage import MODES, Ratios, make_hint
from runtime.imaging.reference import prepare_reference

EXAMPLES = Path(__file__).parent
HEIGHT, GAP = 300, 12
RATIOS = Ratios(crop=1.3)  # what the example model learned


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw object, scene, hint and composite side by side.")
    parser.add_argument("output", type=Path, metavar="FILE.png")
    parser.add_argument("--bundle", type=Path, default=EXAMPLES / "anydoor-small", metavar="DIR")
    parser.add_argument("--mode", default="keep_background")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    options = parser.parse_args()

    x0, y0, x1, y1 = (int(v) for v in (EXAMPLES / "scene_box.txt").read_text("utf-8").split(","))
    scene, reference = Image.open(EXAMPLES / "scene.png").convert("RGB"), Image.open(EXAMPLES / "object.png")
    compositor = Compositor.load(options.bundle)
    composite = compositor.composite(
        scene,
        Placement(reference, box=(x0, y0, x1, y1), mode=options.mode, ratios=RATIOS),
        seed=options.seed,
        sampling=Sampling(steps=options.steps, guidance_scale=options.guidance_scale),
    )

    cutout = Image.new("RGB", reference.size, "white")
    cutout.paste(reference, mask=reference.getchannel("A"))
    place = scene.copy()
    ImageDraw.Draw(place).rectangle((x0, y0, x1 - 1, y1 - 1), outline="red", width=2)
    collage = draw_collage(scene, reference, Box(x0, y0, x1, y1), options.mode)
    panels = [p.resize((p.width * HEIGHT // p.height, HEIGHT)) for p in (cutout, place, collage, composite)]
    sheet = Image.new("RGB", (sum(p.width + GAP for p in panels) - GAP, HEIGHT), "white")
    left = 0
    for panel in panels:
        sheet.paste(panel, (left, 0))
        left += panel.width + GAP
    sheet.save(options.output)
    print(options.output)


def draw_collage(scene: Image.Image, reference: Image.Image, box: Box, mode: str) -> Image.Image:
    """The first three channels of the hint: the zoomed-in scene with the high-frequency map in the box."""
    rgba = np.asarray(reference)
    prepared = prepare_reference(rgba[..., :3], rgba[..., 3] > 128)
    hint = make_hint(np.asarray(scene), box, prepared, RATIOS, MODES[mode], HEIGHT)
    return Image.fromarray((hint.hint[:3].transpose(1, 2, 0) * 127.5 + 127.5).astype(np.uint8))


if __name__ == "__main__":
    main()
