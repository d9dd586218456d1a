"""Reads the test set of the paper's protocol (section 4.1): every object is put into every scene.

The folder has the layout of the released test set:

    FOLDER/objects/NAME/*.png       pictures of one object, each with transparency around it;
                                    the first by name is the reference, all are the real pictures
    FOLDER/scenes/NAME_GT.png       a scene (or .jpg)
    FOLDER/scenes/NAME_mask.png     white where the object goes; the box around it is the place

The paper has 30 objects (those of DreamBooth) and 80 scenes (of COCO-val).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.support.baselines import exact_box, on_white
from engines.errors import AnyDoorError
from runtime.imaging.boxes import Box
from runtime.imaging.masks import load_mask, mask_from_alpha
from runtime.imaging.pictures import load_picture

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class ProtocolObject:
    """An object and its real pictures."""

    name: str
    files: tuple[Path, ...]

    def cutout(self, file: Path) -> tuple[Picture, Picture]:
        """Read a picture (H, W, 3), and how much of each pixel is the object (H, W), 0..255.

        Raises:
            AnyDoorError: the picture cannot be read, or has no transparency.
        """
        picture = load_picture(file, f"'{file}'")
        if picture.alpha is None:
            raise AnyDoorError(f"'{file}' has no transparency that says where the object is")
        if not mask_from_alpha(picture.alpha).any():
            raise AnyDoorError(f"'{file}' is transparent everywhere")
        return picture.rgb, picture.alpha

    @cached_property
    def reference(self) -> tuple[Picture, Picture]:
        """The picture that is put into the scenes, and its mask."""
        return self.cutout(self.files[0])

    def real_pictures(self) -> list[Picture]:
        """Return every picture of the object, on white and cropped to the object."""
        pictures = []
        for file in self.files:
            image, mask = self.cutout(file)
            pictures.append(on_white(image, mask)[exact_box(mask).slices])
        return pictures


@dataclass(frozen=True)
class ProtocolScene:
    """A scene with a place in it."""

    name: str
    file: Path
    mask_file: Path

    def read(self) -> tuple[Picture, Box]:
        """Read the scene (H, W, 3) and the place.

        Raises:
            AnyDoorError: one of the files cannot be read, or the mask is empty.
        """
        image = load_picture(self.file, f"'{self.file}'").rgb
        mask = load_mask(self.mask_file, f"'{self.mask_file}'")
        if mask.shape != image.shape[:2]:
            raise AnyDoorError(f"'{self.mask_file}' is not as large as its scene '{self.file.name}'")
        if not mask.any():
            raise AnyDoorError(f"'{self.mask_file}' is black: it offers no place")
        return image, exact_box(mask * np.uint8(255))


def read_protocol(folder: Path) -> tuple[list[ProtocolObject], list[ProtocolScene]]:
    """Read the objects and scenes of a folder.

    Raises:
        AnyDoorError: the folder has another layout; the text says what is missing.
    """
    objects = [
        ProtocolObject(each.name, tuple(sorted(each.glob("*.png"))))
        for each in sorted((folder / "objects").glob("*/"))
        if any(each.glob("*.png"))
    ]
    if not objects:
        raise AnyDoorError(f"there is no picture objects/NAME/*.png in '{folder}'")
    scenes = []
    for mask in sorted((folder / "scenes").glob("*_mask.png")):
        name = mask.stem.removesuffix("_mask")
        files = [mask.with_name(f"{name}_GT{suffix}") for suffix in (".png", ".jpg")]
        found = [file for file in files if file.is_file()]
        if not found:
            raise AnyDoorError(f"there is no scene '{files[0]}' for '{mask.name}'")
        scenes.append(ProtocolScene(name, found[0], mask))
    if not scenes:
        raise AnyDoorError(f"there is no mask scenes/NAME_mask.png in '{folder}'")
    return objects, scenes
