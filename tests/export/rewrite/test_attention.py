"""Attention becomes MultiHeadAttention: in every geometry, and only where the kernel takes it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from export.rewrite.rewriting import RewriteError, rewrite
from tests.export.rewrite.graphs import TOLERANCE, Builder, evaluate, random_inputs, relative_error
from tests.export.rewrite.provider import MultiHeadAttention

DTYPES = ["float32", "float16"]


def attention(
    dtype: str = "float32",
    heads: int = 2,
    width: int = 8,
    queries: int = 5,
    keys: int = 3,
    dynamic: bool = True,
    scale: float | None = None,
    mask: tuple[int, float] | None = None,
) -> ir.Model:
    """Projections, and scaled_dot_product_attention as PyTorch's exporter writes it.

    Args:
        dynamic: the batch has a variable size, so that the shape of the keys is computed.
        scale: of the scores; as usual if None.
        mask: how many later keys a query sees, and what the mask adds to the others; no mask if None.
    """
    b = Builder(dtype)
    batch: int | str = "batch" if dynamic else 2
    channels = heads * width

    def split(name: str, length: int) -> str:
        projected = b.node("MatMul", b.input(name, batch, length, 6), b.weight(6, channels))
        parts = b.node("Reshape", projected, b.constant([-1, length, heads, width]), allowzero=1,
            shape=(batch, length, heads, width))  # fmt: skip
        return str(b.node("Transpose", parts, perm=[0, 2, 1, 3]))

    q, k, v = split("query", queries), split("key", keys), split("value", keys)
    root = b.constant(np.sqrt(scale or width**-0.5))
    if dynamic:
        shape = b.node("Shape", k, start=0)
        last = b.node("Slice", shape, b.constant([-1]), b.constant([2**63 - 1]))
        before = b.node("Slice", shape, b.constant([-2]), b.constant([-1]))
        outer = b.node("Slice", shape, b.constant([-(2**63)]), b.constant([-2]))
        flat = b.node("Concat", b.constant([-1]), before, last, axis=0)
        full = b.node("Concat", outer, last, before, axis=0)
    else:
        flat, full = b.constant([-1, keys, width]), b.constant([2, heads, width, keys])
    k = b.node("Reshape", b.node("Transpose", b.node("Reshape", k, flat), perm=[0, 2, 1]), full)
    scores = b.node("MatMul", b.node("Mul", q, root), b.node("Mul", k, root))
    if mask is not None:
        later, lowest = mask
        ones = b.node("Expand", b.constant(1.0), b.constant([queries, keys]))
        triangle = b.node("Trilu", ones, *([b.constant(later)] if later else []), upper=0)
        above = b.node("Equal", triangle, b.constant(0.0))
        scores = b.node("Add", scores, b.node("Where", above, b.constant(lowest), b.constant(0.0)))
    mixed = b.node("MatMul", b.node("Softmax", scores, axis=-1), v)
    merged = b.node("Transpose", mixed, perm=[0, 2, 1, 3])
    return b.model(b.node("Reshape", merged, b.constant([-1, queries, channels]), allowzero=1))


def inputs(model: ir.Model) -> dict[str, np.ndarray]:
    return random_inputs(model, {"batch": 2})


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_result_in_one_operator(dtype: str, dynamic: bool) -> None:
    model = attention(dtype, dynamic=dynamic)
    given_inputs = inputs(model)
    [expected] = evaluate(model, given_inputs)
    report = rewrite(model, "cuda")
    assert report.matches["MultiHeadAttention"] == 1
    assert report.after == {"MatMul": 3, "com.microsoft.MultiHeadAttention": 1}
    [found] = evaluate(model, given_inputs)
    assert found.dtype == dtype
    assert relative_error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_attention_is_unidirectional(dtype: str) -> None:
    model = attention(dtype, queries=5, keys=5, mask=(0, float(np.finfo(dtype).min)))
    given_inputs = inputs(model)
    [expected] = evaluate(model, given_inputs)
    report = rewrite(model, "cuda")
    assert report.matches["causal MultiHeadAttention"] == 1
    assert report.after == {"MatMul": 3, "com.microsoft.MultiHeadAttention": 1}
    [found] = evaluate(model, given_inputs)
    assert relative_error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("keys", "mask"),
    [(5, (1, -1e9)), (5, (0, -1.0)), (3, (0, -1e9))],
    ids=["sees the next key", "hardly masks", "fewer keys"],
)
def test_other_masks_are_not_taken_for_causal_ones(keys: int, mask: tuple[int, float]) -> None:
    model = attention(queries=5, keys=keys, mask=mask)
    with pytest.raises(RewriteError, match="MultiHeadAttention: 1 of 1"):
        rewrite(model, "cuda")


def test_a_single_head_that_nothing_splits_off_is_named() -> None:
    b = Builder("float32")
    query, key, value = (b.input(name, "batch", 5, 8) for name in ("query", "key", "value"))
    scores = b.node("MatMul", query, b.node("Transpose", key, perm=[0, 2, 1]))
    model = b.model(b.node("MatMul", b.node("Softmax", scores, axis=-1), value))
    [kept] = rewrite(model, "cuda").kept
    assert (kept.rule, kept.reason) == ("MultiHeadAttention", "a single head that no reshape splits off")


@given(
    heads=st.integers(1, 4),
    width=st.sampled_from([8, 16, 24]),
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    scale=st.none() | st.floats(0.05, 2.0),
)
@example(heads=1, width=24, queries=1, keys=2, scale=0.2038)  # 1 / sqrt(24) is 0.2041
@settings(max_examples=25)
def test_any_geometry(heads: int, width: int, queries: int, keys: int, scale: float | None) -> None:
    model = attention("float32", heads, width, queries, keys, scale=scale)
    given_inputs = inputs(model)
    [expected] = evaluate(model, given_inputs)
    rewrite(model, "cuda")
    [found] = evaluate(model, given_inputs)
    assert relative_error(found, expected) < TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("width", "reason"),
    [(264, "heads of 264 channels are wider than 256"), (12, "heads of 12 channels are not a multiple of 8")],
)
def test_heads_that_the_kernel_does_not_take_stay(width: int, reason: str) -> None:
    model = attention(heads=1, width=width)
    given_inputs = inputs(model)
    [expected] = evaluate(model, given_inputs)
    report = rewrite(model, "cuda")
    assert report.matches["MultiHeadAttention"] == 0
    [kept] = report.kept
    assert (kept.rule, kept.reason, len(kept.nodes)) == ("MultiHeadAttention", reason, 1)
    [found] = evaluate(model, given_inputs)
    assert relative_error(found, expected) < TOLERANCE["float32"]


@pytest.mark.parametrize("mask", [None, (0, float(np.finfo(np.float32).min))], ids=["all", "causal"])
@pytest.mark.parametrize("width", [8, 12, 264])
def test_runs_on_the_cpu_provider(width: int, mask: tuple[int, float] | None) -> None:
    model = attention(heads=2, width=width, queries=5, keys=5, mask=mask)
    given_inputs = inputs(model)
    [expected] = evaluate(model, given_inputs)
    report = rewrite(model, "cpu")
    assert report.matches["causal MultiHeadAttention" if mask else "MultiHeadAttention"] == 1
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    [found] = session.run(None, given_inputs)
    assert relative_error(found, expected) < TOLERANCE["float32"]


def test_scores_with_a_mask_are_refused_or_left_as_they_are() -> None:
    model = attention()
    [softmax] = [node for node in model.graph if node.op_type == "Softmax"]
    mask = ir.node("Abs", [softmax.inputs[0]])
    model.graph.insert_before(softmax, mask)
    softmax.replace_input_with(0, mask.outputs[0])
    with pytest.raises(RewriteError, match=r"MultiHeadAttention: 1 of 1, the first at 'Softmax_"):
        rewrite(model, "cuda")
    report = rewrite(model, "cuda", strict=False)
    assert report.matches["MultiHeadAttention"] == 0
    assert [kept.reason for kept in report.kept] == ["not recognised"]


def test_values_of_another_width_are_not_taken_for_attention() -> None:
    """A reshape that merges other axes than heads and channels computes something else."""
    model = attention(queries=4, keys=4)
    [merge] = [
        node for node in model.graph if node.op_type == "Reshape" and node.outputs[0].is_graph_output()
    ]
    merge.replace_input_with(1, model.graph.initializers["constant_3"])
    report = rewrite(model, "cuda", strict=False)
    assert report.matches["MultiHeadAttention"] == 0


def test_the_reference_enforces_the_limits() -> None:
    model = attention(heads=1, width=12)
    rewrite(model, "cpu")
    with pytest.raises(ValueError, match="a multiple of 8"):
        evaluate(model, inputs(model), [MultiHeadAttention])
