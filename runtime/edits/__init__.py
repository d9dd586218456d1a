"""Edits of a scene: an object is removed, moved, reshaped, swapped, or a garment is tried on.

Each is a list of known steps: find the object (`runtime.segmentation`), fill the hole that it leaves, and
place something (`runtime.compositor`). Source: AnyDoor (Chen et al., CVPR 2024), section 4.4.
"""

from runtime.edits.editor import Editor

__all__ = ["Editor"]
