"""Converts networks to FP16, except for the few places that stay in FP32.

Normalisation sums the squares of thousands of activations: in FP16 the sum overflows long before an
activation does. Everything else stays far inside FP16's range; `benchmarks/precision.py` measures how far.
Outside the networks all is FP32 already: latents, guidance, the DDIM update, the sines of the timestep.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}

BANK_DTYPES = {"fp32": "float32", "fp16": "float16"}
"""Precision -> dtype of banks that a graph computes, the only inputs and outputs not always float32."""

FLOAT32_LAYERS = (nn.GroupNorm, nn.LayerNorm)


class InFloat32(nn.Module):
    """A layer that computes in float32 between neighbours that do not."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.float()

    def forward(self, hidden: Tensor) -> Tensor:
        """As the layer; the result has the dtype of the argument."""
        return self.layer(hidden.float()).to(hidden.dtype)  # type: ignore[no-any-return]


def keep_float32_layers(module: nn.Module) -> None:
    """Puts the layers that need float32 into an `InFloat32`, in place. Weights must be loaded before."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, FLOAT32_LAYERS):
                setattr(parent, name, InFloat32(child))
