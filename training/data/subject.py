"""Reads the pictures of a subject and of its class for DreamBooth.

Source: DreamBooth (Ruiz et al., CVPR 2023), section 3: three to five pictures of the subject, and pictures
of its class that the model drew before it was tuned.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.errors import AnyDoorError
from runtime.diffusion.noise_schedule import TRAIN_TIMESTEPS
from runtime.imaging.boxes import Box
from runtime.imaging.mask_levels import coarsen_mask
from runtime.imaging.pictures import load_picture, seen
from training.data.pairs import Picture

LEAST_PICTURES = 2
"""Least pictures of a subject: a single one does not separate the subject from its background."""

LARGEST_RATIO = 2.0
"""Largest ratio of a picture's sides; training sees the square in its middle."""

_SMALLEST_PLACE = 0.3
"""Sides of a random place in a picture, as a share of the picture's, at least."""


class SubjectError(AnyDoorError):
    """Pictures of a subject cannot be used; the text says which, and what to do about it."""


def read_pictures(folder: Path, resolution: int, least: int = LEAST_PICTURES) -> list[Picture]:
    """Reads all pictures of a folder, in the order of their names.

    Args:
        folder: holds pictures alone; hidden files do not count.
        resolution: side of the squares that are cut from their middles, in pixels.
        least: how many there must be.

    Returns:
        (R, R, 3) uint8 RGB each.

    Raises:
        SubjectError: there are too few, or one is far from square.
        InputError: one cannot be read.
    """
    if not folder.is_dir():
        raise SubjectError(f"there is no folder '{folder}' with pictures of the subject")
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if len(paths) < least:
        raise SubjectError(
            f"'{folder}' holds {len(paths)} picture{'s' * (len(paths) != 1)}; give at least {least}, better "
            "five, of the same subject before different backgrounds"
        )
    return [_read_picture(path, resolution) for path in paths]


def class_paths(folder: Path, count: int) -> list[Path]:
    """Gives where the pictures of a subject's class are: number n was drawn from the seed n."""
    return [folder / f"{number:05d}.png" for number in range(count)]


def read_class(folder: Path, count: int, resolution: int) -> list[Picture]:
    """Reads the first pictures of a subject's class, as they were drawn for it.

    Args:
        folder: of the pictures; what else is in it does not count.
        count: of pictures.
        resolution: side of the squares that are cut from their middles, in pixels.

    Returns:
        (R, R, 3) uint8 RGB each.

    Raises:
        SubjectError: some are not drawn.
        InputError: one cannot be read.
    """
    paths = class_paths(folder, count)
    there = sum(path.is_file() for path in paths)
    if there < count:
        raise SubjectError(
            f"'{folder}' holds {there} of the {count} pictures of the class: run the stage 'prior'"
        )
    return [_read_picture(path, resolution) for path in paths]


def _read_picture(path: Path, resolution: int) -> Picture:
    """Reads a picture as the square in its middle, (R, R, 3)."""
    return square(seen(load_picture(path, "the picture")), path, resolution)


def square(picture: Picture, path: Path, resolution: int) -> Picture:
    """Cuts the square from the middle of a picture (H, W, 3) and scales it to (R, R, 3).

    Raises:
        SubjectError: the picture is far from square.
    """
    height, width = picture.shape[:2]
    side = min(width, height)
    if max(width, height) > LARGEST_RATIO * side:
        raise SubjectError(
            f"'{path}' has {width} x {height} pixels, far from square, and training sees the square in its "
            "middle: cut it to about a square around the subject"
        )
    left, top = (width - side) // 2, (height - side) // 2
    image = Image.fromarray(picture).resize(
        (resolution, resolution), Image.Resampling.BICUBIC, (left, top, left + side, top + side)
    )
    return np.asarray(image)


def random_place(rng: np.random.Generator, resolution: int) -> NDArray[np.bool_]:
    """Draws where an inpainting model is to draw: a box, a blob, or the whole picture, equally often.

    Returns:
        (R, R), True where it draws.
    """
    place = np.zeros((resolution, resolution), np.bool_)
    kind = ("box", "blob", "whole")[rng.integers(3)]
    width, height = (rng.uniform(_SMALLEST_PLACE, 1, 2) * resolution).round().astype(int).tolist()
    x0, y0 = (int(rng.integers(resolution - side + 1)) for side in (width, height))
    box = Box(x0, y0, x0 + width, y0 + height)
    if kind == "whole":
        place[:] = True
    elif kind == "box":
        place[box.slices] = True
    else:
        rows, columns = np.mgrid[:resolution, :resolution] + 0.5
        x, y = (columns - x0) / width * 2 - 1, (rows - y0) / height * 2 - 1
        place = coarsen_mask(x**2 + y**2 <= 1, "blob", box)
    return place


def without_place(picture: Picture, place: NDArray[np.bool_]) -> dict[str, NDArray[np.float32]]:
    """Returns what an inpainting model sees of a picture (R, R, 3) whose place (R, R) it draws.

    Returns:
        `mask` (1, R, R), 1 where it draws, and `surroundings` (3, R, R), -1..1, grey there.
    """
    outside = (picture.astype(np.float32) / 127.5 - 1) * ~place[..., None]
    return {"mask": place[None].astype(np.float32), "surroundings": outside.transpose(2, 0, 1)}


class SubjectSamples:
    """The endless dataset of a subject, with as many pictures of its class beside it.

    Item n is a function of n alone. Every array has a leading dimension of 1, the subject, or 2, with its
    class.
    """

    def __init__(
        self,
        moments: Sequence[NDArray[np.float32]],
        ids: NDArray[np.int64],
        seed: int,
        pictures: Sequence[Sequence[Picture]] | None = None,
    ) -> None:
        """Takes what was encoded.

        Args:
            moments: of the subject, and of its class: (N, 2, C, h, w), mean and standard deviation of the
                scaled latents of its pictures.
            ids: (1 or 2, 77), their encoded prompts.
            seed: of pictures, places, noises and timesteps.
            pictures: (R, R, 3) uint8 each, of an inpainting model, which also sees them without their
                place.
        """
        self._moments, self._ids, self._seed, self._pictures = moments, ids, seed, pictures

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Gives latents and noise (K, C, h, w), timestep (K,), ids (K, 77).

        With pictures also `mask` (K, 1, R, R), 1 where to draw, and `surroundings` (K, 3, R, R), -1..1, grey
        there.
        """
        rng = np.random.default_rng([self._seed, number])
        samples = [self._sample(kind, rng) for kind in range(len(self._moments))]
        return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}

    def _sample(self, kind: int, rng: np.random.Generator) -> dict[str, Any]:
        row = int(rng.integers(len(self._moments[kind])))
        mean, spread = self._moments[kind][row]
        sample: dict[str, Any] = {
            "latents": mean + spread * rng.standard_normal(mean.shape, np.float32),
            "noise": rng.standard_normal(mean.shape, np.float32),
            "timestep": rng.integers(TRAIN_TIMESTEPS),
            "ids": self._ids[kind],
        }
        if self._pictures is not None:
            picture = self._pictures[kind][row]
            sample |= without_place(picture, random_place(rng, len(picture)))
        return sample
