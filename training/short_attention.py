"""Makes attention in bfloat16 fast on a processor where sequences are short.

PyTorch's fused attention is made for long ones. Its backward pass in bfloat16 is slow on a CPU: a step of the
example model, with 144 cells, is 1.2 times as fast without it. In float32 both are equally fast.
"""

from __future__ import annotations

from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

SHORT = 1024
"""Queries, and as many keys, whose products fit a processor's caches well enough."""


class ShortAttention(AttnProcessor2_0):  # type: ignore[misc]
    """Writes attention out as matrix products where it is short, and is the fused one elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self._written_out = AttnProcessor()

    def __call__(
        self,
        layer: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Computes a layer: (N, cells, C) or (N, C, h, w) -> the same shape.

        Its arguments are those of diffusers' processors, which are given what their signatures name.
        """
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        cells = [x.shape[1] if x.ndim == 3 else x.shape[2] * x.shape[3] for x in (hidden_states, keys)]
        compute = self._written_out if max(cells) <= SHORT else super().__call__
        result: Tensor = compute(layer, hidden_states, encoder_hidden_states, attention_mask, temb)
        return result


def use_short_attention(module: nn.Module) -> None:
    """Has all layers of attention with diffusers' fused processor take `ShortAttention`."""
    for layer in module.modules():
        if isinstance(layer, Attention) and type(layer.processor) is AttnProcessor2_0:
            layer.set_processor(ShortAttention())
