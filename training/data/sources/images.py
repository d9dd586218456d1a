"""Reads single images (MSRA-10K, DUT, HFlickr, LVIS, SAM), views (MVImgNet), try-on (VITON-HD, FashionTryOn).

A single image is its own reference: only the augmentation in `make_pair` makes the two differ.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from training.data.masks import shrink
from training.data.pairs import Shot
from training.data.sources.base import (
    Source,
    SourceError,
    decode_segmentation,
    decoding,
    read_labels,
    read_mask,
    read_picture,
)
from training.data.sources.videos import choose_frames

LEAST_AREA = 0.02
"""Share of the image that a mask must cover where nobody chose the object as the image's subject."""


class SalientObjects(Source):
    """An image and a black and white mask of the same name."""

    kind = "image"
    images: tuple[str, ...]
    masks: tuple[str, ...]

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._images = self.existing(*self.images)
        self.files = sorted(self.existing(*self.masks).glob("*.png"))
        self.not_empty(self.files, "mask")

    def __len__(self) -> int:
        return len(self.files)

    def image_of(self, mask: Path) -> Path:
        """Finds the image that a mask belongs to."""
        return self._images / f"{mask.stem}.jpg"

    def pair(self, index: int, rng: Generator) -> tuple[Shot, Shot]:
        """Reads the image twice."""
        file = self.files[index]
        shot = Shot(read_picture(self.image_of(file)), read_mask(file))
        return shot, shot


class MSRA10K(SalientObjects):
    """MSRA-10K: Imgs/NAME.jpg and Imgs/NAME.png."""

    images = masks = ("Imgs",)


class DUT(SalientObjects):
    """DUTS, training part: DUTS-TR-Image/NAME.jpg and DUTS-TR-Mask/NAME.png."""

    images, masks = ("DUTS-TR-Image",), ("DUTS-TR-Mask",)


class HFlickr(SalientObjects):
    """HFlickr of iHarmony4: real_images/NAME.jpg and masks/NAME_NUMBER.png."""

    images, masks = ("real_images",), ("masks",)

    def image_of(self, mask: Path) -> Path:
        """Finds the image that a mask belongs to; several, numbered from 1, may belong to one."""
        return self._images / f"{mask.stem.rpartition('_')[0]}.jpg"


class LVIS(Source):
    """LVIS: train2017/000000000000.jpg (those of COCO) and lvis_v1_train.json with polygons."""

    kind = "image"

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._images = self.existing("train2017")
        path = self.existing("lvis_v1_train.json")
        self.objects: dict[int, list[Any]] = defaultdict(list)
        with decoding(f"{type(self).__name__}: {path}"):
            content = self.read_index(path)
            sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
            for annotation in content["annotations"]:
                height, width = sizes[annotation["image_id"]]
                if annotation["area"] > LEAST_AREA * height * width:
                    self.objects[annotation["image_id"]].append(annotation["segmentation"])
        self.numbers = sorted(self.objects)
        self.not_empty(self.numbers, "object of any size")

    def __len__(self) -> int:
        return len(self.numbers)

    def pair(self, index: int, rng: Generator) -> tuple[Shot, Shot]:
        """Reads one of the image's larger objects."""
        number = self.numbers[index]
        image = read_picture(self._images / f"{number:012d}.jpg")
        polygons = self.objects[number][int(rng.integers(len(self.objects[number])))]
        shot = Shot(image, decode_segmentation(polygons, image.shape[:2]))
        return shot, shot


class SAM(Source):
    """SA-1B: folders of sa_NUMBER.jpg with sa_NUMBER.json, whose masks are compressed run lengths."""

    kind = "image"

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.files = sorted(self.search(self.root.glob("**/sa_*.json"), "file"))
        self.not_empty(self.files, "sa_NUMBER.json")

    def __len__(self) -> int:
        return len(self.files)

    def pair(self, index: int, rng: Generator) -> tuple[Shot, Shot]:
        """Reads one of the image's larger masks."""
        file = self.files[index]
        with decoding(file):
            content = json.loads(file.read_bytes())
            least = LEAST_AREA * content["image"]["height"] * content["image"]["width"]
            large = [a["segmentation"] for a in content["annotations"] if a["area"] > least]
        if not large:
            raise SourceError(f"{file} has no mask of more than {LEAST_AREA:.0%} of the image")
        mask = decode_segmentation(large[int(rng.integers(len(large)))], (0, 0))
        shot = Shot(read_picture(file.with_suffix(".jpg")), mask)
        return shot, shot


