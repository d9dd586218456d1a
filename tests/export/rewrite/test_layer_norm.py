"""Layer normalisation between casts becomes one operator in FP16 with float32 statistics."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from export.rewrite.rewriting import rewrite
from tests.export.rewrite.graphs import (
    ONNX_DTYPES,
    TOLERANCE,
    Builder,
    evaluate,
    random_inputs,
    relative_error,
)


def layer_norm(dtype: str, width: int = 16) -> ir.Model:
    b = Builder(dtype)
    x = b.input("x", "batch", 5, width)
    half = dtype == "float16"
    data = b.node("Cast", x, to=ONNX_DTYPES["float32"]) if half else x
    weights = [b.weight(width, dtype=np.float32, mean=1), b.weight(width, dtype=np.float32)]
    result = b.node("LayerNormalization", data, *weights, axis=-1, epsilon=1e-6, stash_type=1)
    return b.model(b.node("Cast", result, to=ONNX_DTYPES["float16"]) if half else result)


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize("width", [1, 16, 33])
def test_same_result_in_one_operator(width: int, size: int) -> None:
    model = layer_norm("float16", width)
    inputs = {name: array * np.float16(size) for name, array in random_inputs(model, {"batch": 2}).items()}
    [expected] = evaluate(model, inputs)
    report = rewrite(model, "cuda")
    assert report.after == {"LayerNormalization": 1}
    [found] = evaluate(model, inputs)
    assert found.dtype == np.float16
    assert relative_error(found, expected) < TOLERANCE["float16"]


def test_float32_stays_as_it_is() -> None:
    model = layer_norm("float32")
    report = rewrite(model, "cuda")
    assert report.after == report.before == {"LayerNormalization": 1}
    assert not report.kept
