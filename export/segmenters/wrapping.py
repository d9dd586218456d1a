"""Wraps segmentation networks so that all have the same signatures: as nodes of the graph, and in NumPy as
the reference.

    salient   picture (1, 3, S, S) 0..1 RGB                        -> mask (1, 1, S, S) 0..1
    embed     picture (1, 3, S, S) 0..1 RGB, inside (1, 1, S, S)   -> features_0, features_1, ...
    click     features_*, points (1, N, 2) in pixels of the S x S picture, labels (1, N)
                                                                   -> masks (1, K, s, s) logits, scores (1, K)

Labels: 1 on the object, 0 not on it, 2 and 3 the first and last corner of a box, -1 none. Only networks that
keep the proportions of a picture have the input `inside`: 1 where the picture is, 0 right of it and below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from engines.spec import GraphSpec
from export.segmenters.network import WrappedNetwork
from export.segmenters.recognition import CLICK, EMBED, SALIENT, Clicker, Wrap, inputs_of

Arrays = Mapping[str, NDArray[Any]]


def wrap_network(wrap: Wrap, model: onnx.ModelProto, path: Path, spec: GraphSpec) -> None:
    """Writes the graph of a network with its wrap."""
    network = WrappedNetwork(model)
    if wrap.graph == CLICK:
        results = _wrap_click(wrap, network, model, spec)
    else:
        network.feed(network.inputs[0], _normalised(wrap, network))
        results = _wrap_mask(wrap, network, model) if wrap.graph == SALIENT else _features(wrap, network)
    network.save(path, spec, results)


def network_inputs(wrap: Wrap, model: onnx.ModelProto, arrays: Arrays) -> dict[str, NDArray[Any]]:
    """Returns what the network itself takes for the inputs of its graph."""
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    names = list(inputs_of(model))
    if wrap.graph == CLICK:
        assert wrap.clicker
        values = {
            **{name: arrays[f"features_{index}"] for index, name in enumerate(wrap.clicker.features)},
            wrap.clicker.points: arrays["points"].reshape(_batched(wrap.clicker, arrays["points"].shape)),
            wrap.clicker.labels: arrays["labels"].reshape(_batched(wrap.clicker, arrays["labels"].shape)),
            **_constant_inputs(wrap, model),
        }
    else:
        values = {names[0]: _normalise(wrap, arrays["picture"], arrays.get("inside"))}
    return {name: values[name].astype(onnx.helper.tensor_dtype_to_np_dtype(types[name])) for name in names}


def network_outputs(wrap: Wrap, model: onnx.ModelProto) -> list[str]:
    """Returns the outputs of a network that make those of its graph."""
    names = [output.name for output in model.graph.output]
    if wrap.graph == SALIENT:
        return names[:1]
    assert wrap.clicker
    if wrap.graph == EMBED:
        return list(wrap.clicker.features)
    masks = next((name for name in wrap.clicker.masks if name in names), names[0])
    return [masks, next((name for name in names if "iou" in name or "score" in name), names[1])]


def graph_outputs(
    wrap: Wrap, model: onnx.ModelProto, outputs: Sequence[NDArray[Any]]
) -> list[NDArray[np.float32]]:
    """Returns what the graph gives where its network gives this, as `network_outputs` names it."""
    results = [array.astype(np.float32) for array in outputs]
    if wrap.graph == CLICK:
        masks, scores = results
        return [masks.reshape(1, *masks.shape[-3:]), scores.reshape(1, -1)]
    if wrap.graph == EMBED:
        return results
    mask: NDArray[Any] = results[0].reshape(1, 1, *results[0].shape[-2:])
    if not _ends_in_sigmoid(model):
        mask = 1 / (1 + np.exp(-mask))
    if wrap.normalisation.stretched:
        mask = (mask - mask.min()) / max(float(mask.max() - mask.min()), _LEAST_RANGE)
    return [mask]


_LEAST_RANGE = 1e-6


def _normalise(wrap: Wrap, picture: NDArray[Any], inside: NDArray[Any] | None) -> NDArray[np.float32]:
    of = wrap.normalisation
    mean, deviation = (np.array(values, np.float32).reshape(3, 1, 1) for values in (of.mean, of.deviation))
    if wrap.channels_last:
        padded: NDArray[Any] = picture if inside is None else np.where(inside > 0, picture, mean)
        return np.ascontiguousarray((padded[0] * np.float32(255)).transpose(1, 2, 0))
    values: NDArray[Any] = picture
    if of.by_peak:
        values = picture / max(float(picture.max()), _LEAST_RANGE)
    normalised = (values - mean) / deviation
    return (normalised if inside is None else normalised * inside).astype(np.float32)


def _normalised(wrap: Wrap, network: WrappedNetwork) -> str:
    of, value = wrap.normalisation, "picture"
    has_inside = len(wrap.inputs) > 1
    mean, deviation = (
        network.constant(np.reshape(values, (1, 3, 1, 1))) for values in (of.mean, of.deviation)
    )
    if wrap.channels_last:
        if has_inside:
            is_inside = network.before("Greater", "inside", network.constant(0))
            value = network.before("Where", is_inside, value, mean)
        value = network.before("Mul", value, network.constant(255))
        value = network.before("Transpose", value, perm=[0, 2, 3, 1])
        shape = network.constant([wrap.size, wrap.size, 3], np.int64)
        return network.before("Reshape", value, shape)
    if of.by_peak:
        peak = network.before("ReduceMax", value, keepdims=1)
        value = network.before("Div", value, network.before("Max", peak, network.constant(_LEAST_RANGE)))
    value = network.before("Div", network.before("Sub", value, mean), deviation)
    return network.before("Mul", value, "inside") if has_inside else value


def _wrap_mask(wrap: Wrap, network: WrappedNetwork, model: onnx.ModelProto) -> list[str]:
    mask = network.output(model.graph.output[0].name)
    shape = network.constant([1, 1, wrap.size, wrap.size], np.int64)
    mask = network.after("Reshape", mask, shape)
    if not _ends_in_sigmoid(model):
        mask = network.after("Sigmoid", mask)
    if wrap.normalisation.stretched:
        least = network.after("ReduceMin", mask, keepdims=1)
        span = network.after("Sub", network.after("ReduceMax", mask, keepdims=1), least)
        span = network.after("Max", span, network.constant(_LEAST_RANGE))
        mask = network.after("Div", network.after("Sub", mask, least), span)
    return [mask]


def _ends_in_sigmoid(model: onnx.ModelProto) -> bool:
    """Returns whether the mask of a network is from 0 to 1 and no logits; it may be reshaped or resized at
    last."""
    makers = {output: node for node in model.graph.node for output in node.output}
    node = makers.get(model.graph.output[0].name)
    while node and node.op_type in ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Resize"):
        node = makers.get(node.input[0])
    return node is not None and node.op_type == "Sigmoid"


def _features(wrap: Wrap, network: WrappedNetwork) -> list[str]:
    assert wrap.clicker
    return [network.output(name) for name in wrap.clicker.features]


def _wrap_click(wrap: Wrap, network: WrappedNetwork, model: onnx.ModelProto, spec: GraphSpec) -> list[str]:
    assert wrap.clicker
    for index, name in enumerate(wrap.clicker.features):
        network.feed(name, f"features_{index}")
    for name, value, sizes in (
        (wrap.clicker.points, "points", (1, -1, 2)),
        (wrap.clicker.labels, "labels", (1, -1)),
    ):
        shape = network.constant(_batched(wrap.clicker, sizes), np.int64)
        network.feed(name, network.before("Reshape", value, shape))
    for name, values in _constant_inputs(wrap, model).items():
        network.feed(name, network.constant(values))
    masks, scores = (network.output(name) for name in network_outputs(wrap, model))
    shapes = [network.constant(tensor.shape, np.int64) for tensor in spec.outputs]
    return [network.after("Reshape", masks, shapes[0]), network.after("Reshape", scores, shapes[1])]


def _batched(clicker: Clicker, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of points or labels as a decoder takes them: EfficientSAM has an axis for queries."""
    return (1, *shape) if clicker.points.startswith("batched") else tuple(shape)


def _constant_inputs(wrap: Wrap, model: onnx.ModelProto) -> dict[str, NDArray[np.float32]]:
    """Returns what a decoder takes beside features, points and labels: no earlier mask, and the picture's
    size."""
    assert wrap.clicker
    known = {*wrap.clicker.features, wrap.clicker.points, wrap.clicker.labels}
    values = {}
    for name, shape in inputs_of(model).items():
        if name == "orig_im_size":
            values[name] = np.full(2, wrap.size, np.float32)
        elif name not in known:
            values[name] = np.zeros([size or 1 for size in shape], np.float32)
    return values
