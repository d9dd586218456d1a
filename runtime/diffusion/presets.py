"""How much likeness to the exact picture is given for speed: named sets of sampling parameters.

    compositor.composite(scene, placement, sampling=preset("fast"))
    compositor.composite(scene, placement, sampling=preset("balanced", steps=30))

What each costs and gains is measured by benchmarks/quality.py and argued in docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from runtime.errors import InputError
from runtime.request import Sampling

DEFAULT = "exact"

QUALITIES: Mapping[str, Sampling] = {
    "exact": Sampling(),
    "balanced": Sampling(sampler="dpm_solver_2m", steps=20, map_steps=10),
    "fast": Sampling(sampler="dpm_solver_2m", steps=12, guidance_interval=(200, 999), map_steps=4),
}
"""Name -> parameters. "exact" is the original's way and the default."""


def preset(quality: str = DEFAULT, **overrides: Any) -> Sampling:
    """The sampling parameters of a quality, some of them replaced.

    Args:
        quality: one of `QUALITIES`.
        overrides: fields of `Sampling`.

    Raises:
        InputError: there is no such quality.
    """
    if quality not in QUALITIES:
        raise InputError(f"there is no quality '{quality}': choose one of {', '.join(QUALITIES)}")
    return replace(QUALITIES[quality], **overrides)
