"""Whether this machine has a card."""

from __future__ import annotations

from engines.cuda import Device
from engines.errors import BackendError


def no_card() -> str:
    """What the driver of this machine says; empty if there is a card."""
    try:
        Device()
    except BackendError as error:
        return str(error)
    return ""
