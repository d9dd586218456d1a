"""Weights in half the bytes, and only where not a bit is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from export.onnx_graph import export_onnx
from export.systems.anydoor import GRAPH_MODULES, graph_specs
from export.weights import store_exact_halves
from tests.support.anydoor import ID_ENCODER
from training.network.checkpoint import read_checkpoint


def export_id_encoder(checkpoint: Path, path: Path, round_trip: torch.dtype) -> None:
    """The ID encoder as a float32 graph whose weights went through another dtype."""
    opened = read_checkpoint(checkpoint)
    model = opened.load_part("id_encoder").to(round_trip).float()
    spec = graph_specs(opened.architecture, 64)[ID_ENCODER]
    export_onnx(GRAPH_MODULES[ID_ENCODER](model).eval(), spec, path)


def tokens(path: Path) -> NDArray[np.float32]:
    picture = np.random.default_rng(0).random((1, 3, 224, 224), dtype=np.float32)
    result: NDArray[np.float32] = onnxruntime.InferenceSession(str(path)).run(None, {"reference": picture})[0]
    return result


def size(path: Path) -> int:
    return path.with_name(f"{path.name}.data").stat().st_size


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "id_encoder.onnx"


def test_half_precision_weights_take_half_the_bytes_and_compute_the_same(
    tiny_checkpoint: Path, path: Path
) -> None:
    export_id_encoder(tiny_checkpoint, path, torch.float16)
    bytes_before, tokens_before = size(path), tokens(path)
    store_exact_halves(path)
    # the resampled position embeddings are no halves
    assert size(path) < 0.65 * bytes_before
    np.testing.assert_array_equal(tokens(path), tokens_before)


def test_weights_that_need_all_their_bits_keep_them(tiny_checkpoint: Path, path: Path) -> None:
    export_id_encoder(tiny_checkpoint, path, torch.float32)
    bytes_before, tokens_before = size(path), tokens(path)
    store_exact_halves(path)
    assert size(path) > 0.9 * bytes_before
    np.testing.assert_array_equal(tokens(path), tokens_before)
