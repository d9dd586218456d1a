"""Checkpoints and bundles that are made once and kept in build/ until the code that makes them changes."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from benchmarks.support.fingerprint import CHECKPOINT_SOURCES, fingerprint
from engines.bundle import no_checkpoint, sha256
from engines.errors import AnyDoorError, BundleError
from engines.manifest import MANIFEST, read_manifest
from runtime.progress_bar import ProgressBar

SEEDED = Path("build/latency")
BUNDLES = Path("build/parity")

_SEED = 1


def seeded_checkpoint(name: str) -> Path:
    """Return a checkpoint with seeded weights, made by an earlier call or now: a file or a folder.

    Args:
        name: one of `benchmarks.seeded.ARCHITECTURES`.
    """
    from benchmarks.seeded import ARCHITECTURES
    from benchmarks.seeded import seeded_checkpoint as write
    from training.network.architecture import Architecture

    suffix = ".safetensors" if isinstance(ARCHITECTURES[name], Architecture) else ""
    checkpoint = SEEDED / f"{name}-{fingerprint(CHECKPOINT_SOURCES)}{suffix}"
    if not checkpoint.exists():
        write(checkpoint, ARCHITECTURES[name], _SEED, quiet=False)
    return checkpoint


def seeded_bundle(checkpoint: Path, resolution: int) -> Path:
    """Return a bundle of a seeded checkpoint, made by an earlier call or now.

    Args:
        checkpoint: see `seeded_checkpoint`.
        resolution: side of the pictures that the networks draw, in pixels.
    """
    bundle = checkpoint.with_name(f"{checkpoint.stem}-{fingerprint()}")
    if not bundle.exists():
        started = time.monotonic()
        _build(checkpoint, bundle, "fp32", resolution)
        print(f"built {bundle} in {time.monotonic() - started:.0f} s, once", file=sys.stderr)
    return bundle


def find_or_build(
    checkpoint: Path,
    precision: str = "fp32",
    resolution: int = 512,
    unet_head_width: int | None = None,
    dino_heads: int | None = None,
) -> Path:
    """Return a bundle of any checkpoint, made by an earlier call or now.

    Raises:
        AnyDoorError: the bundle cannot be built.
    """
    if not checkpoint.is_file():
        raise AnyDoorError(no_checkpoint(checkpoint))
    with ProgressBar(
        total=checkpoint.stat().st_size, unit="B", unit_scale=True, desc="hashing the checkpoint", leave=False
    ) as bar:
        digest = sha256(checkpoint, progress=bar.update)
    bundle = BUNDLES / f"{checkpoint.stem}-{digest[:12]}-{precision}-{resolution}-{fingerprint()}"
    try:
        if read_manifest(bundle / MANIFEST).checkpoint["sha256"] == digest:
            print(f"bundle: {bundle} (from an earlier run)", file=sys.stderr)
            return bundle
    except BundleError:
        pass
    _build(checkpoint, bundle, precision, resolution, unet_head_width, dino_heads)
    return bundle


def _build(
    checkpoint: Path,
    bundle: Path,
    precision: str,
    resolution: int,
    unet_head_width: int | None = None,
    dino_heads: int | None = None,
) -> None:
    from export.build import build_bundle
    from export.options import BuildOptions, SourceOptions
    from export.systems import open_source

    options = BuildOptions(precision=precision, resolution=resolution)
    build_bundle(open_source(checkpoint, SourceOptions(unet_head_width, dino_heads)), bundle, options)
