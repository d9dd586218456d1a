"""Group normalisation, with SiLU where it follows -> com.microsoft.GroupNorm."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import ANY_VALUE

from export.rewrite.layout import channels_first, channels_last, is_to_first, last
from export.rewrite.rule import MICROSOFT, PatternRule
from export.rewrite.values import (
    constant,
    describe,
    dimensions,
    reshape_result,
    reshaped,
    shape_items,
)
from export.rewrite.weights import derived_weight

_LARGEST_GROUP = 512

_FLOAT, _HALF = int(ir.DataType.FLOAT), int(ir.DataType.FLOAT16)


class GroupNorm(PatternRule):
    """Group normalisation, which is exported as InstanceNormalization of one channel a group -> GroupNorm.

    The kernel reads (N, H, W, C), takes float32 scale and shift of C numbers, and sums in float32 whatever it
    reads, so an FP16 graph needs no Cast around it. It takes an even number of channels a group, at most 512.
    Its variance is the mean of the squares less the square of the mean, in float32. It adds with atomic
    operations, so the last bits differ from run to run.

    Sources: GroupNorm in ONNX Runtime's docs/ContribOperators.md; `GroupNorm::ComputeInternal` in
    onnxruntime/contrib_ops/cuda/diffusion/group_norm.cc, `LaunchGroupNormKernel` in group_norm_impl.cu and
    `GetChannelsPerBlock` in group_norm_common_base.cc.
    """

    name = "GroupNorm"

    def __init__(self, half: bool, flat: bool) -> None:
        """Makes the rule for one form of the pattern.

        Args:
            half: between a Cast to float32 and one back.
            flat: of (N, C, H W) data that a Reshape makes of a picture, as in the VAE's attention.
        """
        super().__init__()
        self._half = half
        self._flat = flat

    def pattern(
        self, op: Any, x: Any, flat_shape: Any, ones: Any, zeros: Any, shape: Any, gamma: Any, beta: Any
    ) -> Any:
        """InstanceNormalization of (N, G, C/G H W) with scale 1 and shift 0, then gamma x + beta."""
        data = op.Reshape(x, flat_shape) if self._flat else x
        data = op.Cast(data, to=_FLOAT) if self._half else data
        groups = op.Reshape(data, ANY_VALUE, _outputs=["groups"])
        normalised = op.InstanceNormalization(groups, ones, zeros, _outputs=["normalised"])
        result = op.Add(op.Mul(op.Reshape(normalised, shape), gamma), beta)
        return op.Cast(result, to=_HALF) if self._half else result

    def check(self, context: Any, **found: Any) -> bool:
        """Requires groups of neighbouring channels, and sizes that the kernel takes."""
        source = dimensions(found["x"])
        if source is None or len(source) != 4 or not all(isinstance(size, int) for size in source[1:]):
            return False
        data = reshaped(source, shape_items(found["flat_shape"])) if self._flat else source
        ones, zeros = constant(found["ones"]), constant(found["zeros"])
        if data is None or data[:2] != source[:2] or ones is None or zeros is None:
            return False
        if not np.all(ones == 1) or not np.all(zeros == 0):
            return False
        channels, groups = int(source[1]), len(ones)
        if (reshape_result(found["groups"]) or ())[:2] != (source[0], groups) or channels % groups:
            return False
        per_channel = (channels, *(1 for _ in data[2:]))
        affine = [found["gamma"], found["beta"]]
        if shape_items(found["shape"]) != data or any(dimensions(value) != per_channel for value in affine):
            return False
        if any(value.const_value is None for value in affine):
            return False
        reason = self.refusal(int(channels) // groups)
        return not reason or self.keep(found["normalised"].producer(), reason)

    def refusal(self, per_group: int) -> str:
        """Why the kernel does not take groups of so many channels; empty if it does."""
        if per_group % 2:
            return f"groups of {per_group} channels are odd"
        return (
            f"groups of {per_group} channels are larger than {_LARGEST_GROUP}"
            if per_group > _LARGEST_GROUP
            else ""
        )

    def rewrite(self, op: Any, x: Any, gamma: Any, beta: Any, **found: Any) -> Any:
        """GroupNorm of the picture with channels last."""
        channels = (gamma.const_value.size,)
        scale = derived_weight(op, gamma, "gamma", np.ravel, channels, ir.DataType.FLOAT)
        shift = derived_weight(op, beta, "beta", np.ravel, channels, ir.DataType.FLOAT)
        result = op.GroupNorm(
            channels_last(op, x),
            scale,
            shift,
            groups=found["ones"].const_value.size,
            epsilon=_epsilon(found["normalised"]),
            activation=0,
            channels_last=1,
            _domain=MICROSOFT,
            _version=1,
        )
        picture = channels_first(op, describe(result, x, last(dimensions(x))))
        return op.Reshape(picture, found["flat_shape"]) if self._flat else picture


class DeterministicGroupNorm(GroupNorm):
    """Group normalisation in plain operators with channels last, of which the same input has the same bits.

    (N, H W, G, C/G), of which mean and variance are taken with ReduceMean. With `use_deterministic_compute`,
    which the engine sets, the provider computes that with cuDNN and not with its own kernels, whose atomic
    operations add in no fixed order. All of it is in float32.

    Source: `ReduceKernel::ComputeImpl` in onnxruntime/core/providers/cuda/reduction/reduction_ops.cc.
    """

    name = "deterministic group normalisation"

    def refusal(self, per_group: int) -> str:
        """Empty: there is no limit."""
        return ""

    def rewrite(self, op: Any, x: Any, gamma: Any, beta: Any, **found: Any) -> Any:
        """(x - mean) * (gamma / sqrt(variance + epsilon)) + beta."""
        shape = last(dimensions(x)) or ()
        channels, groups = int(shape[3]), found["ones"].const_value.size
        per_channel = (1, 1, groups, channels // groups)
        scale, shift = (
            derived_weight(op, of, "groups", lambda a: a.reshape(per_channel), per_channel, ir.DataType.FLOAT)
            for of in (gamma, beta)
        )
        picture = channels_last(op, x)
        data = op.Cast(picture, to=_FLOAT) if self._half else picture
        data = op.Reshape(data, op.Constant(value_ints=[0, -1, *per_channel[2:]]))
        axes = op.Constant(value_ints=[1, 3])
        centred = op.Sub(data, op.ReduceMean(data, axes, keepdims=1))
        variance = op.ReduceMean(op.Mul(centred, centred), axes, keepdims=1)
        epsilon = op.Constant(value_float=_epsilon(found["normalised"]))
        factor = op.Div(scale, op.Sqrt(op.Add(variance, epsilon)))
        result = op.Add(op.Mul(centred, factor), shift)
        result = op.Reshape(result, op.Constant(value_ints=[0, *shape[1:]]))
        result = op.Cast(result, to=_HALF) if self._half else result
        picture = channels_first(op, describe(result, x, shape))
        return op.Reshape(picture, found["flat_shape"]) if self._flat else picture


class GroupNormSiLU(PatternRule):
    """GroupNorm, then x Sigmoid(x) -> GroupNorm with its activation, which computes in float32.

    Source: `activation` of GroupNorm in ONNX Runtime's docs/ContribOperators.md.
    """

    name = "GroupNorm with SiLU"

    def pattern(self, op: Any, x: Any, gamma: Any, beta: Any) -> Any:
        """SiLU of the normalised picture, channels first."""
        normalised = op.GroupNorm(x, gamma, beta, activation=0, _domain=MICROSOFT, _outputs=["normalised"])
        picture = op.Transpose(normalised, perm=[0, 3, 1, 2], _outputs=["picture"])
        return op.Mul(picture, op.Sigmoid(picture))

    def rewrite(self, op: Any, x: Any, gamma: Any, beta: Any, **found: Any) -> Any:
        """GroupNorm with activation."""
        attributes = {**found["normalised"].producer().attributes, "activation": 1}
        result = op.GroupNorm(x, gamma, beta, **attributes, _domain=MICROSOFT, _version=1)
        return channels_first(op, describe(result, x, dimensions(x)))


def _epsilon(normalised: ir.Value) -> float:
    node = normalised.producer()
    assert node is not None
    return node.attributes.get_float("epsilon", 1e-5) or 0.0


def single_channel_groups(node: ir.Node) -> str | None:
    """Why an InstanceNormalization stays that is not between two Reshapes: its groups have one channel."""
    grouped = node.inputs[0]
    reshape = None if grouped is None else grouped.producer()
    if grouped is None or reshape is None or reshape.op_type != "Reshape":
        return None
    source, groups = dimensions(reshape.inputs[0]), reshape_result(grouped)
    single = source is not None and groups is not None and source[:2] == groups[:2]
    return "groups of 1 channels are odd" if single else None


def silu_after_group_norm(node: ir.Node) -> bool:
    """Returns whether a node is the Sigmoid of what a GroupNorm without activation returns."""
    if node.op_type != "Sigmoid" or node.inputs[0] is None:
        return False
    transpose = node.inputs[0].producer()
    norm = (
        transpose.inputs[0].producer()
        if transpose and is_to_first(transpose) and transpose.inputs[0]
        else None
    )
    return norm is not None and norm.op_type == "GroupNorm"
