"""GEGLU becomes two projections, or BiasSplitGelu in the widths that the kernel is compiled for."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from export.rewrite.rewriting import RewriteError, rewrite
from tests.export.rewrite.graphs import TOLERANCE, Builder, evaluate, random_inputs, relative_error


def geglu(dtype: str, width: int, root: float = 2**0.5, axis: int = 2) -> ir.Model:
    """diffusers' GEGLU as PyTorch's exporter writes it: (N, L, 6) -> (N, L, width)."""
    b = Builder(dtype)
    projected = b.node("MatMul", b.input("x", "batch", 4, 6), b.weight(6, 2 * width, std=0.4))
    biased = b.node("Add", projected, b.weight(2 * width))
    left, right = b.node("Split", biased, outputs=2, axis=axis, num_outputs=2)
    error = b.node("Erf", b.node("Div", right, b.constant(root)))
    half = b.node("Mul", b.constant(0.5), b.node("Add", error, b.constant(1.0)))
    return b.model(b.node("Mul", left, b.node("Mul", right, half)))


@pytest.mark.parametrize("width", [1280, 2560, 5120])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_same_result_in_one_operator(dtype: str, width: int) -> None:
    model = geglu(dtype, width)
    inputs = random_inputs(model, {"batch": 2})
    [expected] = evaluate(model, inputs)
    report = rewrite(model, "cuda")
    assert report.after == {"MatMul": 1, "com.microsoft.BiasSplitGelu": 1}
    [found] = evaluate(model, inputs)
    assert found.dtype == dtype
    assert relative_error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("width", [32, 640, 1281])
def test_widths_that_the_kernel_does_not_have_stay(width: int) -> None:
    model = geglu("float16", width)
    report = rewrite(model, "cuda")
    [kept] = report.kept
    assert kept.rule == "BiasSplitGelu"
    assert kept.reason == f"its width is {2 * width}, not two times 1280, 2560, 5120"
    assert report.after == report.before


@pytest.mark.parametrize("root", [1.0, 1.702])
def test_other_activations_are_not_taken_for_gelu(root: float) -> None:
    report = rewrite(geglu("float32", 1280, root), "cuda", strict=False)
    assert report.matches["BiasSplitGelu"] == 0


def test_halves_of_another_axis_are_not_taken_for_geglu() -> None:
    report = rewrite(geglu("float32", 1280, axis=1), "cuda", strict=False)
    assert report.matches["BiasSplitGelu"] == 0
    assert [kept.reason for kept in report.kept] == ["not recognised"]


def test_inputs_of_commutative_operators_may_be_swapped() -> None:
    model = geglu("float32", 1280)
    inputs = random_inputs(model, {"batch": 2})
    [expected] = evaluate(model, inputs)
    for node in model.graph:
        if node.op_type in ("Add", "Mul"):
            first, second = node.inputs
            node.replace_input_with(0, second)
            node.replace_input_with(1, first)
    assert rewrite(model, "cuda").matches["BiasSplitGelu"] == 1
    [found] = evaluate(model, inputs)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [2, -1])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_two_projections_compute_the_same_bits(dtype: str, axis: int) -> None:
    model = geglu(dtype, 32, axis=axis)
    inputs = random_inputs(model, {"batch": 2})
    [expected] = evaluate(model, inputs)
    report = rewrite(model, "any")
    assert report.matches == {"two projections": 1}
    assert report.after == report.before + Counter(MatMul=1, Add=1) - Counter(Split=1)
    weights = {tuple(weight.const_value.shape) for weight in model.graph.initializers.values()}
    assert weights == {(6, 32), (32,), ()}
    [found] = evaluate(model, inputs)
    np.testing.assert_array_equal(found, expected)


def test_a_split_of_another_axis_stays_one_projection() -> None:
    with pytest.raises(RewriteError, match=r"two projections: 1 of 1"):
        rewrite(geglu("float32", 32, axis=1), "any")


def test_a_split_of_something_else_is_left_alone() -> None:
    b = Builder("float32")
    left, right = b.node("Split", b.input("x", "batch", 4, 6), outputs=2, axis=2, num_outputs=2)
    report = rewrite(b.model(b.node("Mul", left, right)), "any")
    assert report.after == report.before
