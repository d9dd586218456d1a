"""Determines how much memory caches tensors for later pictures, like detail maps."""

from __future__ import annotations

from engines.engine import Engine
from engines.memory_limit import usable_memory
from engines.memory_plan import LARGEST_CACHE

_SHARE_OF_MEMORY = 8


def default_cache_bytes() -> int:
    """Returns an eighth of the machine's memory, or of a container's, at most 4 GiB.

    The detail maps of AnyDoor at full size, 512 px, 50 steps with guidance take 2.7 GB in fp32 and 1.3 GB in
    fp16.
    """
    memory = usable_memory()
    if memory is None:
        return LARGEST_CACHE // 4
    return min(memory // _SHARE_OF_MEMORY, LARGEST_CACHE)


def usable_cache_bytes(engine: Engine, wanted: int | None) -> int:
    """Returns bytes to keep: as many as wanted, never more than the engine's device has room for."""
    room = engine.cache_bytes
    if wanted is None:
        # on a card, what there is room for is already no more than is worth keeping
        wanted = room if engine.device != "cpu" and room is not None else default_cache_bytes()
    return wanted if room is None else min(wanted, room)
