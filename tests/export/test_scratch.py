"""Scratch memory of ONNX graphs whose peak is known by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from engines.bundle import Bundle
from export.scratch import scratch_bytes, scratch_on_a_card
from tests.support.anydoor import DECODE, ENCODE, GRAPHS

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16

Value = tuple[str, int, Sequence[int | str]]
"""Name, dtype and shape."""


def save(
    path: Path,
    nodes: Sequence[NodeProto],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    **weights: np.ndarray,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def node(operator: str, inputs: str, outputs: str, **attributes: object) -> NodeProto:
    return helper.make_node(operator, inputs.split(), outputs.split(), **attributes)


def both(peak: int) -> dict[str, int]:
    return {"onnxruntime": peak, "openvino": peak}


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_a_result_lives_from_its_node_to_the_last_that_reads_it(tmp_path: Path, samples: int) -> None:
    """The input is not counted; a, b and c are there together, then c and y."""
    path = save(
        tmp_path / "graph.onnx",
        [
            node("Relu", "x", "a"),
            node("Neg", "a", "b"),
            node("Add", "a b", "c"),
            node("Cast", "c", "y", to=HALF),
        ],
        [("x", FLOAT, ["samples", 100])],
        [("y", HALF, ["samples", 100])],
    )
    assert scratch_bytes(path, {"samples": samples}) == both(samples * 3 * 400)


def test_a_skip_connection_stays_until_it_is_read(tmp_path: Path) -> None:
    chain = [
        node("Relu", "x", "skip"),
        node("Relu", "skip", "a"),
        node("Relu", "a", "b"),
        node("Relu", "b", "c"),
    ]
    inputs: list[Value] = [("x", FLOAT, ["rows", 10])]
    outputs: list[Value] = [("y", FLOAT, ["rows", 10])]
    with_skip = save(tmp_path / "skip.onnx", [*chain, node("Add", "c skip", "y")], inputs, outputs)
    without = save(tmp_path / "plain.onnx", [*chain, node("Add", "c c", "y")], inputs, outputs)
    assert scratch_bytes(with_skip, {"rows": 2}) == both(3 * 80)
    assert scratch_bytes(without, {"rows": 2}) == both(2 * 80)


def test_an_output_stays_until_the_end(tmp_path: Path) -> None:
    path = save(
        tmp_path / "graph.onnx",
        [
            node("Relu", "x", "first"),
            node("Relu", "first", "a"),
            node("Relu", "a", "b"),
            node("Relu", "b", "last"),
        ],
        [("x", FLOAT, [1, 10])],
        [("first", FLOAT, [1, 10]), ("last", FLOAT, [1, 10])],
    )
    assert scratch_bytes(path, {}) == both(3 * 40)


def test_a_result_that_nobody_reads_is_gone_at_once(tmp_path: Path) -> None:
    path = save(
        tmp_path / "graph.onnx",
        [node("Split", "x", "a b", axis=1, num_outputs=2), node("Relu", "a", "c"), node("Relu", "c", "y")],
        [("x", FLOAT, [1, 20])],
        [("y", FLOAT, [1, 10])],
    )
    assert scratch_bytes(path, {}) == both(2 * 40)


def test_what_follows_from_weights_alone_takes_nothing(tmp_path: Path) -> None:
    """Backends fold it when they load the graph: the transposed weights, cast from half precision."""
    path = save(
        tmp_path / "graph.onnx",
        [
            node("Cast", "stored", "weights", to=FLOAT),
            node("Transpose", "weights", "transposed"),
            node("MatMul", "x transposed", "y"),
        ],
        [("x", FLOAT, ["rows", 50])],
        [("y", FLOAT, ["rows", 3])],
        stored=np.zeros((3, 50), np.float16),
    )
    assert scratch_bytes(path, {"rows": 4}) == both(4 * 3 * 4)


def test_a_dtype_takes_its_bytes(tmp_path: Path) -> None:
    for dtype, size in ((FLOAT, 4), (HALF, 2), (TensorProto.UINT8, 1), (TensorProto.INT64, 8)):
        path = save(
            tmp_path / "graph.onnx",
            [node("Cast", "x", "y", to=dtype)],
            [("x", FLOAT, ["rows", 7])],
            [("y", dtype, ["rows", 7])],
        )
        assert scratch_bytes(path, {"rows": 3}) == both(21 * size)


def test_attention_without_its_scores_takes_less(tmp_path: Path) -> None:
    """2 rows of 16 tokens of 4 channels in float32: q, k, v and the result take 512 bytes each, scores 2048.

    With scores, v is there with those before and those after the scaling or the softmax: 512 + 2 * 2048.
    Without, it is q, k, v and the transposed k: 4 * 512.
    """
    projections = [node("MatMul", f"x w{name}", name) for name in "qkv"]
    path = save(
        tmp_path / "graph.onnx",
        [
            *projections,
            node("Transpose", "k", "transposed", perm=[0, 2, 1]),
            node("MatMul", "q transposed", "scores"),
            node("Mul", "scores scale", "scaled"),
            node("Softmax", "scaled", "probabilities", axis=-1),
            node("MatMul", "probabilities v", "y"),
        ],
        [("x", FLOAT, ["rows", 16, 4])],
        [("y", FLOAT, ["rows", 16, 4])],
        scale=np.float32([0.5]),
        **{f"w{name}": np.zeros((4, 4), np.float32) for name in "qkv"},
    )
    assert scratch_bytes(path, {"rows": 2}) == {"onnxruntime": 512 + 2 * 2048, "openvino": 4 * 512}
    assert scratch_bytes(path, {"rows": 2}, has_attention=True) == both(4 * 512)


@pytest.mark.parametrize("graph", GRAPHS)
def test_larger_calls_of_a_real_graph_take_more(tiny_bundle: Path, graph: str) -> None:
    bundle = Bundle.open(tiny_bundle)
    manifest, path = bundle.manifest, bundle.graph_file(graph)
    one, four = (
        scratch_bytes(path, sizes, has_attention=bool(manifest.graphs[graph].variants))
        for sizes in (manifest.typical_sizes, manifest.largest_sizes)
    )
    on_a_card = scratch_bytes(path, manifest.largest_sizes)["onnxruntime"]
    assert manifest.graphs[graph].scratch_bytes == {**one, "cuda": on_a_card}
    outputs = sum(tensor.nbytes(manifest.typical_sizes) for tensor in manifest.specs[graph].outputs)
    for backend in one:
        # encoder and decoder take one picture at a time
        assert four[backend] == one[backend] if graph in (ENCODE, DECODE) else four[backend] > one[backend]
        assert one[backend] >= outputs
    assert one["openvino"] <= one["onnxruntime"]


def test_a_bundle_for_cards_says_what_its_own_operators_take(
    tiny_cuda_bundle: Path, tiny_half_bundle: Path
) -> None:
    cards, plain = Bundle.open(tiny_cuda_bundle), Bundle.open(tiny_half_bundle)
    for graph, record in cards.manifest.graphs.items():
        assert record.scratch_bytes["cuda"] == scratch_on_a_card(cards.graph_file(graph), cards.manifest)
        as_plain = plain.manifest.graphs[graph].scratch_bytes
        assert 0 < record.scratch_bytes["cuda"] <= as_plain["cuda"]
        # on a CPU it would run as it was before
        assert record.scratch_bytes["openvino"] == as_plain["openvino"]
