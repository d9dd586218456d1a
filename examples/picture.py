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
from runtime.imaging.collage import make_hint
from runtime.imaging.masks import mask_from_alpha
from runtime.imaging.modes import MODES
from runtime.imaging.reference import prepare_reference
from runtime.parameters import PLACEMENT_PARAMETERS, PlacementParameters

EXAMPLES = Path(__file__).parent
HEIGHT, GAP = 300, 12


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw object, scene, hint and composite side by side.")
    parser.add_argument("output", type=Path, metavar="FILE.png")
    parser.add_argument("--bundle", type=Path, default=EXAMPLES / "anydoor-small", metavar="DIR")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--strength", type=float, default=1.0)
    options = parser.parse_args()

    x0, y0, x1, y1 = (int(v) for v in (EXAMPLES / "scene_box.txt").read_text("utf-8").split(","))
    scene, reference = Image.open(EXAMPLES / "scene.png").convert("RGB"), Image.open(EXAMPLES / "object.png")
    compositor = Compositor.load(options.bundle)
    composite = compositor.composite(
        scene,
        Placement(reference, box=(x0, y0, x1, y1), strength=options.strength),
        seed=options.seed,
        sampling=Sampling(steps=options.steps),
    )
    # what was left open, as the bundle says it
    parameters = PlacementParameters(**{name: compositor.defaults.get(name) for name in PLACEMENT_PARAMETERS})

    cutout = Image.new("RGB", reference.size, "white")
    cutout.paste(reference, mask=reference.getchannel("A"))
    place = scene.copy()
    ImageDraw.Draw(place).rectangle((x0, y0, x1 - 1, y1 - 1), outline="red", width=2)
    collage = draw_collage(scene, reference, Box(x0, y0, x1, y1), parameters)
    panels = [p.resize((p.width * HEIGHT // p.height, HEIGHT)) for p in (cutout, place, collage, composite)]
    sheet = Image.new("RGB", (sum(p.width + GAP for p in panels) - GAP, HEIGHT), "white")
    left = 0
    for panel in panels:
        sheet.paste(panel, (left, 0))
        left += panel.width + GAP
    sheet.save(options.output)
    print(options.output)


def draw_collage(
    scene: Image.Image, reference: Image.Image, box: Box, parameters: PlacementParameters
) -> Image.Image:
    """Draws the first three channels of the hint: the zoomed-in scene with the high-frequency map in the
    box."""
    rgba, ratios = np.asarray(reference), parameters.ratios
    prepared = prepare_reference(rgba[..., :3], mask_from_alpha(rgba[..., 3]), ratios.reference)
    hint = make_hint(np.asarray(scene), box, prepared, ratios, MODES[parameters.mode], HEIGHT)
    return Image.fromarray((hint.hint[:3].transpose(1, 2, 0) * 127.5 + 127.5).astype(np.uint8))


if __name__ == "__main__":
    main()
