"""Defines the interface of a compositing system, which prepares placements for the networks and finishes
their pictures.

Everything else is shared: engines, sampler, batching, server, memory plan, presets. A system is one module in
this folder with a function `create(model) -> System`, one in `export/systems` and one in `training/systems`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engines.bundle import Bundle
from engines.engine import Engine
from engines.errors import BundleError
from runtime.diffusion.ddim import Schedule
from runtime.imaging.boxes import Box
from runtime.imaging.scene import ShareOf
from runtime.parameters import PlacementParameters, SamplingParameters
from runtime.request import Placement
from runtime.result import Stopwatch
from runtime.sampling.conditions import Conditions
from runtime.validation import Abilities, Limits


@dataclass(frozen=True, eq=False)
class Model:
    """A bundle at work."""

    bundle: Bundle
    engine: Engine
    constants: Mapping[str, NDArray[np.float32]]
    """The arrays of constants.npz."""
    cache_bytes: int
    """Memory for tensors that are kept for later pictures."""
    control_window: int
    """Sampling steps that a window graph computes in one call."""

    def constant(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Returns a constant that the system needs.

        Raises:
            BundleError: the bundle has none of that shape, in float32.
        """
        found = self.constants.get(name)
        if found is None or found.shape != shape or found.dtype != np.float32:
            raise BundleError(f"the bundle at '{self.bundle.path}' has no constant '{name}' {shape} float32")
        return found


@dataclass(frozen=True, eq=False, kw_only=True)
class Prepared:
    """A placement in its scene, ready for the networks. What else it holds is the system's own."""

    region: Box
    """The only part of the scene that it may change."""
    share_of: ShareOf | None = None
    """Of what is drawn, if it does not cover all of the region."""
    tiles: Sequence[Prepared] = ()
    """The tiles of its place, which are drawn after it."""
    start: NDArray[np.float32] | None = None
    """(3, H, W) RGB -1..1: the networks' picture that sampling starts from; None starts from noise."""
    is_tile: bool = False
    """Whether it is a part of a placement that was drawn before."""


class System(Protocol):
    """One compositing system with its model. `prepare`, `renew` and `finish` may run in any thread."""

    abilities: Abilities
    """What the models support; `runtime.validation.check_usable` refuses everything else."""
    defaults: Mapping[str, Any]
    """Parameter -> value, for what neither the request nor the manifest says; see `runtime.parameters`."""

    def prepare(
        self,
        scene: NDArray[np.uint8],
        placement: Placement,
        parameters: PlacementParameters,
        limits: Limits,
        watch: Stopwatch,
    ) -> Prepared:
        """Decodes, checks and prepares a placement. Uses no engine.

        Args:
            scene: (H, W, 3) RGB.
            placement: as the caller gave it.
            parameters: its parameters, with nothing left open.
            limits: what a request may ask for.
            watch: counts the stages read and prepare.

        Raises:
            InputError: something about the placement cannot be used by this model, in one sentence.
        """

    def renew(self, prepared: Any, scene: NDArray[np.uint8], watch: Stopwatch) -> Prepared:
        """Returns the same placement in another scene of the same size: that with the objects placed
        before."""

    def conditions(
        self, prepared: Any, sampling: SamplingParameters, schedule: Schedule, watch: Stopwatch
    ) -> Conditions:
        """Returns the conditions that the samples of a placement share. Runs the condition graphs, on the
        engine's thread. What is kept for later pictures is kept for `runtime.sampling.conditions.OWNER`."""

    def finish(
        self, picture: NDArray[np.uint8], scene: NDArray[np.uint8], prepared: Any
    ) -> NDArray[np.uint8]:
        """Returns the result: a copy of the scene, (H, W, 3), with the networks' picture, RGB, at its
        place."""

    def kept_bytes(self) -> int:
        """Returns memory of tensors that are kept for later pictures."""

    def clear(self) -> None:
        """Drops what is kept for later pictures."""
