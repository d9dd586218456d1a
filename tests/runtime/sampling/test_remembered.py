"""Results that are kept for the next picture: of the same thing, for the same owner."""

from __future__ import annotations

import contextvars

import numpy as np
from numpy.typing import NDArray

from runtime.sampling.conditions import OWNER
from runtime.sampling.remembered import Remembered


def asked(remembered: Remembered[str, NDArray[np.float32]], owner: str, key: str) -> bool:
    """Whether an owner's array had to be computed."""
    computed = []

    def compute() -> NDArray[np.float32]:
        computed.append(key)
        return np.ones(4, np.float32)

    def get() -> None:
        OWNER.set(owner)
        remembered.get(key, compute)

    contextvars.copy_context().run(get)
    return bool(computed)


def test_what_was_computed_for_somebody_else_is_computed_again() -> None:
    remembered: Remembered[str, NDArray[np.float32]] = Remembered(4)
    assert asked(remembered, "alice", "cup")
    assert asked(remembered, "bob", "cup")
    assert not asked(remembered, "alice", "cup")
    assert not asked(remembered, "bob", "cup")
    assert remembered.nbytes == 2 * 16


def test_what_was_not_asked_for_longest_is_forgotten() -> None:
    remembered: Remembered[str, NDArray[np.float32]] = Remembered(2)
    asked(remembered, "alice", "cup")
    asked(remembered, "alice", "hat")
    asked(remembered, "alice", "cup")
    asked(remembered, "alice", "shoe")
    assert not asked(remembered, "alice", "cup")
    assert asked(remembered, "alice", "hat")
    remembered.clear()
    assert remembered.nbytes == 0
