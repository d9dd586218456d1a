"""Defines the presets: named sets of sampling parameters that trade likeness to the exact picture for speed.

    compositor.composite(scene, placement, sampling=Sampling(quality="fast"))
    compositor.composite(scene, placement, sampling=Sampling(quality="balanced", steps=30))

`benchmarks/speed_vs_quality.py` measures what each costs and gains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EXACT = "exact"

QUALITIES: Mapping[str, Mapping[str, Any]] = {
    EXACT: {},
    "balanced": {"sampler": "dpm_solver_2m", "steps": 20, "map_steps": 10},
    "fast": {"sampler": "dpm_solver_2m", "steps": 12, "guidance_interval": (200, 999), "map_steps": 4},
}
"""Name -> parameters. "exact" sets nothing: the model is sampled as its authors do it."""
