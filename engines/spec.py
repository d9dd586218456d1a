"""Describes a graph for an engine: its role, its inputs and outputs, and how one step leads to the next.

Part of the model format (docs/model-format.md): the exporter writes it into the manifest, and everything that
runs a bundle reads it from there.

Dimensions that vary from call to call are named; all others are fixed when the bundle is built:

    samples     pictures in the making. Each has its own timestep, scales and coefficients, so samples at
                different steps share a call.
    rows        evaluations of the network: one per sample without guidance, two with it. A sample without
                guidance does not pay for the unconditional half.

The other names belong to banks. A bank is a set of tensors with one leading dimension, and each row of a step
names the row of the bank that it needs. One picture, four samples of one placement, or several requests at
different steps are then the same call, and nothing is copied to get there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import numpy as np

from engines.errors import BundleError

Role = Literal["condition", "scene", "window", "step", "decode", "segment"]
"""When a graph runs: condition, once per reference or prompt; scene, once per picture; window, for several
steps at a time; step, at every step; decode, at the end; segment, to find an object."""

ROLES: tuple[Role, ...] = get_args(Role)

DTYPES = ("float32", "float16", "int32", "uint8")
"""NumPy names of the dtypes that inputs and outputs have."""

SAMPLING_ROLES = frozenset[Role]({"step", "window"})
"""The roles that alternate while a picture is sampled."""

CAPTURED_ROLES = SAMPLING_ROLES | frozenset[Role]({"decode"})
"""The roles of graphs that run for every picture, and so are worth a CUDA graph on a card."""

SAMPLES = "samples"
ROWS = "rows"

Dimension = int | str


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph."""

    name: str
    dtype: str
    """One of `DTYPES`."""
    shape: tuple[Dimension, ...]
    """Sizes; a string names a variable dimension."""
    file_name: str = ""
    """Its name in the graph's file, if different."""

    @property
    def stored_name(self) -> str:
        """The name in the graph's file."""
        return self.file_name or self.name

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Returns the shape with every variable dimension replaced by its size."""
        return tuple(sizes[d] if isinstance(d, str) else d for d in self.shape)

    def nbytes(self, sizes: Mapping[str, int]) -> int:
        """Returns memory of a tensor of these sizes."""
        return math.prod(self.resolve(sizes)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class BankSpec:
    """Inputs of a step graph that hold many rows, of which each row of a call names the one it needs."""

    name: str
    tensors: tuple[str, ...]
    """Inputs with the bank's leading dimension."""
    index: str
    """The int32 input (rows,) with the bank's row of every row of the call."""


@dataclass(frozen=True)
class GraphSpec:
    """The signature of one graph."""

    name: str
    role: Role
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    banks: tuple[BankSpec, ...] = ()
    """The banks of a step graph."""
    per_step: tuple[str, ...] = ()
    """Inputs of a step graph that change at every step: a few numbers per sample or row."""
    feedback: Mapping[str, str] = field(default_factory=dict)
    """Input of a step graph -> the output of the step before that it takes."""

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Inputs, then outputs."""
        return self.inputs + self.outputs

    @cached_property
    def banked(self) -> frozenset[str]:
        """The tensors of banks whose leading dimension is that of banks alone: a call may have more rows of
        them than it names."""
        named = {name for bank in self.banks for name in bank.tensors}
        others = {dimension for of in self.inputs if of.name not in named for dimension in of.shape}
        return frozenset(name for name in named if self.tensor(name).shape[0] not in others)

    def tensor(self, name: str) -> TensorSpec:
        """Returns the input or output of that name.

        Raises:
            BundleError: there is none.
        """
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise BundleError(f"the graph '{self.name}' has no tensor '{name}'")

    def sizes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Returns variable dimension -> its size in a call.

        Args:
            shapes: shape of every input.
        """
        return {
            dimension: size
            for tensor in self.inputs
            for dimension, size in zip(tensor.shape, shapes[tensor.name])
            if isinstance(dimension, str)
        }


def sizes_for(dimensions: Mapping[str, int], samples: int) -> dict[str, int]:
    """Returns variable dimension -> its size in a call with guidance.

    Args:
        dimensions: variable dimension -> its size for one sample, as in the manifest.
        samples: how many share the call: 1 for a typical call, the bundle's `max_batch` for the largest.
    """
    return {name: per_sample * samples for name, per_sample in dimensions.items()}
