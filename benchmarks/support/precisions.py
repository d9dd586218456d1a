"""The words for precisions, as everywhere in the project, and what PyTorch calls them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TORCH_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def torch_dtype(precision: str) -> torch.dtype:
    """Return PyTorch's dtype of a precision, one of `TORCH_DTYPES`."""
    import torch

    found: torch.dtype = getattr(torch, TORCH_DTYPES[precision])
    return found
