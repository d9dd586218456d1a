"""Results of networks that are kept, because the next picture may need them again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.sampling.conditions import OWNER

Key = TypeVar("Key", bound=Hashable)


class Remembered(Generic[Key]):
    """Arrays that were computed last, by what they were computed of and for whom (`OWNER`)."""

    def __init__(self, most: int) -> None:
        """Starts empty; keeps so many arrays."""
        self._most = most
        self._arrays: OrderedDict[tuple[str, Key], NDArray[np.float32]] = OrderedDict()

    def get(self, key: Key, compute: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        """The array of a key, which is computed if it is not remembered."""
        owned = (OWNER.get(), key)
        if owned not in self._arrays:
            self._arrays[owned] = compute()
            if len(self._arrays) > self._most:
                self._arrays.popitem(last=False)
        self._arrays.move_to_end(owned)
        return self._arrays[owned]

    @property
    def nbytes(self) -> int:
        """Memory of all arrays."""
        return sum(array.nbytes for array in self._arrays.values())

    def clear(self) -> None:
        """Forgets everything."""
        self._arrays.clear()
