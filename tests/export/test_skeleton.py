"""Skeletons: the graphs that a build writes, without weights; and the noise that they are filled with."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from benchmarks.seeded import TINY
from engines.bundle import Bundle
from engines.engine import open_engine
from engines.errors import BundleError
from engines.manifest import MANIFEST, read_manifest
from engines.options import EngineOptions
from export.example_inputs import example_inputs
from export.noise import fill, is_filled
from export.options import CUDA, BuildOptions
from export.skeleton import build_skeleton
from export.systems import published_source
from export.systems.anydoor import AnyDoorSource
from export.systems.stable_diffusion import ENCODE, TEXT_ENCODER, StableDiffusionSource
from export.systems.system import ExportSource
from runtime import Compositor, Sampling
from tests.support.anydoor import CONTROL, DECODE, DENOISE, ID_ENCODER
from tests.support.stable_diffusion import tiny_stable_diffusion_bundle
from training.network.architecture import Architecture
from training.network.stable_diffusion import StableDiffusionArchitecture

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


WIDE_INPAINTING = StableDiffusionArchitecture(
    unet_channels=(320, 640),
    unet_attention=(True, False),
    unet_layers=1,
    scene_channels=5,
    vae_channels=(128, 256, 512, 512),
    vae_layers=1,
    text_layers=1,
)
"""The same of Stable Diffusion 2 for inpainting."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("stable_diffusion", marks=pytest.mark.slow),
        pytest.param("anydoor", marks=pytest.mark.nightly),
    ],
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Skeleton and bundle of a small network."""
    path = tmp_path_factory.mktemp("skeleton") / request.param
    if request.param == "anydoor":
        bundle = request.getfixturevalue("tiny_bundle")
        source: ExportSource = AnyDoorSource.without_weights(TINY, torch.float32)
    else:
        bundle = tiny_stable_diffusion_bundle(9)
        sizes = read_manifest(bundle / MANIFEST).architecture
        tuples = {name: tuple(size) if isinstance(size, list) else size for name, size in sizes.items()}
        source = StableDiffusionSource.without_weights(StableDiffusionArchitecture(**tuples), torch.float32)
    build_skeleton(source, path, BuildOptions(resolution=64))
    return path, bundle


@pytest.fixture(scope="module")
def skeleton(pair: tuple[Path, Path]) -> Path:
    return pair[0]


def graph(path: Path) -> onnx.GraphProto:
    return onnx.load(path, load_external_data=False).graph


def operators_and_weights(path: Path) -> tuple[list[str], dict[tuple[Any, ...], int]]:
    """Operators in their order; weight's name and shape -> its type."""
    found = graph(path)
    return [node.op_type for node in found.node], {(w.name, *w.dims): w.data_type for w in found.initializer}


def test_the_graphs_are_those_of_a_build(pair: tuple[Path, Path]) -> None:
    """Same operators in the same order, with weights of the same names and shapes."""
    skeleton, bundle = pair
    for path in skeleton.glob("*.onnx"):
        (ours, weights), (theirs, built) = map(operators_and_weights, (path, bundle / path.name))
        assert ours == theirs
        # of an untrained network the exporter merges weights that are alike
        assert built.items() <= weights.items()
        assert read_manifest(bundle / MANIFEST).system == "stable_diffusion" or built == weights


def test_weights_are_left_out(skeleton: Path) -> None:
    assert not is_filled(skeleton)
    assert not list(skeleton.glob("*.data"))
    assert sum(file.stat().st_size for file in skeleton.iterdir()) < 500_000


def test_constants_are_kept(pair: tuple[Path, Path]) -> None:
    """What is no weight has its value: shapes, scales, the frequencies of the time embedding."""
    skeleton, bundle = pair
    for path in skeleton.glob("*.onnx"):
        stored = {w.name: w for w in graph(path).initializer}
        for weight in onnx.load(bundle / path.name).graph.initializer:
            ours = stored[weight.name]
            if ours.data_location != onnx.TensorProto.EXTERNAL:
                np.testing.assert_array_equal(
                    onnx.numpy_helper.to_array(ours), onnx.numpy_helper.to_array(weight)
                )


def test_a_filled_skeleton_runs_on_numbers_of_an_ordinary_size(skeleton: Path) -> None:
    fill(skeleton)
    bundle = Bundle.open(skeleton)
    engine = open_engine(bundle, EngineOptions(backend="onnxruntime", device="cpu"))
    for spec in bundle.manifest.specs.values():
        inputs = example_inputs(spec, bundle.manifest.typical_sizes)
        if "guidance_scale" in inputs:
            inputs["guidance_scale"][:] = 5
        for name, tensor in engine.run(spec.name, inputs).items():
            values = engine.to_host(tensor).astype(np.float64)
            assert 1e-3 < values.std() < 300, (spec.name, name)


def test_a_filled_skeleton_draws_what_a_prompt_says(skeleton: Path) -> None:
    """It has a tokenizer, of as many tokens as the text encoder reads."""
    if read_manifest(skeleton / MANIFEST).tokenizer is None:
        pytest.skip("it is given a picture")
    fill(skeleton)
    compositor = Compositor.load(skeleton, EngineOptions(backend="onnxruntime", device="cpu"))
    pictures = [compositor.draw(prompt, seed=7, sampling=Sampling(steps=2)) for prompt in ("a cat", "snow")]
    assert np.std(pictures[0]) > 1
    assert pictures[0].tobytes() != pictures[1].tobytes()