class MVImgNet(Source):
    """MVImgNet: CLASS/OBJECT/images/001.jpg, masks in mask/CLASS/OBJECT/001.jpg.png."""

    kind = "multi-view"
    either_side = False

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        folders = self.search(self.existing("mask").glob("*/*"), "object")
        self.objects = sorted(path for path in folders if len(list(path.glob("*.jpg.png"))) > 1)
        self.not_empty(self.objects, "object with two masks")

    def __len__(self) -> int:
        return len(self.objects)

    def pair(self, index: int, rng: Generator) -> tuple[Shot, Shot]:
        """Reads two views of an object."""
        masks = sorted(self.objects[index].glob("*.jpg.png"))
        first, second = (self._shot(masks[view]) for view in choose_frames(len(masks), rng, self.window))
        return first, second

    def _shot(self, mask: Path) -> Shot:
        category, name = mask.parts[-3:-1]
        return Shot(read_picture(self.root / category / name / "images" / mask.stem), read_mask(mask))


class VitonHD(Source):
    """VITON-HD: train/cloth, train/cloth-mask, train/image and the person's parts in train/image-parse-v3."""

    kind = "try-on"
    either_side = False
    UPPER_CLOTHES = 5

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        for folder in ("cloth", "cloth-mask", "image", "image-parse-v3"):
            self.existing("train", folder)
        self.names = sorted(file.stem for file in (self.root / "train" / "cloth").glob("*.jpg"))
        self.not_empty(self.names, "garment")

    def __len__(self) -> int:
        return len(self.names)

    def pair(self, index: int, rng: Generator) -> tuple[Shot, Shot]:
        """Reads the garment, and a person who wears it."""
        train, name = self.root / "train", self.names[index]
        garment = Shot(
            read_picture(train / "cloth" / f"{name}.jpg"), read_mask(train / "cloth-mask" / f"{name}.jpg")
        )
        parts = read_labels(train / "image-parse-v3" / f"{name}.png")
        worn = np.asarray(parts == self.UPPER_CLOTHES)
        return garment, Shot(read_picture(train / "image" / f"{name}.jpg"), worn)


class FashionTryon(Source):
    """FashionTryOn: train/GARMENT/target.jpg and mask.jpg, persons as POSE.jpg with POSE/segment.png."""

    kind = "try-on"
    either_side = False
    CLOTHES = 7
    RIM = 3
    """Pixels at the border of the clothes that the label maps give to them and the pictures do not."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        segments = self.search(self.existing("train").glob("*/*/segment.png"), "person")
        self.poses: dict[Path, list[Path]] = defaultdict(list)
        for segment in sorted(segments):
            self.poses[segment.parents[1]].append(segment)
        self.garments = sorted(self.poses)
        self.not_empty(self.garments, "train/GARMENT/POSE/segment.png")

    def __len__(self) -> int:
        return len(self.garments)

    def pair(self, index: int, rng: Generator) -> tuple[Shot, Shot]:
        """Reads the garment, and a person who wears it in one of the poses."""
        folder = self.garments[index]
        garment = Shot(read_picture(folder / "target.jpg"), read_mask(folder / "mask.jpg"))
        segment = self.poses[folder][int(rng.integers(len(self.poses[folder])))]
        # grey, and where it is stored as a colour its first channel
        worn = np.asarray(read_labels(segment) % 256 == self.CLOTHES)
        person = read_picture(segment.parent.with_suffix(".jpg"))
        return garment, Shot(person, shrink(worn, self.RIM))
