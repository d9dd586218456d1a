"""Selects the precision of training, from the recipe and the device."""

from __future__ import annotations

import torch
from accelerate import Accelerator


def has_bf16(device: torch.device) -> bool:
    """Returns whether the device computes in bfloat16, instead of only storing it: AMX, AVX512-BF16, or a
    card."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and (
        torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    )


def allow_tf32(allowed: bool) -> None:
    """Says whether a card may round what it multiplies in fp32 to TF32's 10 bits.

    PyTorch lets convolutions do so, and products of matrices not, unless it is told.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def describe_precision(accelerator: Accelerator) -> str:
    """Says where and in what precision a stage learns."""
    device, precision = accelerator.device, accelerator.mixed_precision
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, {'fp32' if precision == 'no' else precision}"
