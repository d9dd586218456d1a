"""Draws the picture of the small model that reads words in docs/systems.md.

    anydoor build examples/stable-diffusion-small --output build/engines/words
    python examples/words.py build/engines/words docs/words.png

A row per prompt, from the same seeds. Below them an object that is drawn from words, cut out by the
example's segmenter and put into the example's scene by AnyDoor's example model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from runtime import AnyDoorError, Compositor, Placement, Sampling
from runtime.segmentation import Segmenter

EXAMPLES = Path(__file__).parent
PROMPTS = (
    "a red ball on white",
    "a blue bottle on grass",
    "a green bear on black",
    "a yellow car before bricks",
    "a purple mushroom on wood",
    "a mug on a chessboard",
)
COMPOSITED, SEED = "a blue bottle on white", 1
SEEDS, SIDE, GAP, TEXT = 8, 96, 4, 210
SAMPLING = Sampling(steps=30, guidance_scale=3.0)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw what the small model that reads words draws.")
    parser.add_argument("bundle", type=Path, metavar="DIR", help="built from examples/stable-diffusion-small")
    parser.add_argument("output", type=Path, metavar="FILE.png")
    options = parser.parse_args()

    try:
        model = Compositor.load(options.bundle)
    except AnyDoorError as error:
        parser.error(str(error))
    rows = [row(prompt, seeds(model, prompt)) for prompt in PROMPTS]
    rows.append(row("cut out, composited", [*composited(model)]))
    sheet = Image.new("RGB", (rows[0].width, sum(each.height + GAP for each in rows) - GAP), "white")
    top = 0
    for each in rows:
        sheet.paste(each, (0, top))
        top += each.height + GAP
    sheet.save(options.output, optimize=True)
    print(options.output)


def seeds(model: Compositor, prompt: str) -> list[Image.Image]:
    """Pictures of a prompt from consecutive seeds."""
    return model.draw(prompt, seed=0, sampling=SAMPLING, num_images=SEEDS)


def composited(model: Compositor) -> tuple[Image.Image, Image.Image]:
    """The drawn object, and the example's scene with it."""
    drawn = model.draw(COMPOSITED, seed=SEED, sampling=SAMPLING)
    box = tuple(map(int, (EXAMPLES / "scene_box.txt").read_text("utf-8").split(",")))
    placement = Placement(drawn, reference_mask="auto", box=box)
    anydoor = Compositor.load(
        EXAMPLES / "anydoor-small", segmenter=Segmenter.load(EXAMPLES / "segmenter-small")
    )
    scene = anydoor.composite(EXAMPLES / "scene.png", placement, seed=7, sampling=Sampling(steps=30))
    return drawn.resize((scene.height, scene.height), Image.Resampling.BICUBIC), scene


def row(label: str, pictures: Sequence[Image.Image]) -> Image.Image:
    """A label, and pictures in a row: small ones enlarged, others fitted into the same width."""
    small = all(picture.height <= SIDE for picture in pictures)
    shown = [
        picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC) if small else picture for picture in pictures
    ]
    width = SEEDS * (SIDE + GAP) - GAP
    strip = Image.new("RGB", (sum(p.width + GAP for p in shown) - GAP, shown[0].height), "white")
    left = 0
    for picture in shown:
        strip.paste(picture, (left, 0))
        left += picture.width + GAP
    strip.thumbnail((width, width), Image.Resampling.LANCZOS)
    labelled = Image.new("RGB", (TEXT + width, strip.height), "white")
    font = ImageFont.load_default(size=15)
    ImageDraw.Draw(labelled).text((0, strip.height // 2), label, fill="black", font=font, anchor="lm")
    labelled.paste(strip, (TEXT, 0))
    return labelled


if __name__ == "__main__":
    main()
