"""Defines the interface of a data set: two pictures of one object."""

from __future__ import annotations

import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, UnidentifiedImageError

from engines.errors import AnyDoorError
from runtime.imaging.decoding import QUIET
from runtime.imaging.masks import MASK_THRESHOLD
from runtime.progress_bar import ProgressBar
from training.data.masks import Mask
from training.data.pairs import Kind, Picture, Shot

_DAMAGE = (  # what JSON, NumPy and Pillow raise on content that makes no sense; OSError says enough by itself
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    SyntaxError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


class SourceError(AnyDoorError):
    """A folder or a file is not what it should be in its data set; the text says why."""


class Source(ABC):
    """A data set on disk. `kind` is the paper's type of data, which decides the timesteps."""

    kind: Kind
    released_kind: Kind | None = None
    """What the set counts as when the released code draws timesteps, where that is another type."""
    either_side: bool = True
    """How the released code filters this set by size, see `training.data.pairs.check_masks`."""

    window: int | None = None
    """How far apart two frames or views may be, where that is limited; see `choose_frames`."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    @abstractmethod
    def __len__(self) -> int:
        """Counts the objects (or videos with objects)."""

    @abstractmethod
    def pair(self, index: int, rng: Generator) -> tuple[Shot, Shot]:
        """Reads a reference and a target of one object; the masks may still prove unfit in `make_pair`.

        Raises:
            SourceError, OSError: a file is missing or damaged, or shows no object.
        """

    def existing(self, *parts: str) -> Path:
        """Gives a file or folder under the root that must exist."""
        path = self.root.joinpath(*parts)
        if not path.exists():
            raise SourceError(f"{type(self).__name__}: {path} is missing; {self.root} is not its folder")
        return path

    def not_empty(self, found: Sequence[Any], what: str) -> None:
        """Refuses a folder that has the right name and nothing in it."""
        if not found:
            raise SourceError(f"{type(self).__name__}: no {what} under {self.root}")

    def search(self, paths: Iterable[Path], unit: str) -> Iterator[Path]:
        """Passes on paths as they are found; counts them on the terminal, as large trees take minutes."""
        return iter(
            ProgressBar(paths, f"{type(self).__name__}: searching {self.root}", unit=f" {unit}", leave=False)
        )

    def read_index(self, path: Path) -> Any:
        """Reads the JSON file that lists a whole set; says so on the terminal, as gigabytes take a while."""
        with ProgressBar(desc=f"{type(self).__name__}: reading {path}", bar_format="{desc}", leave=False):
            return json.loads(path.read_bytes())


@contextmanager
def decoding(what: object) -> Iterator[None]:
    """Turns whatever is raised inside about content that makes no sense into a `SourceError` about `what`."""
    try:
        with QUIET:
            yield
    except UnidentifiedImageError as error:
        raise SourceError(f"{what} is no picture that can be read") from error
    except OSError as error:
        if error.filename is not None:
            raise
        raise SourceError(f"{what} cannot be read: {error}") from error
    except _DAMAGE as error:
        raise SourceError(f"{what} is damaged or has another structure: {error!r}") from error


def read_picture(path: Path) -> Picture:
    """Reads a picture as uint8 (H, W, 3) RGB."""
    with decoding(path), Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def read_labels(path: Path) -> NDArray[np.int64]:
    """Reads a label map (H, W): palette or grey values as they are, colours as R + 256 G + 65536 B."""
    with decoding(path), Image.open(path) as image:
        values = np.asarray(image).astype(np.int64)
        return values if values.ndim == 2 else values[..., :3] @ np.array([1, 256, 65536])


def read_mask(path: Path) -> Mask:
    """Reads a black and white picture as a mask (H, W) of bool."""
    with decoding(path), Image.open(path) as image:
        mask: Mask = np.asarray(image.convert("L")) > MASK_THRESHOLD
        return mask


def decode_segmentation(segmentation: Any, size: tuple[int, int]) -> Mask:
    """Decodes a mask as COCO writes it: polygons, or run lengths, plain or compressed.

    Args:
        segmentation: list of polygons [x0, y0, x1, y1, ...], or {"size": [h, w], "counts": ...}.
        size: (height, width) of the picture, for polygons.

    Returns:
        (H, W) bool.

    Raises:
        SourceError: it is neither, or run lengths do not cover their picture.
    """
    with decoding("a segmentation"):
        if isinstance(segmentation, Mapping):
            return _decode_runs(segmentation)
        canvas = Image.new("1", (size[1], size[0]))
        draw = ImageDraw.Draw(canvas)
        for polygon in segmentation:
            draw.polygon([(x, y) for x, y in zip(polygon[::2], polygon[1::2], strict=True)], fill=1)
        return np.asarray(canvas)


def _decode_runs(segmentation: Mapping[str, Any]) -> Mask:
    height, width = segmentation["size"]
    counts = segmentation["counts"]
    runs = _uncompress(counts) if isinstance(counts, str) else list(counts)
    # before anything is made of them: damaged lengths may be of any size
    if min(runs) < 0 or sum(runs) != height * width:
        raise SourceError(f"run lengths cover {sum(runs)} pixels, the picture has {height * width}")
    values = np.arange(len(runs)) % 2 == 1  # background first
    flat: Mask = np.repeat(values, runs)
    mask: Mask = flat.reshape(width, height).T
    return mask


def _uncompress(text: str) -> list[int]:
    """COCO's compressed run lengths as numbers.

    Five bits per character from '0' on, low bits first, the sixth says that more follow; from the fourth
    number on each is the difference to the one before the last.
    """
    numbers: list[int] = []
    position = 0
    while position < len(text):
        value, shift, more = 0, 0, True
        while more:
            code = ord(text[position]) - 48
            value |= (code & 31) << shift
            more, position, shift = bool(code & 32), position + 1, shift + 5
            if not more and code & 16:
                value -= 1 << shift
        numbers.append(value + (numbers[-2] if len(numbers) > 2 else 0))
    return numbers
