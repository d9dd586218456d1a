"""One graph: example inputs for it, and its export to ONNX."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from engines.engine import Array
from engines.spec import ROWS, SAMPLES, GraphSpec, TensorSpec
from export.rewrite.rewriting import rewrite
from export.systems.system import Draw

OPSET = 18

TRAIN_TIMESTEPS = 1000


def example_inputs(
    spec: GraphSpec, sizes: Mapping[str, int], seed: int = 0, examples: Mapping[str, Draw] | None = None
) -> dict[str, Array]:
    """Seeded inputs: timesteps in 0..999, indices of rows that exist, the rest normal.

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
        return rng.standard_normal(shape, dtype=np.float32).astype(tensor.dtype)

    return {tensor.name: draw(tensor) for tensor in spec.inputs}


def export_onnx(
    module: nn.Module, spec: GraphSpec, path: Path, target: str | None = None, opset: int = OPSET
) -> None:
    """Writes a graph as ONNX, its weights beside it in `PATH.data`.

    Args:
        module: takes the inputs in their order; the last may be variadic.
        spec: its signature.
        path: where to.
        target: what to rewrite it for, see `export.rewrite.rewriting`; not at all if None.
        opset: version of the ONNX operators.
    """
    program = trace(module, spec, opset)
    if target:
        rewrite(program.model, target)
    with _quiet():
        program.save(path, external_data=True)


def trace(module: nn.Module, spec: GraphSpec, opset: int = OPSET) -> torch.onnx.ONNXProgram:
    """Turns a module into an ONNX graph in memory; arguments as of `export_onnx`."""
    dimensions = sorted({size for tensor in spec.inputs for size in tensor.shape if isinstance(size, str)})
    # all differ and none is 1, so that the export takes no two dimensions for the same
    sizes = {name: size for size, name in enumerate(dimensions, 2)}
    inputs = example_inputs(spec, sizes)
    arguments = tuple(torch.from_numpy(array) for array in inputs.values())
    dims = {name: torch.export.Dim(name, min=1) for name in dimensions}
    shapes = [
        {axis: dims[size] for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
        for tensor in spec.inputs
    ]
    parameters = inspect.signature(module.forward).parameters.values()
    named = sum(parameter.kind is not parameter.VAR_POSITIONAL for parameter in parameters)
    dynamic = (*shapes[:named], *((tuple(shapes[named:]),) if named < len(shapes) else ()))
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            opset_version=opset,
            optimize=True,
            verify=False,
            verbose=False,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            dynamic_shapes=dynamic,
        )
    assert program is not None  # with dynamo=True it never is
    return program


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's chatter out of the progress bars; what goes wrong is raised all the same."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
