"""Defines a decoded picture, with the metadata of its file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_EXIF_BYTES = 65_527
"""A JPEG's segment holds no more."""


@dataclass(frozen=True)
class Metadata:
    """Metadata of a picture's file; None where it has none."""

    icc_profile: bytes | None = None
    """Colour profile; sRGB if None."""
    exif: bytes | None = None
    """Without orientation and thumbnail, beginning with "Exif"."""
    dpi: tuple[float, float] | None = None
    """Pixels per inch along x and y."""

    @property
    def nbytes(self) -> int:
        """Size of profile and EXIF."""
        return len(self.icc_profile or b"") + len(self.exif or b"")

    @property
    def info(self) -> dict[str, Any]:
        """The metadata as Pillow takes it, in `save` or in an image's `info`."""
        return {name: value for name, value in vars(self).items() if value is not None}


NO_METADATA = Metadata()


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture, upright."""

    rgb: NDArray[np.uint8]
    """(H, W, 3) in sRGB."""
    alpha: NDArray[np.uint8] | None
    """(H, W) opacity, if the picture has any transparency."""
    own: NDArray[np.uint8]
    """(H, W, 3) in its own colours, those of `metadata.icc_profile`; `rgb` itself where they are sRGB."""
    metadata: Metadata
    kind: str
    """Its colour model if not RGB, like "CMYK"; empty for RGB."""
    orientation: int
    """EXIF orientation that was undone, 1 if none."""
    deep: bool = False
    """Whether its file has more than 8 bits for each value."""

    @property
    def nbytes(self) -> int:
        """Memory of its pixels."""
        arrays = {id(array): array.nbytes for array in (self.rgb, self.own, self.alpha) if array is not None}
        return sum(arrays.values())

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """(H, W, 3) in its own colours, or (H, W, 4) with its transparency."""
        return self.own if self.alpha is None else np.dstack([self.own, self.alpha])
