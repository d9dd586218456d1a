"""What all tests share: seeded checkpoints and the bundles built from them, made once and kept in build/."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.shared import lock, shared_folder

ROOT = Path(__file__).parents[1]

TINY_RESOLUTION = 64

# no test depends on how busy the machine is
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


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
    return _bundle("tiny", TINY_RESOLUTION, "fp16")


@pytest.fixture(scope="session")
def tiny_cuda_bundle() -> Path:
    """The same in the operators of ONNX Runtime's CUDA provider; do not write into it."""
    return _bundle("tiny", TINY_RESOLUTION, "fp16", ("cuda",))


@pytest.fixture(scope="session")
def tiny_plan_bundle(tiny_half_bundle: Path) -> Path:
    """Its plans of TensorRT for RTX; do not write into them."""
    return _plans(tiny_half_bundle)


@pytest.fixture(scope="session")
def small_checkpoint() -> Path:
    """The checkpoint that the golden cases were recorded with."""
    return _checkpoint("small")


@pytest.fixture(scope="session")
def small_bundle() -> Path:
    """A bundle of it for 512 px; do not write into it."""
    return _bundle("small", 512)


@pytest.fixture(scope="session")
def small_plan_bundle(small_bundle: Path) -> Path:
    """Its plans of TensorRT for RTX, in FP32 like the bundle; do not write into them."""
    return _plans(small_bundle)


@pytest.fixture(autouse=True, scope="session")
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is kept from one start to the next stays out of the user's home."""
    os.environ["ANYDOOR_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    """Parallel test processes share the cores."""
    os.environ.setdefault("OMP_NUM_THREADS", "2")
