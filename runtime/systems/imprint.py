"""IMPRINT, and ObjectStitch: tokens of the reference say what is drawn inside a mask of the scene.

Without a reference the scene goes on inside the mask. Sources: IMPRINT (Song et al., 2024), section 3.2;
ObjectStitch (Song et al., 2023). The authors of the first have published no code, so what its paper does not
say is chosen here; docs/systems.md lists it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.diffusion.presets import EXACT
from runtime.errors import InputError, in_field
from runtime.imaging.reference import load_reference, prepare_reference
from runtime.parameters import PlacementParameters
from runtime.request import Placement
from runtime.result import Stopwatch
from runtime.sampling.reference_tokens import ReferenceTokens
from runtime.sampling.remembered import Remembered
from runtime.systems.inpainting import Inpainting
from runtime.systems.system import Model
from runtime.validation import Abilities, Limits

ID_ENCODER = "id_encoder"

DEFAULTS: Mapping[str, Any] = {
    "steps": 50,
    "guidance_scale": 3.0,
    "eta": 0.0,
    "sampler": "ddim",
    "guidance_interval": (0, 999),
    "timesteps": None,
    "mode": "keep_background",
    "mask_level": "exact",
    "reference_ratio": 1.2,
    "box_ratio": 1.1,
    "crop_ratio": 2.0,
}
"""The guidance scale is that of ObjectStitch's paper; the ratios are those of AnyDoor."""

ABILITIES = Abilities("IMPRINT", "reference", DEFAULTS, [EXACT], fills=True)

Reference = NDArray[np.uint8] | None
"""(S, S, 3) RGB on white; None if there is nothing to draw but the scene."""


class Imprint(Inpainting[Reference]):
    """The system with a model; see `runtime.systems.system.System`."""

    abilities = ABILITIES
    defaults = DEFAULTS

    def __init__(self, model: Model) -> None:
        """Looks up what the model has.

        Raises:
            BundleError: a graph or a constant is missing.
        """
        super().__init__(model, ID_ENCODER)
        spec, sizes = model.bundle.manifest.specs[ID_ENCODER], model.bundle.manifest.typical_sizes
        self._tokens = ReferenceTokens(model.engine, spec, sizes)
        self._no_reference = model.constant("unconditional_tokens", self._tokens.shape)

    def read(
        self, placement: Placement, parameters: PlacementParameters, limits: Limits, watch: Stopwatch
    ) -> Reference:
        """Cuts the object out of the reference.

        Raises:
            InputError: the reference cannot be used.
        """
        if placement.reference is None:
            with in_field("reference_mask"):
                if placement.reference_mask is not None:
                    raise InputError("a reference mask is given, and no reference: give both, or neither")
            return None
        with watch.measure("read"):
            picture, mask = load_reference(
                placement.reference, placement.reference_mask, limits.pixels, placement.keep_specks
            )
        with watch.measure("prepare"):
            return prepare_reference(picture, mask, parameters.ratios.reference, self._tokens.side).image

    def tokens(self, what: Reference, watch: Stopwatch) -> NDArray[np.float32]:
        """The reference's, (1, T, D)."""
        return self._no_reference if what is None else self._tokens.of(what, watch)

    def unconditional_tokens(self, what: Reference, watch: Stopwatch) -> NDArray[np.float32]:
        """Those of no reference; there is nothing to lead away from where there is none."""
        return self._no_reference[: what is not None]

    @property
    def kept_tokens(self) -> Remembered[Any, Any]:
        """Tokens that are remembered."""
        return self._tokens.kept


def create(model: Model) -> Imprint:
    """The system at work with a model."""
    return Imprint(model)
