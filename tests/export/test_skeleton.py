"""Skeletons: the graphs that a build writes, without weights; and the noise that they are filled with."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from benchmarks.seeded import TINY
from engines.bundle import Bundle
from engines.engine import open_engine
from engines.errors import BundleError
from engines.options import EngineOptions
from export.example_inputs import example_inputs
from export.noise import fill, is_filled
from export.options import CUDA, BuildOptions
from export.precision import TORCH_DTYPES
from export.skeleton import build_skeleton
from export.systems.anydoor import AnyDoorSource
from tests.support.anydoor import CONTROL, DECODE, DENOISE, ID_ENCODER
from training.network.architecture import Architecture

ROOT = Path(__file__).parents[2]

WIDE = Architecture(
    unet_channels=(320, 640),
    unet_attention=(True, False),
    unet_layers=1,
    vae_channels=(128, 256, 512, 512),
    vae_layers=1,
    dino_depth=1,
)
"""As wide as the published network, and shallow."""


@pytest.fixture(scope="module")
def tiny_skeleton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("skeleton") / "tiny"
    source = AnyDoorSource.without_weights(TINY, torch.float32)
    build_skeleton(source, path, BuildOptions(resolution=64))
    return path


def graph(path: Path) -> onnx.GraphProto:
    return onnx.load(path, load_external_data=False).graph


def test_the_graphs_are_those_of_a_build(tiny_skeleton: Path, tiny_bundle: Path) -> None:
    """Same operators in the same order, with weights of the same names and shapes."""
    for path in tiny_skeleton.glob("*.onnx"):
        ours, theirs = graph(path), graph(tiny_bundle / path.name)
        assert [node.op_type for node in ours.node] == [node.op_type for node in theirs.node]
        weights = [{(w.name, *w.dims): w.data_type for w in g.initializer} for g in (ours, theirs)]
        assert weights[0] == weights[1]


def test_weights_are_left_out(tiny_skeleton: Path) -> None:
    assert not is_filled(tiny_skeleton)
    assert not list(tiny_skeleton.glob("*.data"))
    assert sum(file.stat().st_size for file in tiny_skeleton.iterdir()) < 500_000


def test_constants_are_kept(tiny_skeleton: Path, tiny_bundle: Path) -> None:
    """What is no weight has its value: shapes, scales, the frequencies of the time embedding."""
    for path in tiny_skeleton.glob("*.onnx"):
        stored = {w.name: w for w in graph(path).initializer}
        for weight in onnx.load(tiny_bundle / path.name).graph.initializer:
            ours = stored[weight.name]
            if ours.data_location != onnx.TensorProto.EXTERNAL:
                np.testing.assert_array_equal(
                    onnx.numpy_helper.to_array(ours), onnx.numpy_helper.to_array(weight)
                )


def test_a_filled_skeleton_runs_on_numbers_of_an_ordinary_size(tiny_skeleton: Path) -> None:
    fill(tiny_skeleton)
    bundle = Bundle.open(tiny_skeleton)
    engine = open_engine(bundle, EngineOptions(backend="onnxruntime", device="cpu"))
    for spec in bundle.manifest.specs.values():
        inputs = example_inputs(spec, bundle.manifest.typical_sizes)
        if "guidance_scale" in inputs:
            inputs["guidance_scale"][:] = 5
        for name, tensor in engine.run(spec.name, inputs).items():
            values = engine.to_host(tensor).astype(np.float64)
            assert 1e-3 < values.std() < 300, (spec.name, name)


def test_noise_depends_on_the_seed_alone(tiny_skeleton: Path) -> None:
    hashes = [[record.sha256 for record in fill_and_open(tiny_skeleton, seed).files()] for seed in (1, 1, 2)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_filling_needs_no_onnx_and_no_pytorch(tiny_skeleton: Path) -> None:
    code = (
        "import sys; sys.modules |= dict.fromkeys(('torch', 'onnx', 'onnx_ir', 'onnxscript', 'tqdm'));"
        "from pathlib import Path; from export.noise import fill; fill(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_skeleton)], check=True, cwd=ROOT)
    assert is_filled(tiny_skeleton)


def test_only_skeletons_are_filled(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"is no skeleton: its noise\.json is missing"):
        fill(tiny_bundle)


def fill_and_open(path: Path, seed: int) -> Bundle:
    fill(path, seed)
    return Bundle.open(path)


def cuda_operators(architecture: Architecture, precision: str, path: Path) -> dict[str, Counter[str]]:
    """Graph -> its operators in a bundle for ONNX Runtime's CUDA provider."""
    source = AnyDoorSource.without_weights(architecture, TORCH_DTYPES[precision])
    manifest = build_skeleton(source, path, BuildOptions(precision=precision, targets=(CUDA,)))
    assert manifest.target == CUDA
    return {
        name: Counter(node.op_type for node in graph(path / f"{name}.onnx").node) for name in manifest.graphs
    }


def assert_no_pattern_is_left(counts: dict[str, Counter[str]]) -> None:
    plain = ("Softmax", "InstanceNormalization", "Conv", "Erf", "Split", "IsNaN", "Where")
    for name in (DENOISE, CONTROL, ID_ENCODER):
        assert not any(counts[name][kind] for kind in plain), name
    # one head of 512 channels
    assert {kind: counts[DECODE][kind] for kind in plain if counts[DECODE][kind]} == {"Softmax": 1}


@pytest.mark.nightly
def test_operators_of_the_cuda_provider(tmp_path: Path) -> None:
    """At the widths of the published network every pattern has a kernel."""
    assert_no_pattern_is_left(cuda_operators(WIDE, "fp16", tmp_path / "wide"))


@pytest.mark.nightly
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_operators_of_the_published_network(tmp_path: Path, precision: str) -> None:
    counts = cuda_operators(Architecture(), precision, tmp_path / "full")
    assert_no_pattern_is_left(counts)
    fused = ("MultiHeadAttention", "GroupNorm", "NhwcConv", "BiasSplitGelu", "LayerNormalization")
    assert {name: tuple(counts[name][kind] for kind in fused) for name in counts} == {
        ID_ENCODER: (40, 0, 1, 0, 81),
        CONTROL: (14, 27, 46, 7, 21),
        DENOISE: (32, 61, 66, 16, 48),
        DECODE: (0, 30, 36, 0, 0),
    }
