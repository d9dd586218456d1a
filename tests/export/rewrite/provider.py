"""The operators that ONNX Runtime adds to ONNX, written from their documentation, limits included.

Sources: onnxruntime's docs/ContribOperators.md, and for what the CUDA kernels refuse their source in
onnxruntime/contrib_ops/cuda. All compute in float32 and round once, like the kernels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx.reference.op_run import OpRun

Array = NDArray[Any]

DOMAIN = "com.microsoft"


class LimitError(ValueError):
    """The kernel does not take these arguments."""


def require(condition: bool, what: str) -> None:
    if not condition:
        raise LimitError(what)


class MultiHeadAttention(OpRun):  # type: ignore[misc]
    """contrib_ops/cuda/bert/multihead_attention.cc with flash attention (flash_attention/flash_api.cc)."""

    op_domain = DOMAIN
    largest_head: int | None = 256
    head_multiple = 8

    def _run(  # type: ignore[override]
        self,
        query: Array,
        key: Array,
        value: Array,
        num_heads: int,
        scale: float,
        unidirectional: int | None = None,
    ) -> tuple[Array]:
        batch, length, channels = query.shape
        width = channels // num_heads
        require(query.dtype == key.dtype == value.dtype, "one dtype")
        require(key.shape == value.shape and key.shape[::2] == (batch, channels), "keys like queries")
        require(channels == num_heads * width, "heads divide the channels")
        require(width % self.head_multiple == 0, f"a head width that is a multiple of {self.head_multiple}")
        require(self.largest_head is None or width <= self.largest_head, f"heads up to {self.largest_head}")
        heads = [
            tensor.astype(np.float32).reshape(batch, -1, num_heads, width).swapaxes(1, 2)
            for tensor in (query, key, value)
        ]
        scores = heads[0] @ heads[1].swapaxes(2, 3) * np.float32(scale or width**-0.5)
        if unidirectional:
            require(scores.shape[2] == scores.shape[3], "as many keys as queries")
            scores = np.where(np.tri(*scores.shape[2:], dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        result = weights / weights.sum(-1, keepdims=True) @ heads[2]
        return (result.swapaxes(1, 2).reshape(batch, length, channels).astype(query.dtype),)


def _group_norm(
    x: Array,
    gamma: Array,
    beta: Array,
    activation: int,
    channels_last: int | None,
    epsilon: float | None,
    groups: int,
) -> Array:
    require(channels_last in (None, 1), "channels last")
    require(x.ndim == 4, "four axes")
    require(gamma.dtype == beta.dtype == np.float32, "float32 scale and shift")
    channels = x.shape[3]
    require(gamma.shape == beta.shape == (channels,), "a scale and a shift per channel")
    require(channels % groups == 0, "groups that divide the channels")
    require(channels // groups % 2 == 0, "an even number of channels per group")
    require(channels // groups <= 512, "at most 512 channels per group")
    data = x.astype(np.float32).reshape(*x.shape[:3], groups, -1)
    mean = data.mean((1, 2, 4), keepdims=True)
    variance = data.var((1, 2, 4), keepdims=True)
    result = ((data - mean) / np.sqrt(variance + (epsilon or 1e-5))).reshape(x.shape) * gamma + beta
    if activation:
        result = result / (1 + np.exp(-result))
    return result.astype(x.dtype)


class GroupNorm(OpRun):  # type: ignore[misc]
    """contrib_ops/cuda/diffusion/group_norm.cc and group_norm_impl.cu."""

    op_domain = DOMAIN

    def _run(  # type: ignore[override]
        self,
        x: Array,
        gamma: Array,
        beta: Array,
        activation: int,
        channels_last: int | None,
        epsilon: float | None,
        groups: int,
    ) -> tuple[Array]:
        return (_group_norm(x, gamma, beta, activation, channels_last, epsilon, groups),)


class SkipGroupNorm(OpRun):  # type: ignore[misc]
    """contrib_ops/cuda/diffusion/group_norm.cc: the sum is rounded before it is normalised."""

    op_domain = DOMAIN

    def _run(  # type: ignore[override]
        self,
        x: Array,
        gamma: Array,
        beta: Array,
        skip: Array,
        bias: Array | None = None,
        activation: int = 0,
        channels_last: int | None = None,
        epsilon: float | None = None,
        groups: int = 1,
    ) -> tuple[Array, Array]:
        pixel = (x.shape[0], 1, 1, x.shape[3])
        require(skip.shape in (x.shape, pixel, pixel[::3]), "a skip of the picture's shape, or of one pixel")
        require(bias is None or bias.shape == x.shape[3:], "a bias per channel")
        require(x.dtype == skip.dtype and (bias is None or bias.dtype == x.dtype), "one dtype")
        total = x if bias is None else x + bias
        total = total + skip.reshape(skip.shape if skip.ndim == 4 else pixel)
        normalised = _group_norm(total, gamma, beta, activation, channels_last, epsilon, groups)
        return normalised, total


class NhwcConv(OpRun):  # type: ignore[misc]
    """contrib_ops/cuda/diffusion/nhwc_conv.cc: Conv with channels last in data and weights."""

    op_domain = DOMAIN

    def _run(  # type: ignore[override]
        self,
        x: Array,
        weights: Array,
        bias: Array | None = None,
        auto_pad: str | None = None,
        dilations: list[int] | None = None,
        group: int | None = None,
        kernel_shape: list[int] | None = None,
        pads: list[int] | None = None,
        strides: list[int] | None = None,
    ) -> tuple[Array]:
        require(x.ndim == weights.ndim == 4, "pictures")
        require(auto_pad in (None, "NOTSET"), "explicit padding")
        outputs, height, width, per_group = weights.shape
        groups = group or 1
        require(x.shape[3] == per_group * groups, "weights that fit the channels")
        require(kernel_shape in (None, [height, width]), "weights of the kernel's shape")
        top, left, bottom, right = pads or (0, 0, 0, 0)
        down, across = strides or (1, 1)
        step_down, step_across = dilations or (1, 1)
        data = np.pad(x.astype(np.float32), ((0, 0), (top, bottom), (left, right), (0, 0)))
        rows = (data.shape[1] - step_down * (height - 1) - 1) // down + 1
        columns = (data.shape[2] - step_across * (width - 1) - 1) // across + 1
        result = np.zeros((x.shape[0], rows, columns, groups, outputs // groups), np.float32)
        filters = weights.astype(np.float32).reshape(groups, outputs // groups, height, width, per_group)
        for i, j in np.ndindex(height, width):
            seen = data[:, i * step_down :: down, j * step_across :: across][:, :rows, :columns]
            parts = seen.reshape(*seen.shape[:3], groups, per_group)
            result += np.einsum("nhwgc,gmc->nhwgm", parts, filters[:, :, i, j], optimize=True)
        result = result.reshape(*result.shape[:3], outputs)
        return ((result if bias is None else result + bias.astype(np.float32)).astype(x.dtype),)


class BiasSplitGelu(OpRun):  # type: ignore[misc]
    """contrib_ops/cuda/diffusion/bias_split_gelu.cc."""

    op_domain = DOMAIN

    def _run(self, x: Array, bias: Array) -> tuple[Array]:  # type: ignore[override]
        require(x.ndim == 3, "three axes")
        require(x.shape[2] in (2560, 5120, 10240), "a width of 2560, 5120 or 10240")
        require(bias.shape == x.shape[2:], "a bias per channel")
        left, right = np.split((x + bias).astype(np.float32), 2, axis=2)
        return ((left * right * 0.5 * (1 + _erf(right / np.float32(np.sqrt(2))))).astype(x.dtype),)


class LayerNormalization(OpRun):  # type: ignore[misc]
    """core/providers/cuda/nn/layer_norm_impl.cu: statistics in float32, whatever the data."""

    op_domain = ""

    def _run(  # type: ignore[override]
        self,
        x: Array,
        scale: Array,
        shift: Array,
        axis: int | None = None,
        epsilon: float | None = None,
        stash_type: int | None = None,
    ) -> tuple[Array]:
        require(x.dtype == scale.dtype == shift.dtype, "one dtype")
        require(stash_type in (None, 1), "float32 statistics")
        data = x.astype(np.float32)
        axes = tuple(range((axis if axis is not None else -1) % x.ndim, x.ndim))
        mean, variance = data.mean(axes, keepdims=True), data.var(axes, keepdims=True)
        result = (data - mean) / np.sqrt(variance + (epsilon or 1e-5)) * scale + shift
        return (result.astype(x.dtype),)


class SkipLayerNormalization(OpRun):  # type: ignore[misc]
    """contrib_ops/cuda/bert/skip_layer_norm.cc in strict mode: sums and statistics in float32."""

    op_domain = DOMAIN

    def _run(  # type: ignore[override]
        self,
        x: Array,
        skip: Array,
        gamma: Array,
        beta: Array,
        bias: Array | None = None,
        epsilon: float | None = None,
    ) -> tuple[Array, None, None, Array]:
        require(x.ndim in (2, 3), "two or three axes")
        require(x.shape == skip.shape, "a skip of the same shape")
        weights = [gamma, beta, *([] if bias is None else [bias])]
        require(all(weight.shape == x.shape[-1:] for weight in weights), "a number per channel")
        require(all(array.dtype == x.dtype for array in (skip, *weights)), "one dtype")
        total = x.astype(np.float32) + skip.astype(np.float32) + (0 if bias is None else bias)
        mean, variance = total.mean(-1, keepdims=True), total.var(-1, keepdims=True)
        result = (total - mean) / np.sqrt(variance + epsilon) * gamma + beta
        return result.astype(x.dtype), None, None, total.astype(x.dtype)

    def _check_and_fix_outputs(self, res: tuple[Any, ...]) -> tuple[Any, ...]:
        """As they are: the CUDA kernel does not return the statistics, and the evaluator refuses None."""
        return res


class BiasAdd(OpRun):  # type: ignore[misc]
    """contrib_ops/cuda/diffusion/bias_add.cc."""

    op_domain = DOMAIN

    def _run(self, x: Array, bias: Array, skip: Array) -> tuple[Array]:  # type: ignore[override]
        require(x.ndim == 3, "three axes")
        require(x.shape[2] in (320, 640, 1280), "a width of 320, 640 or 1280")
        require(bias.shape == x.shape[2:], "a bias per channel")
        require(skip.shape == x.shape, "a skip of the same shape")
        return (x + bias + skip,)


_erf = np.vectorize(math.erf, otypes=[np.float32])

OPERATORS = [
    MultiHeadAttention,
    GroupNorm,
    SkipGroupNorm,
    NhwcConv,
    BiasSplitGelu,
    LayerNormalization,
    SkipLayerNormalization,
    BiasAdd,
]
