"""Transposes move towards the outputs and cancel, and results stay the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from export.rewrite.rewriting import rewrite
from tests.export.rewrite.graphs import TOLERANCE, Builder, evaluate, random_inputs, relative_error

Between = Callable[[Builder, str, str], str]
"""What is between two convolutions: (builder, picture, the graph's input) -> picture."""

SHAPE = ("batch", 4, 5, 6)


def silu(b: Builder, x: str, _: str) -> str:
    return str(b.node("Mul", x, b.node("Sigmoid", x, shape=SHAPE), shape=SHAPE))


def residual(b: Builder, x: str, start: str) -> str:
    return str(b.node("Add", x, start, shape=SHAPE))


def half(b: Builder, x: str, _: str) -> str:
    return str(b.node("Mul", x, b.constant(0.5), shape=SHAPE))


def embedding(b: Builder, x: str, _: str) -> str:
    vector = b.node("Unsqueeze", b.input("vector", "batch", 4), b.constant([2, 3]))
    return str(b.node("Add", x, vector, shape=SHAPE))


def clip(b: Builder, x: str, _: str) -> str:
    return str(b.node("Clip", x, b.constant(-1.0), b.constant(1.0), shape=SHAPE))


def skip(b: Builder, x: str, start: str) -> str:
    joined = b.node("Concat", x, start, axis=1, shape=("batch", 8, 5, 6))
    return str(b.node("Conv", joined, b.weight(4, 8, 1, 1), shape=SHAPE))


def tokens(b: Builder, x: str, _: str) -> str:
    flat = b.node("Reshape", x, b.constant([-1, 4, 30]), shape=("batch", 4, 30))
    rows = b.node("Transpose", flat, perm=[0, 2, 1], shape=("batch", 30, 4))
    mixed = b.node("MatMul", rows, b.weight(4, 4), shape=("batch", 30, 4))
    back = b.node("Transpose", mixed, perm=[0, 2, 1], shape=("batch", 4, 30))
    return str(b.node("Reshape", back, b.constant([-1, 4, 5, 6]), shape=SHAPE))


def enlarge(b: Builder, x: str, _: str) -> str:
    factors = b.constant([1, 1, 2, 3], np.float32)
    return str(
        b.node(
            "Resize", x, "", factors, mode="nearest", nearest_mode="floor", shape=("batch", 4, 10, 18),
            coordinate_transformation_mode="asymmetric",
        )
    )  # fmt: skip


def convolutions(between: Between) -> ir.Model:
    b = Builder("float32")
    start = b.input("x", *SHAPE)
    first = b.node("Conv", start, b.weight(4, 4, 3, 3), pads=[1, 1, 1, 1], shape=SHAPE)
    middle = between(b, first, start)
    return b.model(b.node("Conv", middle, b.weight(4, 4, 3, 3), pads=[1, 1, 1, 1]))


@pytest.mark.parametrize("between", [silu, half, residual, embedding, clip, skip, tokens, enlarge])
def test_none_is_left_between_two_convolutions(between: Between) -> None:
    """One puts the channels of the input last, and one those of the output first."""
    model = convolutions(between)
    inputs = random_inputs(model, {"batch": 2})
    [expected] = evaluate(model, inputs)
    report = rewrite(model, "cuda")
    assert report.after["Transpose"] == 2
    [found] = evaluate(model, inputs)
    assert relative_error(found, expected) < TOLERANCE["float32"]


def test_a_picture_with_two_readers_is_transposed_once() -> None:
    b = Builder("float32")
    first = b.node("Conv", b.input("x", *SHAPE), b.weight(4, 4, 1, 1), shape=SHAPE)
    second = b.node("Conv", b.node("Add", first, first, shape=SHAPE), b.weight(4, 4, 1, 1), shape=SHAPE)
    model = b.model(b.node("Add", first, second, shape=SHAPE), first)
    inputs = random_inputs(model, {"batch": 2})
    expected = evaluate(model, inputs)
    report = rewrite(model, "cuda")
    assert report.after["Transpose"] == 3
    for found, wanted in zip(evaluate(model, inputs), expected):
        assert relative_error(found, wanted) < TOLERANCE["float32"]


@pytest.mark.parametrize("axis", [2, 3])
def test_pictures_joined_along_another_axis_stay_first(axis: int) -> None:
    b = Builder("float32")
    first = b.node("Conv", b.input("x", *SHAPE), b.weight(4, 4, 1, 1), shape=SHAPE)
    shape = ("batch", 4, 10, 6) if axis == 2 else ("batch", 4, 5, 12)
    model = b.model(b.node("Concat", first, first, axis=axis, shape=shape))
    inputs = random_inputs(model, {"batch": 2})
    [expected] = evaluate(model, inputs)
    report = rewrite(model, "cuda")
    assert report.matches["Concat with channels last"] == 0
    [found] = evaluate(model, inputs)
    assert relative_error(found, expected) < TOLERANCE["float32"]


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_pictures_enlarged_by_mixing_pixels_stay_first(mode: str) -> None:
    b = Builder("float32")
    first = b.node("Conv", b.input("x", *SHAPE), b.weight(4, 4, 1, 1), shape=SHAPE)
    factors = b.constant([1, 1, 2, 2], np.float32)
    model = b.model(b.node("Resize", first, "", factors, mode=mode, shape=("batch", 4, 10, 12)))
    assert rewrite(model, "cuda").matches["Resize with channels last"] == 0


def test_operators_that_broadcast_other_axes_stay_first() -> None:
    """(4, 1, 1) means channels with the channels first, and rows with the channels last."""
    b = Builder("float32")
    first = b.node("Conv", b.input("x", *SHAPE), b.weight(4, 4, 1, 1), shape=SHAPE)
    model = b.model(b.node("Mul", first, b.weight(4, 1, 1), shape=SHAPE))
    inputs = random_inputs(model, {"batch": 2})
    [expected] = evaluate(model, inputs)
    rewrite(model, "cuda")
    [found] = evaluate(model, inputs)
    assert relative_error(found, expected) < TOLERANCE["float32"]


def test_opposite_transposes_vanish() -> None:
    b = Builder("float32")
    x = b.input("x", "batch", 2, 3, 4)
    for order in ([0, 2, 3, 1], [0, 3, 1, 2], [0, 2, 1, 3]):
        x = b.node("Transpose", x, perm=order)
    model = b.model(b.node("Abs", x))
    inputs = random_inputs(model, {"batch": 2})
    [expected] = evaluate(model, inputs)
    assert rewrite(model, "cuda").after == {"Transpose": 1, "Abs": 1}
    [found] = evaluate(model, inputs)
    assert relative_error(found, expected) == 0
