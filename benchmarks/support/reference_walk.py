"""Follows the reference picture through a program: which functions receive it, or an object that holds it?

The reference is recognised by its path, by the bytes of its file, and by its values: an array is the
reference if it has the same values in any order and scale. So conversions, copies and transposed views are
found, wherever they are made. What a function makes of the reference alone (a crop, a mask, the prepared
reference) counts as the reference, too.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.support.call_trace import Function, Project, is_importing

_DEPTH = 12
"""How deep objects are searched."""
_LEAST_VALUES = 64
"""Smaller arrays are not compared by their values: too many are equal by chance."""
_MASK_LEVELS = (0, 127, 128, 254)
"""Levels of transparency that masks are cut at."""
_TOLERANCE = 1e-3
"""Largest difference of values on the scale 0..1."""


class PictureMarks:
    """Recognises a picture: its path, its file's bytes, and arrays with its values."""

    def __init__(self, path: Path) -> None:
        """Read the picture."""
        self._path = os.fspath(path)
        self._bytes = path.read_bytes()
        self._values: list[NDArray[np.float32]] = []
        self._compared: dict[int, tuple[NDArray[Any], bool]] = {}
        """id of an array -> the array, which has to live as long as its id is used, and the result."""
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGBA"))
        alpha = pixels[..., 3]
        for array in (pixels, pixels[..., :3], alpha, *(alpha > level for level in _MASK_LEVELS)):
            self.add(array)

    def add(self, array: NDArray[Any]) -> None:
        """Recognise the values of one more array."""
        values = _sorted_values(array)
        if values is not None:
            self._values.append(values)
            self._compared[id(array)] = (array, True)

    def matches(self, value: Any) -> bool:
        """Return whether a value is the picture."""
        if isinstance(value, np.ndarray):
            if id(value) not in self._compared:
                self._compared[id(value)] = (value, self._has_its_values(value))
            return self._compared[id(value)][1]
        if isinstance(value, bytes | bytearray | memoryview):
            return len(value) == len(self._bytes) and bytes(value) == self._bytes
        if isinstance(value, Image.Image):
            return getattr(value, "filename", "") == self._path
        return isinstance(value, str | os.PathLike) and os.fspath(value) == self._path

    def _has_its_values(self, array: NDArray[Any]) -> bool:
        if not any(known.size == array.size for known in self._values):
            return False
        values = _sorted_values(array)
        return values is not None and any(
            known.size == values.size and np.allclose(known, values, rtol=0, atol=_TOLERANCE)
            for known in self._values
        )


def _sorted_values(array: NDArray[Any]) -> NDArray[np.float32] | None:
    """Returns the values in rising order on the scale 0..1; None if there are too few, or just one."""
    if array.size < _LEAST_VALUES or array.dtype.kind not in "buif":
        return None
    values = np.sort(array.astype(np.float32), axis=None)
    low, high = values[0], values[-1]
    return (values - low) / (high - low) if high > low else None


def leaves(value: Any, packages: frozenset[str], depth: int = _DEPTH) -> Iterator[Any]:
    """Yield the strings, paths, bytes, pictures and arrays that a value is or holds.

    Args:
        value: anything; containers, dataclasses, bound methods and other objects of the project are searched.
        packages: top-level packages of the project.
        depth: how many objects may lie inside each other.
    """
    seen: set[int] = set()
    todo = deque([(value, depth)])
    while todo:
        current, left = todo.popleft()
        if isinstance(current, str | bytes | bytearray | memoryview | os.PathLike | np.ndarray | Image.Image):
            yield current
        elif left and id(current) not in seen:
            seen.add(id(current))
            todo.extend((part, left - 1) for part in _parts(current, packages))


def _parts(value: Any, packages: frozenset[str]) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset | deque):
        return list(value)
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__self__]
    kind = type(value)
    own = kind.__module__.partition(".")[0] in packages
    if not own and not isinstance(value, argparse.Namespace | SimpleNamespace):
        return []
    slots = [name for each in kind.__mro__ for name in getattr(each, "__slots__", ())]
    stored = [getattr(value, name) for name in slots if isinstance(name, str) and hasattr(value, name)]
    return [*getattr(value, "__dict__", {}).values(), *stored]


class ReferenceWalk:
    """Records the functions that receive the reference, up to the end of its way; a profile hook."""

    def __init__(
        self,
        project: Project,
        reference: PictureMarks,
        scene: PictureMarks,
        is_end: Callable[[Function], bool],
    ) -> None:
        """Start at the first call.

        Args:
            project: whose functions count.
            reference: what is followed.
            scene: the picture that it is put into; what comes from both is not the reference.
            is_end: whether a function that receives the reference is the end of its way.
        """
        self.functions: list[Function] = []
        """In the order of their first calls; the last one is the end."""
        self.ended = False
        self._project = project
        self._reference, self._scene, self._is_end = reference, scene, is_end
        self._of_reference_alone: set[FrameType] = set()
        """Calls that were given the reference and no other picture."""

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """Look at a call or a return."""
        if self.ended:
            return
        if event == "call":
            function = self._project.function_of(frame.f_code)
            if function and not is_importing(frame):
                self._look_at_call(frame, function)
        elif event == "return" and frame in self._of_reference_alone:
            self._of_reference_alone.remove(frame)
            for leaf in leaves(argument, self._project.packages):
                if isinstance(leaf, np.ndarray) and not self._reference.matches(leaf):
                    self._reference.add(leaf)

    def _look_at_call(self, frame: FrameType, function: Function) -> None:
        found = list(leaves(_arguments(frame), self._project.packages))
        if not any(self._reference.matches(leaf) for leaf in found):
            return
        if function not in self.functions:
            self.functions.append(function)
        others = (leaf for leaf in found if not self._reference.matches(leaf))
        if not any(isinstance(leaf, np.ndarray) or self._scene.matches(leaf) for leaf in others):
            self._of_reference_alone.add(frame)
        self.ended = self._is_end(function)


def _arguments(frame: FrameType) -> list[Any]:
    """Returns the arguments of a call that begins, self included."""
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount
    count += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    values = frame.f_locals
    return [values[name] for name in code.co_varnames[:count] if name in values]
