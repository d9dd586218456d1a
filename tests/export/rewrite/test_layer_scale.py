"""The scale of a residual branch becomes part of the weights of its last layer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from export.rewrite.rewriting import rewrite
from tests.export.rewrite.graphs import TOLERANCE, Builder, evaluate, random_inputs, relative_error


def branch(dtype: str, read: bool = False, scale: float = 0.1) -> ir.Model:
    """The end of a block of DINOv2, and the start of the next.

    Args:
        read: the result of the linear layer is read by others, too.
    """
    b = Builder(dtype)
    x, skip = b.input("x", "batch", 5, 8), b.input("skip", "batch", 5, 16)
    layer = b.node("Add", b.node("MatMul", x, b.weight(8, 16)), b.weight(16))
    scaled = b.node("Mul", layer, b.weight(16, mean=scale, std=scale))
    total = b.node("Add", scaled, skip)
    normalised = b.node(
        "LayerNormalization", total, b.weight(16, mean=1), b.weight(16), axis=-1, epsilon=1e-6
    )
    return b.model(normalised, total, *([layer] if read else []))


@pytest.mark.parametrize("scale", [0.1, 1e-5])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_same_results_without_a_factor(dtype: str, scale: float) -> None:
    """Scales are small before training, and in FP16 products with them lie below its normal numbers."""
    model = branch(dtype, scale=scale)
    inputs = random_inputs(model, {"batch": 2})
    expected = evaluate(model, inputs)
    report = rewrite(model, "cuda")
    assert report.matches["scaled projections"] == 1
    assert report.after == {"MatMul": 1, "com.microsoft.SkipLayerNormalization": 1}
    for found, wanted in zip(evaluate(model, inputs), expected, strict=True):
        assert relative_error(found, wanted) < TOLERANCE[dtype]


def test_weights_are_rounded_once() -> None:
    model = branch("float16")
    weight, _, scale = (value.const_value.numpy() for value in list(model.graph.initializers.values())[:3])
    rewrite(model, "cuda")
    [product] = [node for node in model.graph if node.op_type == "MatMul"]
    assert product.inputs[1] is not None
    assert product.inputs[1].const_value is not None
    exact = weight.astype(np.float64) * scale
    np.testing.assert_array_equal(product.inputs[1].const_value.numpy(), exact.astype(np.float16))


def test_a_layer_that_others_read_keeps_its_weights() -> None:
    report = rewrite(branch("float32", read=True), "cuda")
    assert report.matches["scaled projections"] == 0
    [kept] = report.kept
    assert (kept.rule, kept.reason) == ("scaled projections", "others read the layer without the scale")
