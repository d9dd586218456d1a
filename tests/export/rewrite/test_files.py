"""Rewritten files: weights are shared where they stay the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from engines.bundle import Bundle
from export.example_inputs import example_inputs
from export.rewrite.files import rewrite_file
from export.verification import relative_error
from tests.support.anydoor import CONTROL


def test_attention_needs_no_weights_of_its_own(tiny_bundle: Path) -> None:
    """A variant for the CPU is a small file beside the same weights."""
    bundle = Bundle.open(tiny_bundle)
    plain = bundle.graph_file(CONTROL)
    fused = plain.with_name("control.cpu.onnx")
    try:
        report = rewrite_file(plain, fused, "cpu")
        assert report.after["com.microsoft.MultiHeadAttention"] == report.before["Softmax"] > 0
        assert not fused.with_name(f"{fused.name}.data").exists()
        inputs = example_inputs(bundle.manifest.specs[CONTROL], {"maps": 3})
        for found, expected in zip(*(run(path, inputs) for path in (fused, plain))):
            assert relative_error(found, expected) < 1e-5
    finally:
        fused.unlink(missing_ok=True)


def run(path: Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return list(onnxruntime.InferenceSession(path).run(None, inputs))
