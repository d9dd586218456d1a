"""Defines what a system gives the sampler for a placement: banks of tensors, and the rows that a sample
uses."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from engines.engine import Array, DeviceTensor

OWNER: ContextVar[str] = ContextVar("owner", default="")
"""Whose conditions are made at the moment. Part of every key under which something of them is kept: whether
it was there shows in the time that a request takes, and would tell others what this owner asked for."""


@dataclass(frozen=True, eq=False)
class BankRows:
    """A bank, and the rows in it that one sample needs at one step."""

    tensors: Mapping[str, DeviceTensor | Array]
    """Input of the step graph -> (N, ...)."""
    conditional: int
    """Row of the conditional half."""
    unconditional: int
    """Row of the unconditional half, not before the conditional one; the same row if there is no other."""
    on_host: bool = False
    """Whether the tensors are arrays that are still to be sent to the device; the same for all rows of a
    bank."""

    @property
    def count(self) -> int:
        """Rows from the conditional to the unconditional one."""
        return self.unconditional + 1 - self.conditional


@dataclass(frozen=True, eq=False)
class FixedConditions:
    """Conditions that are the same at every step."""

    rows: Mapping[str, BankRows]
    steps: int

    def banks(self, step: int) -> Mapping[str, BankRows]:
        """Bank -> its rows at a step."""
        return self.rows

    def steps_ready(self, step: int) -> int:
        """Returns all that are left."""
        return self.steps - step


class Conditions(Protocol):
    """The conditions that the samples of one placement share."""

    def banks(self, step: int) -> Mapping[str, BankRows]:
        """Bank -> its rows at a step, counted from 0. The tensors stay as they are when they are the same."""

    def steps_ready(self, step: int) -> int:
        """Returns how many steps from this one on have all their banks in the same tensors."""
