"""A bundle of format 1, `tests/data/bundle-1`, and one of the same checkpoint in the present format.

The first was made by the builder of format 1. Its checkpoint is not kept: it follows from the network and the
seed below.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.shared import ROOT, lock, shared_folder

OLD_BUNDLE = ROOT / "tests" / "data" / "bundle-1"
"""Do not write into it."""

_RESOLUTION = 64

_HINT_BLOCK_CHANNELS = (4, 4, 8, 8)
"""Narrower than in any other network: the hint block would be larger than the rest together."""


def bundle_of_the_same_checkpoint() -> Path:
    """Builds it once for this version of the code; do not write into it."""
    path = shared_folder() / "format-1-fp32"
    with lock(path.with_suffix(".bundle.lock")):
        if not path.exists():
            _build(path)
    return path


def _build(path: Path) -> None:
    # with PyTorch, whose import takes longer than most tests of what is there
    from benchmarks.seeded import seeded_checkpoint
    from export.build import build_bundle
    from export.options import BuildOptions
    from export.progress import Progress
    from export.systems import open_source
    from training.network import modules
    from training.network.architecture import Architecture

    architecture = Architecture(
        unet_channels=(8, 16),
        unet_attention=(True, False),
        unet_layers=1,
        unet_head_width=4,
        unet_norm_groups=4,
        token_width=8,
        vae_channels=(8, 8, 8, 8),
        vae_layers=1,
        vae_norm_groups=4,
        dino_width=8,
        dino_depth=1,
        dino_heads=2,
        dino_grid=16,
    )
    checkpoint = path.with_name("bundle-1.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules, "HINT_BLOCK_CHANNELS", _HINT_BLOCK_CHANNELS)
        seeded_checkpoint(checkpoint, architecture, seed=0)
        build_bundle(
            open_source(checkpoint), path, BuildOptions(resolution=_RESOLUTION), Progress(quiet=True)
        )
