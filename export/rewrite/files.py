"""Rewrites the file of a graph."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from export.rewrite.report import Report
from export.rewrite.rewriting import rewrite

_INLINE_BYTES = 256
"""Smaller weights are stored in the graph's file, as the exporter does."""


def rewrite_file(path: Path, output: Path, target: str, strict: bool = True) -> Report:
    """Rewrites a graph and writes it to another file.

    If both are in the same folder and no weight changes, the new file names the weights of the old one, which
    must stay. Else the new file has its own in `OUTPUT.data`, written one at a time.

    Args:
        path: the graph; its weights are in `PATH.data`.
        output: the file to write; not `path`.
        target: see `rewrite`.
        strict: see `rewrite`.

    Raises:
        RewriteError: see `rewrite`.
    """
    model = ir.load(path)
    report = rewrite(model, target, strict)
    weights = [weight.const_value for weight in model.graph.initializers.values()]
    if output.parent == path.parent and not any(isinstance(weight, ir.LazyTensor) for weight in weights):
        ir.save(model, output)
    else:
        ir.save(model, output, external_data=f"{output.name}.data", size_threshold_bytes=_INLINE_BYTES)
    return report
