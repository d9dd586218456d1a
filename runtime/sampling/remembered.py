"""Caches computed values that the next picture may need again."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.sampling.conditions import OWNER


class Kept(Protocol):
    """A value that can be cached."""

    @property
    def nbytes(self) -> int:
        """Its memory."""


Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value", bound=Kept)


class Remembered(Generic[Key, Value]):
    """Values that were computed last, by what they were computed of and for whom (`OWNER`).

    Any thread may ask. Two that ask for the same at once may both compute it.
    """

    def __init__(self, most: int) -> None:
        """Starts empty; keeps so many values."""
        self._most = most
        self._values: OrderedDict[tuple[str, Key], Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key, compute: Callable[[], Value]) -> Value:
        """Returns the value of a key, which is computed if it is not remembered."""
        owned = (OWNER.get(), key)
        with self._lock:
            value = self._values.get(owned)
        if value is None:
            value = compute()
        with self._lock:
            self._values[owned] = value
            self._values.move_to_end(owned)
            if len(self._values) > self._most:
                self._values.popitem(last=False)
        return value

    @property
    def nbytes(self) -> int:
        """Memory of all values."""
        with self._lock:
            return sum(value.nbytes for value in self._values.values())

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._values.clear()


def digest(*of: NDArray[Any] | str) -> bytes:
    """Returns a key for what follows from these arrays and words alone."""
    found = hashlib.sha256()
    for each in of:
        if isinstance(each, str):
            found.update(each.encode())
        else:
            found.update(f"{each.shape} {each.dtype.str} ".encode())
            found.update(np.ascontiguousarray(each).data)
    return found.digest()
