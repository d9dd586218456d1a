"""A linear layer's bias and a residual become BiasAdd, in the widths that the kernel is compiled for."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from export.rewrite.rewriting import rewrite
from tests.export.rewrite.graphs import TOLERANCE, Builder, evaluate, random_inputs, relative_error

DTYPES = ["float32", "float16"]


def residual(dtype: str, width: int = 320, picture: bool = False) -> ir.Model:
    """A linear layer on a residual.

    Args:
        picture: the residual is one of channels last, which the tokens become.
    """
    b = Builder(dtype)
    layer = b.node("MatMul", b.input("x", "batch", 6, 4), b.weight(4, width))
    layer = b.node("Add", layer, b.weight(width))
    shape = ("batch", 2, 3, width) if picture else ("batch", 6, width)
    if picture:
        layer = b.node("Reshape", layer, b.constant([-1, 2, 3, width]), shape=shape)
    return b.model(b.node("Add", b.input("skip", *shape), layer))


@pytest.mark.parametrize("picture", [True, False])
@pytest.mark.parametrize("width", [320, 640, 1280])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_result_in_one_operator(dtype: str, width: int, picture: bool) -> None:
    model = residual(dtype, width, picture)
    inputs = random_inputs(model, {"batch": 2})
    [expected] = evaluate(model, inputs)
    report = rewrite(model, "cuda")
    views = {"Reshape": 2} if picture else {}
    assert report.after == {"MatMul": 1, "com.microsoft.BiasAdd": 1, **views}
    [found] = evaluate(model, inputs)
    assert found.shape == expected.shape
    assert relative_error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("picture", [True, False])
@pytest.mark.parametrize("width", [64, 1024])
def test_widths_that_the_kernel_does_not_have_stay(width: int, picture: bool) -> None:
    report = rewrite(residual("float16", width, picture), "cuda")
    [kept] = report.kept
    assert (kept.rule, kept.reason) == ("BiasAdd", f"its width is {width}, not 320, 640, 1280")
    assert report.after == report.before


def test_a_residual_that_is_broadcast_stays_an_addition() -> None:
    b = Builder("float32")
    layer = b.node("Add", b.node("MatMul", b.input("x", "batch", 6, 4), b.weight(4, 320)), b.weight(320))
    report = rewrite(b.model(b.node("Add", layer, b.input("skip", 6, 320))), "cuda")
    assert [kept.reason for kept in report.kept] == ["its summands differ in shape"]
