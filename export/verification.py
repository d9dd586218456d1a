"""Does a built graph compute what PyTorch computes? Both run on the same seeded inputs."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from engines.engine import Array, Engine
from engines.errors import AnyDoorError
from engines.manifest import Manifest
from export.example_inputs import example_inputs
from export.systems.system import GraphExport

TOLERANCE = {"fp32": 1e-4, "fp16": 5e-2}
"""Precision -> largest relative error of any output that a build accepts."""


class VerificationError(AnyDoorError):
    """A built graph does not compute what PyTorch computes."""


def verify_graph(
    module: nn.Module, graph: GraphExport, engine: Engine, manifest: Manifest, seed: int = 0
) -> dict[str, float]:
    """Runs a graph and the float32 module it was made from on the same inputs: one picture with guidance.

    Args:
        module: the graph in PyTorch, with float32 weights.
        graph: its signature, and how its inputs are drawn.
        engine: runs the built graph.
        manifest: sizes, and the precision that sets the tolerance.
        seed: of the inputs.

    Returns:
        Output -> error, see `output_error`.

    Raises:
        VerificationError: an output is out of tolerance or not finite.
    """
    spec, precision = graph.spec, manifest.precision
    inputs = example_inputs(spec, manifest.typical_sizes, seed, graph.examples)
    built = {name: engine.to_host(tensor) for name, tensor in engine.run(spec.name, inputs).items()}
    with torch.no_grad():
        result = module(*(torch.from_numpy(array.astype(_full(array))) for array in inputs.values()))
    expected = dict(zip([t.name for t in spec.outputs], result if isinstance(result, tuple) else (result,)))
    errors = {name: output_error(built[name], tensor.numpy()) for name, tensor in expected.items()}
    worst = max(errors, key=lambda name: errors[name])
    # not '>': an error that is not a number must fail as well
    if not errors[worst] <= TOLERANCE[precision]:
        raise VerificationError(
            f"the graph '{spec.name}' differs from PyTorch: output '{worst}' has a relative error of "
            f"{errors[worst]:.1e}, and {TOLERANCE[precision]:.0e} is accepted in {precision}"
        )
    return errors


def output_error(found: Array, expected: Array) -> float:
    """Norm of the difference / norm of what was expected; for pictures in 256 levels, mean difference / 255.

    A value on the edge between two levels may fall to either side, however small the error is.
    """
    if expected.dtype == np.uint8:
        return float(np.abs(found.astype(np.int16) - expected.astype(np.int16)).mean() / 255)
    return relative_error(found, expected)


def relative_error(found: Array, expected: Array) -> float:
    """Norm of the difference over norm of what was expected, in float64."""
    difference = np.linalg.norm(found.astype(np.float64) - expected.astype(np.float64))
    return float(difference / max(float(np.linalg.norm(expected.astype(np.float64))), 1e-30))


def _full(array: Array) -> np.dtype[np.generic]:
    return np.dtype(np.float32) if array.dtype == np.float16 else array.dtype