def test_noise_depends_on_the_seed_alone(skeleton: Path) -> None:
    hashes = [[record.sha256 for record in fill_and_open(skeleton, seed).files()] for seed in (1, 1, 2)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_filling_needs_no_onnx_and_no_pytorch(skeleton: Path) -> None:
    code = (
        "import sys; sys.modules |= dict.fromkeys(('torch', 'onnx', 'onnx_ir', 'onnxscript', 'tqdm'));"
        "from pathlib import Path; from export.noise import fill; fill(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(skeleton)], check=True, cwd=ROOT)
    assert is_filled(skeleton)


def test_only_skeletons_are_filled(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"is no skeleton: its noise\.json is missing"):
        fill(tiny_bundle)


def fill_and_open(path: Path, seed: int) -> Bundle:
    fill(path, seed)
    return Bundle.open(path)


def cuda_operators(source: ExportSource, precision: str, path: Path) -> dict[str, Counter[str]]:
    """Graph -> its operators in a bundle for ONNX Runtime's CUDA provider."""
    manifest = build_skeleton(source, path, BuildOptions(precision=precision, targets=(CUDA,)))
    assert manifest.target == CUDA
    return {
        name: Counter(node.op_type for node in graph(path / f"{name}.onnx").node) for name in manifest.graphs
    }


PLAIN = ("Softmax", "InstanceNormalization", "Conv", "Erf", "IsNaN", "Where", "Trilu")
"""Operators of patterns that have a kernel of their own."""

FUSED = (
    "MultiHeadAttention",
    "NhwcConv",
    "BiasSplitGelu",
    "GroupNorm",
    "SkipGroupNorm",
    "LayerNormalization",
    "SkipLayerNormalization",
    "BiasAdd",
)


def plain_operators(counts: dict[str, Counter[str]]) -> dict[str, dict[str, int]]:
    return {name: {kind: of[kind] for kind in PLAIN if of[kind]} for name, of in counts.items()}


ANYDOOR_PLAIN = {ID_ENCODER: {}, CONTROL: {}, DENOISE: {}, DECODE: {"Softmax": 1}}
"""The decoder's attention has one head of 512 channels."""


def inpainting_plain(layers: int) -> dict[str, dict[str, int]]:
    """The text encoder's GELU is no gate. It runs once per prompt."""
    return {
        TEXT_ENCODER: {"Erf": layers},
        ENCODE: {"Softmax": 1},
        DENOISE: {},
        DECODE: {"Softmax": 1},
    }


@pytest.mark.nightly
def test_operators_of_the_cuda_provider(tmp_path: Path) -> None:
    """At the widths of the published network every pattern has a kernel."""
    source = AnyDoorSource.without_weights(WIDE, torch.float16)
    assert plain_operators(cuda_operators(source, "fp16", tmp_path / "wide")) == ANYDOOR_PLAIN


@pytest.mark.nightly
def test_operators_of_the_cuda_provider_for_stable_diffusion(tmp_path: Path) -> None:
    source = StableDiffusionSource.without_weights(WIDE_INPAINTING, torch.float16)
    assert plain_operators(cuda_operators(source, "fp16", tmp_path / "wide")) == inpainting_plain(1)


@pytest.mark.nightly
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_operators_of_the_published_stable_diffusion(tmp_path: Path, precision: str) -> None:
    source = published_source(precision, "stable_diffusion")
    counts = cuda_operators(source, precision, tmp_path / "full")
    assert plain_operators(counts) == inpainting_plain(23)
    assert {name: tuple(of[kind] for kind in FUSED) for name, of in counts.items()} == {
        TEXT_ENCODER: (23, 0, 0, 0, 0, 1, 46, 0),
        ENCODE: (0, 28, 0, 14, 8, 0, 0, 0),
        DENOISE: (32, 66, 16, 16, 45, 16, 32, 27),
        DECODE: (0, 36, 0, 18, 12, 0, 0, 0),
    }


@pytest.mark.nightly
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_operators_of_the_published_network(tmp_path: Path, precision: str) -> None:
    counts = cuda_operators(published_source(precision), precision, tmp_path / "full")
    assert plain_operators(counts) == ANYDOOR_PLAIN
    assert {name: tuple(of[kind] for kind in FUSED) for name, of in counts.items()} == {
        ID_ENCODER: (40, 1, 0, 0, 0, 1, 80, 0),
        CONTROL: (14, 46, 7, 4, 23, 7, 14, 10),
        DENOISE: (32, 66, 16, 16, 45, 16, 32, 27),
        DECODE: (0, 36, 0, 18, 12, 0, 0, 0),
    }
    # keys and values of three widths, and what three widths take from the embedding of the timestep
    assert {name: of["Split"] for name, of in counts.items()} == {
        ID_ENCODER: 0,
        CONTROL: 4,
        DENOISE: 6,
        DECODE: 0,
    }
