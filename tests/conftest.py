"""What all tests share: seeded checkpoints and the bundles built from them, made once and kept in build/."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from runtime import Compositor
from tests.support.shared import lock, shared_folder, traced_once

ROOT = Path(__file__).parents[1]

TINY_RESOLUTION = 64

# no test depends on how busy the machine is
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# Read when PyTorch is imported. Test processes share the cores, and in networks as small as these, threads
# only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


FIRST = (
    *("benchmarks/test_card.py", "export/test_targets.py", "training/test_train_imprint.py"),
    *("export/test_skeleton.py", "benchmarks/test_parity.py", "training/test_train_card.py"),
    *("export/test_precision.py", "training/test_train.py", "benchmarks/test_latency.py"),
)
"""Files that take long, so that no process is left with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts files; `make test` gives each to one process, which makes what its tests share once."""
    order = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.relative_to(ROOT / "tests").as_posix(), len(FIRST)))


def _checkpoint(name: str) -> Path:
    from benchmarks.seeded import ARCHITECTURES, seeded_checkpoint

    path = shared_folder() / f"{name}.safetensors"
    with lock(path.with_suffix(".lock")):
        if not path.exists():
            seeded_checkpoint(path, ARCHITECTURES[name], seed=0)
    return path


def _bundle(name: str, resolution: int, precision: str = "fp32", targets: tuple[str, ...] = ()) -> Path:
    path = shared_folder() / "-".join((name, precision, *targets))
    with lock(path.with_suffix(".bundle.lock")):
        if not path.exists():
            # with PyTorch, whose import takes longer than most tests of what is there
            from export.build import build_bundle
            from export.options import BuildOptions
            from export.progress import Progress
            from export.systems import open_source

            options = BuildOptions(precision=precision, resolution=resolution, targets=targets)
            build_bundle(open_source(_checkpoint(name)), path, options, Progress(quiet=True))
    return path


def _half_bundles() -> tuple[Path, Path]:
    """The smallest network's bundles in FP16, for any target and for CUDA."""
    with lock(shared_folder() / "halves.lock"), traced_once():
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
def small_modules(tmp_path_factory: pytest.TempPathFactory) -> Compositor:
    """A compositor of the same network whose graphs are PyTorch's modules, as exports take minutes."""
    from export.systems import open_source
    from tests.support.module_engine import module_compositor

    return module_compositor(open_source(_checkpoint("small")), tmp_path_factory.mktemp("small"), (512, 512))


@pytest.fixture(scope="session")
def small_plan_bundle(small_bundle: Path) -> Path:
    """Its plans of TensorRT for RTX; do not write into them."""
    return _plans(small_bundle)


@pytest.fixture(scope="session")
def example_bundle() -> Path:
    """The bundle of the repository; do not write into it."""
    return ROOT / "examples" / "anydoor-small"


@pytest.fixture(scope="session", autouse=True)
def example_checkpoint() -> Path:
    """The checkpoint that it was built from, restored from it if need be; do not write into it.

    Always there, because recipes, documents and the index of another example name its file.
    """
    from benchmarks.support import example

    return example.example_checkpoint()


@pytest.fixture(scope="session")
def segmenter_bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Bundles of tests.support.segmenters: one finds what is bright, the other what is clicked on."""
    from tests.support.segmenters import built

    return built(tmp_path_factory.mktemp("segmenters"))


@pytest.fixture(autouse=True, scope="session")
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is kept from one start to the next stays out of the user's home."""
    os.environ["ANYDOOR_CACHE"] = str(tmp_path_factory.mktemp("cache"))
