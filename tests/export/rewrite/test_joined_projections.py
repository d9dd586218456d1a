"""Linear layers of one input become one product."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from export.rewrite.rewriting import rewrite
from tests.export.rewrite.graphs import TOLERANCE, Builder, evaluate, random_inputs, relative_error

DTYPES = ["float32", "float16"]


def keys_and_values(dtype: str, widths: list[int]) -> ir.Model:
    """Of tokens (N, 5, 8), a projection of each width."""
    b = Builder(dtype)
    tokens = b.input("tokens", "batch", 5, 8)
    return b.model(*(b.node("MatMul", tokens, b.weight(8, width)) for width in widths))


def embeddings(dtype: str, widths: list[int], transposed: bool) -> ir.Model:
    """Of an embedding (N, 8), a projection with a bias of each width."""
    b = Builder(dtype)
    time = b.input("time", "batch", 8)
    shapes = [(width, 8) if transposed else (8, width) for width in widths]
    return b.model(
        *(
            b.node("Gemm", time, b.weight(*shape), b.weight(max(shape)), transB=int(transposed))
            for shape in shapes
        )
    )


def compare(model: ir.Model, dtype: str) -> dict[str, int]:
    """Rewrites a graph and compares its results. Returns its operators."""
    inputs = random_inputs(model, {"batch": 2})
    expected = evaluate(model, inputs)
    report = rewrite(model, "cuda")
    for found, wanted in zip(evaluate(model, inputs), expected, strict=True):
        assert found.shape == wanted.shape
        assert relative_error(found, wanted) < TOLERANCE[dtype]
    return dict(report.after)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_of_each_width_are_one_product(dtype: str) -> None:
    widths = [16, 32, 16, 16, 32, 32, 16, 32, 32]
    assert compare(keys_and_values(dtype, widths), dtype) == {"MatMul": 2, "Split": 2}


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_biases_are_joined_too(dtype: str, transposed: bool) -> None:
    assert compare(embeddings(dtype, [16] * 5, transposed), dtype) == {"Gemm": 1, "Split": 1}


def test_queries_keys_and_values_stay_three_products() -> None:
    model = keys_and_values("float16", [16, 16, 16])
    assert rewrite(model, "cuda").after == {"MatMul": 3}


def test_a_split_has_at_most_32_parts() -> None:
    assert compare(keys_and_values("float32", [4] * 37), "float32") == {"MatMul": 2, "Split": 2}


def test_other_inputs_are_other_products() -> None:
    b = Builder("float32")
    inputs = [b.input(name, "batch", 5, 8) for name in ("first", "second")]
    model = b.model(*(b.node("MatMul", x, b.weight(8, 16)) for x in inputs * 3))
    assert rewrite(model, "cuda").after == {"MatMul": 6}


def test_each_weight_is_stored_once() -> None:
    model = keys_and_values("float16", [16] * 4)
    rewrite(model, "cuda")
    [weight] = model.graph.initializers.values()
    assert weight.const_value is not None
    assert weight.const_value.numpy().shape == (8, 64)
    assert weight.dtype is not None
    assert weight.dtype.numpy() == np.float16
