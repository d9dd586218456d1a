"""Stores weights of an ONNX graph in half the bytes where that is lossless."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_SMALLEST = 256
"""Values; below that the cast's own description outweighs what it saves."""


def store_exact_halves(path: Path) -> None:
    """Stores float32 weights as float16 and casts them back, if that gives the same float32 values.

    So a bundle of a half-precision checkpoint is no larger than the checkpoint. The graph computes in float32
    as before: execution backends fold the casts when they load it.

    Args:
        path: the graph; its weights are in `PATH.data`.
    """
    model = onnx.load(path)
    data = path.with_name(f"{path.name}.data")
    casts = []
    for index, weight in enumerate(model.graph.initializer):
        if weight.data_type != TensorProto.FLOAT or np.prod(weight.dims) < _SMALLEST:
            continue
        values = numpy_helper.to_array(weight)
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if not np.array_equal(halves.astype(np.float32), values):
            continue
        name = weight.name
        model.graph.initializer[index].CopyFrom(numpy_helper.from_array(halves, f"{name}_half"))
        casts.append(helper.make_node("Cast", [f"{name}_half"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    data.unlink()
    onnx.save(
        model,
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=data.name,
        size_threshold=256,
    )
