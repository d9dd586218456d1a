"""What all tests share: seeded checkpoints and the bundles built from them, made once and kept in build/."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support.shared import lock, shared_folder

ROOT = Path(__file__).parents[1]

TINY_RESOLUTION = 64

# no test depends on how busy the machine is
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# Read when PyTorch is imported. Test processes share the cores, and in networks as small as these, threads
# only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lets the first process begin with the benchmarks, which build the smallest bundle, and the next with
    training, which needs none and so does not wait for it."""
    order = {"benchmarks": 0, "training": 1}
    items.sort(key=lambda item: order.get(item.path.relative_to(ROOT / "tests").parts[0], 2))


def _checkpoint(name: str) -> Path:
    from benchmarks.seeded import ARCHITECTURES, seeded_checkpoint

    path = shared_folder() / f"{name}.safetensors"
    with lock(path.with_suffix(".lock")):
        if not path.exists():
            seeded_checkpoint(path, ARCHITECTURES[name], seed=0)
    return path


def _bundle(name: str, resolution: int, precision: str = "fp32", targets: tuple[str, ...] = ()) -> Path:
    from export.build import build_bundle
    from export.options import BuildOptions
    from export.progress import Progress
    from export.systems import open_source

    checkpoint = _checkpoint(name)
    path = checkpoint.parent / "-".join((name, precision, *targets))
    with lock(path.with_suffix(".bundle.lock")):
        if not path.exists():
            options = BuildOptions(precision=precision, resolution=resolution, targets=targets)
            build_bundle(open_source(checkpoint), path, options, Progress(quiet=True))
    return path


@contextmanager
def _traced_once() -> Iterator[None]:
    """Lets bundles of one network in one precision share their graphs, which differ only after they are
    rewritten for a target: tracing them takes most of a build's time."""
    from export import onnx_graph

    traced: dict[str, Any] = {}
    trace = onnx_graph.trace

    def once(module: Any, spec: Any, opset: int) -> Any:
        if spec.name not in traced:
            traced[spec.name] = trace(module, spec, opset)
        program = copy.copy(traced[spec.name])
        program.model = program.model.clone()
        return program

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_graph, "trace", once)
        yield


def _half_bundles() -> tuple[Path, Path]:
    """The smallest network's bundles in FP16, for any target and for CUDA."""
    with lock(shared_folder() / "halves.lock"), _traced_once():
        plain, cuda = (_bundle("tiny", TINY_RESOLUTION, "fp16", targets) for targets in ((), ("cuda",)))
    return plain, cuda


def _plans(bundle: Path) -> Path:
    """Plans of TensorRT for RTX, for three architectures, built on the CPU."""
    pytest.importorskip("tensorrt_rtx", reason="needs pip install '.[tensorrt]'")
    path = bundle.with_name(f"{bundle.name}-plans")
    with lock(path.with_suffix(".bundle.lock")):
        if not path.exists():
            # in a process that cannot import PyTorch: on a Jetson there is none
            code = (
                "import sys; sys.modules |= dict.fromkeys(('torch', 'onnx', 'onnxscript', 'onnxruntime'));"
                "from export.build_engines import main; sys.exit(main(sys.argv[1:]))"
            )
            arguments = [str(bundle), "--output", str(path), "--backend", "tensorrt_rtx"]
            targets = ["--targets", "sm86,sm89,sm120", "--quiet"]
            subprocess.run([sys.executable, "-c", code, *arguments, *targets], check=True, cwd=ROOT)
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    """A checkpoint of the smallest network, seed 0."""
    return _checkpoint("tiny")


@pytest.fixture(scope="session")
def tiny_bundle() -> Path:
    """A bundle of the smallest network for 64 px; do not write into it."""
    return _bundle("tiny", TINY_RESOLUTION)


@pytest.fixture(scope="session")
def tiny_half_bundle() -> Path:
    """The same in FP16; do not write into it."""
    return _half_bundles()[0]


@pytest.fixture(scope="session")
def tiny_cuda_bundle() -> Path:
    """The same in the operators of ONNX Runtime's CUDA provider; do not write into it."""
    return _half_bundles()[1]


@pytest.fixture(scope="session")
def tiny_plan_bundle(tiny_bundle: Path) -> Path:
    """Plans of TensorRT for RTX, in FP32; do not write into them."""
    return _plans(tiny_bundle)


@pytest.fixture(scope="session")
def tiny_half_plan_bundle(tiny_half_bundle: Path) -> Path:
    """The same in FP16; do not write into them."""
    return _plans(tiny_half_bundle)


@pytest.fixture(scope="session")
def tiny_inpainting_plan_bundle() -> Path:
    """Plans of Stable Diffusion with 9 channels, in FP32; do not write into them."""
    from tests.support.stable_diffusion import tiny_stable_diffusion_bundle

    return _plans(tiny_stable_diffusion_bundle(9))


@pytest.fixture(scope="session")
def small_bundle() -> Path:
    """A bundle of the network that the golden cases were recorded with, for 512 px; do not write into it."""
    return _bundle("small", 512)


@pytest.fixture(scope="session")
def small_plan_bundle(small_bundle: Path) -> Path:
    """Its plans of TensorRT for RTX; do not write into them."""
    return _plans(small_bundle)


@pytest.fixture(scope="session")
def example_bundle() -> Path:
    """The bundle of the repository; do not write into it."""
    return ROOT / "examples" / "anydoor-small"


@pytest.fixture(scope="session")
def segmenter_bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Bundles of tests.support.segmenters: one finds what is bright, the other what is clicked on."""
    from tests.support.segmenters import built

    return built(tmp_path_factory.mktemp("segmenters"))


@pytest.fixture(autouse=True, scope="session")
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is kept from one start to the next stays out of the user's home."""
    os.environ["ANYDOOR_CACHE"] = str(tmp_path_factory.mktemp("cache"))
