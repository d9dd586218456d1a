"""Reads values of an ONNX graph: constants, and shapes with variable dimensions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

Dimension = int | str
"""A size, or the name of a variable one."""

Dimensions = tuple[Dimension, ...]

_MANY = 1024
"""Values; shapes, scalars and one number a group are not more, and weights are not read to find out."""


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """Returns the array of a short constant; None if the value is computed, or is a weight."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.size > _MANY else tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """Returns the number of a constant with one element; None if it is none."""
    array = constant(value)
    return None if array is None or array.size != 1 else float(array.reshape(-1)[0])


def is_close(value: ir.Value | None, number: float) -> bool:
    """Returns whether a value is a constant that equals a number, rounded to float16."""
    found = scalar(value)
    return found is not None and math.isclose(found, number, rel_tol=2**-11)


def is_bias(value: ir.Value | None, shape: Dimensions) -> bool:
    """Returns whether a value is a stored weight, with a number for each channel of data that have them
    last."""
    return value is not None and value.const_value is not None and dimensions(value) == shape[-1:]


def differing_summands(add: ir.Node | None) -> str | None:
    """Says so if what an Add adds differs in shape: the kernels that take residuals do not broadcast."""
    shapes = {dimensions(value) for value in add.inputs} if add else set()
    return "its summands differ in shape" if len(shapes) > 1 else None


def is_read_once(value: ir.Value) -> bool:
    """Returns whether a value has one reader, and is no result of the graph."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def linear_bias(value: ir.Value) -> ir.Value | None:
    """Returns what a linear layer adds last, if nothing else reads its result; it may have become a
    picture."""
    node, shape = value.producer(), dimensions(value)
    if node is None or shape is None or not is_read_once(value):
        return None
    if node.op_type == "Reshape" and node.inputs[0] is not None:
        return linear_bias(node.inputs[0])
    if node.op_type != "Add":
        return None
    return next((summand for summand in node.inputs if summand and is_bias(summand, shape)), None)


def dimensions(value: ir.Value | None) -> Dimensions | None:
    """Returns the shape of a value; None if its rank or a dimension has not been inferred."""
    if value is None or value.shape is None:
        return None
    found = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
    return None if any(dim in (None, "") for dim in found) else tuple(found)


def shape_items(value: ir.Value | None) -> Dimensions | None:
    """Returns the elements of a value that describes a shape (int64, 1-D), with variable sizes by their
    names.

    Understands what exporters compute shapes with: constants, `Shape`, `Slice` and `Concat`.
    """
    array = constant(value)
    if array is not None:
        return tuple(int(number) for number in array.reshape(-1))
    node = None if value is None else value.producer()
    if node is None:
        return None
    if node.op_type == "Shape":
        whole = dimensions(node.inputs[0])
        if whole is None:
            return None
        start = node.attributes.get_int("start", 0)
        return whole[start : node.attributes.get_int("end", len(whole))]
    if node.op_type == "Concat":
        parts = [shape_items(part) for part in node.inputs]
        return None if None in parts else tuple(item for part in parts for item in part or ())
    if node.op_type == "Slice" and len(node.inputs) in (3, 4):
        whole, bounds = shape_items(node.inputs[0]), [scalar(bound) for bound in node.inputs[1:3]]
        if whole is None or None in bounds:
            return None
        start, end = (int(bound or 0) for bound in bounds)
        return whole[max(start, -len(whole)) : min(end, len(whole))]
    return None


def reshaped(source: Dimensions | None, target: Dimensions | None) -> Dimensions | None:
    """Returns the shape that data have in another shape, of which -1 stands for what remains; None if
    unknown."""
    if source is None or target is None or 0 in target:
        return None
    if -1 not in target:
        return target
    rest = Counter(size for size in source if isinstance(size, str))
    rest.subtract(size for size in target if isinstance(size, str))
    known = math.prod(size for size in source if isinstance(size, int))
    used = -math.prod(size for size in target if isinstance(size, int))
    names = [*rest.elements()]
    if used <= 0 or known % used or min(rest.values(), default=0) < 0:
        return None
    if not names:
        inferred: Dimension = known // used
    elif len(names) == 1 and known == used:
        inferred = names[0]
    else:
        return None
    return tuple(inferred if size == -1 else size for size in target)


def reshape_result(value: ir.Value) -> Dimensions | None:
    """Returns the shape of what a Reshape returns, from its inputs; None if unknown."""
    node = value.producer()
    assert node is not None
    source, target = dimensions(node.inputs[0]), shape_items(node.inputs[1])
    if source is not None and target is not None and not node.attributes.get_int("allowzero", 0):
        # 0 keeps a dimension
        target = tuple(
            kept if size == 0 else size for size, kept in zip_longest(target, source[: len(target)])
        )
    return reshaped(source, target)


def permuted(shape: Dimensions, order: Sequence[int]) -> Dimensions:
    """Returns the shape that `Transpose` makes of a shape."""
    return tuple(shape[axis] for axis in order)


def describe(value: ir.Value, like: ir.Value, shape: Dimensions | None) -> ir.Value:
    """Notes the shape of a new value, and the dtype of another one. Returns the value."""
    value.dtype = like.dtype
    value.shape = None if shape is None else ir.Shape(shape)
    return value
