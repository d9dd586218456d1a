"""Moves transposes towards the outputs until they meet their opposite.

The rules for pictures leave a transpose before and after every operator. Nothing is left of them between two
such operators: elementwise operators compute the same in either layout, and two opposite transposes cancel.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import ANY_VALUE

from export.rewrite.layout import TO_LAST, channels_first, channels_last, is_to_first, last
from export.rewrite.rule import PatternRule, Rule
from export.rewrite.values import constant, describe, dimensions, reshape_result, shape_items


class TransposePair(PatternRule):
    """Two transposes in a row -> one, or none."""

    name = "two transposes"

    def pattern(self, op: Any, x: Any, inner: Any, outer: Any) -> Any:
        """Returns a transpose of a transpose."""
        return op.Transpose(op.Transpose(x, perm=inner), perm=outer)

    def rewrite(self, op: Any, x: Any, inner: Any, outer: Any) -> Any:
        """Returns the two orders in one."""
        order = [inner.as_ints()[axis] for axis in outer.as_ints()]
        return op.Identity(x) if order == sorted(order) else op.Transpose(x, perm=order)


class ElementwiseLast(PatternRule):
    """An elementwise operator of pictures of which one has just been put channels first -> channels last."""

    commutes = False

    def __init__(self, kind: str, inputs: int) -> None:
        """Makes the rule for one operator.

        Args:
            kind: type of the operator.
            inputs: how many it has.
        """
        super().__init__()
        self.name = f"{kind} with channels last"
        self._kind = kind
        self._inputs = inputs

    def pattern(self, op: Any, x: Any) -> Any:
        """Returns the operator, whatever its inputs are."""
        return getattr(op, self._kind)(x, _allow_other_inputs=True, _outputs=["result"])

    def check(self, context: Any, **found: Any) -> bool:
        """Requires four axes, or a number, in every input."""
        inputs = found["result"].producer().inputs
        if len(inputs) != self._inputs or not any(
            value and is_to_first(value.producer()) for value in inputs
        ):
            return False
        return all(_axes(value) == 4 or _is_number(value) for value in inputs)

    def rewrite(self, op: Any, result: Any, **found: Any) -> Any:
        """Returns the same operator between the layouts."""
        node = result.producer()
        inputs = [value if _is_number(value) else channels_last(op, value) for value in node.inputs]
        picture = getattr(op, self._kind)(*inputs, **self.attributes(node))
        return channels_first(op, describe(picture, result, last(dimensions(result))))

    def attributes(self, node: ir.Node) -> dict[str, Any]:
        """Returns the attributes of the new operator."""
        return dict(node.attributes)


class ConcatLast(ElementwiseLast):
    """Two pictures joined along the channels -> channels last."""

    def __init__(self) -> None:
        super().__init__("Concat", 2)

    def check(self, context: Any, **found: Any) -> bool:
        """Requires the axis of the channels."""
        return found["result"].producer().attributes["axis"].as_int() == 1 and super().check(context, **found)

    def attributes(self, node: ir.Node) -> dict[str, Any]:
        """Returns the last axis."""
        return {"axis": 3}


class ResizeLast(ElementwiseLast):
    """A picture enlarged by repeating pixels -> channels last.

    In this mode the provider's kernel scales any axes: `Upsample::BaseCompute` in onnxruntime/core/providers/
    cuda/tensor/upsample.cc.
    """

    def __init__(self) -> None:
        super().__init__("Resize", 3)

    def check(self, context: Any, **found: Any) -> bool:
        """Requires that scales are given, of all axes, and that pixels are repeated."""
        node = found["result"].producer()
        x, _, scales = node.inputs if len(node.inputs) == 3 else (None, None, None)
        factors = constant(scales)
        return (
            node.attributes.get_string("mode", "nearest") == "nearest"
            and "axes" not in node.attributes
            and x is not None
            and is_to_first(x.producer())
            and factors is not None
            and len(factors) == 4
        )

    def rewrite(self, op: Any, result: Any, **found: Any) -> Any:
        """Resize between the layouts."""
        node = result.producer()
        factors = constant(node.inputs[2])
        assert factors is not None
        scales = op.Constant(value_floats=[float(factors[axis]) for axis in TO_LAST])
        picture = op.Resize(channels_last(op, node.inputs[0]), None, scales, **node.attributes)
        return channels_first(op, describe(picture, result, last(dimensions(result))))


class VectorPicture(PatternRule):
    """(N, C) -> (N, C, 1, 1), then channels last -> (N, 1, 1, C) at once."""

    name = "vectors as pictures"

    def pattern(self, op: Any, x: Any, axes: Any) -> Any:
        """Returns the form in which an embedding is added to a picture."""
        return op.Transpose(op.Unsqueeze(x, axes), perm=[0, 2, 3, 1])

    def check(self, context: Any, **found: Any) -> bool:
        """Requires new axes after the channels."""
        return _axes(found["x"]) == 2 and shape_items(found["axes"]) == (2, 3)

    def rewrite(self, op: Any, x: Any, **found: Any) -> Any:
        """New axes before the channels."""
        return op.Unsqueeze(x, op.Constant(value_ints=[1, 2]))


class FlattenedPicture(PatternRule):
    """Channels first, (N, C, H W), then (N, H W, C) -> (N, H W, C) at once."""

    name = "pictures as tokens"

    def pattern(self, op: Any, x: Any) -> Any:
        """From a picture with channels last to tokens, by way of channels first."""
        first = op.Transpose(x, perm=[0, 3, 1, 2])
        return op.Transpose(op.Reshape(first, ANY_VALUE, _outputs=["flat"]), perm=[0, 2, 1])

    def check(self, context: Any, **found: Any) -> bool:
        """Requires that the picture's axes become one."""
        source = dimensions(found["x"])
        if source is None or not all(isinstance(size, int) for size in source[1:]):
            return False
        batch, height, width, channels = source
        return reshape_result(found["flat"]) == (batch, channels, math.prod((height, width)))  # type: ignore[arg-type]

    def rewrite(self, op: Any, x: Any, **found: Any) -> Any:
        """Returns one Reshape."""
        _, height, width, channels = dimensions(x) or ()
        return op.Reshape(x, op.Constant(value_ints=[0, height * width, channels]))  # type: ignore[operator]


