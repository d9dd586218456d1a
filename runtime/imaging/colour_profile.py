"""Converts colour profiles: the networks work in sRGB.

Source: ICC.1:2010; LittleCMS through `PIL.ImageCms`. Relative colorimetric, as photo editors convert.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

_INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION
_STEPS = np.linspace(0, 255, 6).round().astype(np.uint8)
_SAMPLES = np.stack(np.meshgrid(_STEPS, _STEPS, _STEPS), axis=-1).reshape(1, -1, 3)
"""Colours by which sRGB is recognised."""


class ProfileError(ValueError):
    """A profile that is damaged, or does not belong to such an image."""


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Returns the image in sRGB, of mode RGB; itself if sRGB is its profile.

    Args:
        image: of mode RGB, L, CMYK or LAB.
        profile: its ICC profile.

    Raises:
        ProfileError: the profile cannot be used with the image.
    """
    own = _opened(profile)
    if image.mode == "L" and own.profile.xcolor_space.strip() == "RGB":
        image = image.convert("RGB")
    transform = _transform(own, _srgb(), image.mode)
    if image.mode == "RGB" and _changes_little(transform):
        return image
    return _applied(image, transform)


def from_srgb(pixels: NDArray[np.uint8], profile: bytes) -> NDArray[np.uint8]:
    """Returns pixels (H, W, 3) of sRGB in the colours of an RGB profile.

    Raises:
        ProfileError: the profile cannot be used in this direction.
    """
    transform = _transform(_srgb(), _opened(profile), "RGB")
    return np.asarray(_applied(Image.fromarray(np.ascontiguousarray(pixels)), transform))


def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _opened(profile: bytes) -> ImageCms.ImageCmsProfile:
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(profile))
    except ImportError as error:
        raise ProfileError("this Pillow is built without LittleCMS") from error
    except (OSError, ImageCms.PyCMSError) as error:
        raise ProfileError("it is damaged") from error


def _transform(
    from_profile: ImageCms.ImageCmsProfile, to_profile: ImageCms.ImageCmsProfile, mode: str
) -> ImageCms.ImageCmsTransform:
    try:
        return ImageCms.buildTransform(from_profile, to_profile, mode, "RGB", _INTENT, _FLAGS)
    except ImageCms.PyCMSError as error:
        raise ProfileError(f"it is not for {mode}") from error


def _applied(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    try:
        result = ImageCms.applyTransform(image, transform)
    except (ValueError, ImageCms.PyCMSError) as error:
        raise ProfileError("it cannot be applied") from error
    assert result is not None
    return result


def _changes_little(transform: ImageCms.ImageCmsTransform) -> bool:
    changed = np.asarray(_applied(Image.fromarray(_SAMPLES), transform)).astype(int)
    return bool(np.abs(changed - _SAMPLES).max() <= 1)
