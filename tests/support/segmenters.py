"""Small segmentation networks with the inputs and outputs of public ones: they find what is bright.

    python -m tests.support.segmenters FOLDER

writes bundles of two of them, u2net and sam, and a picture for them, shelf.png.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from export.build import build_segmenter
from export.options import BuildOptions
from export.progress import Progress
from export.segmenters.building import SegmenterSource

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64

Shape = Sequence[int | str]
Tensor = tuple[str, Shape]


class Network:
    """An ONNX graph, node by node."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        name = f"weight{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def add(self, operator: str, *inputs: str, to: str = "", to_type: int = 0, **attributes: Any) -> str:
        result = to or f"value{len(self._nodes)}"
        if to_type:
            attributes["to"] = to_type
        self._nodes.append(helper.make_node(operator, list(inputs), [result], **attributes))
        return result

    def save(self, path: Path, inputs: Sequence[Tensor], outputs: Sequence[Tensor], **types: int) -> Path:
        values = [
            [helper.make_tensor_value_info(name, types.get(name, FLOAT), list(shape)) for name, shape in side]
            for side in (inputs, outputs)
        ]
        graph = helper.make_graph(self._nodes, "small", *values, self._weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        onnx.checker.check_model(model)
        onnx.save(model, path)
        return path


def salient(
    path: Path,
    normalise: tuple[Sequence[float], Sequence[float]],
    size: int | str,
    names: tuple[str, str] = ("input", "output"),
    others: int = 0,
    sigmoid: bool = True,
    half: bool = False,
) -> Path:
    """A network whose mask is what is brighter than 0.5 before it was normalised, and smooth around that.

    Args:
        path: where to write it.
        normalise: mean and deviation that its pictures must have been brought to.
        size: side of its picture, or the name of a variable one.
        names: of its input and its first output.
        others: outputs beside the first.
        sigmoid: whether the mask is from 0 to 1, not logits.
        half: whether weights are in float16, and the network computes in it.
    """
    network = Network()
    dtype = np.float16 if half else np.float32
    mean, deviation, middle, slope = (
        network.constant(np.reshape(values, (1, -1, 1, 1)), dtype) for values in (*normalise, 0.5, 20.0)
    )
    value = network.add("Cast", names[0], to_type=TensorProto.FLOAT16 if half else FLOAT)
    value = network.add("Add", network.add("Mul", value, deviation), mean)
    value = network.add("ReduceMean", value, axes=[1], keepdims=1)
    value = network.add("Mul", network.add("Sub", value, middle), slope)
    mask = network.add("Sigmoid" if sigmoid else "Identity", value)
    network.add("Cast", mask, to=names[1], to_type=FLOAT)
    outputs = [(names[1], (1, 1, size, size))]
    for index in range(others):
        other = network.add("Cast", network.add("Neg", value), to=f"d{index}", to_type=FLOAT)
        outputs.append((other, (1, 1, size, size)))
    return network.save(path, [(names[0], (1, 3, size, size))], outputs)


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (1.0, 1.0, 1.0))
SIGNED = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

SIDE = 64
"""Of the picture that the networks of clicks take, in pixels."""
CELLS = 32
"""Of their masks."""


def encoder(
    path: Path,
    normalise: tuple[Sequence[float], Sequence[float]],
    picture: Tensor,
    features: Sequence[str],
) -> Path:
    """An encoder whose first feature is how bright a picture was before it was normalised, in cells.

    Args:
        path: where to write it.
        normalise: mean and deviation that its pictures must have been brought to; or that it applies itself.
        picture: name and shape of its input; of three sizes, the channels come last.
        features: names of its outputs.
    """
    network = Network()
    name, shape = picture
    mean, deviation = (np.reshape(values, (1, 3, 1, 1)) for values in normalise)
    if len(shape) == 3:
        value = network.add("Transpose", name, perm=[2, 0, 1])
        value = network.add("Reshape", value, network.constant((1, 3, SIDE, SIDE), np.int64))
        value = network.add("Div", value, network.constant(255))
    else:
        value = network.add("Mul", name, network.constant(deviation))
        value = network.add("Add", value, network.constant(mean))
    value = network.add("ReduceMean", value, axes=[1], keepdims=1)
    step = SIDE // CELLS
    value = network.add("AveragePool", value, kernel_shape=[step, step], strides=[step, step])
    outputs = []
    for feature in features:
        network.add("Identity", value, to=feature)
        outputs.append((feature, (1, 1, CELLS, CELLS)))
    return network.save(path, [picture], outputs)


def decoder(
    path: Path,
    points: Tensor,
    labels: Tensor,
    features: Sequence[str],
    masks: Sequence[Tensor],
    scores: Tensor,
    others: Sequence[Tensor] = (),
    **types: int,
) -> Path:
    """A decoder of two masks: the better one is what is as bright as the points on the object, and not as
    bright as those that are not on it; the other is everything else.

    Args:
        path: where to write it.
        points: name and shape.
        labels: likewise.
        features: names of the encoder's outputs.
        masks: name and shape of each output with the masks.
        scores: name and shape.
        others: name and shape of inputs that it ignores.
        types: of inputs that are not in float32.
    """
    network = Network()
    xy = network.add("Reshape", points[0], network.constant((1, -1, 2), np.int64))
    signs = network.add("Reshape", labels[0], network.constant((1, -1, 1), np.int64))
    plane = network.add("Reshape", features[0], network.constant((-1,), np.int64))
    on = network.add("Cast", network.add("Greater", signs, network.constant(0)), to_type=FLOAT)
    off = network.add("Cast", network.add("Equal", signs, network.constant(0)), to_type=FLOAT)
    here, there = (_unlike(network, plane, _cell(network, xy, which)) for which in (on, off))
    has_off = network.add("Min", _sum(network, off), network.constant(1))
    there = network.add("Add", there, network.add("Sub", network.constant(1), has_off))
    tolerance = network.constant(0.1)
    good = network.add("Min", network.add("Sub", tolerance, here), network.add("Sub", there, tolerance))
    both = network.add("Concat", network.add("Neg", good), good, axis=0)
    for name, shape in masks:
        network.add("Reshape", both, network.constant(shape, np.int64), to=name)
    network.add("Reshape", network.constant((0.2, 0.9)), network.constant(scores[1], np.int64), to=scores[0])
    given = [(feature, (1, 1, CELLS, CELLS)) for feature in features]
    return network.save(path, [*given, points, labels, *others], [*masks, scores], **types)


def _sum(network: Network, values: str) -> str:
    return network.add("ReduceSum", values, network.constant((1,), np.int64), keepdims=1)


def _cell(network: Network, xy: str, weights: str) -> str:
    """Index of the cell in the middle of the points that have a weight."""
    count = network.add("Max", _sum(network, weights), network.constant(1))
    middle = network.add("Div", _sum(network, network.add("Mul", xy, weights)), count)
    column_row = network.add("Floor", network.add("Mul", middle, network.constant(CELLS / SIDE)))
    index = network.add("Mul", column_row, network.constant((1, CELLS)))
    index = network.add("ReduceSum", index, network.constant((2,), np.int64), keepdims=0)
    return network.add("Cast", index, to_type=INT64)


def _unlike(network: Network, plane: str, cell: str) -> str:
    """How much brighter or darker than a cell all cells are, (1, 1, cells, cells)."""
    value = network.add("Gather", plane, network.add("Reshape", cell, network.constant((1,), np.int64)))
    unlike = network.add("Abs", network.add("Sub", plane, value))
    return network.add("Reshape", unlike, network.constant((1, 1, CELLS, CELLS), np.int64))


def sam(folder: Path, channels_last: bool = False) -> tuple[Path, Path]:
    """An encoder and a decoder like those of SAM and MobileSAM."""
    picture = ("input_image", ("height", "width", 3)) if channels_last else ("images", (1, 3, SIDE, SIDE))
    size = (SIDE, SIDE, 3) if channels_last else picture[1]
    features = ["image_embeddings"]
    return encoder(folder / "sam_encoder.onnx", IMAGENET, (picture[0], size), features), decoder(
        folder / "sam_decoder.onnx",
        ("point_coords", (1, "num_points", 2)),
        ("point_labels", (1, "num_points")),
        features,
        [("masks", (1, 2, CELLS, CELLS)), ("low_res_masks", (1, 2, CELLS, CELLS))],
        ("iou_predictions", (1, 2)),
        [("mask_input", (1, 1, 256, 256)), ("has_mask_input", (1,)), ("orig_im_size", (2,))],
    )


def sam2(folder: Path) -> tuple[Path, Path]:
    """An encoder and a decoder like those of SAM 2."""
    features = ["image_embed", "high_res_feats_0", "high_res_feats_1"]
    return encoder(
        folder / "sam2.encoder.onnx", IMAGENET, ("image", (1, 3, SIDE, SIDE)), features[1:] + features[:1]
    ), decoder(
        folder / "sam2.decoder.onnx",
        ("point_coords", ("num_labels", "num_points", 2)),
        ("point_labels", ("num_labels", "num_points")),
        features,
        [("masks", (1, 2, CELLS, CELLS))],
        ("iou_predictions", (1, 2)),
        [("mask_input", ("num_labels", 1, 256, 256)), ("has_mask_input", ("num_labels",))],
    )


def efficient_sam(folder: Path) -> tuple[Path, Path]:
    """An encoder and a decoder like those of EfficientSAM."""
    plain = ((0.0,) * 3, (1.0,) * 3)
    picture = ("batched_images", (1, 3, SIDE, SIDE))
    features = ["image_embeddings"]
    return encoder(folder / "efficient_encoder.onnx", plain, picture, features), decoder(
        folder / "efficient_decoder.onnx",
        ("batched_point_coords", (1, 1, "num_points", 2)),
        ("batched_point_labels", (1, 1, "num_points")),
        features,
        [("output_masks", (1, 1, 2, CELLS, CELLS))],
        ("iou_predictions", (1, 1, 2)),
        [("orig_im_size", (2,))],
        orig_im_size=INT64,
    )


def u2net(folder: Path) -> Path:
    """A network like U2Net."""
    return salient(folder / "u2net.onnx", IMAGENET, 320, ("input.1", "1959"), others=6)


def bright_things() -> NDArray[np.uint8]:
    """A picture (48, 96, 3) of a white and a light grey rectangle on black; see `WHITE` and `GREY`."""
    picture = np.zeros((48, 96, 3), np.uint8)
    picture[WHITE] = 255
    picture[GREY] = 160
    return picture


WHITE, GREY = (slice(12, 36), slice(12, 36)), (slice(18, 36), slice(60, 84))
"""Where the rectangles are."""


def built(folder: Path) -> tuple[Path, Path]:
    """Bundles in a folder: one finds what is bright, the other what is clicked on."""
    for name, files in (("u2net", [u2net(folder)]), ("sam", sam(folder))):
        build_segmenter(SegmenterSource.open(files), folder / name, BuildOptions(), Progress(quiet=True))
    return folder / "u2net", folder / "sam"


if __name__ == "__main__":
    built(Path(sys.argv[1]))
    Image.fromarray(bright_things()).save(Path(sys.argv[1], "shelf.png"))
