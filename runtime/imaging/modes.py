"""Defines the modes of a placement, after AnyDoor's two entry scripts. Other systems give the names the
closest meaning that they have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from runtime.errors import InputError, in_field
from runtime.imaging.paste_back import TARGET_BOX, WHOLE_CROP, PasteRule


@dataclass(frozen=True)
class Mode:
    """A mode of placing an object."""

    shape_control: bool
    """The mask channel is the target mask itself, not the filled box."""
    smooth_mask: bool
    """The mask channel is resized linearly and is 1 in the padding, instead of nearest and -1 in the
    padding."""
    paste: PasteRule
    """The part of the networks' picture that is pasted into the scene."""


MODES: Mapping[str, Mode] = MappingProxyType(
    {
        # run_inference.py
        "crop": Mode(shape_control=False, smooth_mask=True, paste=WHOLE_CROP),
        # run_gradio_demo.py with shape control
        "shape": Mode(shape_control=True, smooth_mask=False, paste=TARGET_BOX),
        # run_gradio_demo.py without shape control
        "keep_background": Mode(shape_control=False, smooth_mask=False, paste=TARGET_BOX),
    }
)


def check_mode(name: str) -> None:
    """Refuses a name that is no mode.

    Raises:
        InputError: lists those that there are.
    """
    with in_field("mode"):
        if name not in tuple(MODES):  # a bundle's default may be anything, also what has no hash
            raise InputError(f"there is no mode '{name}': choose one of {', '.join(MODES)}")
