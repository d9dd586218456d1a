"""`anydoor doctor`: what is installed, which backends work, which bundle fits this machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tqdm import tqdm

from engines.backends.onnxruntime import engine as onnxruntime
from engines.backends.openvino import engine as openvino
from engines.backends.tensorrt.engine import SHARE_OF_FREE_MEMORY, check_plans, residency_of
from engines.backends.tensorrt.library import FLAVOURS, load_library
from engines.bundle import MANIFEST, Bundle
from engines.cuda import Card, Device
from engines.engine import open_engine
from engines.errors import AnyDoorError, BackendError
from engines.memory_plan import free_host_memory
from engines.spec import DENOISE, GRAPHS

PACKAGES = {
    "numpy": "required",
    "pillow": "required",
    "openvino": "runs bundles on the CPU, at full size faster: pip install 'anydoor-runtime[openvino]'",
    "onnxruntime": "runs bundles on the CPU: pip install 'anydoor-runtime[cpu]'",
    "onnxruntime-gpu": "runs bundles on an NVIDIA card: pip install 'anydoor-runtime[cuda]'",
    "cuda-python": "runs TensorRT bundles: pip install 'anydoor-runtime[tensorrt]'",
    "torch": "only to build bundles and to train: pip install 'anydoor-runtime[export]'",
}

DEFAULT_BUNDLES = Path("build/engines")


def run_doctor(paths: list[Path], memory_budget: int | None = None) -> int:
    """Prints the findings.

    Args:
        paths: bundles to check; all that are in their usual place if empty.
        memory_budget: bytes of the device's memory; says what of a bundle would live where.

    Returns:
        0 if some device can run a bundle and every bundle named is sound; else 2.
    """
    print(f"anydoor-runtime {version('anydoor-runtime')}, Python {platform.python_version()}")
    print(f"{os.cpu_count()} cores, {_memory_gb():.1f} GB of memory, {free_host_memory() / 1e9:.1f} GB free")
    print("\npackages")
    for package, purpose in PACKAGES.items():
        print(f"  {package:<16} {_version(package):<12} {purpose}")
    print("\ndevices")
    usable = _print_devices()
    named = bool(paths)
    paths = paths or [manifest.parent for manifest in sorted(DEFAULT_BUNDLES.glob(f"*/{MANIFEST}"))]
    print("\nbundles")
    if not paths:
        print(f"  none in {DEFAULT_BUNDLES}; build one with: python export/build_engines.py CHECKPOINT")
    sound = [_print_bundle(path, memory_budget) for path in paths]
    return 0 if usable and (all(sound) or not named) else 2


def _print_devices() -> bool:
    """Whether any device works."""
    found: list[str] = []
    try:
        found = onnxruntime.devices()
        for device in ("cpu", "cuda"):
            state = "available" if device in found else "not in the installed ONNX Runtime"
            print(f"  {device:<12} {state}")
    except AnyDoorError as error:
        print(f"  {'cpu, cuda':<12} {error}")
    found += _print_openvino()
    libraries = [_print_library(backend) for backend in FLAVOURS]
    try:
        card = Device().card()
    except AnyDoorError as error:
        print(f"  {'card':<12} none: {error}")
        return bool(found)
    print(f"  {'card':<12} {_describe(card)}")
    return bool(found) or any(libraries)


def _print_openvino() -> list[str]:
    """The devices that OpenVINO runs on: the CPU, if it is installed."""
    try:
        precisions = openvino.precisions()
    except AnyDoorError as error:
        print(f"  {'openvino':<12} {error}")
        return []
    print(f"  {'openvino':<12} cpu, inference precision {' or '.join(precisions)}")
    return ["cpu"]


def _print_library(backend: str) -> bool:
    """Whether a TensorRT is installed."""
    try:
        library = load_library(backend)
    except AnyDoorError as error:
        print(f"  {backend:<12} {error}")
        return False
    print(f"  {backend:<12} {library.flavour.title} {library.version}")
    return True


def _describe(card: Card) -> str:
    return (
        f"{card.name}, {card.architecture}, {card.total / 1e9:.1f} GB of memory, {card.free / 1e9:.1f} GB "
        f"free, driver for CUDA {card.driver}"
    )


def _check_backend(bundle: Bundle, memory_budget: int | None) -> str:
    """What a bundle would run on, without loading it.

    Raises:
        AnyDoorError: it cannot run here; says why.
    """
    record = bundle.manifest.graphs[DENOISE]
    if record.backend not in FLAVOURS:
        engine = open_engine(bundle, memory_budget=memory_budget)
        for line in engine.describe().splitlines():
            print(f"      {line}")
        residency = getattr(engine, "residency", None)
        if residency and not residency.fits:
            needed, free = residency.total / 1e9, residency.budget / 1e9
            raise BackendError(f"it needs {needed:.1f} GB of memory, and {free:.1f} GB of it are free")
        return f"{engine.device} with {engine.backend}"
    print(f"    plans of {FLAVOURS[record.backend].title} {record.backend_version} for {record.target}")
    library = check_plans(bundle, record.backend)
    if memory_budget is not None:
        _print_residency(bundle, memory_budget)
    card = Device().card()
    library.check_card(bundle, card)
    if memory_budget is None:
        _print_residency(bundle, int(card.free * SHARE_OF_FREE_MEMORY))
    return card.name


def _print_residency(bundle: Bundle, memory_budget: int) -> None:
    for line in residency_of(bundle, memory_budget).table().splitlines():
        print(f"      {line}")


def _print_bundle(path: Path, memory_budget: int | None) -> bool:
    """Whether the bundle is sound and its backend can be used."""
    print(f"  {path}")
    try:
        bundle = Bundle.open(path)
        manifest = bundle.manifest
        size = sum(record.bytes for record in bundle.files())
        resolution = manifest.model.resolution
        print(
            f"    {manifest.precision}, {resolution} px, batch up to {manifest.max_batch}, "
            f"{size / 1e6:.1f} MB, from {manifest.checkpoint['file']}"
        )
        with tqdm(total=size, unit="B", unit_scale=True, desc="    hashing", leave=False) as bar:
            for graph in GRAPHS:
                bundle.verify(graph, bar.update, reread=True)
        bundle.constants()
        device = _check_backend(bundle, memory_budget)
    except AnyDoorError as error:
        print(f"    unusable: {error}")
        return False
    worst = max(max(manifest.graphs[graph].error.values()) for graph in GRAPHS)
    print(f"    sound; largest error against PyTorch {worst:.1e}; runs on {device}")
    return True


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def _memory_gb() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError, OSError):
        return float("nan")