class UnflattenedPicture(PatternRule):
    """(N, H W, C) -> (N, C, H W) -> (N, C, H, W) -> channels last first, so that it can move on."""

    name = "tokens as pictures"

    def pattern(self, op: Any, x: Any) -> Any:
        """From tokens to a picture with channels first."""
        return op.Reshape(op.Transpose(x, perm=[0, 2, 1]), ANY_VALUE, _outputs=["result"])

    def check(self, context: Any, **found: Any) -> bool:
        """Requires that one axis becomes the picture's."""
        source, result = dimensions(found["x"]), reshape_result(found["result"])
        if source is None or result is None or len(result) != 4 or len(source) != 3:
            return False
        return result[:2] == (source[0], source[2]) and all(isinstance(size, int) for size in result[2:])

    def rewrite(self, op: Any, x: Any, result: Any) -> Any:
        """Returns a Reshape, then channels first."""
        batch, channels, height, width = reshape_result(result) or ()
        picture = op.Reshape(x, op.Constant(value_ints=[0, height, width, channels]))
        return channels_first(op, describe(picture, x, (batch, height, width, channels)))


def transpose_rules() -> list[Rule]:
    """Returns all rules of this module."""
    elementwise = {"Add": 2, "Mul": 2, "Cast": 1, "Sigmoid": 1, "Round": 1, "Clip": 3}
    return [
        TransposePair(),
        *(ElementwiseLast(kind, inputs) for kind, inputs in elementwise.items()),
        ConcatLast(),
        ResizeLast(),
        VectorPicture(),
        FlattenedPicture(),
        UnflattenedPicture(),
    ]


def _axes(value: ir.Value | None) -> int | None:
    shape = None if value is None else value.shape
    return None if shape is None else len(shape)


def _is_number(value: ir.Value | None) -> bool:
    shape = None if value is None else dimensions(value)
    return (
        shape is not None
        and math.prod(size for size in shape if isinstance(size, int)) == 1
        and len(shape) < 2
    )
