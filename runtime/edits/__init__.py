"""Edits scenes: removes, moves, reshapes or swaps an object, or tries on a garment.

Each edit is a sequence of steps: find the object (`runtime.segmentation`), fill the hole that it leaves, and
place something (`runtime.compositor`). Source: AnyDoor (Chen et al., CVPR 2024), section 4.4.
"""

from runtime.edits.editor import Editor

__all__ = ["Editor"]
