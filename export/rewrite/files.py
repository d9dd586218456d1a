"""Rewrites the file of a graph."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from export.rewrite.report import Report
from export.rewrite.rewriting import rewrite

_INLINE_BYTES = 256
"""Smaller weights are stored in the graph's file, as the exporter does."""


def rewrite_file(path: Path, output: Path, target: str, strict: bool = True) -> Report:
    """Rewrites a graph and writes it to another file of the same folder.

    If no weight changes, the new file names the weights of the old one, which must stay. Else the new file
    has its own in `OUTPUT.data`, which are written one at a time.

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
    weights = model.graph.initializers.values()
    if any(isinstance(weight.const_value, ir.LazyTensor) for weight in weights):
        ir.save(model, output, external_data=f"{output.name}.data", size_threshold_bytes=_INLINE_BYTES)
    else:
        ir.save(model, output)
    return report
