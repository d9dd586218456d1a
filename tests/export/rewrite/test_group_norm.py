"""Group normalisation becomes GroupNorm, with SiLU where it follows."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.options import DETERMINISTIC_CUDA
from export.rewrite.rewriting import RewriteError, rewrite
from tests.export.rewrite.graphs import (
    ONNX_DTYPES,
    TOLERANCE,
    Builder,
    evaluate,
    random_inputs,
    relative_error,
)

DTYPES = ["float32", "float16"]


def group_norm(
    dtype: str = "float32",
    channels: int = 8,
    groups: int = 2,
    height: int = 3,
    width: int = 4,
    silu: bool = True,
    flat: bool = False,
    dynamic: bool = True,
    skip: tuple[int, ...] = (),
    epsilon: float = 1e-5,
) -> ir.Model:
    """nn.GroupNorm as PyTorch's exporter writes it, in float32 between casts if the data are float16.

    Args:
        silu: SiLU follows.
        flat: of (N, C, H W) data that a Reshape makes of the picture.
        dynamic: the batch has a variable size, so that the shape is taken at run time.
        skip: shape without batch of what is added to the result of a convolution before; none if empty.
        epsilon: added to the variance.
    """
    b = Builder(dtype)
    batch: int | str = "batch" if dynamic else 2
    x = b.input("x", batch, channels, height, width)
    if skip:
        convolved = b.node("Conv", x, b.weight(channels, channels, 1, 1), b.weight(channels))
        x = b.node("Add", convolved, b.input("skip", batch, *skip))
    shape: list[int] = [2, channels, height, width]
    noted = (batch, channels, height, width)
    if flat:
        shape, noted = [2, channels, height * width], (batch, channels, height * width)
        x = b.node("Reshape", x, b.constant([-1, *shape[1:]]), allowzero=1, shape=noted)
    half = dtype == "float16"
    data = b.node("Cast", x, to=ONNX_DTYPES["float32"]) if half else x
    per_channel = (channels, *(1 for _ in shape[2:]))
    grouped = b.node("Reshape", data, b.constant([0, groups, -1]))
    ones, zeros = (b.constant(np.full(groups, value), np.float32) for value in (1, 0))
    normalised = b.node("InstanceNormalization", grouped, ones, zeros, epsilon=epsilon)
    restored = b.node("Reshape", normalised, b.node("Shape", data, start=0) if dynamic else b.constant(shape))
    scaled = b.node("Mul", restored, b.weight(*per_channel, dtype=np.float32, mean=1, std=0.2))
    result = b.node("Add", scaled, b.weight(*per_channel, dtype=np.float32))
    result = b.node("Cast", result, to=ONNX_DTYPES["float16"]) if half else result
    return b.model(b.node("Mul", result, b.node("Sigmoid", result)) if silu else result)


def check(model: ir.Model, tolerance: float, target: str = "cuda") -> ir.Model:
    """Rewrites a graph and compares results; returns it."""
    inputs = random_inputs(model, {"batch": 2})
    [expected] = evaluate(model, inputs)
    rewrite(model, target)
    [found] = evaluate(model, inputs)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert relative_error(found, expected) < tolerance
    return model


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_result_in_one_operator(dtype: str, silu: bool, dynamic: bool) -> None:
    model = check(group_norm(dtype, silu=silu, dynamic=dynamic), TOLERANCE[dtype])
    assert operators(model) == ["Transpose", "GroupNorm", "Transpose"]
    [norm] = [node for node in model.graph if node.op_type == "GroupNorm"]
    assert norm.attributes["activation"].as_int() == silu


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_flattened_pictures(dtype: str, dynamic: bool) -> None:
    model = check(group_norm(dtype, silu=False, flat=True, dynamic=dynamic), TOLERANCE[dtype])
    assert operators(model) == ["Transpose", "GroupNorm", "Transpose", "Reshape"]


@given(
    groups=st.integers(1, 6),
    pairs=st.integers(1, 4),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    silu=st.booleans(),
    flat=st.booleans(),
)
@settings(max_examples=25)
def test_any_geometry(groups: int, pairs: int, height: int, width: int, silu: bool, flat: bool) -> None:
    channels = groups * pairs * 2
    model = group_norm("float32", channels, groups, height, width, silu=silu and not flat, flat=flat)
    assert "GroupNorm" in operators(check(model, TOLERANCE["float32"]))


@pytest.mark.parametrize(
    ("channels", "groups", "reason"),
    [
        (9, 3, "groups of 3 channels are odd"),
        (514, 1, "groups of 514 channels are larger than 512"),
    ],
)
def test_groups_that_the_kernel_does_not_take_stay(channels: int, groups: int, reason: str) -> None:
    model = group_norm("float16", channels, groups)
    report = rewrite(model, "cuda")
    assert report.matches["GroupNorm"] == report.matches["GroupNorm with SiLU"] == 0
    [kept] = report.kept
    assert (kept.rule, kept.reason, len(kept.nodes)) == ("GroupNorm", reason, 1)
    assert report.after == report.before


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize(("channels", "groups"), [(8, 2), (9, 3), (514, 1), (8, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_operators_take_groups_of_any_size(
    dtype: str, channels: int, groups: int, flat: bool
) -> None:
    """Channels are last, so that transposes cancel between convolutions."""
    plain = group_norm(dtype, channels, groups, silu=not flat, flat=flat)
    model = check(plain, TOLERANCE[dtype], DETERMINISTIC_CUDA)
    kinds = operators(model)
    assert kinds.count("ReduceMean") == kinds.count("Transpose") == 2
    assert not {"InstanceNormalization", "GroupNorm"} & set(kinds)
    assert all(node.domain == "" for node in model.graph)


def test_deterministic_operators_do_not_overflow() -> None:
    model = group_norm("float16", silu=False)
    inputs = {name: array * np.float16(1000) for name, array in random_inputs(model, {"batch": 2}).items()}
    [expected] = evaluate(model, inputs)
    rewrite(model, DETERMINISTIC_CUDA)
    [found] = evaluate(model, inputs)
    assert relative_error(found, expected) < TOLERANCE["float16"]


@pytest.mark.parametrize("skip", [(), (8, 3, 4)], ids=["alone", "after a sum"])
@pytest.mark.parametrize("target", ["cuda", DETERMINISTIC_CUDA])
def test_the_epsilon_is_the_graphs(target: str, skip: tuple[int, ...]) -> None:
    check(group_norm(skip=skip, epsilon=0.5), TOLERANCE["float32"], target)


def test_a_result_that_others_read_keeps_its_value() -> None:
    """SiLU is fused, and what else reads the normalised picture sees it without SiLU."""
    model = group_norm()
    silu = model.graph.outputs[0].producer()
    assert silu is not None
    normalised = silu.inputs[0]
    assert normalised is not None
    model.graph.outputs.append(normalised)
    inputs = random_inputs(model, {"batch": 2})
    expected = evaluate(model, inputs)
    rewrite(model, "cuda")
    for found, wanted in zip(evaluate(model, inputs), expected):
        assert relative_error(found, wanted) < TOLERANCE["float32"]


def test_instance_normalisation_itself_is_refused() -> None:
    """With a scale it is not the first half of a group normalisation."""
    model = group_norm()
    [norm] = [node for node in model.graph if node.op_type == "InstanceNormalization"]
    scale = norm.inputs[1]
    assert scale is not None
    scale.const_value = ir.tensor(np.array([1, 2], np.float32))
    with pytest.raises(RewriteError, match="GroupNorm: 1 of 1, the first at 'InstanceNormalization"):
        rewrite(model, "cuda")


def test_groups_of_interleaved_channels_are_refused() -> None:
    """Reshape can split a picture in other ways than into groups of neighbouring channels."""
    model = group_norm(channels=4, height=2, width=2)
    [first, *_] = [node for node in model.graph if node.op_type == "Reshape"]
    shape = ir.val("shape", const_value=ir.tensor(np.array([0, 4, -1], np.int64)))
    model.graph.register_initializer(shape)
    first.replace_input_with(1, shape)
    report = rewrite(model, "cuda", strict=False)
    assert report.matches["GroupNorm"] == 0


def test_large_activations_do_not_overflow() -> None:
    """Squares that are too large for float16 are summed in float32."""
    model = group_norm("float16", silu=False)
    inputs = {name: array * np.float16(1000) for name, array in random_inputs(model, {"batch": 2}).items()}
    [expected] = evaluate(model, inputs)
    rewrite(model, "cuda")
    [found] = evaluate(model, inputs)
    assert math.isfinite(float(np.abs(found).max()))
    assert relative_error(found, expected) < TOLERANCE["float16"]
