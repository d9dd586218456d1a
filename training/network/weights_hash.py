"""Tells weights from others, to notice that something was made with other ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn


def hash_weights(parts: Iterable[nn.Module]) -> str:
    """Computes the SHA-256 of the weights of some parts of a network, with their names and shapes."""
    digest = hashlib.sha256()
    for part in parts:
        for name, tensor in part.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
