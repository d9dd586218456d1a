"""A bundle, and what it paints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engines.bundle import Bundle
from tests.support.simulated_engine import Painter, on_onnxruntime


@pytest.fixture(scope="package")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="package")
def expected_pictures(bundle: Bundle) -> np.ndarray:
    """What ONNX Runtime paints on the CPU."""
    pictures = Painter(bundle, on_onnxruntime(bundle)).paint()
    assert len(np.unique(pictures)) > 100
    return pictures
