"""The memory of the card that is in use, asked inside the process that uses it: without nvidia-smi."""

from __future__ import annotations

from contextlib import suppress

from engines.cuda import Device
from engines.errors import AnyDoorError


def used_gb() -> float | None:
    """Return the gigabytes that all processes use (cudaMemGetInfo); None without cuda-python or a card."""
    with suppress(AnyDoorError):
        card = Device().card()
        return (card.total - card.free) / 1e9
    return None
