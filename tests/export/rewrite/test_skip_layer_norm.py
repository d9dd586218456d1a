"""A residual that is normalised becomes one operator that also returns the sum."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from export.rewrite.rewriting import rewrite
from tests.export.rewrite.graphs import TOLERANCE, Builder, evaluate, random_inputs, relative_error

DTYPES = ["float32", "float16"]


def residual(
    dtype: str, bias: bool = True, axis: int = -1, axes: int = 3, read: bool = True, epsilon: float = 1e-5
) -> ir.Model:
    """A linear layer on a residual, then LayerNormalization.

    Args:
        axes: of the data.
        read: the sum is read by what follows, too.
        epsilon: added to the variance.
    """
    b = Builder(dtype)
    shape = ("batch", 5, 16, 16)[4 - axes :] if axes < 4 else ("batch", 3, 5, 16)
    x, skip = b.input("x", *shape), b.input("skip", *shape)
    layer = b.node("MatMul", x, b.weight(16, 16, std=0.25))
    layer = b.node("Add", b.weight(16), layer) if bias else layer
    total = b.node("Add", layer, skip)
    sizes = (5, 16) if axis == 1 else (16,)
    normalised = b.node(
        "LayerNormalization", total, b.weight(*sizes, mean=1), b.weight(*sizes), axis=axis, epsilon=epsilon
    )
    return b.model(normalised, *([total] if read else []))


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_results_in_one_operator(dtype: str, bias: bool, read: bool) -> None:
    model = residual(dtype, bias, read=read)
    inputs = random_inputs(model, {"batch": 2})
    expected = evaluate(model, inputs)
    report = rewrite(model, "cuda")
    assert report.after == {"MatMul": 1, "com.microsoft.SkipLayerNormalization": 1}
    for found, wanted in zip(evaluate(model, inputs), expected, strict=True):
        assert found.dtype == dtype
        assert relative_error(found, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("read", [True, False])
def test_runs_in_onnx_runtime(read: bool) -> None:
    """Its CPU provider has the operator too, in float32; its epsilon is the graph's."""
    model = residual("float32", read=read, epsilon=0.5)
    inputs = random_inputs(model, {"batch": 2})
    expected = evaluate(model, inputs)
    rewrite(model, "cuda")
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    for found, wanted in zip(session.run(None, inputs), expected, strict=True):
        assert relative_error(found, wanted) < TOLERANCE["float32"]


def test_what_nobody_reads_has_no_name() -> None:
    """The kernel writes no statistics, and the sum only where it is asked for."""
    names = {}
    for read in (True, False):
        model = residual("float16", read=read)
        rewrite(model, "cuda")
        [node] = [node for node in ir.to_proto(model).graph.node if node.op_type == "SkipLayerNormalization"]
        names[read] = [bool(name) for name in node.output]
    assert names == {True: [True, False, False, True], False: [True]}


def test_the_bias_of_a_summand_that_others_read_stays_where_it_is() -> None:
    """So the first residual of a transformer keeps its own."""
    model = residual("float32")
    biased = next(node for node in model.graph if node.op_type == "Add").outputs[0]
    model.graph.outputs.append(biased)
    report = rewrite(model, "cuda")
    assert report.matches["SkipLayerNormalization with bias"] == 0
    assert report.matches["SkipLayerNormalization"] == report.after["Add"] == 1


@pytest.mark.parametrize(
    ("axes", "axis", "reason"),
    [(4, -1, "its input has 4 axes"), (3, 1, "it normalises more than the last axis")],
)
def test_what_the_kernel_does_not_take_stays(axes: int, axis: int, reason: str) -> None:
    model = residual("float32", bias=False, axes=axes, axis=axis)
    report = rewrite(model, "cuda")
    assert [(kept.rule, kept.reason) for kept in report.kept] == [("SkipLayerNormalization", reason)]
    assert report.after == report.before


def test_large_activations_do_not_overflow() -> None:
    """Squares that are too large for float16 are summed in float32."""
    model = residual("float16")
    inputs = {name: array * np.float16(1000) for name, array in random_inputs(model, {"batch": 2}).items()}
    [expected, _] = evaluate(model, inputs)
    rewrite(model, "cuda")
    [found, _] = evaluate(model, inputs)
    assert relative_error(found, expected) < TOLERANCE["float16"]
