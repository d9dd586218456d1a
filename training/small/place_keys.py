"""Starts the cross-attention of a small model with keys that tell the places of ID tokens.

A head that is guided to a place (see `training.small.attention_guide`) has to tell neighbouring tokens apart.
Learned from nothing, keys do so late: after 288,000 samples, heads of an example model still averaged over
three tokens. Yet the places can be read off the tokens by a linear function, because the ID encoder starts
with them (`training.systems.identity.start_with_pixels`). It is fitted here, and guided heads start with it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

PERIODS = (2.0, 1.0, 0.5, 0.25)
"""Of the waves that tell a place, in sides of the reference: those that the ID encoder starts with, but for
the slowest."""

KEY_GAIN = 4.0
"""Amplitude of the waves in a key: queries of about unit variance then look at about one token."""

_RIDGE = 1e-2
"""Weight of the squared coefficients, per reference."""


def place_codes(side: int) -> Tensor:
    """Computes the waves at the places of a reference's tokens, (side * side, 16), -1..1."""
    places = torch.cartesian_prod(*2 * [(torch.arange(side) + 0.5) / side])
    angles = (places[:, None] * (2 * torch.pi / torch.tensor(PERIODS))[:, None]).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], 1)


def place_reader(tokens: Tensor) -> Tensor:
    """Fits a linear function from tokens to `place_codes`, but for a constant: least squares.

    Args:
        tokens: (N, T, D), the patch tokens of N references.

    Returns:
        Weights (16, D).
    """
    side = round(tokens.shape[1] ** 0.5)
    inputs = tokens.flatten(0, 1).double()
    codes = place_codes(side).double().repeat(len(tokens), 1)
    inputs, codes = inputs - inputs.mean(0), codes - codes.mean(0)
    ridge = _RIDGE * len(tokens) * torch.eye(inputs.shape[1], dtype=inputs.dtype)
    reader: Tensor = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ codes)
    return reader.T.float()


@torch.no_grad()
def start_with_places(layers: Iterable[Attention], tokens: Tensor, heads: int) -> None:
    """Puts the places of tokens into the keys of the first heads of some cross-attention.

    A constant in all keys of a head does not change where it looks, so the keys need none.

    Args:
        layers: are changed; a head with fewer than 16 channels gets as many waves as it has channels.
        tokens: (N, T, D), the patch tokens of references, as the layers get them.
        heads: how many of each layer.
    """
    reader = KEY_GAIN * place_reader(tokens)
    for layer in layers:
        keys = layer.to_k.weight.unflatten(0, (layer.heads, -1))
        count = min(keys.shape[1], len(reader))
        keys[:heads, :count] = reader[:count]
