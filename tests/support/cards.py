"""Whether this machine has a card, and one to put into it."""

from __future__ import annotations

import pytest

from engines.backends.tensorrt import engine, library
from engines.cuda import Device
from engines.errors import BackendError
from tests.support.simulated_card import SimulatedDevice


def no_card() -> str:
    """What the driver of this machine says; empty if there is a card."""
    try:
        Device()
    except BackendError as error:
        return str(error)
    return ""


def put_in_a_card(monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    """What of TensorRT looks for a card finds a simulated one."""
    for module in (engine, library):
        monkeypatch.setattr(module, "Device", lambda: SimulatedDevice(architecture=architecture))
