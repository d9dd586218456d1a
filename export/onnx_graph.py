"""Exports one graph to ONNX."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from onnxscript import rewriter
from torch import nn

from engines.spec import GraphSpec
from export.example_inputs import example_inputs
from export.rewrite.rewriting import rewrite

OPSET = 18


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
    with _quiet(), _without_slow_rule(), torch.no_grad():
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


@contextlib.contextmanager
def _without_slow_rule() -> Iterator[None]:
    """Leaves out of the exporter's optimisation the rule that makes a split of two slices.

    It goes through the whole graph at every node (`SimplePatternMatcher.match` in onnxscript's
    rewriter/_matcher.py), and finds nothing in these networks, which have splits already.
    """
    rules = rewriter._DEFAULT_REWRITE_RULES
    rewriter._DEFAULT_REWRITE_RULES = tuple(rule for rule in rules if rule.name != "SlicesSplit")
    try:
        yield
    finally:
        rewriter._DEFAULT_REWRITE_RULES = rules
