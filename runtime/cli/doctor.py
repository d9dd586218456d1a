"""Implements `anydoor doctor`: shows packages, working backends, and bundles that fit this machine."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING

from engines.errors import AnyDoorError
from engines.options import EngineOptions
from engines.registry import Backend, backends
from runtime.cli import missing_package
from runtime.cli.flags import add_engine_flags, engine_options
from runtime.version import version as our_version

if TYPE_CHECKING:
    from engines.bundle import Bundle

NAME = "doctor"
HELP = "Show what is installed, which backends work, and which bundles fit this machine"
EXAMPLES = """
anydoor doctor
anydoor doctor build/engines/anydoor
anydoor doctor build/engines/orin --memory-budget 6G
"""

_REQUIRED = ("numpy", "pillow", "tqdm")
_OPTIONAL = {
    "cuda-bindings": "drives NVIDIA cards: pip install '.[cuda]' or '.[tensorrt]'",
    "grpcio": "client: pip install '.[client]'; server: pip install '.[serve]'",
    "torch": "builds bundles and trains: pip install '.[export]' or '.[train]'",
}
_DEFAULT_BUNDLES = Path("build/engines")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument(
        "bundles",
        nargs="*",
        type=Path,
        metavar="BUNDLE",
        help=f"bundles to check (default: all in {_DEFAULT_BUNDLES})",
    )
    parser.add_argument(
        "--trusted-key",
        type=Path,
        metavar="FILE",
        help="PEM file with a public key; bundles must be signed with its private key",
    )
    add_engine_flags(parser.add_argument_group("how to run the bundles"))


def run(options: argparse.Namespace) -> int:
    """Prints the findings.

    Returns:
        0 if some device can run a bundle and every named bundle is valid; else 2.

    Raises:
        AnyDoorError: an option is out of range, or a package that is required is missing.
    """
    engine = engine_options(options)
    print(f"anydoor-runtime {our_version()}, Python {platform.python_version()}, {platform.platform()}")
    print("\npackages")
    _print_packages()
    try:
        from engines.manifest import MANIFEST
        from engines.memory_limit import free_host_memory
    except ModuleNotFoundError as error:
        raise missing_package(error, "cpu") from error
    print("\ndevices")
    print(f"  {'host':<14} {os.cpu_count()} cores, {free_host_memory() / 1e9:.1f} GB of memory free")
    usable = _print_devices()
    named = bool(options.bundles)
    paths = options.bundles or [path.parent for path in sorted(_DEFAULT_BUNDLES.glob(f"*/{MANIFEST}"))]
    print("\nbundles")
    if not paths:
        print(f"  none in {_DEFAULT_BUNDLES}; build one with: anydoor build CHECKPOINT")
    sound = [_print_bundle(path, engine, options.trusted_key) for path in paths]
    return 0 if usable and (all(sound) or not named) else 2


def _print_packages() -> None:
    for package in _REQUIRED:
        print(f"  {package:<16} {_version(package):<12} required")
    for backend in backends().values():
        what = f"runs bundles on {' and '.join(backend.devices)}: {backend.install}"
        print(f"  {backend.package:<16} {backend_versions(backend):<12} {what}")
    for package, purpose in _OPTIONAL.items():
        print(f"  {package:<16} {_version(package):<12} {purpose}")


def backend_versions(backend: Backend) -> str:
    """Returns the versions of a backend's library that are installed, "found" for one without a version, else
    "-".

    Several distributions may bring the same package: one for processors, another for cards.
    """
    names = sorted({name for name in packages_distributions().get(backend.package, []) if name})
    versions = [version(name) if name == backend.package else f"{version(name)} ({name})" for name in names]
    # what was unpacked into a folder of the path has no metadata
    return ", ".join(versions) or ("found" if backend.installed else "-")


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "-"


def _print_devices() -> bool:
    """Prints the devices of each backend; returns whether any works."""
    from engines.cuda import Device
    from engines.engine import load_backend

    found: set[str] = set()
    for name, backend in backends().items():
        try:
            devices = load_backend(name).usable_devices() if backend.installed else {}
        except AnyDoorError as error:
            print(f"  {name:<14} {error}")
            continue
        found |= set(devices)
        remarks = [f"{device} ({remark})" if remark else device for device, remark in devices.items()]
        print(f"  {name:<14} {', '.join(remarks) or 'not installed'}")
    try:
        card = Device().card()
    except AnyDoorError as error:
        print(f"  {'card':<14} none: {error}")
        return bool(found - {"cuda"})
    print(
        f"  {'card':<14} {card.name}, {card.architecture}, {card.total / 1e9:.1f} GB of memory, "
        f"{card.free / 1e9:.1f} GB free, driver for CUDA {card.driver}"
    )
    return bool(found)


def _print_bundle(path: Path, options: EngineOptions, trusted_key: Path | None) -> bool:
    """Prints what a bundle is and how it would run here; returns whether it is sound and can."""
    from engines.bundle import Bundle
    from runtime.progress_bar import ProgressBar

    print(f"  {path}")
    try:
        bundle = Bundle.open(path, trusted_key)
        manifest = bundle.manifest
        size = sum(record.bytes for record in bundle.files())
        print(
            f"    {manifest.system}, {manifest.precision}, {manifest.size_text}, batch up to "
            f"{manifest.max_batch}, {size / 1e6:.1f} MB, from {manifest.checkpoint.get('file', 'unknown')}"
        )
        print(f"    made by {manifest.backend} {manifest.backend_version} for {manifest.target}")
        if manifest.is_segmenter:
            print(f"    wrap: {manifest.architecture.get('wrap', 'unknown')}")
        else:
            defaults = [f"{name} {value}" for name, value in manifest.defaults.items()]
            print(f"    defaults: {', '.join(defaults) or 'those of the system'}")
        with ProgressBar(total=size, unit="B", unit_scale=True, desc="    hashing", leave=False) as bar:
            bundle.verify_all(bar.update)
        runs_on = _print_plan(bundle, options)
    except AnyDoorError as error:
        print(f"    unusable: {error}")
        return False
    errors = [error for record in manifest.graphs.values() for error in record.error.values()]
    worst = f"{max(errors):.1e}" if errors else "not measured"
    signed = f"signed by the owner of {trusted_key}; " if trusted_key else ""
    against = "the network" if manifest.is_segmenter else "PyTorch"
    print(f"    sound; {signed}largest error against {against} {worst}; runs on {runs_on}")
    return True


def _print_plan(bundle: Bundle, options: EngineOptions) -> str:
    """Prints the memory plan; returns the device and the backend that would run the bundle.

    Raises:
        AnyDoorError: nothing can run it here, and why.
    """
    from engines.engine import choose_backend, load_backend
    from engines.memory_plan import plan_device_memory

    name = choose_backend(bundle, options)
    only_cards = options.device == "cuda" or backends()[name].devices == ("cuda",)
    if options.memory_budget is not None and only_cards:
        # a budget is enough to plan a card's memory, also on a machine without a card
        _print_lines(plan_device_memory(bundle.manifest, options.memory_budget).table())
        device, _ = load_backend(name).examine(bundle, options)
    else:
        device, plan = load_backend(name).examine(bundle, options)
        _print_lines(plan)
    return f"{device} with {name}"


def _print_lines(table: str) -> None:
    for line in table.splitlines():
        print(f"      {line}")
