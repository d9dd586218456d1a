"""Reads further data sets of IMPRINT: stills, portraits (PPR10K), rendered views (Objaverse)."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

from runtime.errors import InputError
from runtime.imaging.masks import MASK_THRESHOLD, MaskedPicture, load_mask
from runtime.imaging.pictures import load_picture, seen
from training.data.pairs import Shot
from training.data.sources.base import Source, SourceError, decoding, read_mask, read_picture
from training.data.sources.videos import choose_frames


class Stills(Source):
    """Pictures from anywhere: images/NAME.*, masks/NAME.png; further objects in masks/NAME_2.png and so on.

    They are read as those of a request. The paper takes stock photographs, of which no list is published.
    """

    kind = "image"

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        files = {
            folder: [path for path in self.existing(folder).iterdir() if not path.name.startswith(".")]
            for folder in ("images", "masks")
        }
        images = {path.stem: path for path in files["images"] if path.is_file()}
        self.objects: list[tuple[Path, Path]] = []
        for mask in sorted(path for path in files["masks"] if path.suffix.lower() == ".png"):
            whole, _, number = mask.stem.rpartition("_")
            image = images.get(mask.stem) or (images.get(whole) if number.isdecimal() else None)
            if image:
                self.objects.append((image, mask))
        self.not_empty(self.objects, "mask of a picture")

    def __len__(self) -> int:
        return len(self.objects)

    def pair(self, index: int, rng: Generator) -> tuple[Shot, Shot]:
        """Reads the picture twice."""
        image, mask = self.objects[index]
        name = f"the picture {image.name}"
        try:
            picture = load_picture(image, name)
            of = MaskedPicture(name, picture.rgb.shape, picture.orientation)
            shot = Shot(seen(picture), load_mask(mask, f"the mask {mask.name}", of=of))
        except InputError as error:
            raise SourceError(str(error)) from error
        return shot, shot


class PPR10K(Source):
    """PPR10K, small pictures: train/target_a/GROUP_NUMBER.tif, train/masks/GROUP_NUMBER.png.

    A group shows the same people in one scene. The layout is the one that the authors' code reads
    (csjliang/PPR10K, code_3DLUT/datasets.py); of three retouched versions, the first.
    """

    kind = "image"
    FOLDER = "target_a"

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        pictures = self.existing("train", self.FOLDER)
        self._masks = self.existing("train", "masks")
        groups: dict[str, list[Path]] = defaultdict(list)
        for file in sorted(self.search(pictures.glob("*_*.tif"), "photo")):
            groups[file.stem.rpartition("_")[0]].append(file)
        self.groups = [group for group in groups.values() if len(group) > 1]
        self.not_empty(self.groups, "group of two photos")

    def __len__(self) -> int:
        return len(self.groups)

    def pair(self, index: int, rng: Generator) -> tuple[Shot, Shot]:
        """Reads two photos of a group."""
        group = self.groups[index]
        first, second = (self._shot(group[n]) for n in choose_frames(len(group), rng, self.window))
        return first, second

    def _shot(self, file: Path) -> Shot:
        return Shot(read_picture(file), read_mask(self._masks / f"{file.stem}.png"))


class Objaverse(Source):
    """Views of Objaverse's objects, rendered beforehand: OBJECT/000.png and so on, on transparent ground.

    Consecutive numbers must be neighbouring views, for the window's sake.
    """

    kind = "multi-view"
    either_side = False

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        views: dict[Path, list[Path]] = defaultdict(list)
        for file in sorted(self.search(self.root.glob("*/*.png"), "view")):
            views[file.parent].append(file)
        self.objects = [files for files in views.values() if len(files) > 1]
        self.not_empty(self.objects, "object with two views")

    def __len__(self) -> int:
        return len(self.objects)

    def pair(self, index: int, rng: Generator) -> tuple[Shot, Shot]:
        """Reads two views of an object."""
        views = self.objects[index]
        first, second = (self._shot(views[n]) for n in choose_frames(len(views), rng, self.window))
        return first, second

    def _shot(self, file: Path) -> Shot:
        with decoding(file), Image.open(file) as image:
            if not image.has_transparency_data:
                raise SourceError(f"{file} has no transparency, which says where the object is")
            picture = np.asarray(image.convert("RGBA"))
        return Shot(picture[..., :3], picture[..., 3] > MASK_THRESHOLD)
