"""Generates example inputs of a graph, to trace, verify and measure it. Needs NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from engines.engine import Array
from engines.spec import ROWS, SAMPLES, GraphSpec, TensorSpec

if TYPE_CHECKING:
    # imports PyTorch
    from export.systems.system import Draw

TRAIN_TIMESTEPS = 1000
SMALLEST_VOCABULARY = 512
"""Tokens that every vocabulary has: the bytes, inside and at the end of a word."""


def example_inputs(
    spec: GraphSpec, sizes: Mapping[str, int], seed: int = 0, examples: Mapping[str, Draw] | None = None
) -> dict[str, Array]:
    """Seeded inputs: timesteps in 0..999, indices of rows that exist, ids of tokens, the rest normal.

    Args:
        spec: signature of the graph.
        sizes: variable dimension -> its size.
        seed: of the random numbers.
        examples: input -> how to draw it instead.
    """
    rng = np.random.default_rng(seed)
    rows = {"conditional_row": ROWS, "unconditional_row": ROWS, "row_sample": SAMPLES}
    rows |= {bank.index: str(spec.tensor(bank.tensors[0]).shape[0]) for bank in spec.banks}

    def draw(tensor: TensorSpec) -> Array:
        shape = tensor.resolve(sizes)
        if examples and tensor.name in examples:
            return examples[tensor.name](rng, shape)
        if tensor.name in rows and tensor.dtype == "int32":
            return (np.arange(shape[0]) % sizes[rows[tensor.name]]).astype(np.int32)
        if tensor.name == "timestep":
            return rng.integers(0, TRAIN_TIMESTEPS, shape).astype(np.float32)
        if tensor.dtype == "int32":
            return rng.integers(0, SMALLEST_VOCABULARY, shape, np.int32)
        return rng.standard_normal(shape, dtype=np.float32).astype(tensor.dtype)

    return {tensor.name: draw(tensor) for tensor in spec.inputs}
