"""The contents of `examples/`: the model's checkpoint, an object, a scene and a place in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.support.bundle_option import EXAMPLE_BUNDLE
from engines.bundle import REST, sha256
from engines.manifest import MANIFEST, read_manifest
from runtime.request import Placement

EXAMPLES = Path(__file__).parents[2] / "examples"
SCENE = EXAMPLES / "scene.png"
OBJECT = EXAMPLES / "object.png"
CHECKPOINT = EXAMPLE_BUNDLE.with_suffix(".safetensors")


def example_checkpoint() -> Path:
    """Return the example model's checkpoint; where it is missing or of another version of the bundle, it is
    restored from that.

    Raises:
        AnyDoorError: it cannot be restored.
    """
    if (EXAMPLE_BUNDLE / REST).is_file():
        wanted = read_manifest(EXAMPLE_BUNDLE / MANIFEST).checkpoint["sha256"]
        if not CHECKPOINT.is_file() or sha256(CHECKPOINT) != wanted:
            from export.restore_checkpoint import restore

            restore(EXAMPLE_BUNDLE, CHECKPOINT)
    return CHECKPOINT


def scene_box() -> tuple[int, int, int, int]:
    """Return x0, y0, x1, y1 of the place in the scene, in pixels."""
    x0, y0, x1, y1 = (int(value) for value in (EXAMPLES / "scene_box.txt").read_text("utf-8").split(","))
    return x0, y0, x1, y1


def placement(brighter: int = 0) -> Placement:
    """Return the object at its place, a number of levels (0..255) brighter.

    Another brightness is another reference: nothing that was kept for the first one can be used for it.
    """
    from PIL import Image

    rgba = np.asarray(Image.open(OBJECT).convert("RGBA")).astype(np.int16)
    rgba[..., :3] = np.minimum(rgba[..., :3] + brighter, 255)
    return Placement(rgba.astype(np.uint8), box=scene_box())


def prompted(variant: int = 0) -> Placement:
    """Return a prompt and a place; another variant is another prompt, and a place some pixels to the right.

    In this mode nothing is blended, as in diffusers' pipeline for networks that see the scene.
    """
    x0, y0, x1, y1 = scene_box()
    box = (x0 + variant, y0, x1 + variant, y1)
    return Placement(prompt=f"a red cup, picture {variant}", box=box, mode="crop")


PLACEMENTS = {"anydoor": placement, "stable_diffusion": prompted}
"""System -> what makes a variant of its example."""
