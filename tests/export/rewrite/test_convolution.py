"""2-D convolutions become NhwcConv with weights in the other layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.rewrite.files import rewrite_file
from export.rewrite.rewriting import rewrite
from tests.export.rewrite.graphs import TOLERANCE, Builder, evaluate, random_inputs, relative_error


def convolution(
    dtype: str = "float32",
    inputs: int = 4,
    outputs: int = 6,
    kernel: tuple[int, ...] = (3, 3),
    strides: tuple[int, ...] = (1, 1),
    pads: tuple[int, ...] = (1, 1, 1, 1),
    dilations: tuple[int, ...] = (1, 1),
    group: int = 1,
    bias: bool = True,
    **attributes: object,
) -> ir.Model:
    b = Builder(dtype)
    sides = (7, 8, 5)[: len(kernel)]
    x = b.input("x", "batch", inputs, *sides)
    weights = [b.weight(outputs, inputs // group, *kernel, std=0.3)]
    weights += [b.weight(outputs)] if bias else []
    return b.model(
        b.node(
            "Conv",
            x,
            *weights,
            kernel_shape=kernel,
            strides=strides,
            group=group,
            **({"pads": pads, "dilations": dilations} | attributes),
        )
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_same_result(dtype: str, bias: bool) -> None:
    model = convolution(dtype, bias=bias)
    inputs = random_inputs(model, {"batch": 2})
    [expected] = evaluate(model, inputs)
    report = rewrite(model, "cuda")
    assert [node.op_type for node in model.graph] == ["Transpose", "NhwcConv", "Transpose"]
    assert report.matches["NhwcConv"] == 1
    [found] = evaluate(model, inputs)
    assert relative_error(found, expected) < TOLERANCE[dtype]


@given(
    per_group=st.integers(1, 3),
    group=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    dilations=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
@settings(max_examples=25)
def test_any_geometry(
    per_group: int,
    group: int,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    pads: tuple[int, ...],
    dilations: tuple[int, int],
) -> None:
    model = convolution("float32", per_group * group, 2 * group, kernel, strides, pads, dilations, group)
    inputs = random_inputs(model, {"batch": 2})
    [expected] = evaluate(model, inputs)
    rewrite(model, "cuda")
    [found] = evaluate(model, inputs)
    assert found.shape == expected.shape
    assert relative_error(found, expected) < TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kernel": (3,), "strides": (1,), "pads": (1, 1), "dilations": (1,)}, "it has 1 spatial axes"),
        ({"pads": (0, 0, 0, 0), "auto_pad": "VALID"}, "its padding is automatic"),
    ],
)
def test_convolutions_that_are_not_taken_stay(options: dict[str, tuple[int, ...]], reason: str) -> None:
    model = convolution(**options)  # type: ignore[arg-type]
    report = rewrite(model, "cuda")
    assert [(kept.rule, kept.reason) for kept in report.kept] == [("NhwcConv", reason)]
    assert report.after == report.before


def test_shared_weights_are_stored_once(tmp_path: Path) -> None:
    """And in the order of the kernel, in the new file alone."""
    b = Builder("float32")
    weights = b.weight(4, 4, 3, 3)
    once = b.node("Conv", b.input("x", 1, 4, 5, 5), weights, pads=[1, 1, 1, 1])
    model = b.model(b.node("Conv", once, weights, pads=[1, 1, 1, 1]))
    plain, fused = tmp_path / "plain.onnx", tmp_path / "fused.onnx"
    ir.save(model, plain, external_data="plain.onnx.data", size_threshold_bytes=0)
    rewrite_file(plain, fused, "cuda")
    (tmp_path / "plain.onnx.data").unlink()
    stored = ir.load(fused)
    [tensor] = [value.const_value for value in stored.graph.initializers.values()]
    assert tensor is not None
    original = ir.to_proto(model).graph.initializer[0]
    expected = np.frombuffer(original.raw_data, np.float32).reshape(4, 4, 3, 3)
    np.testing.assert_array_equal(tensor.numpy(), expected.transpose(0, 2, 3, 1))
    inputs = random_inputs(model)
    [found], [wanted] = evaluate(stored, inputs), evaluate(model, inputs)
    assert relative_error(found, wanted) < TOLERANCE["float32"]


def test_two_convolutions_meet_without_a_transpose_between_them() -> None:
    b = Builder("float32")
    x = b.input("x", "batch", 4, 5, 6)
    for _ in range(2):
        x = b.node("Conv", x, b.weight(4, 4, 1, 1), shape=("batch", 4, 5, 6))
    model = b.model(x)
    rewrite(model, "cuda")
    assert [node.op_type for node in model.graph] == ["Transpose", "NhwcConv", "NhwcConv", "Transpose"]
