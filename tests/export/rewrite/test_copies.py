"""Small copies that need not be made."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from export.rewrite.rewriting import rewrite
from tests.export.rewrite.graphs import Builder, evaluate, random_inputs


def chosen_rows(dtype: int) -> ir.Model:
    """Rows of a picture by indices of a type, which are cast to int64 as PyTorch's exporter does."""
    nodes = [
        helper.make_node("Cast", ["indices"], ["wide"], to=TensorProto.INT64),
        helper.make_node("Gather", ["data", "wide"], ["rows"], axis=1),
    ]
    inputs = [
        helper.make_tensor_value_info("data", TensorProto.FLOAT, [2, 3]),
        helper.make_tensor_value_info("indices", dtype, ["n"]),
    ]
    result = helper.make_tensor_value_info("rows", TensorProto.FLOAT, [2, "n"])
    model = helper.make_model(helper.make_graph(nodes, "graph", inputs, [result]))
    return ir.from_proto(model)


def test_indices_need_not_be_widened() -> None:
    model = chosen_rows(TensorProto.INT32)
    inputs = {"data": np.arange(6, dtype=np.float32).reshape(2, 3), "indices": np.array([2, 0, 2], np.int32)}
    [expected] = evaluate(model, inputs)
    assert rewrite(model, "cuda").after == {"Gather": 1}
    [found] = evaluate(model, inputs)
    np.testing.assert_array_equal(found, expected)


def test_indices_of_another_type_are_cast() -> None:
    assert rewrite(chosen_rows(TensorProto.UINT8), "cuda").after == {"Cast": 1, "Gather": 1}


def swapped(middle: int = 4, width: int = 4) -> ir.Model:
    """Sine and cosine of a timestep, then the two halves the other way round."""
    b = Builder("float32")
    time = b.input("time", "batch", width)
    whole = b.node("Concat", b.node("Sin", time), b.node("Cos", time), axis=-1)
    one = b.constant([1])
    back = b.node("Slice", whole, b.constant([middle]), b.constant([2**63 - 1]), one, one)
    front = b.node("Slice", whole, b.constant([0]), b.constant([middle]), one, one)
    return b.model(b.node("Concat", back, front, axis=-1))


@pytest.mark.parametrize(("middle", "operators"), [(4, 3), (3, 6)])
def test_halves_that_are_swapped_are_joined_that_way(middle: int, operators: int) -> None:
    """Other parts than the two halves are left alone."""
    model = swapped(middle)
    inputs = random_inputs(model, {"batch": 2})
    [expected] = evaluate(model, inputs)
    assert rewrite(model, "cuda").after.total() == operators
    [found] = evaluate(model, inputs)
    np.testing.assert_array_equal(found, expected)
