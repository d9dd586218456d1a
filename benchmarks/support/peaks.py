"""What machines can do at most: published rates, and those of this machine, measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from benchmarks.support.precisions import torch_dtype


@dataclass(frozen=True)
class Peak:
    """The highest rates that a machine can reach."""

    machine: str
    tflops: float
    """10^12 operations of matrix products per second."""
    gbs: float
    """10^9 bytes read or written per second."""
    source: str
    """Where the figures come from, and what they stand for."""
    device: str = "cuda"
    """cpu or cuda; published figures are those of cards, in FP16."""
    precision: str = "fp16"
    """fp32, fp16 or bf16, of the products."""


_DENSE = "dense FP16 on tensor cores"

PUBLISHED = (
    Peak("RTX 4090", 165.2, 1008, f"published: {_DENSE}, FP32 accumulation"),
    Peak(
        "Jetson AGX Orin 64 GB",
        42.5,
        204.8,
        f"published: {_DENSE}; a quarter of the GPU's 170 sparse INT8 TOPS",
    ),
    Peak(
        "Jetson Orin NX 16 GB", 15.0, 102.4, f"published: {_DENSE}; from AGX Orin by cores and clock, 918 MHz"
    ),
    Peak(
        "Jetson Orin Nano 8 GB", 10.0, 68.0, f"published: {_DENSE}; a quarter of 40 sparse INT8 TOPS, 625 MHz"
    ),
    Peak("H200 SXM", 989.5, 4800, f"published: {_DENSE}, FP32 accumulation"),
)
"""Published figures; the Jetsons' are of the GPU alone, at full clock and without the "super" modes."""

_SHEET = f"data sheet: {_DENSE}, FP32 accumulation; half of the figure with sparsity"

CARDS = {
    "NVIDIA H100 80GB HBM3": Peak("H100 SXM", 989.5, 3350, _SHEET),
    "NVIDIA H100 PCIe": Peak("H100 PCIe", 756.5, 2000, _SHEET),
    "NVIDIA H100 NVL": Peak("H100 NVL", 835.5, 3900, _SHEET),
    "NVIDIA H200": Peak("H200 SXM", 989.5, 4800, _SHEET),
    "NVIDIA A100-SXM4-40GB": Peak("A100 SXM 40 GB", 312, 1555, _SHEET),
    "NVIDIA A100-SXM4-80GB": Peak("A100 SXM 80 GB", 312, 2039, _SHEET),
    "NVIDIA A100-PCIE-40GB": Peak("A100 PCIe 40 GB", 312, 1555, _SHEET),
    "NVIDIA A100 80GB PCIe": Peak("A100 PCIe 80 GB", 312, 1935, _SHEET),
    "NVIDIA L40S": Peak("L40S", 362, 864, _SHEET),
    "NVIDIA L4": Peak("L4", 121, 300, _SHEET),
    "NVIDIA GeForce RTX 3090": Peak("RTX 3090", 71, 936, f"GA102 white paper: {_DENSE}, FP32 accumulation"),
    "NVIDIA GeForce RTX 4090": Peak("RTX 4090", 165.2, 1008, f"Ada white paper: {_DENSE}, FP32 accumulation"),
    "NVIDIA GeForce RTX 5090": Peak(
        "RTX 5090", 209.5, 1792, f"Blackwell white paper: {_DENSE}, FP32 accumulation"
    ),
}
"""Name that the driver gives a card -> its published rates."""

_PRODUCT_SIDES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
"""Small ones too: on a busy machine a short product is sometimes undisturbed, a long one never."""
_COPIED_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}
_SECONDS = 1.0

Work = Callable[[], object]


def measure_peak(threads: int, device: str = "cpu", precision: str = "fp32") -> Peak:
    """Measure this machine's rates: the best of many products of large matrices, and of many large copies.

    Args:
        threads: of the copy; those of the product are set by OMP_NUM_THREADS before NumPy is imported.
        device: cpu or cuda.
        precision: of the product, one of `TORCH_DTYPES`; NumPy computes fp32 on the CPU, PyTorch all others.
    """
    by_numpy = device == "cpu" and precision == "fp32"
    moved, sides = _COPIED_BYTES[device], _PRODUCT_SIDES[device]
    products = [
        _numpy_product(side) if by_numpy else _torch_product(side, device, precision) for side in sides
    ]
    copy = _numpy_copy(moved, threads) if device == "cpu" else _torch_copy(moved, device)
    return Peak(
        f"this machine ({device}, {threads} threads)" if device == "cpu" else f"this machine ({device})",
        max(2 * side**3 / _best_seconds(product) for side, product in zip(sides, products)) / 1e12,
        2 * moved / _best_seconds(copy) / 1e9,
        f"measured: {precision} matrix product in {'NumPy' if by_numpy else 'PyTorch'}, and copy",
        device,
        precision,
    )


def _best_seconds(work: Work) -> float:
    best, until = math.inf, time.perf_counter() + _SECONDS
    while (started := time.perf_counter()) < until:
        work()
        best = min(best, time.perf_counter() - started)
    return best


def _numpy_product(side: int) -> Work:
    left, right = np.random.default_rng(0).standard_normal((2, side, side), dtype=np.float32)
    result = np.empty_like(left)
    return lambda: np.matmul(left, right, out=result)


def _numpy_copy(nbytes: int, threads: int) -> Work:
    source = np.ones((threads, nbytes // threads // 4), np.float32)
    target = np.zeros_like(source)
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(lambda part: np.copyto(target[part], source[part]), range(threads)))


def _torch_product(side: int, device: str, precision: str) -> Work:
    import torch

    left, right = torch.randn(2, side, side, device=device).to(torch_dtype(precision))
    return _finished(lambda: left @ right, device)


def _torch_copy(nbytes: int, device: str) -> Work:
    import torch

    source = torch.ones(nbytes // 4, device=device)
    target = torch.zeros_like(source)
    return _finished(lambda: target.copy_(source), device)


def _finished(work: Work, device: str) -> Work:
    import torch

    def run() -> None:
        work()
        if device != "cpu":
            torch.cuda.synchronize()

    return run
