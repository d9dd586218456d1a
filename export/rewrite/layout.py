"""Converts between layouts of pictures: channels first as in PyTorch, or last as tensor cores read them."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from export.rewrite.values import Dimensions, describe, dimensions, permuted

TO_LAST = (0, 2, 3, 1)
TO_FIRST = (0, 3, 1, 2)


def channels_last(op: Any, value: ir.Value) -> ir.Value:
    """Maps (N, C, H, W) to (N, H, W, C); undoes `channels_first` instead of doing both."""
    node = value.producer()
    if node is not None and is_to_first(node) and node.inputs[0] is not None:
        return node.inputs[0]
    return _transpose(op, value, TO_LAST)


def channels_first(op: Any, value: ir.Value) -> ir.Value:
    """Maps (N, H, W, C) to (N, C, H, W)."""
    return _transpose(op, value, TO_FIRST)


def last(shape: Dimensions | None) -> Dimensions | None:
    """Returns the shape of a (N, C, H, W) value with channels last."""
    return None if shape is None else permuted(shape, TO_LAST)


def is_to_first(node: ir.Node | None) -> bool:
    """Returns whether a node puts the channels first."""
    return node is not None and node.op_type == "Transpose" and _order(node) == TO_FIRST


def _transpose(op: Any, value: ir.Value, order: tuple[int, ...]) -> ir.Value:
    shape = dimensions(value)
    result = op.Transpose(value, perm=list(order))
    return describe(result, value, None if shape is None else permuted(shape, order))


def _order(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes.get_ints("perm", ()) or ())
