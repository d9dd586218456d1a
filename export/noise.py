"""Seeded noise in place of weights: what a skeleton is filled with where it runs.

Every tensor is scaled by what reads it, so that numbers stay of an ordinary size all through the network.
What the network draws means nothing.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, external_data_helper, helper

from engines.bundle import sha256
from engines.files import replacing, write_text
from engines.manifest import MANIFEST, FileRecord, GraphRecord, Manifest, read_manifest

_PERIOD = 1_000_003
"""Numbers that are drawn and then repeated; a prime, so that no two rows of a weight are the same."""

_GAIN = 0.7
"""Standard deviation of a projection's results for inputs of 1: residual blocks add up."""

_SCALES = {
    "GroupNorm": 1,
    "InstanceNormalization": 1,
    "LayerNormalization": 1,
    "Mul": None,
}
"""Operator -> which of its inputs is multiplied with data; None is any."""


def fill(bundle: Path, seed: int = 0) -> Manifest:
    """Writes the missing weights of a skeleton, and completes its manifest.

    Args:
        bundle: a directory that `build_skeleton` wrote.
        seed: of the noise. A weight depends on it and on the weight's name alone.
    """
    manifest = read_manifest(bundle / MANIFEST)
    noise = np.random.default_rng(seed).standard_normal(_PERIOD, dtype=np.float32)
    graphs = {name: _fill_graph(bundle, record, noise) for name, record in manifest.graphs.items()}
    manifest = replace(manifest, graphs=graphs)
    write_text(bundle / MANIFEST, manifest.to_json())
    return manifest


def _fill_graph(bundle: Path, record: GraphRecord, noise: NDArray[np.float32]) -> GraphRecord:
    graph_file, data_file = record.files
    graph = onnx.load(bundle / graph_file.path, load_external_data=False).graph
    readers = _readers(graph)
    weights = [w for w in graph.initializer if external_data_helper.uses_external_data(w)]
    path = bundle / data_file.path
    with replacing(path) as partial, partial.open("wb") as file:
        for weight in sorted(weights, key=_offset):
            file.seek(_offset(weight))
            file.write(_draw(weight, *readers[weight.name], noise).tobytes())
    data = FileRecord(data_file.path, path.stat().st_size, sha256(path))
    return replace(record, files=(graph_file, data))


def _readers(graph: onnx.GraphProto) -> dict[str, tuple[onnx.NodeProto, int]]:
    """Weight -> the first node that reads it, beyond a Cast, and as which input."""
    readers: dict[str, tuple[onnx.NodeProto, int]] = {}
    for node in graph.node:
        for index, name in enumerate(node.input):
            readers.setdefault(name, (node, index))
    for name, (node, _) in list(readers.items()):
        if node.op_type == "Cast" and node.output[0] in readers:
            readers[name] = readers[node.output[0]]
    return readers


def _offset(weight: TensorProto) -> int:
    return int(external_data_helper.ExternalDataInfo(weight).offset or 0)


def _draw(
    weight: TensorProto, reader: onnx.NodeProto, index: int, noise: NDArray[np.float32]
) -> NDArray[Any]:
    """The values of a weight."""
    count, dtype = math.prod(weight.dims), helper.tensor_dtype_to_np_dtype(weight.data_type)
    start = zlib.crc32(weight.name.encode()) % _PERIOD
    values = np.resize(np.roll(noise, -start), count)
    mean, deviation = _distribution(list(weight.dims), reader, index)
    scaled: NDArray[np.float32] = values * np.float32(deviation) + np.float32(mean)
    return scaled.astype(dtype)


def _distribution(shape: list[int], reader: onnx.NodeProto, index: int) -> tuple[float, float]:
    """Mean and standard deviation of a weight that is an input of a node."""
    kind = reader.op_type
    if kind in ("Conv", "NhwcConv") and index == 1:
        return 0.0, _GAIN / math.sqrt(math.prod(shape[1:]))
    if kind == "MatMul":
        return 0.0, _GAIN / math.sqrt(shape[-2])
    if kind == "Gemm" and index == 1:
        transposed = any(attribute.name == "transB" and attribute.i for attribute in reader.attribute)
        return 0.0, _GAIN / math.sqrt(shape[1 if transposed else 0])
    if kind in _SCALES and _SCALES[kind] in (None, index):
        return 1.0, 0.1
    return 0.0, 0.05
