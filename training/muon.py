"""Optimizes weight matrices by Muon, and everything else by AdamW.

Muon (Jordan et al., 2024) orthogonalises the momentum of each matrix, so that all its directions learn at one
rate, the rare ones too. It is for networks that start from nothing, which need fewer samples with it, and for
their hidden layers; the first and last ones, biases and norms are left to AdamW. Updates have the root mean
square of AdamW's, so that one learning rate fits both (Liu et al., 2025, "Muon is Scalable for LLM Training",
section 2.2). PyTorch's own Muon takes matrices only, one after the other; here a convolution counts as the
matrix of its outputs, and matrices of one shape are orthogonalised together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
"""Decay of the momentum, which is Nesterov's."""

UPDATE_RMS = 0.2
"""Root mean square of an update at learning rate 1: about that of AdamW."""

MOMENTUM_STATE = "momentum_buffer"
"""Name of the momentum in a matrix's state; AdamW's states have none."""

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Jordan's polynomial: five rounds take singular values above 0.01 to between 0.7 and 1.2."""
_ROUNDS = 5

_ENDS = ("conv_in", "conv_out", "time_embedding", "embeddings", "enter", "leave")
"""Layers that are not hidden ones, of the networks of diffusers and transformers, and of the segmenter."""


def hidden_matrices(named: Iterable[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
    """Picks the weights of hidden layers, linear ones and convolutions, from named parameters."""
    return [
        weight for name, weight in named if weight.ndim > 1 and not set(_ENDS).intersection(name.split("."))
    ]


def orthogonalise(matrices: Tensor) -> Tensor:
    """Takes the singular values of matrices to about 1, by Newton-Schulz iteration in bfloat16.

    Args:
        matrices: (N, rows, columns).

    Returns:
        As many, float32. A matrix of zeros stays one.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).bfloat16()
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


class MuonAdamW(torch.optim.AdamW):
    """Steps by Muon on some weights, and by AdamW on the others."""

    def __init__(self, params: Any, matrices: Iterable[nn.Parameter], **settings: Any) -> None:
        """Takes AdamW's arguments, and which of the parameters are stepped by Muon."""
        super().__init__(params, **settings)
        self.matrices = set(matrices)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step, and drops the gradients of the matrices."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for weight in group["params"]:
                if weight in self.matrices and weight.grad is not None:
                    shapes.setdefault(weight.shape, []).append(weight)
            for alike in shapes.values():
                self._step_together(alike, group["lr"], group["weight_decay"])
        return super().step(closure)

    def _step_together(self, weights: list[nn.Parameter], rate: float | Tensor, decay: float) -> None:
        """Steps weights of one shape."""
        directions = []
        for weight in weights:
            state, gradient = self.state[weight], weight.grad
            assert gradient is not None
            if not state:
                state[MOMENTUM_STATE] = torch.zeros_like(weight)
                state["step"] = torch.zeros(())  # AdamW looks for it in every state that it loads
            state[MOMENTUM_STATE].lerp_(gradient, 1 - MOMENTUM)
            directions.append(gradient.lerp(state[MOMENTUM_STATE], MOMENTUM).flatten(1))
            weight.grad = None  # AdamW leaves out what has none
        updates = orthogonalise(torch.stack(directions))
        size = UPDATE_RMS * max(updates.shape[1:]) ** 0.5
        for weight, update in zip(weights, updates, strict=True):
            weight.mul_(1 - rate * decay).sub_(update.view_as(weight) * (rate * size))
